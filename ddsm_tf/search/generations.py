"""Searches as pure functions of their results, generation by generation.

There is no state but the results: the same seed and the same results always ask for the same
genomes, so a search that was killed goes on where it stopped, and one that runs on many workers
does what it would do on one.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping

import numpy as np

from ddsm_tf.search.space import Genome, ScheduleSpace

Objectives = tuple[float, float]
"""(distance, cost); less is better for both."""

TRIES_PER_GENOME = 50


class Generations(ABC):
    """Proposes genomes, one generation after another, none twice.

    Args:
        space: the schedules.
    """

    def __init__(self, space: ScheduleSpace) -> None:
        self.space = space
        self._bred: dict[tuple, list[Genome]] = {}

    @abstractmethod
    def first_generation(self) -> list[Genome]:
        """What is tried before anything is known."""

    @abstractmethod
    def next_generation(
        self, known: list[Genome], results: Mapping[Genome, Objectives], number: int
    ) -> list[Genome]:
        """What generation `number` tries, after the generations that make up `known`.

        Must depend on its arguments alone. An empty list ends the search.
        """

    def pending(self, results: Mapping[Genome, Objectives]) -> list[Genome]:
        """The genomes of the present generation that have no result yet.

        Args:
            results: every finished genome's objectives.

        Returns:
            At least one genome, or none when the search has ended.
        """
        generation, known = self.first_generation(), []
        for number in itertools.count(1):
            missing = [genome for genome in generation if genome not in results]
            if missing or not generation:
                return missing
            known += generation
            # A pure function of these: remembering what it gave saves time and changes nothing.
            key = (number, *(results[genome] for genome in known))
            if key not in self._bred:
                self._bred[key] = self.next_generation(known, results, number)
            generation = self._bred[key]

    def fill(
        self, wanted: int, known: Collection[Genome], propose: Callable[[], Genome]
    ) -> list[Genome]:
        """`wanted` proposals that are not `known`; fewer where fewer schedules are left."""
        wanted = min(wanted, self.space.size - len(known))
        tries = TRIES_PER_GENOME * wanted
        genomes: list[Genome] = []
        while len(genomes) < wanted:
            # A population that has converged may breed nothing new; the search must not hang.
            genome = propose() if tries > 0 else self._first_unknown({*known, *genomes})
            tries -= 1
            if genome not in known and genome not in genomes and self.space.is_schedule(genome):
                genomes.append(genome)
        return genomes

    def _first_unknown(self, known: set[Genome]) -> Genome:
        return next(genome for genome in self.space.genomes() if genome not in known)


def random_genome(space: ScheduleSpace, random: np.random.Generator) -> Genome:
    """A genome of random composition in random order, so that costs spread over their range.

    With every segment drawn by itself all schedules would cost about the same.
    """
    shares = random.dirichlet(np.ones(len(space.choices)))
    drawn = random.choice(len(space.choices), size=space.segments, p=shares)
    return tuple(map(int, drawn))


def ramps(space: ScheduleSpace, switches: Collection[int]) -> list[Genome]:
    """Two-stage schedules: one width, then another, for every pair (T-Stitch: arXiv 2402.14167).

    Args:
        space: the schedules.
        switches: after how many segments the width changes; each gives all pairs.
    """
    pairs = itertools.permutations(space.widths, 2)
    # Narrow before wide comes first, as in DDSM's published CIFAR-10 schedule; then widths that
    # are neighbours.
    order = sorted(
        pairs,
        key=lambda pair: (pair[0] > pair[1], abs(space.index(pair[0]) - space.index(pair[1]))),
    )
    return list(dict.fromkeys(space.ramp(*pair, switch) for switch in switches for pair in order))
