"""The surrogate: how well it predicts distances of schedules that were never tried."""

import numpy as np
import pytest
from test_space import make_space

from ddsm_tf.search.generations import random_genome
from ddsm_tf.search.space import SKIP
from ddsm_tf.search.surrogate import PARTS, Surrogate

HELD_OUT = 200


def contributions(space):
    """To the log-distance, (segments, choices): width lost hurts, twelve times more at the end."""
    weights = np.linspace(0.05, 0.6, space.segments) * 10 / space.segments
    lost = np.array([1.25 if choice == SKIP else 1.0 - choice for choice in space.choices])
    return weights[:, None] * lost**1.5


def rough_contributions(space, seed=0):
    """Without any order along the trajectory or the widths."""
    table = np.random.default_rng(seed).random((space.segments, len(space.choices)))
    return table * 3.0 / space.segments


def distances_of(table, genomes):
    return np.exp(1.0 + table[np.arange(len(table)), genomes].sum(axis=1))


def draw(space, count, seed):
    """Different genomes, (count, segments)."""
    random, genomes = np.random.default_rng(seed), {}
    while len(genomes) < count:
        genome = random_genome(space, random)
        if space.is_schedule(genome):
            genomes[genome] = None
    return np.array(list(genomes))


def rank_correlation(first, second):
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return np.corrcoef(*ranks)[0, 1]


def quality(space, table, trials, seed=0, proxy=None):
    """Error of the log-distance of held-out genomes, relative to its spread; rank correlation."""
    genomes = draw(space, trials + HELD_OUT, seed)
    distances = distances_of(table, genomes)
    predict = Surrogate(space, genomes[:trials], distances[:trials], proxy)
    predicted, true = predict(genomes[trials:]), distances[trials:]
    errors = np.log(predicted) - np.log(true)
    return np.sqrt(np.mean(errors**2)) / np.log(true).std(), rank_correlation(predicted, true)


def mean_error(space, table, trials, proxy=None, seeds=8):
    return np.mean([quality(space, table, trials, seed, proxy)[0] for seed in range(seeds)])


def test_a_few_dozen_trials_predict_the_others():
    space = make_space(segments=10, steps=50)
    for seed in range(5):
        error, correlation = quality(space, contributions(space), 24, seed)
        assert error < 0.06 and correlation > 0.99
        # What lies in no order is harder.
        error, correlation = quality(space, rough_contributions(space, seed), 60, seed)
        assert error < 0.05 and correlation > 0.99


@pytest.mark.parametrize("table", [contributions, rough_contributions])
def test_an_additive_distance_is_recovered_exactly_in_the_end(table):
    space = make_space(segments=10, steps=50)
    errors = [quality(space, table(space), trials)[0] for trials in (12, 40, 120)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01


def test_predictions_pass_through_the_trials():
    space = make_space(segments=10, steps=50)
    genomes = draw(space, 24, 0)
    distances = distances_of(contributions(space), genomes)
    assert Surrogate(space, genomes, distances)(genomes) == pytest.approx(distances, rel=0.02)


def test_distances_in_another_unit_give_predictions_in_that_unit():
    space = make_space(segments=10, steps=50)
    genomes = draw(space, 40, 0)
    distances = distances_of(contributions(space), genomes)
    once = Surrogate(space, genomes[:20], distances[:20])(genomes)
    again = Surrogate(space, genomes[:20], 1000.0 * distances[:20])(genomes)
    assert again == pytest.approx(1000.0 * once, rel=1e-6)


def test_a_good_proxy_helps_and_a_useless_one_does_no_harm():
    space = make_space(segments=10, steps=50)
    table = contributions(space)
    useless = np.random.default_rng(1).random(table.shape)
    for trials in (8, 12):
        without = mean_error(space, table, trials)
        # Its unit does not matter.
        assert mean_error(space, table, trials, proxy=1e-4 * table) < 0.8 * without
        assert mean_error(space, table, trials, proxy=useless) < 1.4 * without
    assert mean_error(space, table, 12, proxy=table) < 0.4 * mean_error(space, table, 12)


@pytest.mark.parametrize("widths", [(1.0,), (1.0, 0.5)])
def test_a_proxy_that_says_nothing_at_all_changes_nothing(widths):
    # A network of one width has such a proxy, and one whose widths are all as good.
    space = make_space(segments=4, widths=widths)
    genomes = np.array([[0, 0, 0, 0], [0, 0, 0, len(widths) - 1]])
    predictions = [
        Surrogate(space, genomes, np.array([2.0, 3.0]), proxy)(genomes)
        for proxy in (None, np.zeros((4, len(widths))))
    ]
    assert np.isfinite(predictions).all()
    assert predictions[1] == pytest.approx(predictions[0])


def test_more_segments_than_parts_and_of_unequal_length_are_predicted():
    # 64 segments of 100 steps: of two steps and of one, in parts of three segments and of two.
    space = make_space(segments=64, steps=100)
    assert space.segments > PARTS and set(space.segment_lengths) == {1, 2}
    table = contributions(space) * np.array(space.segment_lengths)[:, None]
    error, correlation = quality(space, table, 40)
    assert error < 0.08 and correlation > 0.99


def test_skips_are_predicted():
    space = make_space(segments=10, steps=50, skips=True)
    error, correlation = quality(space, contributions(space), 30)
    assert error < 0.06 and correlation > 0.99


def test_predictions_average_over_noise():
    space = make_space(segments=10, steps=50)
    genomes = draw(space, 60 + HELD_OUT, 0)
    true = distances_of(contributions(space), genomes)
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(60))
    predict = Surrogate(space, genomes[:60], true[:60] * noise)
    error = np.std(np.log(predict(genomes[60:])) - np.log(true[60:]))
    assert error < 0.06


def test_two_trials_already_say_which_end_is_better():
    space = make_space(segments=10, steps=50)
    genomes = np.array([space.uniform(1.0), space.uniform(0.25)])
    predict = Surrogate(space, genomes, np.array([2.0, 8.0]))
    assert predict(genomes) == pytest.approx([2.0, 8.0], rel=0.2)
    between = predict(np.array([space.uniform(0.75), space.uniform(0.5)]))
    assert 2.0 < between[0] < between[1] < 8.0


@pytest.mark.parametrize("distance", [1.0, 3.0])
def test_equal_distances_predict_themselves(distance):
    space = make_space(segments=10, steps=50)
    genomes = draw(space, 40, 0)
    predicted = Surrogate(space, genomes[:20], np.full(20, distance))(genomes)
    assert predicted == pytest.approx(np.full(40, distance))


def test_a_distance_of_zero_is_the_best_of_finite_predictions():
    space = make_space(segments=10, steps=50)
    genomes = draw(space, 40, 0)
    distances = distances_of(contributions(space), genomes[:20])
    distances[7] = 0.0
    predicted = Surrogate(space, genomes[:20], distances)(genomes)
    assert np.isfinite(predicted).all() and (predicted > 0).all()
    assert predicted[:20].argmin() == 7


def test_the_same_trials_give_the_same_predictions():
    space = make_space(segments=10, steps=50)
    genomes = draw(space, 40, 0)
    distances = distances_of(contributions(space), genomes[:20])
    proxy = contributions(space)
    once, again = (Surrogate(space, genomes[:20], distances, proxy)(genomes) for _ in range(2))
    assert np.array_equal(once, again)
    # One by one or all together.
    alone = [Surrogate(space, genomes[:20], distances, proxy)(genomes[k : k + 1]) for k in (3, 30)]
    assert np.concatenate(alone) == pytest.approx(once[[3, 30]])
