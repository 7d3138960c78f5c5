"""Calibration samples: which timesteps a width gets, and that they are the sampler's own states."""

from collections import Counter

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.export.calibration import (
    TRAJECTORIES,
    calibration_samples,
    own_timesteps,
    samples_of_all,
)
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import network_calls, step_coefficients
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.seeds import ImageNoise

TABLE = NoiseTable.linear(1000)
SHAPE = (4, 4, 1)
# 950 … 700 narrow, 650 … 300 wide, 250 … 0 narrow again.
SCHEDULE = StepSchedule(even_timesteps(1000, 20), (0.5,) * 6 + (1.0,) * 8 + (0.5,) * 6)
NARROW = (950, 900, 850, 800, 750, 700, 250, 200, 150, 100, 50, 0)
WIDE = (650, 600, 550, 500, 450, 400, 350, 300)


def shrink(x, t, width):
    """A stand-in for a network, whose output tells t and the width."""
    return (0.2 + t / 2000 + 0.1 * width) * x


def samples(schedule=SCHEDULE, widths=(1.0, 0.5, 0.25), **options):
    return calibration_samples(shrink, schedule, TABLE, SHAPE, widths, **options)


def test_a_width_is_calibrated_on_its_own_share_of_the_schedule():
    calls = network_calls(SCHEDULE, TABLE)
    assert own_timesteps(calls, 1.0) == WIDE
    assert own_timesteps(calls, 0.5) == NARROW
    found = samples(count=100)
    counts = {width: Counter(found[width].t.tolist()) for width in found}
    assert set(counts[1.0]) == set(WIDE) and set(counts[1.0].values()) == {12, 13}
    assert set(counts[0.5]) == set(NARROW) and set(counts[0.5].values()) == {8, 9}
    assert all(len(found[width].t) == 100 for width in found)


def test_a_width_that_never_runs_is_calibrated_on_all_timesteps():
    found = samples(count=100)[0.25]
    assert Counter(found.t.tolist()) == dict.fromkeys(SCHEDULE.timesteps, 5)


def test_fewer_samples_than_timesteps_are_spread_evenly():
    found = samples(StepSchedule.uniform(1.0, even_timesteps(1000, 1000)), (1.0,), count=10)
    assert sorted(found[1.0].t.tolist()) == [99 + 100 * i for i in range(10)]


def test_a_short_share_gives_each_trajectory_once():
    schedule = StepSchedule((900, 500, 0), (0.5, 1.0, 0.5))
    found = samples(schedule, count=1000)
    assert len(found[1.0].t) == TRAJECTORIES
    assert len(np.unique(found[1.0].x.reshape(TRAJECTORIES, -1), axis=0)) == TRAJECTORIES
    assert Counter(found[0.5].t.tolist()) == {900.0: TRAJECTORIES, 0.0: TRAJECTORIES}


def test_samples_are_states_of_real_trajectories():
    x = ImageNoise(3, 0, TRAJECTORIES, SHAPE).draw()
    states = {}
    rows = step_coefficients(SCHEDULE, TABLE)
    for t, width, row in zip(SCHEDULE.timesteps, SCHEDULE.widths, rows, strict=True):
        states[t] = x
        x0 = np.clip(row.x0_from_x * x + row.x0_from_model * shrink(x, t, width), -1, 1)
        x = row.x_from_x0 * x0 + row.x_from_x * x
    for found in samples(seed=3, count=60).values():
        assert found.x.dtype == found.t.dtype == np.float32
        for state, t in zip(found.x, found.t, strict=True):
            nearest = np.abs(states[int(t)] - state).max(axis=(1, 2, 3)).min()
            assert nearest < 1e-5


def test_a_seed_fixes_samples_and_their_order():
    first, again, other = samples(seed=1)[0.5], samples(seed=1)[0.5], samples(seed=2)[0.5]
    np.testing.assert_array_equal(first.x, again.x)
    np.testing.assert_array_equal(first.t, again.t)
    assert not np.array_equal(first.t, other.t)
    assert not np.isin(first.x[first.t == 950], other.x[other.t == 950]).any()


def test_every_batch_holds_timesteps_of_the_whole_share():
    t = samples(StepSchedule.uniform(1.0, even_timesteps(1000, 50)), (1.0,))[1.0].t
    spread = [np.ptp(t[first : first + 16]) for first in range(0, len(t), 16)]
    assert min(spread) > 500


def test_of_several_schedules_each_width_gets_those_that_run_it():
    full = SCHEDULE.with_widths([1.0] * 20)
    found = samples_of_all(shrink, [SCHEDULE, full], TABLE, SHAPE, (1.0, 0.5, 0.25))
    assert set(found[0.5].t) == set(NARROW) and len(found[0.5].t) == 12 * TRAJECTORIES
    # All of its own share, and again along the trajectories at full width.
    wide = Counter(found[1.0].t.tolist())
    assert set(wide) == set(SCHEDULE.timesteps) and len(found[1.0].t) == 8 * TRAJECTORIES + 192
    assert min(wide[t] for t in WIDE) == TRAJECTORIES + 9 and max(wide[t] for t in NARROW) == 10
    np.testing.assert_array_equal(found[0.25].t, samples()[0.25].t)


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match=r"`count` \(=0\) must be at least 1"):
        samples(count=0)
    with pytest.raises(InputError, match="train_timesteps"):
        calibration_samples(shrink, SCHEDULE, NoiseTable.linear(10), SHAPE, (1.0,))
