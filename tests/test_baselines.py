"""What a search is compared with: fixed lists, the importance table, the paper's search."""

import itertools

import numpy as np
import pytest
from test_space import COSTS, WIDTHS, make_space

from ddsm_tf.errors import InputError
from ddsm_tf.search.baselines import (
    FixedSchedules,
    PaperSearch,
    importance_genomes,
    importance_proxy,
    ramp_schedules,
    random_schedules,
)
from ddsm_tf.search.space import SKIP


def objectives(space, genome):
    """Narrow steps hurt late in sampling and hardly at its start."""
    weights = np.linspace(0.1, 2.0, space.segments)
    widths = [space.choices[index] for index in genome]
    distance = 5.0 + sum(w * (1 - width) for w, width in zip(weights, widths, strict=True))
    return float(distance), sum({**COSTS, SKIP: 0.0}[width] for width in widths)


def generations(search, count):
    """The genomes of each of the first generations, and all results."""
    results, found = {}, []
    while len(found) < count and (pending := search.pending(results)):
        found.append(pending)
        results |= {genome: objectives(search.space, genome) for genome in pending}
    return found, results


# Fixed lists


def test_fixed_schedules_are_tried_once_and_in_order():
    space = make_space(segments=2)
    search = FixedSchedules(space, [(1, 0), (3, 3), (1, 0), (0, 2)])
    assert search.pending({}) == [(1, 0), (3, 3), (0, 2)]
    assert search.pending({(3, 3): (1.0, 1.0)}) == [(1, 0), (0, 2)]
    found, results = generations(search, 10)
    assert len(found) == 1 and search.pending(results) == []


def test_random_schedules_are_spread_over_the_costs():
    space = make_space(segments=20, steps=20)
    genomes = random_schedules(space, 400, seed=0).pending({})
    assert genomes[:4] == [space.uniform(width) for width in WIDTHS]
    assert len(genomes) == len(set(genomes)) == 404
    costs = space.relative_costs(np.array(genomes[4:]), COSTS)
    # A width a segment, drawn one by one, would cost 0.47 ± 0.08: from 0.34 to 0.60.
    low, middle, high = np.quantile(costs, (0.05, 0.5, 0.95))
    assert low < 0.25 and high > 0.75 and middle == pytest.approx(0.47, abs=0.07)
    # All widths are as frequent, and none has a place of its own.
    for part in np.array_split(np.array(genomes[4:]), 4, axis=1):
        assert np.bincount(part.ravel()) / part.size == pytest.approx([0.25] * 4, abs=0.04)


def test_random_schedules_differ_by_seed_and_end_with_the_space():
    space = make_space()
    first, again, other = (random_schedules(space, 20, seed).pending({}) for seed in (0, 0, 1))
    assert first == again and len(set(first[4:]) & set(other[4:])) < 5
    space = make_space(segments=2, skips=True)
    found, _ = generations(random_schedules(space, 1000, seed=0), 3)
    assert len(found) == 1 and sorted(found[0]) == list(space.genomes())


@pytest.mark.parametrize("skips", [False, True])
def test_ramps_are_every_pair_of_widths_at_every_switch(skips):
    space = make_space(segments=5, skips=skips)
    genomes = ramp_schedules(space).pending({})
    assert genomes[:4] == [(k,) * 5 for k in range(4)]
    ramps = [
        (a,) * switch + (b,) * (5 - switch)
        for switch in range(1, 5)
        for a, b in itertools.permutations(range(4), 2)
    ]
    assert len(genomes) == len(set(genomes)) == 4 + 48
    assert set(genomes[4:]) == set(ramps)
    # Switches in the middle first, neighbours first, and narrow before wide.
    assert genomes[4:8] == [(1, 1, 0, 0, 0), (2, 2, 1, 1, 1), (3, 3, 2, 2, 2), (2, 2, 0, 0, 0)]
    switches = [next(k for k in range(5) if genome[k] != genome[0]) for genome in genomes[4:]]
    assert switches == [2] * 12 + [3] * 12 + [1] * 12 + [4] * 12
    narrow_first = [genome[0] > genome[-1] for genome in genomes[4:]]
    assert narrow_first == ([True] * 6 + [False] * 6) * 4


# The importance table


def table(space, seed=None):
    """(segments, choices) of harm; late segments matter more, or in no order at all."""
    weights = np.linspace(0.1, 2.0, space.segments)
    if seed is not None:
        weights = np.random.default_rng(seed).random(space.segments)
    lost = 1.0 - np.array(space.widths)
    return np.array(space.segment_lengths)[:, None] * weights[:, None] * lost**1.5


def harm_of(space, proxy, genome):
    return proxy[np.arange(space.segments), list(genome)].sum()


