"""Bundles: narrow networks are slices of the widest to the last bit; bytes do not vary."""

import hashlib
import io
import json
import shutil
import zlib

import numpy as np
import pytest
from conftest import TINY, randomise

from ddsm_tf.cli import run as run_cli
from ddsm_tf.cost import macs_per_width
from ddsm_tf.edge import Bundle
from ddsm_tf.edge.assembly import CHUNK, Axis, Patch, Recipe, Slice
from ddsm_tf.errors import InputError
from ddsm_tf.export import bundle as export_bundle
from ddsm_tf.export import export, tflite
from ddsm_tf.export.bundle import weights_sha256, write_bundle
from ddsm_tf.export.slices import constants, graph_piece
from ddsm_tf.export.tflite import numbered_layers, write_tflite
from ddsm_tf.models import SlimmableUNet
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule

TABLE = NoiseTable.linear(1000)
SCHEDULES = {"default": StepSchedule((500, 0), (0.5, 1.0))}


@pytest.fixture(scope="module")
def big_unet():
    """A network whose weights outweigh its operators."""
    return randomise(SlimmableUNet(**{**TINY, "base_channels": 64}))


@pytest.fixture(scope="module")
def plain(big_unet, tmp_path_factory):
    """Its plain TFLite files: folder, width → name."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, write_tflite(big_unet, folder)


@pytest.fixture(scope="module")
def big_bundle(big_unet, plain, tmp_path_factory):
    folder = shutil.copytree(plain[0], tmp_path_factory.mktemp("big") / "bundle")
    write_bundle(folder, plain[1], big_unet, TABLE, SCHEDULES, provenance={"note": "random"})
    return folder


def test_a_float_bundle_is_hardly_larger_than_its_widest_file(big_bundle):
    sizes = {path.name: path.stat().st_size for path in big_bundle.iterdir()}
    names = {"manifest.json", "unet_1_0.tflite", "unet_0_5.slices"}
    assert set(sizes) == names
    assert sum(sizes.values()) <= 1.05 * sizes["unet_1_0.tflite"]
    # The graph of operators, more than all of that, is not stored twice either.
    assert sizes["unet_0_5.slices"] < 8_000


def test_narrow_networks_are_assembled_to_the_last_bit(big_bundle, plain):
    bundle, (folder, files) = Bundle.load(big_bundle), plain
    assert bundle.widths == (1.0, 0.5)
    for width, name in files.items():
        assert bundle.tflite(width) == (folder / name).read_bytes()


def test_every_weight_is_a_slice_and_inputs_with_a_skip_have_two_ranges(big_bundle, plain):
    bundle, (folder, files) = Bundle.load(big_bundle), plain
    recipe = bundle._recipe(bundle.networks[0.5])
    slices = [piece for piece in recipe.pieces if isinstance(piece, Slice)]
    kernels = [piece for piece in slices if len(piece.axes) == 4 and piece.axes[1].size == 3]
    arrays = constants((folder / files[0.5]).read_bytes())
    shapes = sorted(array.values.shape for array in arrays if array.values.shape[1:2] == (3,))
    found = sorted(tuple(axis.kept for axis in piece.axes) for piece in kernels)
    assert found == shapes and len(found) >= 10
    # 128 channels from below and 128 of a skip, of which 64 each.
    ranges = {piece.axes[3].ranges for piece in kernels}
    assert ((0, 64), (128, 192)) in ranges and ((0, 32),) in ranges


def test_the_manifest_vouches_for_every_file(tiny_bundle, tiny_unet, tiny_schedule):
    text = (tiny_bundle / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["format"] == "ddsm-bundle" and manifest["version"] == 3
    assert manifest["image_shape"] == [8, 8, 1]
    assert manifest["value_range"] == [-1.0, 1.0]
    assert (manifest["quantize"], manifest["batch"]) == ("none", None)
    assert manifest["widths"] == {"1.0": "unet_1_0.tflite", "0.5": "unet_0_5.slices"}
    assert manifest["schedule"] == tiny_schedule.to_dict()
    assert manifest["schedules"] == {"full": tiny_schedule.with_widths([1.0] * 20).to_dict()}
    assert len(manifest["noise_table"]["betas"]) == 1000
    files = {p.name: p.read_bytes() for p in tiny_bundle.iterdir() if p.suffix != ".json"}
    assert manifest["sha256"] == {k: hashlib.sha256(v).hexdigest() for k, v in files.items()}
    assert manifest["bytes"] == {k: len(v) for k, v in files.items()}
    macs = macs_per_width(tiny_unet)
    assert {float(w): n["macs"] for w, n in manifest["networks"].items()} == macs
    assert manifest["networks"]["0.5"]["slices_of"] == "unet_1_0.tflite"
    unsealed = text.replace(manifest["manifest_sha256"], "0" * 64)
    assert hashlib.sha256(unsealed.encode()).hexdigest() == manifest["manifest_sha256"]


def test_two_exports_have_the_same_bytes(tiny_bundle, tiny_unet, tiny_schedule, tmp_path):
    names = [layer.name for layer in tiny_unet._flatten_layers()]
    again = export("bundle", tiny_unet, TABLE, tiny_schedule, tmp_path / "again")
    for path in tiny_bundle.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert [layer.name for layer in tiny_unet._flatten_layers()] == names


def test_layers_have_their_own_names_again_after_an_error(tiny_unet):
    names = [layer.name for layer in tiny_unet._flatten_layers()]
    with pytest.raises(ValueError, match="conversion"), numbered_layers(tiny_unet):
        assert tiny_unet.name == "SlimmableUNet_0"
        raise ValueError("conversion")
    assert [layer.name for layer in tiny_unet._flatten_layers()] == names


def test_the_weights_digest_tells_weights_apart(tiny_unet):
    # Rebuilding must not change it, one weight must.
    twin = SlimmableUNet.from_config(tiny_unet.get_config())
    twin.set_weights(tiny_unet.get_weights())
    assert weights_sha256(twin) == weights_sha256(tiny_unet)
    bias = twin.output_conv.bias
    bias.assign(bias + 1e-7)
    assert weights_sha256(twin) != weights_sha256(tiny_unet)


@pytest.mark.parametrize("broken", ["larger", "wrong"])
def test_a_narrow_network_that_is_no_slice_is_stored_whole(
    big_unet, plain, tmp_path, monkeypatch, broken
):
    if broken == "larger":
        monkeypatch.setattr(Recipe, "to_bytes", lambda self: bytes(2**22))
    else:
        monkeypatch.setattr(Recipe, "assemble", lambda self, source: b"something else")
    source, files = plain
    folder = shutil.copytree(source, tmp_path / "bundle")
    write_bundle(folder, files, big_unet, TABLE, SCHEDULES)
    bundle = Bundle.load(folder)
    assert [network.file.name for network in bundle.networks.values()] == list(files.values())
    assert bundle.tflite(0.5) == (source / files[0.5]).read_bytes()


def test_a_narrow_network_with_other_weights_keeps_them(big_unet, plain, tmp_path):
    """Pruned networks, say: what is no slice stands among the literal bytes."""
    source, files = plain
    folder = shutil.copytree(source, tmp_path / "bundle")
    narrow = bytearray((source / files[0.5]).read_bytes())
    kernel = max(constants(bytes(narrow)), key=lambda array: array.values.nbytes)
    narrow[kernel.start : kernel.start + kernel.values.nbytes : 5] = bytes(
        len(range(0, kernel.values.nbytes, 5))
    )
    (folder / files[0.5]).write_bytes(narrow)
    write_bundle(folder, files, big_unet, TABLE, SCHEDULES)
    bundle = Bundle.load(folder)
    assert bundle.tflite(0.5) == bytes(narrow)
    assert len(bundle._recipe(bundle.networks[0.5]).literal) > kernel.values.nbytes


def test_bad_names_and_notes_are_refused(tiny_unet, tiny_schedule, big_unet, plain, tmp_path):
    def refused(match, kind="bundle", **options):
        with pytest.raises(InputError, match=match):
            export(kind, tiny_unet, TABLE, tiny_schedule, tmp_path / "out", **options)

    refused("named with", schedules={"a/b": tiny_schedule})
    for name in ("default", "full"):
        refused(f"'{name}'.*every bundle has", schedules={name: tiny_schedule})
    refused("is not a width", schedules={"x": StepSchedule.uniform(0.3, (1, 0))})
    refused("are for a bundle", kind="tflite", schedules={"x": tiny_schedule})
    folder = shutil.copytree(plain[0], tmp_path / "bundle")
    with pytest.raises(InputError, match=r"provenance\.note"):
        write_bundle(folder, plain[1], big_unet, TABLE, SCHEDULES, provenance={"note": None})
    assert not (folder / "manifest.json").exists()


def test_the_command_adds_schedules_and_says_where_weights_come_from(tiny_run, tmp_path, capfd):
    out = tmp_path / "bundle"
    command = ["export", str(tiny_run), "bundle", "-o", str(out), "--add-schedule"]
    for bad in ("fast", "=uniform:1", "fast="):
        assert run_cli([*command, bad]) == 2
        assert "--add-schedule" in capfd.readouterr().err
    assert run_cli([*command, "a=uniform:1", "--add-schedule", "a=full"]) == 2
    assert "twice" in capfd.readouterr().err
    assert run_cli([*command, "fast=uniform:0.5"]) == 0
    bundle = Bundle.load(out)
    assert set(bundle.schedules) == {"default", "full", "fast"}
    assert set(bundle.schedules["fast"].widths) == {0.5}
    assert (bundle.provenance["preset"], bundle.provenance["training_steps"]) == ("digits", 10)


def test_overwrite_does_not_take_the_run_away(tiny_run, tmp_path, capfd):
    run = shutil.copytree(tiny_run, tmp_path / "runs" / "run")
    for out in (run, run.parent, run / ".." / "run"):
        assert run_cli(["export", str(run), "bundle", "-o", str(out), "--overwrite"]) == 2
        assert "name a folder of its own" in capfd.readouterr().err
    assert (run / "weights.keras").is_file()


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ({"note": "x" * 201}, r"`provenance\.note` .* at most 200 characters"),
        ({"note": "two\nlines"}, r"`provenance\.note` .* printable"),
        # The versions and the digest take four of the places.
        ({f"note_{i}": i for i in range(61)}, "`provenance` must .* at most 64 entries"),
    ],
)
def test_bad_notes_are_refused_before_anything_is_converted(
    tiny_unet, tiny_schedule, tmp_path, monkeypatch, notes, words
):
    monkeypatch.setattr(tflite, "write_tflite", lambda *_, **__: pytest.fail("converted"))
    with pytest.raises(InputError, match=words):
        export("bundle", tiny_unet, TABLE, tiny_schedule, tmp_path / "out", provenance=notes)
    assert list(tmp_path.iterdir()) == []


# Assembly by itself, against NumPy's own indexing.

AXES = (Axis(6, ((0, 2), (3, 5))), Axis(5, ((1, 4),)), Axis(7, ((0, 3), (4, 5), (6, 7))))


@pytest.mark.parametrize("item", [1, 2, 4, 8])
@pytest.mark.parametrize("chunk", [1, 100, CHUNK])
def test_slices_are_what_numpy_would_take(monkeypatch, item, chunk):
    monkeypatch.setattr("ddsm_tf.edge.assembly.CHUNK", chunk)
    source = np.random.default_rng(0).bytes(13 + 6 * 5 * 7 * item + 9)
    array = np.frombuffer(source, f"u{item}", 6 * 5 * 7, 13).reshape(6, 5, 7)
    expected = array[np.ix_([0, 1, 3, 4], [1, 2, 3], [0, 1, 2, 4, 6])].tobytes()
    recipe = Recipe((3, Slice(13, item, AXES), 2), b"abcde")
    sizes = {"network_bytes": len(expected) + 5, "source_bytes": len(source)}
    recipe = Recipe.from_bytes(recipe.to_bytes(), **sizes)
    assert recipe.assemble(io.BytesIO(source)) == b"abc" + expected + b"de"


def test_a_patch_changes_bytes_of_the_source():
    recipe = Recipe((1, Patch(3, 4), Patch(9, 0), 1), b"<\0\1\0\xff>")
    recipe = Recipe.from_bytes(recipe.to_bytes(), network_bytes=6, source_bytes=9)
    assert recipe.assemble(io.BytesIO(b"abcdefghi")) == b"<ddf\x98>"
    with pytest.raises(InputError, match="has changed"):
        recipe.assemble(io.BytesIO(b"abcdef"))


def test_only_a_graph_like_the_widest_network_s_is_a_patch():
    random = np.random.default_rng(0)
    wide = random.bytes(5000)
    near = bytearray(wide[-300:])
    near[7] ^= 1
    piece, literal = graph_piece(bytes(near), wide)
    assert piece == Patch(4700, 300) and literal == bytes(7) + b"\1" + bytes(292)
    for graph in (bytes(300), b"", 2 * wide):
        assert graph_piece(graph, wide) == (len(graph), graph)


class Watched(io.BytesIO):
    """A file that remembers how much was read at a time."""

    def __init__(self, content):
        super().__init__(content)
        self.reads = []

    def read(self, size=-1):
        self.reads.append(size)
        return super().read(size)


def test_the_source_is_read_piece_by_piece():
    source = Watched(bytes(8 * CHUNK))
    axes = (Axis(8 * CHUNK // 1024, ((0, 5 * CHUNK // 1024),)), Axis(1024, ((0, 512),)))
    recipe = Recipe((Slice(0, 1, axes),), b"")
    assert len(recipe.assemble(source)) == 5 * CHUNK // 2
    assert source.reads == [CHUNK] * 5


def packed(pieces, literal=b"", **header):
    header = {"format": "ddsm-slices", "version": 2, "pieces": pieces, **header}
    return zlib.compress(json.dumps(header).encode() + b"\n" + literal)


def row(*values):
    return [[0, 1, [list(values)]]]


GOOD = packed([[0, 1, [[50, 0, 8, 10, 12]]]])
HOSTILE = {
    "is no zlib stream": b"no recipe",
    "one whole zlib stream": GOOD[:-3],
    "one whole": GOOD + b"more",
    "not larger than its network": zlib.compress(bytes(10**8)),
    "begin with a line": zlib.compress(b"x" * 50),
    "not valid JSON": zlib.compress(b"{\n"),
    "nested too deeply": zlib.compress(b"[" * 10**5 + b"\n"),
    "format": packed([10], bytes(10), format="other"),
    "version": packed([10], bytes(10), version=1),
    "unknown keys": packed([10], bytes(10), more=1),
    "must be a list": packed({}),
    r"numbers of bytes, \[start": packed([True, 9], bytes(10)),
    r"\(=-1\)": packed([-1, 11], bytes(10)),
    r"2\^40": packed([2**70], bytes(10)),
    "use the 10 literal": packed([9], bytes(10)),
    "give the network's 10": packed([11], bytes(11)),
    r"start, item, axes": packed([[0, 1, 2]]),
    r"or \[start, item": packed([[0]]),
    r"\(=-2\)": packed([[0, -2], 12], bytes(10)),
    "literal bytes": packed([[0, 10]], bytes(9)),
    "within the widest network's 100": packed([[91, 10]], bytes(10)),
    "item": packed([[0, 3, [[50, 0, 10]]]]),
    "`axes`.*1 to 8 lists": packed([[0, 1, []]]),
    "1 to 8 lists": packed([[0, 1, [[1, 0, 1]] * 9]]),
    r"must be \[size": packed(row(50, 0)),
    "8 ranges at most": packed(row(50, *range(20))),
    "rising ranges within": packed(row(50, 41, 51)),
    "rising ranges": packed(row(50, 8, 8, 8, 18)),
    "rising": packed(row(50, 20, 30, 0, 10)),
    "lie within the widest": packed([[41, 1, [[60, 0, 10]]]]),
    "not read above 200": packed([[0, 1, [[1, 0, 1], [90, 0, 1]]]] * 10),
}


@pytest.mark.parametrize("rule", HOSTILE)
def test_hostile_recipes_are_refused(rule):
    assert Recipe.from_bytes(GOOD, network_bytes=10, source_bytes=100)
    with pytest.raises(InputError, match=rule) as caught:
        Recipe.from_bytes(HOSTILE[rule], network_bytes=10, source_bytes=100)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_network_larger_than_the_widest_is_refused():
    with pytest.raises(InputError, match="above the 9 bytes of the widest"):
        Recipe.from_bytes(GOOD, network_bytes=10, source_bytes=9)


def test_a_source_that_was_cut_is_refused():
    recipe = Recipe.from_bytes(GOOD, network_bytes=10, source_bytes=100)
    with pytest.raises(InputError, match="has changed"):
        recipe.assemble(io.BytesIO(bytes(11)))


def test_the_exporter_reads_its_own_recipes():
    recipe = Recipe((Slice(0, 1, (Axis(50, ((0, 8), (10, 12))),)),), b"")
    assert export_bundle._gives(recipe.to_bytes(), bytes(10), bytes(100))
    assert not export_bundle._gives(recipe.to_bytes(), bytes(9) + b"x", bytes(100))
    assert not export_bundle._gives(recipe.to_bytes(), bytes(11), bytes(100))
