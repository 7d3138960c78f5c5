"""What a search must be compared with: fixed lists of schedules, and the search of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.crossover.pntx import TwoPointCrossover

from ddsm_tf.errors import invalid
from ddsm_tf.search.allocation import allocate
from ddsm_tf.search.generations import Generations, Objectives, ramps, random_genome
from ddsm_tf.search.space import Genome, ScheduleSpace

PAPER_POPULATION = 50
PAPER_WEIGHT = 0.001 * 6066 / 3.713
"""What full width costs in units of its own distance: 0.001 a MMAC, 6,066 MMACs, FID 3.713."""


class FixedSchedules(Generations):
    """Proposes a list of genomes, in order.

    Args:
        space: the schedules.
        genomes: what to try; repetitions are left out.
    """

    def __init__(self, space: ScheduleSpace, genomes: Sequence[Genome]) -> None:
        super().__init__(space)
        self.genomes = list(dict.fromkeys(genomes))

    def first_generation(self) -> list[Genome]:
        return self.genomes

    def next_generation(
        self, known: list[Genome], results: Mapping[Genome, Objectives], number: int
    ) -> list[Genome]:
        return []


class PaperSearch(Generations):
    """The search of DDSM (arXiv 2310.03337, section 3.3), with operators that act.

    One objective, the distance plus a weight times the cost; the uniform schedules are seeded;
    elitist survival. The paper's mutation is applied with probability 0.001 twice, so hardly ever;
    here each gene of each child changes with probability 1 / genes to another width at random. All
    trials share their starting noise. The weight is the paper's, made free of units.

    Args:
        space: the schedules; the paper's has a segment for each step.
        seed: fixes every random choice.
        population: genomes a generation, at least 4.
        weight: of the share of full width's cost, in units of full width's distance.
    """

    def __init__(
        self,
        space: ScheduleSpace,
        seed: int,
        population: int = PAPER_POPULATION,
        weight: float = PAPER_WEIGHT,
    ) -> None:
        super().__init__(space)
        if population < 4:
            raise invalid("population", population, "must be at least 4")
        self.seed = seed
        self.population = population
        self.weight = weight
        self._crossover = TwoPointCrossover(prob=1.0)

    def first_generation(self) -> list[Genome]:
        random = np.random.default_rng([self.seed, 0])
        uniform = self.space.uniforms()
        choices = len(self.space.choices)

        def draw() -> Genome:
            return tuple(map(int, random.integers(choices, size=self.space.segments)))

        wanted = max(0, self.population - len(uniform))
        return uniform + self.fill(wanted, set(uniform), draw)

    def next_generation(
        self, known: list[Genome], results: Mapping[Genome, Objectives], number: int
    ) -> list[Genome]:
        random = np.random.default_rng([self.seed, number])
        parents = sorted(known, key=lambda genome: self.fitness(genome, results))
        parents = np.array(parents[: self.population])

        def breed() -> Genome:
            # Binary tournaments: parents stand in order, so the smaller number wins.
            pair = random.integers(len(parents), size=(2, 2)).min(axis=1)
            return self._mutate(self._cross(parents[pair], random), random)

        return self.fill(self.population, set(known), breed)

    def fitness(self, genome: Genome, results: Mapping[Genome, Objectives]) -> float:
        """Distance and cost as one number; less is better."""
        full_distance, full_cost = results[self.space.uniform(self.space.widths[0])]
        distance, cost = results[genome]
        return distance / full_distance + self.weight * cost / full_cost

    def _cross(self, pair: np.ndarray, random: np.random.Generator) -> np.ndarray:
        problem = Problem(n_var=pair.shape[1])
        both = Population.new(X=pair)
        children = self._crossover.do(problem, both, np.array([[0, 1]]), random_state=random)
        return children[0].X

    def _mutate(self, genome: np.ndarray, random: np.random.Generator) -> Genome:
        choices = len(self.space.choices)
        changes = random.random(len(genome)) < 1.0 / len(genome)
        # Added to the present one and taken modulo, these are all the other choices.
        other = (genome + random.integers(1, max(choices, 2), size=len(genome))) % choices
        return tuple(map(int, np.where(changes, other, genome)))


def random_schedules(space: ScheduleSpace, count: int, seed: int) -> FixedSchedules:
    """Every uniform schedule and `count` random ones, spread over the costs."""
    random = np.random.default_rng([seed, 0])
    uniform = space.uniforms()
    fixed = FixedSchedules(space, uniform)
    fixed.genomes += fixed.fill(count, set(uniform), lambda: random_genome(space, random))
    return fixed


def ramp_schedules(space: ScheduleSpace) -> FixedSchedules:
    """Every uniform schedule and every two-stage one; those that switch in the middle first."""
    half = space.parts / 2
    switches = sorted(range(1, space.parts), key=lambda switch: abs(switch - half))
    return FixedSchedules(space, [*space.uniforms(), *ramps(space, switches)])


def importance_genomes(
    space: ScheduleSpace,
    proxy: np.ndarray,
    costs: Mapping[float, float],
    count: int,
    block: int = 1,
) -> list[Genome]:
    """Least harm by the importance table, for `count` budgets spread over the costs.

    Args:
        space: the schedules.
        proxy: (segments, choices), what each segment does to the final image at each width.
        costs: width → cost of a step.
        count: how many budgets.
        block: how many segments share a width.

    Returns:
        At most `count` genomes, without repetitions and uniform schedules, dearest first.
    """
    lengths = np.array(space.segment_lengths)
    if len(set(lengths)) > 1:
        # Segments differ by a step at most; their price a step is what counts.
        proxy = proxy * lengths.mean() / lengths[:, None]
    firsts = np.arange(0, space.segments, block)
    # Segments of one block look alike, so they are given the same width.
    proxy = np.repeat(np.add.reduceat(proxy, firsts), block, axis=0)[: space.segments] / block
    width_costs = [costs[width] for width in space.widths]
    lowest = min(width_costs) / width_costs[0]
    budgets = np.linspace(1.0, min(lowest, 1.0), count + 2)[1:-1]
    harm = proxy[:, : len(space.widths)].T
    genomes = [allocate(harm, width_costs, budget) for budget in budgets]
    uniform = set(space.uniforms())
    return [genome for genome in dict.fromkeys(genomes) if genome not in uniform]


def importance_proxy(space: ScheduleSpace, harm: np.ndarray) -> np.ndarray:
    """What each segment does to the final image at each choice, float (segments, choices).

    Args:
        space: the schedules.
        harm: float (W, steps), of `ImportanceTable.harm` for the space's steps; the unconditional
            branch's behind it, (W, 2 · steps), where that has widths of its own.
    """
    firsts = np.cumsum((0, *space.segment_lengths[:-1]))
    proxy = np.add.reduceat(harm, firsts, axis=1).T
    if space.skips:
        # The table says nothing of skipped steps; they do more harm than any width.
        proxy = np.concatenate([proxy, 2.0 * proxy.max(axis=1, keepdims=True)], axis=1)
    return proxy
