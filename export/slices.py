"""Finding a narrow network's weights in the widest one's TFLite file.

Arrays are found by their content, not by their names or places: whatever the converter does to a
weight, it does to the wide and to the narrow one alike, and what it folds into something else is no
slice and stays as it is. The networks' own channel axes say which ranges of an axis a width keeps.
Behind the arrays both files have their graph of operators, which hardly differs.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ddsm_tf.edge.assembly import Axis, Patch, Recipe, Slice, keep
from ddsm_tf.models.layers import SlimmableLayer

# A slice takes some twenty bytes in a recipe: a smaller array is as well off among the literals.
SMALLEST = 64

Axes = dict[tuple[int, int], set[Axis]]


class Array(NamedTuple):
    """A constant of a TFLite file: where it begins, and its items as unsigned integers."""

    start: int
    values: np.ndarray


def make_recipe(narrow: bytes, wide: bytes, unet: Any, width: float) -> Recipe:
    """The narrow file as slices of the wide one and literal bytes.

    Args:
        narrow: TFLite file of `unet.subnet(width)`.
        wide: TFLite file of the widest network.
        unet: the `SlimmableUNet`.
        width: of `narrow`.
    """
    sources, axes = constants(wide), kept_axes(unet, width)
    pieces: list[int | Patch | Slice] = []
    literals, end, behind = [], 0, 0
    for array in constants(narrow):
        behind = max(behind, array.start + array.values.nbytes)
        piece = find_slice(array.values, sources, axes) if array.start >= end else None
        if piece:
            pieces += [array.start - end, piece]
            literals.append(narrow[end : array.start])
            end = array.start + array.values.nbytes
    graph, literal = graph_piece(narrow[behind:], wide)
    literals += [narrow[end:behind], literal]
    pieces += [behind - end, graph]
    return Recipe(tuple(piece for piece in pieces if piece != 0), b"".join(literals))


def graph_piece(graph: bytes, wide: bytes) -> tuple[int | Patch, bytes]:
    """The end of the narrow file as what differs from the wide one's, if that compresses better.

    Returns:
        The piece and its literal bytes.
    """
    ours, theirs = (np.frombuffer(data, np.uint8) for data in (graph, wide[-len(graph) :]))
    if len(graph) == 0 or len(ours) != len(theirs):
        return len(graph), graph
    difference = (ours ^ theirs).tobytes()
    if len(zlib.compress(difference)) >= len(zlib.compress(graph)):
        return len(graph), graph
    return Patch(len(wide) - len(graph), len(graph)), difference


def constants(data: bytes) -> list[Array]:
    """The constant arrays of a TFLite file of at least `SMALLEST` bytes, in their order there."""
    return sorted(_constants(data), key=lambda array: array.start)


def _constants(data: bytes) -> Iterator[Array]:
    model = schema.Model.GetRootAs(data, 0)
    beginning = np.frombuffer(data, np.uint8).ctypes.data
    seen = set()
    for subgraph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for tensor in map(subgraph.Tensors, range(subgraph.TensorsLength())):
            buffer = model.Buffers(tensor.Buffer())
            if tensor.Buffer() in seen or buffer.DataLength() < SMALLEST:
                continue
            seen.add(tensor.Buffer())
            content = buffer.DataAsNumpy()
            shape = tuple(map(int, tensor.ShapeAsNumpy()))
            item, rest = divmod(len(content), int(np.prod(shape)))
            # Packed four-bit weights and texts have no whole items.
            if rest == 0 and item in (1, 2, 4, 8):
                start = content.ctypes.data - beginning
                yield Array(start, content.view(f"u{item}").reshape(shape))


def kept_axes(unet: Any, width: float) -> Axes:
    """(size at full width, size at `width`) → what the network's channel axes keep there."""
    axes: Axes = {}
    for layer in unet._flatten_layers():
        if not isinstance(layer, SlimmableLayer):
            continue
        for parts in (parts for _, by_axis in layer.weight_axes() for parts in by_axis.values()):
            ranges, offset = [], 0
            for part in parts:
                ranges.append((offset, offset + part.active(width)))
                offset += part.channels
            axis = Axis(offset, tuple(ranges))
            axes.setdefault((axis.size, axis.kept), set()).add(axis)
    return axes


def find_slice(narrow: np.ndarray, sources: list[Array], axes: Mapping) -> Slice | None:
    """A slice of one of the sources that equals `narrow` to the last bit."""
    for source in sources:
        if source.values.dtype != narrow.dtype or source.values.ndim != narrow.ndim:
            continue
        sizes = zip(source.values.shape, narrow.shape, strict=True)
        options = [_options(size, kept, axes) for size, kept in sizes]
        for chosen in itertools.product(*options):
            if _equals(narrow, source.values, chosen):
                return Slice(source.start, narrow.itemsize, chosen)
    return None


def _options(size: int, kept: int, axes: Mapping) -> list[Axis]:
    whole = [Axis(size, ((0, size),))] if size == kept else []
    return whole or sorted(axes.get((size, kept), ()))


def _equals(narrow: np.ndarray, wide: np.ndarray, axes: tuple[Axis, ...]) -> bool:
    # The first row tells most arrays apart, and takes no time.
    first_row = (Axis(1, ((0, 1),)), *axes[1:])
    return np.array_equal(keep(wide[:1], first_row), narrow[:1]) and np.array_equal(
        keep(wide, axes), narrow
    )
