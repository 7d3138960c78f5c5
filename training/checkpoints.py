"""Checkpoints: the whole state of training, from which it goes on as if it had never stopped."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import atomic_file

KEPT_CHECKPOINTS = 3


class Checkpoints:
    """The states of a run: every variable to the last bit, one `.npz` a checkpoint.

    Raw weights, moving average, optimizer, random state and step, so that training goes on as
    if it had never stopped. The newest few are kept.

    Args:
        folder: `checkpoints/` of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, rising."""
        names = (re.fullmatch(r"step_(\d+)\.npz", file.name) for file in self.folder.glob("*.npz"))
        return sorted(int(match[1]) for match in names if match)

    def file(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step_{step:08d}.npz"

    def save(self, step: int, variables: Sequence[Any]) -> None:
        """Write the variables' values, atomically; then drop the oldest checkpoints."""
        import keras

        values = {
            f"{index:05d}": keras.ops.convert_to_numpy(variable)
            for index, variable in enumerate(variables)
        }
        with atomic_file(self.file(step)) as temporary, open(temporary, "wb") as file:
            np.savez(file, step=np.int64(step), **values)
        for old in self.steps()[:-KEPT_CHECKPOINTS]:
            self.file(old).unlink()

    def restore_latest(self, variables: Sequence[Any]) -> int:
        """Assign the newest checkpoint's values; returns its step, 0 if there is none.

        Raises:
            InputError: the file is broken or belongs to another architecture.
        """
        # What a kill left of a checkpoint that was being written.
        for unfinished in self.folder.glob(".step_*"):
            unfinished.unlink()
        steps = self.steps()
        if not steps:
            return 0
        file = self.file(steps[-1])
        for variable, value in zip(variables, _read_values(file, variables), strict=True):
            variable.assign(value)
        return steps[-1]


def _read_values(file: Path, variables: Sequence[Any]) -> list[np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            names = sorted(name for name in archive.files if name != "step")
            values = [archive[name] for name in names]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        rule = f"is broken ({error}); delete it to go on from the one before"
        raise invalid("checkpoint", str(file), rule) from error
    shapes = [value.shape for value in values]
    expected = [tuple(variable.shape) for variable in variables]
    if shapes != expected:
        raise InputError(
            f"`checkpoint` (={str(file)!r}) holds {len(shapes)} arrays that do not fit the "
            f"{len(expected)} of this configuration; it belongs to another architecture"
        )
    return values
