"""`--xla`: the same numbers from compiled networks, for what can be compiled and nothing else."""

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import NOISY_SCHEDULE, TINY, randomise
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from ddsm_tf.cli import run as run_cli
from ddsm_tf.errors import InputError
from ddsm_tf.export import export
from ddsm_tf.export.savedmodel import SavedModelDenoiser
from ddsm_tf.models import DiffusionModel, SlimmableUNet, compiled
from ddsm_tf.models.compiled import CompiledDenoiser
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import width_name

TABLE = NoiseTable.linear(1000)


class Spelling:
    """A network that XLA cannot compile, for it has no text."""

    image_shape, num_classes = (4, 4, 1), 0

    def check_width(self, width):
        return width

    def __call__(self, x, t, width):
        return tf.strings.to_number(tf.strings.as_string(x, precision=9)) * width


def test_a_denoiser_is_compiled_by_xla_if_asked_and_not_else():
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(CompiledDenoiser(Spelling())(x, 0, 0.5), x / 2, atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match="AsString"):
        CompiledDenoiser(Spelling(), xla=True)(x, 0, 0.5)


@pytest.fixture(scope="module")
def small_unet():
    """Blocks of every kind, but few, for each takes XLA a second."""
    small = {"channel_multipliers": (1,), "attention_resolutions": (8,)}
    return randomise(SlimmableUNet(**{**TINY, **small}, name="unet"))


@pytest.fixture(scope="module")
def inputs():
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    return x, np.array([0, 500, 999], np.float32)


def test_the_compiled_network_has_the_same_outputs_for_every_batch_size(small_unet, inputs):
    denoise = CompiledDenoiser(small_unet, xla=True)
    x, t = inputs
    for rows in (3, 2):
        for width in small_unet.widths:
            expected = np.asarray(small_unet(x[:rows], t[:rows], width=width))
            np.testing.assert_allclose(denoise(x[:rows], t[:rows], width), expected, atol=1e-5)


def test_a_backend_without_xla_is_refused(tiny_unet, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(InputError, match=r"`xla` \(=True\) needs .* not torch"):
        CompiledDenoiser(tiny_unet, xla=True)


@pytest.fixture(scope="module")
def exported(small_unet, tmp_path_factory):
    out = tmp_path_factory.mktemp("xla") / "out"
    return export("savedmodel", small_unet, TABLE, NOISY_SCHEDULE, out, xla=True)


def functions_to_compile(version):
    content = (version / "saved_model.pb").read_bytes()
    functions = SavedModel.FromString(content).meta_graphs[0].graph_def.library.function
    return sum(function.attr["_XlaMustCompile"].b for function in functions)


def test_savedmodels_say_what_is_to_be_compiled(small_unet, exported, tiny_savedmodels):
    networks = [f"{width_name(width)}/1" for width in small_unet.widths]
    counts = [functions_to_compile(exported / name) for name in networks]
    assert min(counts) >= 1
    # Every width's, and neither the loop nor the noise.
    assert functions_to_compile(exported / "sampler/1") == sum(counts)
    for name in (*networks, "sampler/1"):
        assert functions_to_compile(tiny_savedmodels / name) == 0


def test_compiled_savedmodels_have_the_same_outputs(small_unet, exported, inputs):
    denoise = SavedModelDenoiser(exported)
    for width in small_unet.widths:
        expected = np.asarray(small_unet(*inputs, width=width))
        np.testing.assert_allclose(denoise(*inputs, width), expected, atol=1e-5)


def test_the_compiled_sampler_has_the_same_images(small_unet, exported):
    sampler = tf.saved_model.load(str(exported / "sampler" / "1"))
    given = {"seed": tf.constant(3, tf.int64), "count": tf.constant(4, tf.int64)}
    found = sampler.signatures["sample"](**given)["images"]
    expected = DiffusionModel(small_unet, TABLE).sample(NOISY_SCHEDULE, 4, seed=3)
    assert np.std(expected) > 20
    assert np.mean(np.abs(np.subtract(found, expected, dtype=int)) <= 1) >= 0.999


@pytest.mark.parametrize("options", [[], ["--xla"]], ids=["plain", "xla"])
@pytest.mark.parametrize("command", ["sample", "evaluate", "search"])
def test_commands_compile_by_xla_if_asked(tiny_run, tmp_path, monkeypatch, command, options):
    asked = []

    def compile_plainly(unet, width, xla, compile_width=compiled._compile):
        asked.append(xla)
        return compile_width(unet, width, False)

    monkeypatch.setattr(compiled, "_compile", compile_plainly)
    run = shutil.copytree(tiny_run, tmp_path / "run")
    more = {
        "sample": ["-n", "2", "--steps", "2", "-o", tmp_path / "grid.png"],
        "evaluate": ["-n", "2", "--steps", "2"],
        "search": ["--trials", "2"],
    }[command]
    assert run_cli([command, str(run), *map(str, more), *options]) == 0
    assert set(asked) == {bool(options)}


@pytest.mark.parametrize("runtime", ["keras", "savedmodel"])
def test_latency_measures_what_xla_compiled(tiny_run, tmp_path, capfd, runtime):
    out = tmp_path / "latency.json"
    arguments = ["latency", tiny_run, "-o", out, "--runtime", runtime, "--rounds", 1, "--xla"]
    assert run_cli(list(map(str, arguments))) == 0
    assert f"{runtime} compiled by XLA, batch 1" in capfd.readouterr().out
    content = json.loads(out.read_text())
    assert content["xla"] is True and set(content["widths"]) == {"1.0", "0.5"}


REFUSED = [
    (["export", "RUN", "bundle", "-o", "OUT", "--xla"], "`xla` (=True) is for savedmodel"),
    (["export", "RUN", "savedmodel", "--serving", "OUT", "--xla"], "`--xla` belongs to -o"),
    (["latency", "RUN", "-o", "OUT", "--runtime", "litert", "--xla"], "`xla` (=True) is for"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[:12])
def test_xla_is_refused_where_nothing_is_compiled(tiny_run, tmp_path, capfd, arguments, message):
    out = tmp_path / "out"
    named = {"RUN": str(tiny_run), "OUT": str(out)}
    assert run_cli([named.get(argument, argument) for argument in arguments]) == 2
    assert message in capfd.readouterr().err and not out.exists()
