"""A folder with a configuration, checkpoints and weights: what runs of all kinds share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Self

from ddsm_tf.errors import invalid
from ddsm_tf.training.checkpoints import Checkpoints
from ddsm_tf.training.flat_config import FlatConfig

# What a run folder keeps of its data, named by what it was made of: any run may find it there.
CACHES = ("cache", "latents")


class RunFolder:
    """A folder with a configuration, checkpoints, weights and logs.

    Attributes:
        path: the folder.
        config: its `config.json`.
    """

    Config: ClassVar[type[FlatConfig]]
    command: ClassVar[str]

    def __init__(self, path: Path, config: Any) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: str | os.PathLike, config: Any) -> Self:
        """Start a run in a folder that is new, empty, or holds nothing but `CACHES`.

        Raises:
            InputError: the folder holds something already, or is a file.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise invalid("--out", str(path), "is a file; name a folder")
        if path.is_dir() and not holds_no_run(path):
            is_run = (path / "config.json").exists()
            remedy = "pass --resume to go on with it" if is_run else "choose a new or empty folder"
            raise invalid("--out", str(path), f"exists and is not empty; {remedy}")
        path.mkdir(parents=True, exist_ok=True)
        config.save(path / "config.json")
        return cls(path, config)

    @classmethod
    def open(cls, path: str | os.PathLike) -> Self:
        """Open an existing run.

        Raises:
            InputError: `path` is no run folder, or its configuration is broken.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            rule = f"is no run folder (no config.json); see `{cls.command}`"
            raise invalid("RUN", str(path), rule)
        return cls(path, cls.Config.load(path / "config.json"))

    @property
    def checkpoints(self) -> Checkpoints:
        """The states of its training."""
        return Checkpoints(self.path / "checkpoints")


def holds_no_run(path: Path) -> bool:
    """Whether a folder has room for a run: there is nothing in it that a run would not find."""
    return all(item.name in CACHES for item in path.iterdir())
