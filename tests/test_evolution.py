"""Evolution: its first generation, its operators, its screening, and where it ends."""

import itertools

import numpy as np
import pytest
from test_space import COSTS, WIDTHS, make_space

from ddsm_tf.errors import InputError
from ddsm_tf.search import Evolution, hypervolume
from ddsm_tf.search.baselines import PaperSearch, importance_genomes, random_schedules
from ddsm_tf.search.pareto import pick_by_hypervolume
from ddsm_tf.search.surrogate import Surrogate

SLOW_NARROW = {1.0: 16.0, 0.75: 9.0, 0.5: 4.0, 0.25: 6.0}
"""As measured on a device: the narrowest width takes more time than the one before it."""


def objectives(space, genome, costs=COSTS):
    """Narrow steps hurt late in sampling and hardly at its start."""
    weights = np.linspace(0.1, 2.0, space.segments)
    widths = [space.choices[index] for index in genome]
    distance = 5.0 + sum(w * (1 - width) for w, width in zip(weights, widths, strict=True))
    return float(distance), sum({**costs, 0.0: 0.0}[width] for width in widths)


def evolve(search, count=10_000, costs=COSTS):
    """`count` trials; results in order."""
    results = {}
    while len(results) < count and (pending := search.pending(results)):
        for genome in pending[: count - len(results)]:
            assert genome not in results
            results[genome] = objectives(search.space, genome, costs)
    return results


def generations(search, count):
    """The genomes of each of the first `count` generations."""
    results, found = {}, []
    while len(found) < count:
        found.append(search.pending(results))
        results |= {genome: objectives(search.space, genome) for genome in found[-1]}
    return found


def volume(results, space):
    """What the results beat, as a share of all that full width and the narrowest leave to beat."""
    worst = objectives(space, space.uniform(space.widths[-1]))[0]
    dearest = objectives(space, space.uniform(1.0))[1]
    return hypervolume(list(results.values()), (worst, dearest)) / ((worst - 5.0) * dearest)


def bred(search, parents, count=2000, number=1):
    """Children of parents that stand best first."""
    random = np.random.default_rng(0)
    return search._breed(np.array(parents), count, number, random)


# The first generation


def test_the_first_generation_has_every_uniform_schedule_ramps_and_random_ones():
    evolution = Evolution(make_space(), 16, seed=0, costs=COSTS)
    first = evolution.first_generation()
    assert first[:4] == [(k,) * 5 for k in range(4)]
    # Noise first, details last: half the steps at a width, then half at the next wider one.
    assert first[4:7] == [(1, 1, 0, 0, 0), (2, 2, 1, 1, 1), (3, 3, 2, 2, 2)]
    assert first[4:7] == evolution.ramp_genomes()
    assert first[7:] == evolution.random_genomes()
    assert len(first) == len(set(first)) == 16


def test_given_seeds_come_after_the_uniform_schedules_and_count():
    seeds = [(3, 2, 1, 0, 0), (0,) * 5, (3, 2, 1, 0, 0), (1, 1, 0, 0, 0)]
    evolution = Evolution(make_space(), 16, seed=0, costs=COSTS, seeds=seeds)
    first = evolution.first_generation()
    assert first[4:6] == [(3, 2, 1, 0, 0), (1, 1, 0, 0, 0)]
    # One of the seeds is a ramp, which is not tried twice. Ramps are a quarter of what is left.
    assert first[6:8] == evolution.ramp_genomes() == [(2, 2, 1, 1, 1), (3, 3, 2, 2, 2)]
    assert first[8:] == evolution.random_genomes()
    assert len(first) == len(set(first)) == 16


def test_chance_has_a_part_however_many_seeds_there_are():
    space = make_space()
    seeds = list(itertools.islice(space.genomes(), 30))
    evolution = Evolution(space, 8, seed=0, costs=COSTS, seeds=seeds)
    first = evolution.first_generation()
    assert set(first) > set(seeds) and len(evolution.random_genomes()) == 1


