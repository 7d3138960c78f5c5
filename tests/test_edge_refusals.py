"""No trust in a bundle: whatever was changed in one is refused, with the reason."""

import hashlib
import json
import os

import pytest
from conftest import run_command

from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge.manifest import sealed
from ddsm_tf.errors import InputError
from ddsm_tf.schedule import StepSchedule


def change(bundle, **fields):
    """Change entries of the manifest and have it vouch for itself again."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_bytes(sealed({**manifest, **fields}))


def test_a_tampered_file_is_refused(bundle):
    for name in ("unet_1_0.tflite", "unet_0_5.slices"):
        data = (bundle / name).read_bytes()
        middle = len(data) // 2
        (bundle / name).write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        with pytest.raises(InputError, match=f"{name}.*not the file the manifest"):
            Bundle.load(bundle)
        (bundle / name).write_bytes(data)


def test_a_file_that_changes_after_loading_is_refused(bundle):
    loaded = Bundle.load(bundle)
    data = bytearray((bundle / "unet_1_0.tflite").read_bytes())
    # The last byte of the first convolution's weights, which both networks share.
    start = next(p for p in loaded._recipe(loaded.networks[0.5]).pieces if not isinstance(p, int))
    data[start.start] ^= 1
    (bundle / "unet_1_0.tflite").write_bytes(data)
    for width, name in ((1.0, "unet_1_0.tflite"), (0.5, "unet_0_5.slices")):
        with pytest.raises(InputError, match=f"{name}.*the manifest was written for"):
            EdgeSampler(loaded).network(width)
    (bundle / "unet_1_0.tflite").write_bytes(data[:1000])
    with pytest.raises(InputError, match=r"unet_1_0.tflite.*not the file"):
        EdgeSampler(loaded).network(0.5)


def replace_by(make):
    def replaced(path):
        path.rename(path.parent.parent / "elsewhere")
        make(path)

    return replaced


STRANGE = {
    "not in the manifest": lambda path: (path.parent / "extra").touch(),
    "'.hidden'.*not in the manifest": lambda path: (path.parent / ".hidden").touch(),
    "'sub'.*not in the manifest": lambda path: (path.parent / "sub").mkdir(),
    "symbolic": replace_by(lambda path: path.symlink_to("../elsewhere")),
    "must be a regular file": replace_by(lambda path: path.mkdir()),
    "regular file$": replace_by(lambda path: os.mkfifo(path)),
    "not the file the manifest": lambda path: os.truncate(path, 2**40),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("words", STRANGE)
@pytest.mark.parametrize("name", ["unet_1_0.tflite", "unet_0_5.slices", "manifest.json"])
def test_what_is_no_ordinary_file_is_refused(bundle, words, name):
    STRANGE[words](bundle / name)
    if name == "manifest.json" and words.startswith("not the file"):
        words = "larger than"
    with pytest.raises(InputError, match=words.replace("symbolic", "symbolic|regular")):
        Bundle.load(bundle)


def test_a_missing_file_is_refused(bundle):
    (bundle / "unet_1_0.tflite").unlink()
    with pytest.raises(InputError, match=r"unet_1_0.tflite.*missing"):
        Bundle.load(bundle)


CHANGES = {
    "format": {"format": "zip"},
    "version": {"version": 4},
    r"version.*=1\)": {"version": 1},
    r"version.*True": {"version": True},
    "image_shape": {"image_shape": [8, 8]},
    "value_range": {"value_range": [0, 1]},
    "noise_table": {"noise_table": {}},
    "betas": {"noise_table": {"betas": [0.5, 2.0]}},
    "products of 1 - β": {"noise_table": {"betas": [1e-300] * 1000}},
    "within .0, 1.": {"noise_table": {"betas": [0.999] * 1000}},
    "timesteps": {"schedule": {**StepSchedule.uniform(1.0, (1, 0)).to_dict(), "timesteps": [0, 1]}},
    "is not a width of the model": {"schedule": StepSchedule.uniform(0.3, (1, 0)).to_dict()},
    "name of a file in the bundle": {"widths": {"1.0": "../unet_1_0.tflite"}},
    r"number in \(0, 1\]": {"widths": {"2.0": "unet_1_0.tflite"}},
    "sha256": {"sha256": {}},
    "unknown keys": {"surprise": 1},
    "must not repeat": {"widths": {"1.0": "unet_1_0.tflite", "1": "unet_0_5.slices"}},
    "at most 16777216": {"image_shape": [65536, 65536, 1]},
    "batch": {"batch": 0},
    "num_classes": {"num_classes": True},
    r"num_classes.*=-1\)": {"num_classes": -1},
    "null or have the keys": {"decoder": {"file": "decoder.tflite"}},
    "decoder.*is the file of a width": {
        "decoder": {"file": "unet_1_0.tflite", "image_shape": [8, 8, 1]}
    },
    "one entry for each of .*'decoder": {
        "decoder": {"file": "decoder.tflite", "image_shape": [8, 8, 1]}
    },
    "prediction": {"noise_table": {"betas": [0.1] * 1000, "prediction": "noise"}},
    "needs a model with classes": {
        "schedule": StepSchedule.uniform(1.0, (1, 0), guidance_scale=2.0).to_dict()
    },
    "`networks`": {"networks": {}},
    "`bytes`": {"bytes": {}},
    "of the names|other than 'default'": {"schedules": {"default": {}}},
    "printable": {"provenance": {"note": "\x1b[2J"}},
    r"provenance\.steps": {"provenance": {"steps": int("9" * 400)}},
    "named with": {"schedules": {"../x": StepSchedule.uniform(1.0, (1, 0)).to_dict()}},
}
NETWORK_CHANGES = {
    "above the": {"bytes": 2**30},
    "give the network's": {"bytes": 1000},
    "in \\[0, 2147483647\\]": {"bytes": 2**31},
    "64 hexadecimal": {"sha256": "0"},
    # The recipe is whole, and what it gives is not what was announced.
    "does not give the network": {"sha256": "1" * 64},
    "macs": {"macs": 0},
    "slices_of": {"slices_of": "unet_0_5.slices"},
}


@pytest.mark.parametrize("rule", NETWORK_CHANGES)
def test_a_changed_network_is_refused(bundle, rule):
    networks = json.loads((bundle / "manifest.json").read_text())["networks"]
    networks["0.5"].update(NETWORK_CHANGES[rule])
    change(bundle, networks=networks)
    with pytest.raises(InputError, match=rule):
        Bundle.load(bundle)


def test_a_manifest_that_does_not_vouch_for_itself_is_refused(bundle):
    path = bundle / "manifest.json"
    text = path.read_text()
    betas = json.loads(text)["noise_table"]["betas"]
    path.write_text(text.replace(repr(betas[500]), repr(betas[500] + 1e-6)))
    with pytest.raises(InputError, match=r"`manifest_sha256`.*is not that of the manifest"):
        Bundle.load(bundle)
    path.write_text(text.replace("{", '{\n "version": 2,', 1))
    with pytest.raises(InputError, match="key twice"):
        Bundle.load(bundle)


@pytest.mark.parametrize("rule", CHANGES)
def test_a_changed_manifest_is_refused(bundle, rule):
    change(bundle, **CHANGES[rule])
    with pytest.raises(InputError, match=rule):
        Bundle.load(bundle)


def test_a_truncated_manifest_is_refused(bundle):
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="not valid JSON"):
        Bundle.load(bundle)


def test_a_file_that_is_no_network_is_refused_with_one_line(bundle, tmp_path):
    (bundle / "unet_1_0.tflite").write_bytes(b"not a network")
    digest = hashlib.sha256(b"not a network").hexdigest()
    plain = {"bytes": 13, "sha256": digest, "macs": 1}
    (bundle / "unet_0_5.slices").unlink()
    change(
        bundle,
        widths={"1.0": "unet_1_0.tflite"},
        networks={"1.0": plain},
        bytes={"unet_1_0.tflite": 13},
        sha256={"unet_1_0.tflite": digest},
        schedule=StepSchedule.uniform(1.0, (500, 0)).to_dict(),
        schedules={},
    )
    done = run_command("ddsm_tf.edge.cli", "sample", bundle, "-o", tmp_path / "x.png")
    assert done.returncode == 2
    assert "unet_1_0.tflite" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
