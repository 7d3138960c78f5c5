"""The space of schedules: what a genome, its text and its schedule have to do with each other."""

import numpy as np
import pytest

from ddsm_tf.cost import cost_fraction, schedule_cost
from ddsm_tf.errors import InputError
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.search import ScheduleSpace
from ddsm_tf.search.space import SKIP

WIDTHS = (1.0, 0.75, 0.5, 0.25)
COSTS = {1.0: 16.0, 0.75: 9.0, 0.5: 4.0, 0.25: 1.0}


def make_space(segments=5, steps=10, widths=WIDTHS, *, skips=False):
    base = StepSchedule.uniform(1.0, even_timesteps(1000, steps))
    return ScheduleSpace(base, widths, segments, skips=skips)


def test_a_genome_is_a_schedule_and_a_text():
    space = make_space(segments=3, steps=7)
    schedule = space.schedule((0, 2, 3))
    assert schedule.widths == (1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25)
    assert schedule.timesteps == even_timesteps(1000, 7)
    assert space.to_text((0, 2, 3)) == "023"
    assert space.from_text("023") == (0, 2, 3)
    assert space.uniform(0.25) == (3, 3, 3)
    assert space.size == 64


@pytest.mark.parametrize("skips", [False, True])
def test_every_genome_has_a_text_and_a_schedule_of_its_own(skips):
    space = make_space(segments=3, steps=7, skips=skips)
    genomes = list(space.genomes())
    assert len(genomes) == len(set(genomes)) == space.size == (124 if skips else 64)
    assert genomes[0] == (0, 0, 0)
    assert [space.from_text(space.to_text(genome)) for genome in genomes] == genomes
    assert len({space.schedule(genome) for genome in genomes}) == space.size


def test_widths_are_told_apart_by_digits_and_then_letters():
    widths = [k / 35 for k in range(1, 36)]
    space = make_space(segments=3, widths=widths)
    # Widest first, whatever the order they come in.
    assert space.widths == tuple(reversed(widths))
    assert space.to_text((9, 10, 34)) == "9ay"
    assert space.from_text("9ay") == (9, 10, 34)
    with pytest.raises(InputError, match="must be 1 to 35 widths"):
        make_space(widths=[k / 36 for k in range(1, 37)])


def test_as_many_widths_as_there_can_be_leave_a_digit_to_skip():
    space = make_space(segments=2, widths=[k / 35 for k in range(1, 36)], skips=True)
    assert space.from_text("z0") == (35, 0)
    assert len(space.schedule((35, 0))) == 5


def test_steps_that_do_not_divide_evenly_make_the_first_segments_longer():
    space = make_space(segments=4, steps=10)
    assert space.segment_lengths == (3, 3, 2, 2)
    assert space.schedule((0, 1, 2, 3)).segments() == [(1.0, 3), (0.75, 3), (0.5, 2), (0.25, 2)]
    assert space.branch_timesteps == {900, 600, 300, 100}


@pytest.mark.parametrize("skips", [False, True])
def test_schedules_part_at_branch_timesteps(skips):
    space = make_space(segments=3, steps=7, skips=skips)
    schedules = [space.schedule(genome) for genome in space.genomes()]
    # A step leads elsewhere if its width differs, or the timestep that follows.
    steps = [
        list(zip(s.timesteps, s.widths, (*s.timesteps[1:], None), strict=True)) for s in schedules
    ]
    parted = set()
    for one in steps:
        for other in steps:
            differ = [a[0] for a, b in zip(one, other, strict=False) if a != b and a[0] == b[0]]
            parted.update(differ[:1])
    assert parted == space.branch_timesteps
    assert len(parted) == (5 if skips else 3)


def test_there_are_never_more_segments_than_steps():
    space = make_space(segments=10, steps=4)
    assert space.segments == 4
    assert space.segment_lengths == (1, 1, 1, 1)


def test_skipped_segments_leave_their_steps_out():
    steps = StepSchedule.uniform(1.0, even_timesteps(1000, 7), eta=0.5)
    space = ScheduleSpace(steps, WIDTHS, 3, skips=True)
    assert space.skips and space.choices == (*WIDTHS, SKIP)
    schedule = space.schedule((4, 1, 4))
    assert schedule.timesteps == steps.timesteps[3:5]
    assert schedule.widths == (0.75, 0.75)
    assert schedule.eta == 0.5
    assert space.to_text((4, 1, 4)) == "414"