def test_random_genomes_differ_by_seed_and_are_spread_over_the_costs():
    space = make_space(segments=20, steps=20)
    drawn = [Evolution(space, 100, seed=s, costs=COSTS).random_genomes() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] and not set(drawn[0]) & set(drawn[2])
    costs = space.relative_costs(np.array(drawn[0]), COSTS)
    # Of twenty segments drawn one by one this would be 0.08.
    assert costs.std() > 0.15


# Results decide, and nothing else


@pytest.fixture(params=["plain", "screened", "refined", "skips", "paper"])
def make_search(request):
    """Gives a fresh search for a seed."""
    return {
        "plain": lambda seed: Evolution(make_space(), 8, seed, screening=0),
        "screened": lambda seed: Evolution(make_space(), 8, seed, costs=COSTS, screening=3),
        "refined": lambda seed: Evolution(
            make_space(), 8, seed, costs=COSTS, screening=3, children=5, refinements=1
        ),
        "skips": lambda seed: Evolution(
            make_space(skips=True), 8, seed, costs=COSTS, screening=3, children=5
        ),
        "paper": lambda seed: PaperSearch(make_space(), seed, population=8),
    }[request.param]


def test_what_is_asked_for_depends_on_seed_and_results_alone(make_search):
    runs = [list(evolve(make_search(seed), 40)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_results_in_another_order_or_by_halves_ask_for_the_same(make_search):
    whole = generations(make_search(0), 4)
    results = {g: objectives(make_search(0).space, g) for g in itertools.chain(*whole[:3])}
    # As many workers would give them, to a process that has seen none of it.
    assert make_search(0).pending(dict(reversed(list(results.items())))) == whole[3]
    for missing in ([whole[2][1]], [whole[2][2], whole[2][0]], [whole[1][3]], [whole[0][5]]):
        some = {genome: result for genome, result in results.items() if genome not in missing}
        expected = [genome for genome in itertools.chain(*whole[:3]) if genome in missing]
        assert make_search(0).pending(some) == expected
    # The same process, asked in between.
    search = make_search(0)
    for count in (0, 1, 9, len(results) - 1):
        search.pending(dict(itertools.islice(results.items(), count)))
    assert search.pending(results) == whole[3]


def test_other_results_breed_other_children(make_search):
    search = make_search(0)
    first = search.pending({})
    results = {genome: objectives(search.space, genome) for genome in first}
    turned = {genome: (20.0 - distance, cost) for genome, (distance, cost) in results.items()}
    asked = [search.pending(results), search.pending(turned), make_search(0).pending(turned)]
    assert asked[0] != asked[1] == asked[2]


# Where a search ends


@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("screening", [0, 2])
@pytest.mark.parametrize("skips", [False, True])
def test_every_schedule_of_a_small_space_is_tried_once(skips, screening, refinements):
    space = make_space(segments=3, widths=WIDTHS[:3], skips=skips)
    search = Evolution(space, 10, seed=0, costs=COSTS, screening=screening, refinements=refinements)
    results = evolve(search)
    assert len(results) == space.size == (63 if skips else 27)
    assert set(results) == set(space.genomes())
    assert search.pending(results) == []


def test_a_search_that_breeds_nothing_new_goes_on():
    space = make_space(segments=3, widths=WIDTHS[:3])
    search = Evolution(space, 4, seed=0, screening=0, mutation=0.0)
    assert set(evolve(search)) == set(space.genomes())


@pytest.mark.parametrize("screening", [0, 5])
def test_a_space_smaller_than_a_generation_ends(screening):
    space = make_space(segments=1)
    search = Evolution(space, 16, seed=0, costs=COSTS, screening=screening)
    assert set(evolve(search)) == {(0,), (1,), (2,), (3,)}


def test_one_width_is_a_space_of_one():
    space = make_space(widths=(1.0,))
    # So says the importance table of such a network.
    proxy = np.zeros((5, 1))
    search = Evolution(space, 4, seed=0, costs={1.0: 16.0}, proxy=proxy)
    assert list(evolve(search)) == [(0,) * 5]


@pytest.mark.parametrize("screening", [0, 5])
def test_generations_have_as_many_children_as_asked_for(screening):
    space = make_space(segments=8, steps=8)
    for children, expected in ((None, 12), (5, 5), (1, 1)):
        search = Evolution(space, 12, seed=0, costs=COSTS, children=children, screening=screening)
        assert [len(found) for found in generations(search, 4)] == [12, *[expected] * 3]


def test_arguments_that_make_no_search_are_refused():
    space = make_space()
    with pytest.raises(InputError, match="population"):
        Evolution(space, 3, seed=0, costs=COSTS)
    with pytest.raises(InputError, match="children"):
        Evolution(space, 8, seed=0, costs=COSTS, children=0)
    for costs in (None, {1.0: 16.0, 0.5: 4.0}):
        with pytest.raises(InputError, match="needs `costs` of all widths"):
            Evolution(space, 8, seed=0, costs=costs)


# Mutation and crossover


@pytest.mark.parametrize(("expected", "segments"), [(1.0, 10), (2.5, 10), (1.0, 3), (1.0, 1)])
def test_mutation_moves_as_many_segments_as_asked_for(expected, segments):
    search = Evolution(make_space(segments=segments), 4, 0, screening=0, mutation=expected)
    children = bred(search, [(1,) * segments])
    moved = (children != 1).sum(axis=1)
    assert moved.mean() == pytest.approx(expected, abs=0.1)
    # Each by itself: as many as the binomial distribution says keep still.
    still = (1 - expected / segments) ** segments
    assert np.mean(moved == 0) == pytest.approx(still, abs=0.03)


def test_mutation_moves_every_segment_where_there_are_fewer_than_asked_for():
    search = Evolution(make_space(segments=3), 4, 0, screening=0, mutation=5.0)
    assert (bred(search, [(1, 2, 1)], 500) != (1, 2, 1)).all()


@pytest.mark.parametrize(
    ("index", "expected"), [(0, {1: 1.0}), (1, {0: 0.5, 2: 0.5}), (3, {2: 1.0})]
)
@pytest.mark.parametrize("segments", [1, 10])
def test_mutation_moves_to_the_neighbours_alone(index, expected, segments):
    search = Evolution(make_space(segments=segments), 4, seed=0, screening=0)
    children = bred(search, [(index,) * segments])
    moved = children[children != index]
    assert len(moved) / len(children) == pytest.approx(1.0, abs=0.1)
    shares = {int(other): np.mean(moved == other) for other in np.unique(moved)}
    assert shares == pytest.approx(expected, abs=0.05)


def test_skipping_is_the_narrowest_width_s_neighbour():
    search = Evolution(make_space(segments=10, skips=True), 4, seed=0, screening=0)
    children = bred(search, [(3,) * 10])
    moved = children[children != 3]
    assert np.mean(moved == 4) == pytest.approx(0.5, abs=0.05)
    assert set(np.unique(children)) == {2, 3, 4}


def test_crossover_swaps_one_stretch_of_any_length():
    segments, count = 10, 2000
    search = Evolution(make_space(segments=segments), 4, seed=0, screening=0, mutation=0.0)
    children = bred(search, [(0,) * segments, (1,) * segments], count)
    # Two children a pair; what one has from its mother the other has from its father.
    first, second = children[: count // 2], children[count // 2 :]
    mixed = (first != second).all(axis=1) & (first.min(axis=1) != first.max(axis=1))
    assert np.mean(mixed) == pytest.approx(2 * 0.75 * 0.25, abs=0.03)
    swapped = first[mixed] != first[mixed][:, :1]
    # Two different cuts among nine are 10 / 3 apart on average.
    assert swapped.sum(axis=1).mean() == pytest.approx(segments / 3, abs=0.15)
    stretches = {
        tuple(i <= k < j for k in range(segments))
        for i, j in itertools.combinations(range(1, segments), 2)
    }
    assert set(map(tuple, swapped.tolist())) == stretches


def test_better_parents_have_more_children():
    search = Evolution(make_space(segments=10), 4, seed=0, screening=0, mutation=0.0)
    children = bred(search, [(k,) * 10 for k in range(4)])
    # The better of two: the worst of four is a parent only if it is drawn twice.
    shares = [np.mean(children == k) for k in range(4)]
    assert shares == pytest.approx([7 / 16, 5 / 16, 3 / 16, 1 / 16], abs=0.02)


def test_most_children_are_neither_of_their_parents():
    search = Evolution(make_space(segments=10), 4, seed=0, screening=0)
    parents = [(0, 1) * 5, (2, 3) * 5]
    children = bred(search, parents)
    copies = np.mean([tuple(child) in parents for child in children.tolist()])
    # Both parents are the same in 10 of 16 pairs, and mutation then spares a child with 0.9 ** 10.
    assert copies == pytest.approx(10 / 16 * 0.9**10, abs=0.03)
    # One gene a child is neither's: a neighbour of 0 or 2, 1 or 3 is of the other parity.
    neither = (children[:, None] != np.array(parents)).all(axis=1)
    assert neither.sum(axis=1).mean() == pytest.approx(1.0, abs=0.1)


def test_survivors_are_the_best_ranked_then_the_least_crowded():
    search = Evolution(make_space(segments=1), 4, seed=0, screening=0)
    points = np.array([(6, 6), (5.1, 4.9), (1, 9), (9, 1), (9, 9), (5, 5)], float)
    genomes = np.arange(6)[:, None]
    ordered = search._survivors(genomes, points, 6, np.random.default_rng(0))[:, 0]
    # Both ends of the front have no neighbour beyond them and stand first; then the front's
    # middle, then the second and the third front.
    assert set(ordered[:2]) == {2, 3}
    assert set(ordered[2:4]) == {1, 5}
    assert ordered[4:].tolist() == [0, 4]
    kept = search._survivors(genomes, points, 4, np.random.default_rng(0))
    assert set(kept[:, 0]) == {1, 2, 3, 5}
    # (5, 5) and its neighbour crowd each other; a lonely point stands before them.
    points[0] = (2, 5.5)
    ordered = search._survivors(genomes, points, 6, np.random.default_rng(0))[:, 0]
    assert set(ordered[:2]) == {2, 3} and ordered[2] == 0 and ordered[5] == 4


# Refinement


def test_segments_are_split_every_third_generation():
    # Ten segments are two blocks of four and one of two.
    space = make_space(segments=10)
    search = Evolution(space, 8, seed=0, costs=COSTS, children=6, screening=3, refinements=2)
    found = generations(search, 10)[1:]
    for number, genomes in enumerate(found, start=1):
        block = 4 if number <= 3 else 2 if number <= 6 else 1
        children = np.array(genomes)
        assert children.shape == (6, 10) and children.min() >= 0 and children.max() <= 3
        for size, together in ((4, block == 4), (2, block >= 2)):
            whole = children[:, : 10 - 10 % size].reshape(6, -1, size)
            equal = (whole == whole[:, :, :1]).all(axis=(1, 2))
            # Of those that may differ within a block, most do.
            assert equal.all() if together else np.mean(equal) <= 0.5, (number, size)
            if together:
                assert (children[:, 8:] == children[:, 8:9]).all()


def test_mutation_moves_a_whole_block():
    search = Evolution(make_space(segments=10), 4, seed=0, screening=0, refinements=2)
    for number, lengths in ((1, {4, 2}), (4, {2}), (7, {1})):
        moved = bred(search, [(0,) * 10], 2000, number) != 0
        once = moved[moved.sum(axis=1) <= max(lengths)]
        counts = once.sum(axis=1)
        assert set(counts[counts > 0]) == lengths
        firsts = {tuple(np.flatnonzero(row)) for row in once if row.any()}
        block = max(lengths)
        blocks = {tuple(range(k, min(k + block, 10))) for k in range(0, 10, block)}
        assert firsts == blocks


def test_refinement_finds_more_in_few_trials():
    space = make_space(segments=20, steps=20)

    def found(refinements):
        searches = [
            Evolution(space, 12, s, costs=COSTS, children=6, screening=4, refinements=refinements)
            for s in range(6)
        ]
        return np.mean([volume(evolve(search, 30), space) for search in searches])

    assert found(2) > found(0) + 0.01


# Screening


@pytest.fixture(scope="module")
def screened():
    """Results of three seeds, 30 trials each."""
    space = make_space(segments=10)
    return [evolve(Evolution(space, 12, s, costs=COSTS, children=6), 30) for s in range(3)]


def test_screening_beats_plain_evolution_and_random_search(screened):
    space = make_space(segments=10)
    plain = [Evolution(space, 12, s, children=6, screening=0) for s in range(3)]
    random = [random_schedules(space, 30, s) for s in range(3)]
    found, by_plain, by_random = (
        np.array([volume(results, space) for results in some])
        for some in (
            screened,
            [evolve(search, 30) for search in plain],
            [evolve(search, 30) for search in random],
        )
    )
    assert (found > by_plain + 0.03).all(), (found, by_plain)
    assert (found > by_random + 0.06).all(), (found, by_random)
    assert by_plain.mean() > by_random.mean() + 0.01


def test_screening_picks_what_it_would_pick_of_all_schedules():
    space = make_space(segments=8, steps=8)
    every = np.array(list(space.genomes()))
    first, second = generations(Evolution(space, 12, seed=1, costs=COSTS, children=6), 2)
    predict = Surrogate(space, first, np.array([objectives(space, genome)[0] for genome in first]))

    def expected(genomes):
        costs = space.relative_costs(np.array(genomes), COSTS)
        return np.stack([predict(genomes), costs], axis=1)

    found = expected(first)
    best = every[pick_by_hypervolume(expected(every), found, 6)]
    before, picked, possible = (
        hypervolume(np.concatenate([found, more]), found.max(axis=0))
        for more in (found, expected(second), expected(best))
    )
    # It looks at 1,280 of 65,536 schedules at most.
    assert picked - before > 0.98 * (possible - before)


def test_a_true_proxy_helps_screening(screened):
    space = make_space(segments=10)
    proxy = np.linspace(0.1, 2.0, 10)[:, None] * (1.0 - np.array(WIDTHS))
    searches = [Evolution(space, 12, s, costs=COSTS, children=6, proxy=proxy) for s in range(3)]
    helped = [volume(evolve(search, 24), space) for search in searches]
    alone = [volume(dict(itertools.islice(some.items(), 24)), space) for some in screened]
    assert np.mean(helped) > np.mean(alone) + 0.005, (helped, alone)


def test_screening_knows_a_width_that_costs_more_than_a_wider_one(screened):
    space = make_space(segments=10)
    search = Evolution(space, 12, seed=0, costs=SLOW_NARROW, children=6)
    results = evolve(search, 30, SLOW_NARROW)
    shares = [
        np.mean(np.array(list(some)[12:]) == WIDTHS.index(0.25)) for some in (results, screened[0])
    ]
    # The slow narrow width is never worth its time.
    assert shares[0] < 0.1 < 0.25 < shares[1], shares


def test_screened_genomes_are_schedules_even_where_skipping_is_best():
    space = make_space(segments=4, steps=4, skips=True)
    search, results = Evolution(space, 8, seed=0, costs=COSTS, screening=5), {}
    for _ in range(6):
        for genome in search.pending(results):
            assert space.is_schedule(genome)
            widths = [space.choices[index] for index in genome]
            results[genome] = (5.0 + sum(widths), sum({**COSTS, 0.0: 0.0}[w] for w in widths))
    assert sum(4 in genome for genome in list(results)[8:]) > 20


def test_the_first_generation_has_whole_blocks():
    space = make_space(segments=12, steps=12)
    proxy = np.random.default_rng(0).random((12, 4)).cumsum(axis=1)
    seeds = importance_genomes(space, proxy, COSTS, 5, block=4)
    search = Evolution(space, 20, 0, costs=COSTS, seeds=seeds, refinements=2)
    first = search.first_generation()
    assert len(first) == 20 and set(seeds) <= set(first) and len(seeds) >= 3
    for genome in first:
        assert all(len(set(genome[k : k + 4])) == 1 for k in (0, 4, 8)), genome
