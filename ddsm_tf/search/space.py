"""The space of schedules that a search walks: one width for each segment of the steps."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.schedule import StepSchedule

Genome = tuple[int, ...]
"""For each segment, in sampling order, the index of its width; 0 is the widest."""

_DIGITS = string.digits + string.ascii_lowercase


class ScheduleSpace:
    """Step schedules whose steps share a width within each of some equal segments.

    A genome is written as one text, a digit a segment: "0012" runs the first half of the steps at
    the widest width, the third quarter at the second, and the last at the third.

    Args:
        steps: timesteps and sampler of every schedule; its widths do not matter.
        widths: the model's widths, at most 36.
        segments: how many segments; more than there are steps means one a step.

    Raises:
        InputError: an argument breaks its rule.
    """

    def __init__(self, steps: StepSchedule, widths: Sequence[float], segments: int) -> None:
        if segments < 1:
            raise invalid("segments", segments, "must be at least 1")
        if not 1 <= len(widths) <= len(_DIGITS):
            raise invalid("widths", tuple(widths), f"must be 1 to {len(_DIGITS)} widths")
        self.steps = steps
        self.widths = tuple(sorted(widths, reverse=True))
        self.segments = min(segments, len(steps))
        parts = np.array_split(np.arange(len(steps)), self.segments)
        self._segment_of_step = np.repeat(np.arange(self.segments), [len(part) for part in parts])

    @property
    def size(self) -> int:
        """How many schedules there are."""
        return len(self.widths) ** self.segments

    def schedule(self, genome: Genome) -> StepSchedule:
        """The schedule of a genome."""
        return self.steps.with_widths(self.widths[genome[k]] for k in self._segment_of_step)

    def uniform(self, width: float) -> Genome:
        """The genome that runs every step at `width`."""
        return (self.widths.index(width),) * self.segments

    def to_text(self, genome: Genome) -> str:
        """One digit a segment."""
        return "".join(_DIGITS[index] for index in genome)

    def from_text(self, text: str) -> Genome:
        """Read what `to_text` wrote.

        Raises:
            InputError: the text has another length or a digit without a width.
        """
        genome = tuple(_DIGITS.find(digit) for digit in text)
        valid = all(0 <= index < len(self.widths) for index in genome)
        if len(genome) != self.segments or not valid:
            rule = f"must be {self.segments} digits below {len(self.widths)}"
            raise invalid("schedule", text, rule)
        return genome