def test_a_schedule_without_steps_is_none():
    space = make_space(segments=3, skips=True)
    assert not space.is_schedule((4, 4, 4)) and space.is_schedule((4, 4, 3))
    assert (4, 4, 4) not in set(space.genomes())
    with pytest.raises(InputError, match="schedule"):
        space.from_text("444")
    assert not make_space().skips


@pytest.mark.parametrize("text", ["", "01", "0123", "014", "0x1", "0-1", "0 1", "01A"])
def test_a_broken_genome_is_refused(text):
    with pytest.raises(InputError, match="must be 3 digits below 4"):
        make_space(segments=3).from_text(text)


def test_no_segments_and_no_widths_are_refused():
    with pytest.raises(InputError, match="segments"):
        make_space(segments=0)
    with pytest.raises(InputError, match="widths"):
        make_space(widths=())


def test_a_ramp_switches_once():
    space = make_space(segments=4)
    assert space.ramp(0.25, 1.0, 1) == (3, 0, 0, 0)
    assert space.ramp(0.75, 0.5, 3) == (1, 1, 1, 2)
    assert space.ramp(0.75, 0.5, 0) == space.uniform(0.5)
    assert space.ramp(0.75, 0.5, 4) == space.uniform(0.75)


def test_a_width_that_the_space_lacks_is_refused():
    space = make_space()
    assert [space.index(width) for width in WIDTHS] == [0, 1, 2, 3]
    for width in (0.3, SKIP):
        with pytest.raises(InputError, match="must be one of"):
            space.index(width)
    assert make_space(skips=True).index(SKIP) == 4


@pytest.mark.parametrize("costs", [COSTS, {1.0: 5.0, 0.75: 6.0, 0.5: 2.0, 0.25: 3.0}])
def test_relative_costs_are_those_of_the_schedules(costs):
    # Segments of 3, 2 and 2 steps, so that a segment's length shows.
    space = make_space(segments=3, steps=7, skips=True)
    genomes = list(space.genomes())
    expected = [schedule_cost(space.schedule(g), costs) / (7 * costs[1.0]) for g in genomes]
    assert space.relative_costs(np.array(genomes), costs) == pytest.approx(expected)


def test_a_width_without_a_cost_is_not_free():
    costs = {width: cost for width, cost in COSTS.items() if width != 0.5}
    with pytest.raises(KeyError, match=r"0\.5"):
        make_space().relative_costs(np.zeros((1, 5), int), costs)


def guided_space(segments=3, steps=7, sampler="ddim"):
    base = StepSchedule.uniform(
        1.0, even_timesteps(1000, steps), sampler=sampler, guidance_scale=3.0
    )
    return ScheduleSpace(base, (1.0, 0.5, 0.25), segments, free_guidance=True)


def test_second_half_of_a_genome_is_the_unconditional_branch():
    space = guided_space()
    assert (space.parts, space.segments, space.size) == (3, 6, 3**6)
    schedule = space.schedule((0, 1, 2, 2, 0, 1))
    assert schedule.widths == (1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25)
    assert schedule.guidance_widths == (0.25, 0.25, 0.25, 1.0, 1.0, 0.5, 0.5)
    assert space.schedule((1,) * 6).guidance_widths is None
    assert space.from_text(space.to_text((0, 1, 2, 2, 0, 1))) == (0, 1, 2, 2, 0, 1)
    assert space.ramp(1.0, 0.25, 1) == (0, 2, 2, 0, 2, 2)
    assert (
        space.branch_timesteps == ScheduleSpace(space.steps, (1.0, 0.5, 0.25), 3).branch_timesteps
    )


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
@pytest.mark.parametrize("free", [True, False])
def test_relative_costs_count_both_branches_and_heun(sampler, free):
    space = guided_space(sampler=sampler)
    if not free:
        space = ScheduleSpace(space.steps, (1.0, 0.5, 0.25), 3)
    costs = {1.0: 10.0, 0.5: 3.0, 0.25: 1.0}
    genomes = [g for index, g in enumerate(space.genomes()) if index % 7 == 0]
    expected = [cost_fraction(space.schedule(genome), costs) for genome in genomes]
    np.testing.assert_allclose(space.relative_costs(np.array(genomes), costs), expected, rtol=1e-12)


def test_free_guidance_needs_guided_steps():
    base = StepSchedule.uniform(1.0, even_timesteps(1000, 4))
    with pytest.raises(InputError, match="free_guidance"):
        ScheduleSpace(base, (1.0, 0.5), 2, free_guidance=True)
