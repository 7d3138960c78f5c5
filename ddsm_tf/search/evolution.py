"""NSGA-II over schedule genomes, as a pure function of the results so far.

There is no state but the results: the same seed and the same results always ask for the same
genomes, so a search that was killed goes on where it stopped, and one that runs on many workers
does what it would do on one.

Reference: Deb et al., 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

from ddsm_tf.errors import invalid
from ddsm_tf.search.space import Genome, ScheduleSpace

Objectives = tuple[float, float]
"""(distance, cost); less is better for both."""

TRIES_PER_CHILD = 50


class Evolution:
    """Proposes genomes, one generation after another.

    The first generation holds every uniform schedule, ramps between two widths and random ones.
    Every later one holds children of the best so far (rank, then crowding), by two-point
    crossover and mutation. No genome is proposed twice.

    Args:
        space: the schedules.
        population: genomes a generation, at least 4.
        seed: fixes every random choice.
        mutation: expected number of segments that change in a child.
    """

    def __init__(
        self, space: ScheduleSpace, population: int, seed: int, mutation: float = 1.0
    ) -> None:
        if population < 4:
            raise invalid("population", population, "must be at least 4")
        self.space = space
        self.population = population
        self.seed = seed
        self.mutation = mutation
        self._survival = RankAndCrowding()

    def pending(self, results: Mapping[Genome, Objectives]) -> list[Genome]:
        """The genomes of the present generation that have no result yet.

        Args:
            results: every finished genome's objectives.

        Returns:
            At least one genome, or none when every schedule has been tried.
        """
        generation, parents, known = self.first_generation(), [], set()
        for number in itertools.count(1):
            missing = [genome for genome in generation if genome not in results]
            if missing or not generation:
                return missing
            known.update(generation)
            parents = self._survivors(parents + generation, results, number)
            generation = self._children(parents, known, number)

    def first_generation(self) -> list[Genome]:
        """Uniform schedules, ramps between two widths, then random genomes."""
        return [*self._seeds(), *self.random_genomes()]

    def random_genomes(self) -> list[Genome]:
        """The random part of the first generation."""
        random, seeds = np.random.default_rng([self.seed, 0]), self._seeds()
        wanted = max(1, self.population - len(seeds))
        return self._fill(wanted, set(seeds), lambda: self._random(random))

    def _seeds(self) -> list[Genome]:
        """Uniform schedules and some of the ramps, none twice."""
        uniform = [self.space.uniform(width) for width in self.space.widths]
        half = self.space.segments // 2
        pairs = itertools.permutations(range(len(uniform)), 2)
        # Narrow before wide comes first, as in DDSM's published CIFAR-10 schedule; then widths that
        # are neighbours.
        order = sorted(pairs, key=lambda pair: (pair[0] < pair[1], abs(pair[0] - pair[1])))
        ramps = [(*uniform[first][:half], *uniform[second][half:]) for first, second in order]
        # Half of what is left goes to random genomes: ramps span few of the schedules.
        room = max(0, self.population - len(uniform)) // 2
        return list(dict.fromkeys([*uniform, *ramps[:room]]))

    def _children(self, parents: list[Genome], known: set[Genome], number: int) -> list[Genome]:
        """New genomes bred from `parents`, which stand best first."""
        random = np.random.default_rng([self.seed, number])

        def breed() -> Genome:
            # The better of two random parents, twice: both stand in order.
            mother, father = (parents[random.integers(len(parents), size=2).min()] for _ in "ab")
            return self._mutate(self._cross(mother, father, random), random)

        return self._fill(self.population, known, breed)

    def _fill(self, wanted: int, known: set[Genome], propose: Callable[[], Genome]) -> list[Genome]:
        """`wanted` proposals that are not `known`; fewer where fewer schedules are left."""
        wanted = min(wanted, self.space.size - len(known))
        tries = TRIES_PER_CHILD * wanted
        genomes: list[Genome] = []
        while len(genomes) < wanted:
            # A population that has converged may breed nothing new; the search must not hang.
            genome = propose() if tries > 0 else self._first_unknown({*known, *genomes})
            tries -= 1
            if genome not in known and genome not in genomes:
                genomes.append(genome)
        return genomes

    def _survivors(
        self, genomes: list[Genome], results: Mapping[Genome, Objectives], number: int
    ) -> list[Genome]:
        """The best `population` of `genomes`, by rank, then crowding."""
        individuals = Population.new(
            X=np.array(genomes), F=np.array([results[genome] for genome in genomes], float)
        )
        survivors = self._survival.do(
            Problem(),
            individuals,
            n_survive=self.population,
            random_state=np.random.default_rng([self.seed, number, 1]),
        )
        ordered = sorted(survivors, key=lambda one: (one.get("rank"), -one.get("crowding")))
        return [tuple(map(int, one.X)) for one in ordered]

    def _random(self, random: np.random.Generator) -> Genome:
        return tuple(map(int, random.integers(len(self.space.widths), size=self.space.segments)))

    def _first_unknown(self, known: set[Genome]) -> Genome:
        every = itertools.product(range(len(self.space.widths)), repeat=self.space.segments)
        return next(genome for genome in every if genome not in known)

    def _cross(self, mother: Genome, father: Genome, random: np.random.Generator) -> Genome:
        """Two-point crossover: neighbouring segments stay together."""
        first, last = np.sort(random.integers(self.space.segments + 1, size=2))
        return (*mother[:first], *father[first:last], *mother[last:])

    def _mutate(self, genome: Genome, random: np.random.Generator) -> Genome:
        """Each segment moves to a neighbouring width with probability `mutation` / segments."""
        widest, narrowest = 0, len(self.space.widths) - 1
        changes = random.random(len(genome)) < self.mutation / len(genome)
        moves = random.choice([-1, 1], size=len(genome))
        # At either end there is one neighbour only.
        moves = np.where(np.equal(genome, widest), 1, moves)
        moves = np.where(np.equal(genome, narrowest), -1, moves)
        moved = np.clip(np.where(changes, genome + moves, genome), widest, narrowest)
        return tuple(map(int, moved))
