"""Sampling with a memory: the same images for fewer calls, and every call counted."""

import random
from collections import Counter

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import sample_images
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.search import ScheduleEvaluator, ScheduleSpace
from ddsm_tf.search.prefix import PrefixSampler

TABLE = NoiseTable.linear(1000)
SHAPE = (3, 2, 1)
STATE = 4 * 3 * 2 * 1  # bytes of one image in float32
TIMESTEPS = (800, 600, 400, 200, 0)


def schedule(widths, timesteps=TIMESTEPS, **options):
    return StepSchedule(timesteps, widths, **options)


# Those beside the first say what they share with it or an earlier one.
SCHEDULES = {
    "first": schedule((1.0, 1.0, 0.5, 0.5, 0.5)),
    "three steps": schedule((1.0, 1.0, 0.5, 1.0, 1.0)),
    "none": schedule((0.5, 1.0, 0.5, 0.5, 0.5)),
    "all": schedule((1.0, 1.0, 0.5, 0.5, 0.5)),
    # Without t = 400 its second step leads elsewhere.
    "one, skips": schedule((1.0, 1.0, 0.5, 0.5), (800, 600, 200, 0)),
    "two of the skipping one": schedule((1.0, 1.0, 1.0, 1.0), (800, 600, 200, 0)),
    # The same widths from another first timestep.
    "none, starts later": schedule((1.0, 0.5, 0.5, 0.5), (600, 400, 200, 0)),
}


class Network:
    """Some network: its output depends on every argument. It keeps what it was asked."""

    def __init__(self):
        self.calls = Counter()
        self.last = []

    def __call__(self, x, t, width):
        self.calls[width] += len(x)
        if t == 0:
            self.last.append(x.copy())
        # Most of x is noise, or clipping would make all images alike.
        return np.float32(1.0 - 0.04 * width) * x + np.float32(t * 1e-5) * x * x


def make_sampler(network=None, batch_size=10, **options):
    return PrefixSampler(network or Network(), TABLE, SHAPE, batch_size=batch_size, **options)


def reused_steps(sampler, schedule, count=1, seed=0):
    """How many steps were not computed for each image; all others must have been."""
    before = sampler.calls.copy(), sampler.reused_calls.copy(), sampler.denoise.calls.copy()
    sampler(schedule, count, seed)
    calls, reused = sampler.calls - before[0], sampler.reused_calls - before[1]
    assert calls == sampler.denoise.calls - before[2]
    assert calls + reused == Counter(np.repeat(schedule.widths, count).tolist())
    steps = reused.total() // count
    assert reused == Counter(np.repeat(schedule.widths[:steps], count).tolist())
    return steps


@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.5}, {"eta": 1.0}, {"sampler": "ddpm"}],
    ids=lambda options: "-".join(map(str, options.values())) or "ddim",
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_images_are_those_of_plain_sampling_to_the_last_bit(options, shuffled):
    some = [schedule(s.widths, s.timesteps, **options) for s in SCHEDULES.values()]
    if shuffled:
        random.Random(0).shuffle(some)
    network = Network()
    sampler = make_sampler(network, batch_size=3)
    different = set()
    for one in some:
        plain = Network()
        expected = sample_images(plain, one, TABLE, SHAPE, 7, seed=2, batch_size=3)
        network.last.clear()
        found = sampler(one, 7, 2)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)
        different.add(found.tobytes())
        # uint8 hides small differences; the state before the last step does not.
        assert [len(x) for x in network.last] == [3, 3, 1]
        for x, wanted in zip(network.last, plain.last, strict=True):
            np.testing.assert_array_equal(x, wanted, strict=True)
    # "all" is "first" again.
    assert len(different) == len(some) - 1
    assert bool(sampler.reused_calls) == (options == {})


