"""The space of schedules that a search walks: one width for each segment of the steps."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.schedule import StepSchedule

Genome = tuple[int, ...]
"""For each segment, in sampling order, the index of its width; 0 is the widest."""

SKIP = 0.0
"""The width of a segment whose steps are left out."""

_DIGITS = string.digits + string.ascii_lowercase


class ScheduleSpace:
    """Step schedules whose steps share a width within each of some equal segments.

    A genome is written as one text, a digit a segment: "0012" runs the first half of the steps at
    the widest width, the third quarter at the second, and the last at the third.

    With `skips`, a segment may also have the width 0: its steps are left out, and the step before
    reaches further. So the search picks timesteps as well as widths.

    With `free_guidance`, a genome has a second half: the width of the unconditional branch in each
    part of the steps. Otherwise that branch runs at the step's own width.

    Args:
        steps: timesteps and sampler of every schedule; its widths do not matter.
        widths: the model's widths, at most 35.
        segments: how many segments; more than there are steps means one a step.
        skips: whether segments may be left out.
        free_guidance: whether the unconditional branch has widths of its own.

    Attributes:
        parts: segments of the steps.
        segments: digits of a genome: as many as `parts`, or twice that with `free_guidance`.
        choices: what a segment can be: the widths, widest first, and `SKIP` last with `skips`.

    Raises:
        InputError: an argument breaks its rule.
    """

    def __init__(
        self,
        steps: StepSchedule,
        widths: Sequence[float],
        segments: int,
        *,
        skips: bool = False,
        free_guidance: bool = False,
    ) -> None:
        if segments < 1:
            raise invalid("segments", segments, "must be at least 1")
        if not 1 <= len(widths) < len(_DIGITS):
            raise invalid("widths", tuple(widths), f"must be 1 to {len(_DIGITS) - 1} widths")
        if free_guidance and (skips or not steps.guided):
            rule = "needs guided steps, none of which is skipped"
            raise invalid("free_guidance", free_guidance, rule)
        self.steps = steps
        self.free_guidance = free_guidance
        self.widths = tuple(sorted(widths, reverse=True))
        self.choices = (*self.widths, SKIP) if skips else self.widths
        self.parts = min(segments, len(steps))
        lengths = [len(part) for part in np.array_split(np.arange(len(steps)), self.parts)]
        self._segment_of_step = np.repeat(np.arange(self.parts), lengths)
        branches = 2 if free_guidance else 1
        self.segments = branches * self.parts
        self.segment_lengths = tuple(lengths) * branches

    @property
    def skips(self) -> bool:
        """Whether segments may be left out."""
        return self.choices[-1] == SKIP

    @property
    def size(self) -> int:
        """How many schedules there are."""
        # One genome skips every step and is no schedule.
        return len(self.choices) ** self.segments - int(self.skips)

    @property
    def branch_timesteps(self) -> frozenset[int]:
        """Where two schedules can part: the first timestep of each segment.

        With skips also the last one, since where it leads depends on what follows.
        """
        lasts = np.cumsum(self.segment_lengths[: self.parts])[:-1] - 1
        firsts = {0, *(lasts + 1)}
        parting = firsts | set(lasts) if self.skips else firsts
        return frozenset(self.steps.timesteps[index] for index in parting)

    def is_schedule(self, genome: Genome) -> bool:
        """Whether any step is left."""
        return any(self.choices[index] != SKIP for index in genome)

    def schedule(self, genome: Genome) -> StepSchedule:
        """The schedule of a genome."""
        widths = [self.choices[genome[k]] for k in self._segment_of_step]
        if self.free_guidance:
            unconditional = [self.choices[genome[self.parts + k]] for k in self._segment_of_step]
            return self.steps.with_widths(widths, unconditional)
        kept = [(t, w) for t, w in zip(self.steps.timesteps, widths, strict=True) if w != SKIP]
        return self.steps.with_steps(*zip(*kept, strict=True))

    def genomes(self) -> Iterator[Genome]:
        """Every genome that is a schedule, widest first."""
        every = itertools.product(range(len(self.choices)), repeat=self.segments)
        return (genome for genome in every if self.is_schedule(genome))

    def index(self, choice: float) -> int:
        """The digit of a width or of `SKIP`.

        Raises:
            InputError: it is none of the space's choices.
        """
        if choice not in self.choices:
            raise invalid("width", choice, f"must be one of {self.choices}")
        return self.choices.index(choice)

    def uniform(self, width: float) -> Genome:
        """The genome that runs every step at `width`."""
        return (self.index(width),) * self.segments

    def uniforms(self) -> list[Genome]:
        """The uniform genomes, widest first."""
        return [self.uniform(width) for width in self.widths]

    def ramp(self, first: float, second: float, switch: int) -> Genome:
        """`first` for the first `switch` parts, then `second`; the same in both branches."""
        before, after = self.index(first), self.index(second)
        branch = (before,) * switch + (after,) * (self.parts - switch)
        return branch * (self.segments // self.parts)

    def relative_costs(self, genomes: np.ndarray, cost_per_width: dict[float, float]) -> np.ndarray:
        """Costs of genomes (N, segments) as shares of all steps at the widest width, (N,)."""
        costs = np.array([{**cost_per_width, SKIP: 0.0}[choice] for choice in self.choices])
        lengths = self._calls_of_segments()
        full = lengths.sum() * cost_per_width[self.widths[0]]
        return costs[np.asarray(genomes, int)] @ lengths / full

    def _calls_of_segments(self) -> np.ndarray:
        """Network calls of each segment; guidance that follows the steps doubles all alike."""
        per_part = np.bincount(self._segment_of_step, self.steps.calls_of_steps)
        return np.tile(per_part, self.segments // self.parts)

    def to_text(self, genome: Genome) -> str:
        """One digit a segment."""
        return "".join(_DIGITS[index] for index in genome)

    def from_text(self, text: str) -> Genome:
        """Read what `to_text` wrote.

        Raises:
            InputError: the text has another length or a digit without a width, or skips all steps.
        """
        genome = tuple(_DIGITS.find(digit) for digit in text)
        valid = all(0 <= index < len(self.choices) for index in genome)
        if len(genome) != self.segments or not valid or not self.is_schedule(genome):
            rule = f"must be {self.segments} digits below {len(self.choices)}"
            raise invalid("schedule", text, rule)
        return genome
