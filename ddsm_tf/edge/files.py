"""Reading the files of a bundle that may come from a stranger."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ddsm_tf.errors import InputError, invalid

# A TFLite file is a flatbuffer, whose offsets have 31 bits.
MAX_FILE_BYTES = 2**31 - 1
AGAIN = "export or copy the bundle again"

# Not every system has them. Without NONBLOCK, opening a named pipe would wait for its other end.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_FLAGS |= getattr(os, "O_BINARY", 0)


class StoredFile(NamedTuple):
    """A file of a bundle, as its manifest describes it.

    Attributes:
        name: of the file, in the bundle's folder.
        bytes: its size.
        sha256: 64 hexadecimal digits.
    """

    name: str
    bytes: int
    sha256: str

    def open(self, folder: Path) -> BinaryIO:
        """The file for reading, if it is a regular file of the right size."""
        file = open_regular(folder / self.name)
        size = os.fstat(file.fileno()).st_size
        if size != self.bytes:
            file.close()
            raise self._changed()
        return file

    def check(self, folder: Path) -> None:
        """Raise `InputError` unless the file is the one that the manifest was written for."""
        with self.open(folder) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                raise self._changed()

    def read(self, folder: Path) -> bytes:
        """The content, checked: what is verified is what is used."""
        with self.open(folder) as file:
            content = file.read(os.fstat(file.fileno()).st_size)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise self._changed()
        return content

    def _changed(self) -> InputError:
        return invalid("file", self.name, f"is not the file the manifest was written for; {AGAIN}")


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a link, a folder, a pipe or a device is refused.

    Raises:
        InputError: the file is missing, cannot be read or is no regular file.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError as error:
        raise invalid("file", path.name, f"is missing; {AGAIN}") from error
    except OSError as error:
        rule = f"cannot be read as a regular file: {error.strerror}"
        raise invalid("file", path.name, rule) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise invalid("file", path.name, "must be a regular file")
    return open(descriptor, "rb")


def read_limited(path: Path, limit: int) -> bytes:
    """A regular file's content.

    Raises:
        InputError: see `open_regular`, or it is larger than `limit` bytes.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise invalid("file", path.name, f"is larger than {limit} bytes")
    return content


def check_listing(folder: Path, names: Collection[str]) -> None:
    """Raise `InputError` unless the folder holds these files and nothing else."""
    found = {path.name for path in folder.iterdir()}
    for name in names:
        if name not in found:
            raise invalid("file", name, f"is missing; {AGAIN}")
    extra = sorted(found - set(names))
    if extra:
        rule = "is not in the manifest; a bundle's folder holds nothing else"
        raise invalid("file", extra[0], rule)
