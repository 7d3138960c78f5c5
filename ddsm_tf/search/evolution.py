"""NSGA-II over schedule genomes, screened by a surrogate.

A trial samples hundreds of images, a prediction takes microseconds. So children are bred for many
generations against a surrogate of the distance, and only those that would enlarge the front most
are tried.

Reference: Deb et al., 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.crossover.pntx import TwoPointCrossover
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

from ddsm_tf.errors import invalid
from ddsm_tf.search.generations import Generations, Objectives, ramps, random_genome
from ddsm_tf.search.pareto import pick_by_hypervolume
from ddsm_tf.search.space import Genome, ScheduleSpace
from ddsm_tf.search.surrogate import Surrogate

REFINE_EVERY = 3
SCREENING_POPULATION = 64


class Evolution(Generations):
    """Proposes genomes, one generation after another.

    The first generation holds every uniform schedule, the given seeds, ramps between two widths and
    random ones. Every later one holds children of the best so far (rank, then crowding), by
    two-point crossover and mutation, picked by what the surrogate says of them. No genome is
    proposed twice.

    Args:
        space: the schedules.
        population: genomes of the first generation, and parents of the later ones; at least 4.
        seed: fixes every random choice.
        costs: width → cost of a step; what the trials report as `cost` grows with it.
        children: genomes of each later generation; as many as `population` if left out.
        mutation: expected number of segments that change in a child.
        screening: generations bred against the surrogate for each that is tried; 0 tries what is
            bred, as plain NSGA-II does.
        seeds: genomes of the first generation, for instance from the importance table.
        proxy: (segments, choices), what the importance table says of each; helps the surrogate.
        refinements: how many times each segment is split in two; `space` has the finest segments,
            and they move together at first. Splitting comes every third generation.
    """

    def __init__(
        self,
        space: ScheduleSpace,
        population: int,
        seed: int,
        *,
        costs: Mapping[float, float] | None = None,
        children: int | None = None,
        mutation: float = 1.0,
        screening: int = 20,
        seeds: Sequence[Genome] = (),
        proxy: np.ndarray | None = None,
        refinements: int = 0,
    ) -> None:
        if population < 4:
            raise invalid("population", population, "must be at least 4")
        if children is not None and children < 1:
            raise invalid("children", children, "must be at least 1")
        if screening and not set(space.widths) <= set(costs or ()):
            rule = f"needs `costs` of all widths {space.widths}; pass them, or screening=0"
            raise invalid("screening", screening, rule)
        super().__init__(space)
        self.population = population
        self.children = children or population
        self.seed = seed
        self.costs = costs
        self.screening = screening
        self.seeds = list(dict.fromkeys(seeds))
        self.proxy = proxy
        self.refinements = refinements
        self._survival = RankAndCrowding()
        self._crossover = TwoPointCrossover(prob=1.0)
        self._mutation = NeighbourMutation(mutation)

    def first_generation(self) -> list[Genome]:
        """Uniform schedules, the given seeds, ramps, then random genomes."""
        return [*self._fixed(), *self.random_genomes()]

    def random_genomes(self) -> list[Genome]:
        """The random part of the first generation."""
        random, fixed = np.random.default_rng([self.seed, 0]), self._fixed()
        wanted = max(1, self.population - len(fixed))

        def draw() -> Genome:
            return self._whole_blocks(random_genome(self.space, random))

        return self.fill(wanted, set(fixed), draw)

    def ramp_genomes(self) -> list[Genome]:
        """The ramps of the first generation."""
        uniform = self.space.uniforms()
        # A quarter of what is left: ramps span few of the schedules.
        room = max(0, self.population - len(uniform) - len(self.seeds)) // 4
        every = map(self._whole_blocks, ramps(self.space, [self.space.parts // 2]))
        return [ramp for ramp in every if ramp not in {*uniform, *self.seeds}][:room]

    def _fixed(self) -> list[Genome]:
        uniform = self.space.uniforms()
        return list(dict.fromkeys([*uniform, *self.seeds, *self.ramp_genomes()]))

    def next_generation(
        self, known: list[Genome], results: Mapping[Genome, Objectives], number: int
    ) -> list[Genome]:
        """Children of the best of `known`."""
        random = np.random.default_rng([self.seed, number])
        tried = np.array(known)
        objectives = np.array([results[genome] for genome in known], float)
        parents = self._survivors(tried, objectives, self.population, random)
        picked: list[Genome] = []
        if self.screening:
            picked = self._screened(parents, tried, objectives[:, 0], number, random)

        def breed() -> Genome:
            return tuple(map(int, self._breed(parents, 1, number, random)[0]))

        return picked + self.fill(self.children - len(picked), {*known, *picked}, breed)

    def _screened(
        self,
        parents: np.ndarray,
        tried: np.ndarray,
        distances: np.ndarray,
        number: int,
        random: np.random.Generator,
    ) -> list[Genome]:
        """New genomes that the surrogate expects to enlarge the front most."""
        predict = Surrogate(self.space, tried, distances, self.proxy)

        def objectives(genomes: np.ndarray, distances: np.ndarray) -> np.ndarray:
            return np.stack([distances, self.space.relative_costs(genomes, self.costs)], axis=1)

        bred, seen = parents, set(map(tuple, tried.tolist()))
        candidates: dict[Genome, None] = {}
        for _ in range(self.screening):
            children = self._breed(bred, SCREENING_POPULATION, number, random)
            new = map(tuple, children.tolist())
            candidates.update(dict.fromkeys(genome for genome in new if genome not in seen))
            pool = np.unique(np.concatenate([bred, children]), axis=0)
            expected = objectives(pool, predict(pool))
            bred = self._survivors(pool, expected, SCREENING_POPULATION, random)
        genomes = [genome for genome in candidates if self.space.is_schedule(genome)]
        if not genomes:
            return []
        expected = objectives(np.array(genomes), predict(np.array(genomes)))
        picked = pick_by_hypervolume(expected, objectives(tried, distances), self.children)
        return [genomes[index] for index in picked]

    def _block(self, number: int) -> int:
        """How many segments move as one in a generation."""
        return 2 ** max(0, self.refinements - (number - 1) // REFINE_EVERY)

    def _whole_blocks(self, genome: Genome) -> Genome:
        """A genome of the first generation: what is not split yet has one width."""
        block = self._block(1)
        return tuple(genome[k // block * block] for k in range(len(genome)))

    def _breed(
        self, parents: np.ndarray, count: int, number: int, random: np.random.Generator
    ) -> np.ndarray:
        """Children (count, segments) of parents that stand best first."""
        block = self._block(number)
        # Segments that are not split yet move as one.
        coarse = parents[:, ::block]
        problem = Problem(n_var=coarse.shape[1], xl=0, xu=len(self.space.choices) - 1)
        # The better of two random parents, twice for each pair: parents stand in order.
        pairs = random.integers(len(coarse), size=((count + 1) // 2, 2, 2)).min(axis=2)
        mated = Population.new(X=coarse)
        children = self._crossover.do(problem, mated, pairs, random_state=random)
        children = self._mutation.do(problem, children, random_state=random)
        fine = np.repeat(children.get("X").astype(int), block, axis=1)
        return fine[:count, : self.space.segments]

    def _survivors(
        self, genomes: np.ndarray, objectives: np.ndarray, count: int, random: np.random.Generator
    ) -> np.ndarray:
        """The best `count`, by rank, then crowding, best first."""
        individuals = Population.new(X=genomes, F=objectives)
        survivors = self._survival.do(
            Problem(), individuals, n_survive=min(count, len(genomes)), random_state=random
        )
        ordered = sorted(survivors, key=lambda one: (one.get("rank"), -one.get("crowding")))
        return np.array([one.X for one in ordered])


class NeighbourMutation(Mutation):
    """Moves each segment to a neighbouring width with probability `expected` / segments.

    Widths are in order, so a neighbour is a small change; a random width is seldom an improvement.

    Args:
        expected: number of segments that change, on average; all move where there are fewer.
    """

    def __init__(self, expected: float = 1.0) -> None:
        super().__init__(prob=1.0)
        self.expected = expected

    def _do(self, problem: Problem, X: np.ndarray, random_state: np.random.Generator, **_: object):
        lowest, highest = problem.xl, problem.xu
        changes = random_state.random(X.shape) < self.expected / problem.n_var
        moves = random_state.choice([-1, 1], size=X.shape)
        # At either end there is one neighbour only.
        moves = np.where(lowest == X, 1, np.where(highest == X, -1, moves))
        return np.clip(np.where(changes, X + moves, X), lowest, highest)