def test_importance_genomes_keep_to_budgets_spread_over_the_costs():
    space = make_space(segments=50, steps=50)
    genomes = importance_genomes(space, table(space), COSTS, 8)
    costs = space.relative_costs(np.array(genomes), COSTS)
    budgets = np.linspace(1.0, 1 / 16, 10)[1:-1]
    assert len(genomes) == 8
    assert (costs <= budgets + 1e-9).all()
    # A segment's next width saves at most 7 / 16 / 50 of the cost.
    assert (costs > budgets - 0.02).all()
    # Early segments are narrow and late ones wide.
    assert all(genome == tuple(sorted(genome, reverse=True)) for genome in genomes)


@pytest.mark.parametrize("steps", [5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_no_schedule_does_less_harm_for_the_cost_of_an_importance_genome(steps, seed):
    # Twelve steps make segments of three steps and of two.
    space = make_space(segments=5, steps=steps)
    proxy = table(space, seed)
    every = np.array(list(space.genomes()))
    costs = space.relative_costs(every, COSTS)
    harm = proxy[np.arange(5), every].sum(axis=1)
    genomes = importance_genomes(space, proxy, COSTS, 12)
    assert len(genomes) == len(set(genomes)) >= 5
    own_costs = space.relative_costs(np.array(genomes), COSTS)
    assert (np.diff(own_costs) < 0).all()
    for genome, cost in zip(genomes, own_costs, strict=True):
        own = harm_of(space, proxy, genome)
        assert harm[costs <= cost + 1e-9].min() >= own - 1e-9
        assert costs[harm <= own + 1e-9].min() >= cost - 1e-9


def test_uniform_schedules_are_left_to_the_baselines_that_they_are():
    space = make_space(segments=4, steps=8)
    # As much harm everywhere: the best schedules for some budgets are uniform.
    proxy = np.tile((1.0 - np.array(WIDTHS)) ** 1.5, (4, 1))
    uniform = {space.uniform(width) for width in WIDTHS}
    assert not uniform & set(importance_genomes(space, proxy, COSTS, 50))
    mixed = importance_genomes(space, table(space), COSTS, 50)
    assert len(mixed) > 5 and not uniform & set(mixed)


def test_importance_genomes_skip_nothing_and_use_no_slow_narrow_width():
    space = make_space(segments=10, skips=True)
    proxy = np.concatenate([table(space), np.zeros((10, 1))], axis=1)
    genomes = importance_genomes(space, proxy, COSTS, 20)
    assert set(np.unique(genomes)) == {0, 1, 2, 3}
    slow = {1.0: 16.0, 0.75: 9.0, 0.5: 4.0, 0.25: 6.0}
    genomes = importance_genomes(space, proxy, slow, 20)
    assert set(np.unique(genomes)) == {0, 1, 2}


def test_the_proxy_sums_the_effects_of_a_segment_s_steps():
    space = make_space(segments=3, steps=7, widths=(1.0, 0.5))
    effect = np.array([[0.0] * 7, [1, 2, 4, 8, 16, 32, 64]])
    assert importance_proxy(space, effect).tolist() == [[0, 7], [0, 24], [0, 96]]


def test_skipping_a_segment_counts_as_twice_the_harm_of_its_worst_width():
    space = make_space(segments=3, steps=7, widths=(1.0, 0.5, 0.25), skips=True)
    effect = np.array([[0.0] * 7, [1, 1, 1, 1, 1, 1, 1], [3, 0, 0, 0, 0, 0, 8]])
    expected = [[0, 3, 3, 6], [0, 2, 0, 4], [0, 2, 8, 16]]
    assert importance_proxy(space, effect).tolist() == expected


# The paper's search


def test_the_paper_s_fitness_is_the_distance_and_a_weight_times_the_cost():
    space = make_space(segments=2)
    results = {(0, 0): (3.713, 6066.0), (3, 1): (4.2, 1500.0)}
    # In the paper's units: FID plus 0.001 a MMAC.
    for genome, (fid, mmacs) in results.items():
        fitness = PaperSearch(space, seed=0).fitness(genome, results)
        assert fitness == pytest.approx((fid + 0.001 * mmacs) / 3.713)
    assert PaperSearch(space, seed=0).weight == pytest.approx(1.63372, abs=1e-5)
    assert PaperSearch(space, seed=0, weight=2.0).fitness((0, 0), results) == pytest.approx(3.0)


def test_other_units_ask_for_the_same_genomes():
    space = make_space()
    found, results = generations(PaperSearch(space, seed=0, population=8), 4)
    scaled = {genome: (7.0 * d, 1000.0 * c) for genome, (d, c) in results.items()}
    last = set(found[3])
    some = {genome: result for genome, result in scaled.items() if genome not in last}
    assert PaperSearch(space, seed=0, population=8).pending(some) == found[3]


def test_the_paper_s_first_generation_is_uniform_schedules_and_chance():
    space = make_space(segments=50, steps=50)
    found, _ = generations(PaperSearch(space, seed=0), 4)
    assert [len(genomes) for genomes in found] == [50] * 4
    assert len(set(itertools.chain(*found))) == 200
    assert found[0][:4] == [(k,) * 50 for k in range(4)]
    drawn = np.array(found[0][4:])
    # Every gene by itself: all widths are as frequent, and within each genome too.
    assert np.bincount(drawn.ravel()) / drawn.size == pytest.approx([0.25] * 4, abs=0.03)
    counts = (drawn == 0).sum(axis=1)
    assert counts.var() == pytest.approx(50 * 0.25 * 0.75, rel=0.5)
    assert PaperSearch(space, seed=1).pending({})[4:] != found[0][4:]


def test_a_population_below_four_is_refused():
    with pytest.raises(InputError, match="population"):
        PaperSearch(make_space(), seed=0, population=3)


def test_parents_are_the_best_of_all_that_were_tried():
    space = make_space(segments=10)
    search = PaperSearch(space, seed=0, population=12)
    found, results = generations(search, 6)
    known = list(itertools.chain(*found))
    parents, cross = [], search._cross

    def recorded(pair, random):
        parents.extend(map(tuple, pair.tolist()))
        return cross(pair, random)

    search._cross = recorded
    search.next_generation(known, results, 6)
    best = sorted(known, key=lambda genome: search.fitness(genome, results))[:12]
    assert set(parents) <= set(best) and len(set(parents)) > 6
    # They survive from any generation, and the better has more children.
    assert len({k for k, genomes in enumerate(found) if set(best) & set(genomes)}) > 1
    ranks = np.array([best.index(parent) for parent in parents])
    assert np.mean(ranks < 6) > 0.6
    assert not set(search.next_generation(known, results, 6)) & set(known)


def test_the_paper_s_search_gets_better():
    space = make_space(segments=10)
    for seed in range(3):
        search = PaperSearch(space, seed, population=16)
        found, results = generations(search, 8)
        fitness = [[search.fitness(genome, results) for genome in some] for some in found]
        best = np.minimum.accumulate([min(some) for some in fitness])
        chance = fitness[0][4:]
        assert best[-1] < best[0] - 0.03
        assert np.mean(fitness[-1]) < np.mean(chance) - 2.0 * np.std(chance) / np.sqrt(12)
        assert np.mean(fitness[-1]) < np.min(chance) + np.std(chance)


@pytest.mark.parametrize(("segments", "skips"), [(10, False), (10, True), (1, False)])
def test_the_paper_s_mutation_changes_one_gene_on_average_to_any_other_width(segments, skips):
    space = make_space(segments=segments, skips=skips)
    search = PaperSearch(space, seed=0, population=8)
    random = np.random.default_rng(0)
    for index in range(len(space.choices)):
        genome = np.full(segments, index)
        children = np.array([search._mutate(genome, random) for _ in range(3000)])
        moved = children[children != index]
        assert len(moved) / 3000 == pytest.approx(1.0, abs=0.07)
        others = set(range(len(space.choices))) - {index}
        shares = {int(other): np.mean(moved == other) for other in np.unique(moved)}
        assert shares == pytest.approx(dict.fromkeys(others, 1 / len(others)), abs=0.03)


def test_the_paper_s_crossover_swaps_one_stretch():
    search = PaperSearch(make_space(segments=10), seed=0, population=8)
    random, pair = np.random.default_rng(0), np.array([[0] * 10, [1] * 10])
    children = np.array([search._cross(pair, random) for _ in range(1000)])
    # Two different cuts among nine are 10 / 3 apart on average.
    assert children.sum(axis=1).mean() == pytest.approx(10 / 3, abs=0.2)
    assert set(children.sum(axis=1)) == set(range(1, 9))
    assert (np.abs(np.diff(children, axis=1)).sum(axis=1) == 2).all()
    # One gene cannot be mixed.
    assert search._cross(np.array([[2], [3]]), random).tolist() == [2]


@pytest.mark.parametrize("skips", [False, True])
def test_the_paper_s_search_walks_the_whole_of_a_small_space(skips):
    space = make_space(segments=3, widths=WIDTHS[:3], skips=skips)
    search = PaperSearch(space, seed=0, population=10)
    found, results = generations(search, 100)
    genomes = list(itertools.chain(*found))
    assert len(genomes) == space.size and set(genomes) == set(space.genomes())
    assert search.pending(results) == []
    one = make_space(widths=(1.0,))
    assert generations(PaperSearch(one, seed=0), 5)[0] == [[(0,) * 5]]
