"""The bundle: a folder with `manifest.json`, the widest network and what the others differ in."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ddsm_tf.edge.assembly import Recipe
from ddsm_tf.edge.files import AGAIN, check_listing, read_limited
from ddsm_tf.edge.manifest import (
    DEFAULT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    StoredNetwork,
    parse_manifest,
)
from ddsm_tf.errors import InputError, invalid
from ddsm_tf.schedule import StepSchedule


@dataclass(frozen=True)
class Bundle(Manifest):
    """What a device needs to sample: what the manifest says, and the folder it vouches for.

    Attributes:
        folder: where the files lie.
    """

    folder: Path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Bundle:
        """Read a bundle and check every file against the manifest.

        Raises:
            InputError: the manifest is missing or breaks a rule, the folder lacks a file or holds
                one more, or a file is not the one the manifest was written for.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise invalid(
                "BUNDLE", str(folder), "must be a folder made by `ddsm export RUN bundle`"
            )
        try:
            manifest = parse_manifest(read_limited(folder / MANIFEST, MAX_MANIFEST_BYTES))
            bundle = cls(folder=folder, **vars(manifest))
            bundle._check_files()
        except InputError as error:
            # A message quotes the manifest, where a name may be as long as the file.
            raise InputError(f"bundle {folder}: {str(error)[:500]}") from error
        return bundle

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths, widest first."""
        return tuple(self.networks)

    @property
    def schedule(self) -> StepSchedule:
        """The default schedule."""
        return self.schedules[DEFAULT]

    def find_schedule(self, name: str) -> StepSchedule:
        """The schedule of that name, or else of the file of that name.

        Raises:
            InputError: there is neither, or the file is no schedule.
        """
        if name in self.schedules:
            return self.schedules[name]
        if not Path(name).exists():
            rule = f"is no file and none of the bundle's {', '.join(self.schedules)}"
            raise invalid("schedule", name, rule)
        return StepSchedule.load(name)

    def tflite(self, width: float) -> bytes:
        """The plain TFLite file of a width, assembled if need be, and checked.

        Raises:
            InputError: the bundle has no such width, or a file has changed since it was loaded.
        """
        network = self.networks.get(width)
        if network is None:
            raise invalid("width", width, f"is not in the bundle; it has {list(self.networks)}")
        if network.slices_of is None:
            return network.file.read(self.folder)
        recipe = self._recipe(network)
        with network.slices_of.open(self.folder) as widest:
            content = recipe.assemble(widest)
        if hashlib.sha256(content).hexdigest() != network.plain.sha256:
            rule = f"does not give the network the manifest was written for; {AGAIN}"
            raise invalid("file", network.file.name, rule)
        return content

    def _check_files(self) -> None:
        check_listing(self.folder, [MANIFEST, *self.files])
        for file in self.files.values():
            file.check(self.folder)
        for width, network in self.networks.items():
            # A recipe may be whole and still give another network than the manifest's.
            if network.slices_of:
                self.tflite(width)

    def _recipe(self, network: StoredNetwork) -> Recipe:
        data = network.file.read(self.folder)
        try:
            return Recipe.from_bytes(
                data,
                network_bytes=network.plain.bytes,
                source_bytes=network.slices_of.bytes,
            )
        except InputError as error:
            raise InputError(f"file {network.file.name}: {error}") from error
