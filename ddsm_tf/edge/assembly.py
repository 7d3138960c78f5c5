"""Narrow networks re-assembled from the widest one's file, with NumPy alone.

A narrow network's weights are slices of the widest network's, so a bundle stores a narrow TFLite
file as a recipe. A `.slices` file is one zlib stream (RFC 1950) that holds

1. one line of JSON, ended by "\\n":
   `{"format": "ddsm-slices", "version": 2, "pieces": [...]}`
2. the literal bytes: whatever in the narrow file is no slice.

The narrow file is its pieces one after the other. A piece is one of

- an integer n: the next n literal bytes;
- a list `[start, n]`: the next n literal bytes, each exclusive-or the next byte of the widest file
  from byte `start` on. Graphs of operators differ from width to width in one byte of a
  hundred, so nearly all of these literals are zeros, which compress to nothing;
- a list `[start, item, axes]`: a slice of a row-major array that begins at byte `start` of the
  widest network's file and has items of `item` bytes (1, 2, 4 or 8). `axes` has a list for each
  axis: `[size, first, stop, first, stop, ...]`, the axis's size in the widest file and the ranges
  `first <= i < stop` that the narrow network keeps, in rising order. An axis behind a concatenation
  has two ranges, every other axis one.

So `[1024, 4, [[64, 0, 16], [3, 0, 3], [3, 0, 3], [96, 0, 16, 64, 72]]]` is a 3×3 kernel, float32
OHWI, with 16 of its 64 outputs and 16 + 8 of its 64 + 32 inputs. Slices are copied byte for byte:
no number is computed, so the result is the narrow network's own file to the last bit.

A recipe may come from a stranger. It is checked whole before anything is assembled: it cannot read
outside the widest file, give more bytes than announced, or have more read than twice that file.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import check_keys

FORMAT = "ddsm-slices"
VERSION = 2
# The JSON line of a network with hundreds of layers takes some ten thousand bytes.
MAX_HEADER_BYTES = 2**20
MAX_AXES = 8
MAX_RANGES = 8
# What is read of the widest file at a time, in bytes.
CHUNK = 2**20

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Axis(NamedTuple):
    """One axis of an array: its size, and the ranges [first, stop) that are kept."""

    size: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def kept(self) -> int:
        """How many indices the ranges keep."""
        return sum(stop - first for first, stop in self.ranges)


class Slice(NamedTuple):
    """Part of an array in the widest network's file; see the module's description."""

    start: int
    item: int
    axes: tuple[Axis, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis in the widest file."""
        return self.item * math.prod(axis.size for axis in self.axes[1:])

    @property
    def stop(self) -> int:
        """Where the array ends in the widest file."""
        return self.start + self.axes[0].size * self.row_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes that the slice gives."""
        return self.item * math.prod(axis.kept for axis in self.axes)

    @property
    def read_bytes(self) -> int:
        """Bytes that are read to get it: whole rows."""
        return self.axes[0].kept * self.row_bytes


class Patch(NamedTuple):
    """Literal bytes that change those of the widest file; see the module's description."""

    start: int
    size: int
    # Beside the literals, of which it takes as many as it gives.
    kept_bytes = 0

    @property
    def stop(self) -> int:
        """Where the bytes end in the widest file."""
        return self.start + self.size

    @property
    def read_bytes(self) -> int:
        """Bytes that are read to get it."""
        return self.size


class Recipe(NamedTuple):
    """A narrow network's file as pieces: numbers of literal bytes, patches and slices."""

    pieces: tuple[int | Patch | Slice, ...]
    literal: bytes | memoryview

    def to_bytes(self) -> bytes:
        """The content of a `.slices` file."""
        pieces = list(map(_to_json, self.pieces))
        header = {"format": FORMAT, "version": VERSION, "pieces": pieces}
        line = json.dumps(header, separators=(",", ":")) + "\n"
        return zlib.compress(line.encode("ascii") + self.literal, 9)

    @classmethod
    def from_bytes(cls, data: bytes, *, network_bytes: int, source_bytes: int) -> Recipe:
        """Read and check what `to_bytes` wrote.

        Args:
            data: content of a `.slices` file.
            network_bytes: size of the file to assemble, which is not above `source_bytes`.
            source_bytes: size of the widest network's file.

        Raises:
            InputError: the recipe is broken, or does not fit these sizes.
        """
        if network_bytes > source_bytes:
            rule = f"must not be above the {source_bytes} bytes of the widest network"
            raise invalid("bytes", network_bytes, rule)
        line, literal = _inflate(data, MAX_HEADER_BYTES + network_bytes)
        try:
            recipe = cls(_parse_pieces(line), literal)
        # Values may be nested so deep that not even an error message can show them.
        except RecursionError as error:
            raise InputError("has a first line that is nested too deeply") from error
        recipe.check(network_bytes, source_bytes)
        return recipe

    def check(self, network_bytes: int, source_bytes: int) -> None:
        """Raise `InputError` unless the recipe gives so many bytes from such a file."""
        reads = [piece for piece in self.pieces if not isinstance(piece, int)]
        literal = sum(map(_literal_bytes, self.pieces))
        if literal != len(self.literal):
            raise invalid("pieces", literal, f"must use the {len(self.literal)} literal bytes")
        given = literal + sum(piece.kept_bytes for piece in reads)
        if given != network_bytes:
            raise invalid("pieces", given, f"must give the network's {network_bytes} bytes")
        if any(piece.stop > source_bytes for piece in reads):
            rule = f"must lie within the widest network's {source_bytes} bytes"
            raise invalid("pieces", max(piece.stop for piece in reads), rule)
        # Many slices that each read much and keep little would take for ever.
        read = sum(piece.read_bytes for piece in reads)
        if read > 2 * source_bytes:
            raise invalid("pieces", read, f"must not read above {2 * source_bytes} bytes")

    def assemble(self, source: BinaryIO) -> bytes:
        """The narrow network's file.

        Args:
            source: the widest network's file; it is read piece by piece, never as a whole.

        Raises:
            InputError: the file is shorter than it was.
        """
        out, offset = io.BytesIO(), 0
        for piece in self.pieces:
            if isinstance(piece, Slice):
                _copy_slice(piece, source, out)
                continue
            literal = memoryview(self.literal)[offset : offset + _literal_bytes(piece)]
            offset += len(literal)
            out.write(_patched(piece, literal, source) if isinstance(piece, Patch) else literal)
        return out.getvalue()