@pytest.mark.parametrize("sampler_name", ["ddim", "euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("longest_first", [False, True])
def test_a_schedule_that_ends_early_leaves_states_for_those_that_go_on(sampler_name, longest_first):
    widths = (1.0, 1.0, 0.5, 0.5, 0.5)
    some = [schedule(widths[:n], TIMESTEPS[:n], sampler=sampler_name) for n in (3, 4, 5)]
    sampler = make_sampler(batch_size=3)
    for one in reversed(some) if longest_first else some:
        expected = sample_images(Network(), one, TABLE, SHAPE, 7, seed=2, batch_size=3)
        np.testing.assert_array_equal(sampler(one, 7, 2), expected)
    assert sampler.reused_calls


def test_what_is_reused_is_the_common_beginning():
    sampler = make_sampler()
    found = {name: reused_steps(sampler, one) for name, one in SCHEDULES.items()}
    assert found == {
        "first": 0,
        "three steps": 3,
        "none": 0,
        "all": 4,  # the last step ends in no state that is kept
        "one, skips": 1,
        "two of the skipping one": 2,
        "none, starts later": 0,
    }
    assert sampler.reused_calls == {1.0: 2 + 2 + 1 + 2, 0.5: 1 + 2}
    assert sampler.calls.total() == 5 * 4 + 4 * 3 - 10


def test_states_are_kept_before_branch_timesteps_only():
    sampler = make_sampler(branch_timesteps={400})
    found = {name: reused_steps(sampler, one) for name, one in SCHEDULES.items()}
    assert found == {
        "first": 0,
        "three steps": 2,
        "none": 0,
        "all": 2,
        "one, skips": 0,
        "two of the skipping one": 0,
        "none, starts later": 0,
    }


@pytest.mark.parametrize("skips", [False, True])
def test_the_branch_timesteps_of_a_space_do_for_its_schedules(skips):
    base = StepSchedule.uniform(1.0, even_timesteps(1000, 7))
    space = ScheduleSpace(base, (1.0, 0.5) if skips else (1.0, 0.5, 0.25), 3, skips=skips)
    genomes = list(space.genomes())
    random.Random(1).shuffle(genomes)
    everywhere = make_sampler()
    at_branches = make_sampler(branch_timesteps=space.branch_timesteps)
    for genome in genomes:
        one = space.schedule(genome)
        np.testing.assert_array_equal(at_branches(one, 2, 0), everywhere(one, 2, 0))
    assert len(at_branches._states) < len(everywhere._states)
    assert at_branches.reused_calls == everywhere.reused_calls
    if not skips:
        # Two images; segments of 3, 2 and 2 steps. Of 27 schedules 18 find both segments before the
        # last one known. Of the 9 others 6 find the first one known.
        assert everywhere.reused_calls.total() == 2 * (18 * 5 + 6 * 3)


@pytest.mark.parametrize("max_bytes", [0, 4 * STATE - 1])
def test_no_memory_reuses_nothing(max_bytes):
    sampler = make_sampler(max_bytes=max_bytes)
    assert [reused_steps(sampler, one, count=4) for one in SCHEDULES.values()] == [0] * 7
    assert not sampler._states


def two_steps(width):
    return schedule((width, 1.0), (500, 0))


def test_the_least_recently_used_state_makes_room():
    # Room for the states of two batches of four images; each schedule keeps one.
    sampler = make_sampler(max_bytes=2 * 4 * STATE)
    order = (1.0, 0.5, 1.0, 0.25, 1.0, 0.5, 0.25, 1.0)
    found = [reused_steps(sampler, two_steps(width), count=4) for width in order]
    # 0.25 replaces 0.5, which was not used after 1.0 was; 0.5 then replaces 0.25, and so on.
    assert found == [0, 0, 1, 0, 1, 0, 0, 0]
    held = sum(x.nbytes for x, _ in sampler._states.values())
    assert held == sampler._bytes == 2 * 4 * STATE


def test_a_state_that_is_too_large_drives_out_no_other():
    sampler = make_sampler(max_bytes=2 * STATE)
    assert reused_steps(sampler, two_steps(1.0), count=2) == 0
    assert reused_steps(sampler, two_steps(1.0), count=3) == 0
    assert reused_steps(sampler, two_steps(1.0), count=2) == 1


def test_a_long_trajectory_never_takes_more_than_its_room():
    sampler = make_sampler(max_bytes=3 * STATE)
    # Four states, of which the first makes room.
    assert reused_steps(sampler, SCHEDULES["first"]) == 0
    assert sampler._bytes == 3 * STATE
    assert reused_steps(sampler, schedule((1.0, 0.5, 0.5, 0.5, 0.5))) == 0
    sampler = make_sampler(max_bytes=3 * STATE)
    reused_steps(sampler, SCHEDULES["first"])
    assert reused_steps(sampler, schedule((1.0, 1.0, 1.0, 0.5, 0.5))) == 2


def test_other_seeds_and_batches_are_other_states():
    sampler = make_sampler(batch_size=3)
    one = SCHEDULES["first"]
    sampler(one, 3, 0)
    assert reused_steps(sampler, one, 3, seed=1) == 0
    assert reused_steps(sampler, one, 3, seed=0) == 4
    # Images 0 to 2 are a known batch, 3 and 4 are not.
    sampler(one, 5, 0)
    assert sampler.reused_calls.total() == 4 * 3 + 4 * 3
    # A batch of two is none of three.
    assert reused_steps(sampler, one, 2) == 0
    for count, seed in ((2, 0), (3, 0), (5, 0), (3, 1)):
        expected = sample_images(Network(), one, TABLE, SHAPE, count, seed=seed, batch_size=3)
        np.testing.assert_array_equal(sampler(one, count, seed), expected)


@pytest.mark.parametrize("options", [{"eta": 0.2}, {"sampler": "ddpm"}])
def test_fresh_noise_is_never_reused(options):
    sampler = make_sampler()
    noisy = schedule(SCHEDULES["first"].widths, **options)
    assert [reused_steps(sampler, noisy, count=2) for _ in range(2)] == [0, 0]
    # Nor is a deterministic state taken for a noisy one.
    reused_steps(sampler, SCHEDULES["first"], count=2)
    assert reused_steps(sampler, noisy, count=2) == 0


def test_output_that_is_not_a_number_is_refused():
    sampler = make_sampler(lambda x, t, width: np.where(t == 0, np.float32(np.nan), 0.0) * x)
    with pytest.raises(InputError, match="NaN or infinity"):
        sampler(SCHEDULES["first"], 2, 0)


def test_a_schedule_of_another_table_and_negative_memory_are_refused():
    with pytest.raises(InputError, match=r"train_timesteps.* 1000"):
        make_sampler()(schedule((1.0, 1.0), (50, 0), train_timesteps=100), 1, 0)
    with pytest.raises(InputError, match=r"`max_bytes` \(=-1\)"):
        make_sampler(max_bytes=-1)


MACS = {1.0: 16.0, 0.5: 4.0}


def make_evaluator(distance=lambda images: 7.5, **options):
    options = {"images": 6, "batch_size": 4, **options}
    full = StepSchedule.uniform(1.0, even_timesteps(1000, 5))
    return ScheduleEvaluator(Network(), TABLE, SHAPE, distance, MACS, full, **options)


def test_costs_and_calls_of_a_schedule_are_exact():
    evaluate = make_evaluator(cost={1.0: 3.0, 0.5: 2.0}, seconds={1.0: 0.25, 0.5: 0.125})
    # One of five steps is left out: 16 + 16 + 4 + 4 of 80 MACs.
    result = evaluate(SCHEDULES["one, skips"])
    assert result == {
        "distance": 7.5,
        "cost": 3.0 + 3.0 + 2.0 + 2.0,
        "macs": 40.0,
        "macs_fraction": 0.5,
        "seconds": 0.75,
        "calls": 24.0,
        "reused_calls": 0.0,
        "full_calls": 12 + 12 / 4,
        "reused_full_calls": 0.0,
    }
    # Three steps of six images known, one of them at the half width; two at full width are not.
    evaluate(SCHEDULES["first"])
    result = evaluate(SCHEDULES["three steps"])
    assert (result["calls"], result["reused_calls"]) == (12.0, 18.0)
    assert (result["full_calls"], result["reused_full_calls"]) == (12.0, 12 + 6 / 4)
    assert evaluate.sampler.denoise.calls.total() == 24 + (30 - 6) + 12


def test_the_cost_is_macs_and_seconds_are_zero_where_none_were_measured():
    result = make_evaluator()(SCHEDULES["first"])
    assert result["cost"] == result["macs"] == 2 * 16.0 + 3 * 4.0
    assert result["macs_fraction"] == 44 / 80
    assert result["seconds"] == 0.0


def test_the_distance_is_of_the_sampled_images():
    seen = []

    def distance(images):
        seen.append(images)
        return float(images.mean())

    evaluate = make_evaluator(distance)
    results = [evaluate(SCHEDULES["first"], 3), evaluate(SCHEDULES["first"], 3, images=9)]
    for images, count, result in zip(seen, (6, 9), results, strict=True):
        one = SCHEDULES["first"]
        expected = sample_images(Network(), one, TABLE, SHAPE, count, seed=3, batch_size=4)
        np.testing.assert_array_equal(images, expected)
        assert result["distance"] == float(expected.mean())
    # Of nine images the first four are a known batch; the fifth and sixth are in another now.
    assert (results[1]["calls"], results[1]["reused_calls"]) == (9 * 5 - 16.0, 16.0)


def test_memory_changes_nothing_but_the_calls():
    with_memory, without = make_evaluator(), make_evaluator(max_bytes=0)
    for one in SCHEDULES.values():
        some, other = with_memory(one, 1), without(one, 1)
        assert other["reused_calls"] == 0.0
        for name in ("calls", "full_calls"):
            assert some[name] + some[f"reused_{name}"] == other[name]
        for name in ("distance", "cost", "macs", "macs_fraction"):
            assert some[name] == other[name]
    assert with_memory.sampler.calls.total() < without.sampler.calls.total()
    branching = make_evaluator(branch_timesteps={400})
    branching(SCHEDULES["first"])
    assert branching(SCHEDULES["three steps"])["reused_calls"] == 6 * 2