def keep(array: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """The ranges of every axis of an array."""
    for number, axis in enumerate(axes):
        before = (slice(None),) * number
        parts = [array[(*before, slice(*bounds))] for bounds in axis.ranges]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=number)
    return array


def _literal_bytes(piece: int | Patch | Slice) -> int:
    """How many literal bytes a piece takes."""
    if isinstance(piece, Slice):
        return 0
    return piece.size if isinstance(piece, Patch) else piece


def _patched(piece: Patch, literal: memoryview, source: BinaryIO) -> bytes:
    source.seek(piece.start)
    ours, theirs = (np.frombuffer(data, np.uint8) for data in (literal, _read(source, piece.size)))
    return (ours ^ theirs).tobytes()


def _read(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise InputError("the widest network's file has changed; copy the bundle again")
    return data


def _copy_slice(piece: Slice, source: BinaryIO, out: io.BytesIO) -> None:
    rows_at_once = max(1, CHUNK // piece.row_bytes)
    for first, stop in piece.axes[0].ranges:
        source.seek(piece.start + first * piece.row_bytes)
        for row in range(first, stop, rows_at_once):
            rows = min(rows_at_once, stop - row)
            data = _read(source, rows * piece.row_bytes)
            shape = (rows, *(axis.size for axis in piece.axes[1:]))
            block = np.frombuffer(data, _UNSIGNED[piece.item]).reshape(shape)
            out.write(keep(block, (Axis(rows, ((0, rows),)), *piece.axes[1:])).tobytes())


def _to_json(piece: int | Patch | Slice) -> Any:
    if not isinstance(piece, Slice):
        return piece
    axes = [
        [axis.size, *(bound for bounds in axis.ranges for bound in bounds)] for axis in piece.axes
    ]
    return [piece.start, piece.item, axes]


def _inflate(data: bytes, limit: int) -> tuple[bytes, memoryview]:
    """The JSON line and the literal bytes, at most `limit` bytes in all."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise InputError(f"is no zlib stream: {error}") from error
    if len(content) > limit or not stream.eof or stream.unused_data:
        raise InputError("must be one whole zlib stream that is not larger than its network")
    end = content.find(b"\n", 0, MAX_HEADER_BYTES)
    if end < 0:
        raise InputError("must begin with a line of JSON")
    # Not a copy: an integer network's literals are as large as its file.
    return content[:end], memoryview(content)[end + 1 :]


def _parse_pieces(line: bytes) -> tuple[int | Patch | Slice, ...]:
    try:
        header = json.loads(line)
    # ValueError: broken JSON or UTF-8, or more digits than Python turns into a number.
    except ValueError as error:
        raise InputError(f"has a first line that is not valid JSON: {error}") from error
    pieces = check_keys(header, format=FORMAT, version=VERSION, required={"pieces"})["pieces"]
    if not isinstance(pieces, list):
        raise invalid("pieces", pieces, "must be a list")
    return tuple(map(_piece, pieces))


def _piece(piece: Any) -> int | Patch | Slice:
    if type(piece) is int:
        return _integer(piece)
    if isinstance(piece, list) and len(piece) == 2:
        return Patch(*map(_integer, piece))
    return _slice(piece)


def _slice(piece: Any) -> Slice:
    if not isinstance(piece, list) or len(piece) != 3 or not isinstance(piece[2], list):
        rule = "must be numbers of bytes, [start, size] or [start, item, axes]"
        raise invalid("pieces", piece, rule)
    start, item, axes = piece
    if type(item) is not int or item not in _UNSIGNED:
        raise invalid("item", item, f"must be one of {sorted(_UNSIGNED)}")
    if not 1 <= len(axes) <= MAX_AXES:
        raise invalid("axes", axes, f"must be 1 to {MAX_AXES} lists")
    return Slice(_integer(start), item, tuple(map(_axis, axes)))


def _axis(values: Any) -> Axis:
    if not isinstance(values, list) or len(values) not in range(3, 2 * MAX_RANGES + 2, 2):
        raise invalid(
            "axes", values, f"must be [size, first, stop, ...], {MAX_RANGES} ranges at most"
        )
    size, *bounds = map(_integer, values)
    ranges = tuple(zip(bounds[::2], bounds[1::2], strict=True))
    rising = all(first < stop for first, stop in ranges)
    apart = all(one[1] <= two[0] for one, two in pairwise(ranges))
    if not rising or not apart or bounds[-1] > size:
        raise invalid("axes", values, "must hold rising ranges within the axis")
    return Axis(size, ranges)


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**40:
        raise invalid("pieces", value, "must hold integers in [0, 2^40)")
    return value
