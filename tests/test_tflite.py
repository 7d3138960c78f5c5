"""TFLite in every precision: what is integer, how far it is off, who runs it, at which batch."""

import json

import click
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.tools import flatbuffer_utils
from conftest import TINY, randomise

from ddsm_tf import cli, export
from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.errors import InputError
from ddsm_tf.export import QUANTIZE, tflite
from ddsm_tf.export.calibration import Samples, calibration_samples, own_timesteps
from ddsm_tf.export.quantization import end_convolutions, quantized
from ddsm_tf.export.tflite import convert, delegation
from ddsm_tf.models import DiffusionModel, SlimmableUNet, compiled
from ddsm_tf.models.compiled import CompiledDenoiser
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import network_calls
from ddsm_tf.schedule import StepSchedule, even_timesteps

TABLE = NoiseTable.linear(1000)
BATCH = 3
INTEGERS = QUANTIZE[2:]
# At most so large an error, as a share of the output.
TOLERANCE = {"float16": 0.002, "dynamic": 0.04, "dynamic-mixed": 0.035, "int8": 0.1}
TOLERANCE |= {"int8-mixed": 0.09}


@pytest.fixture(scope="module")
def unet():
    """One width with attention, as small as it gets: converting is what takes time here."""
    settings = {"channel_multipliers": (1,), "attention_resolutions": (), "widths": (1.0,)}
    return randomise(SlimmableUNet(**{**TINY, **settings}, name="unet"))


@pytest.fixture(scope="module")
def schedule():
    return StepSchedule.uniform(1.0, even_timesteps(1000, 20))


@pytest.fixture(scope="module")
def samples(unet, schedule):
    denoise = CompiledDenoiser(unet)
    return calibration_samples(denoise, schedule, TABLE, (8, 8, 1), (1.0,), count=64)[1.0]


@pytest.fixture(scope="module")
def files(unet, samples):
    """The network in every precision, for any batch."""
    floats = {name: convert(unet, quantize=name) for name in ("none", "float16")}
    return floats | {name: quantized(floats["none"], name, samples) for name in INTEGERS}


@pytest.fixture(scope="module")
def fixed_bundle(unet, schedule, tmp_path_factory):
    """The network in float32 for `BATCH` images at a time."""
    out = tmp_path_factory.mktemp("fixed") / "bundle"
    return export.export("bundle", unet, TABLE, schedule, out, batch=BATCH)


@pytest.fixture(scope="module")
def fixed_files(fixed_bundle, samples):
    data = (fixed_bundle / "unet_1_0.tflite").read_bytes()
    return {"none": data} | {name: quantized(data, name, samples) for name in INTEGERS}


class Graph:
    """Operators of a file with the types of what they take and give."""

    def __init__(self, data):
        resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = Interpreter(model_content=data, experimental_op_resolver_type=resolver)
        self.types = {d["index"]: d["dtype"] for d in interpreter.get_tensor_details()}
        self.operators = interpreter._get_ops_details()

    def inputs(self, name):
        """The types of the first two inputs of every operator of a name."""
        return [
            tuple(self.types[i] for i in op["inputs"][:2])
            for op in self.operators
            if op["op_name"] == name
        ]

    def before(self, name):
        """Names of the operators that those of a name depend on."""
        makers = {tensor: op for op in self.operators for tensor in op["outputs"]}
        waiting = [i for op in self.operators if op["op_name"] == name for i in op["inputs"]]
        found = set()
        while waiting:
            maker = makers.get(waiting.pop())
            if maker:
                found.add(maker["op_name"])
                waiting += maker["inputs"].tolist()
        return found


def run(data, x, t):
    interpreter = Interpreter(model_content=data)
    inputs = {len(d["shape"]): d for d in interpreter.get_input_details()}
    if inputs[4]["shape_signature"][0] < 0:
        for details in inputs.values():
            interpreter.resize_tensor_input(details["index"], (len(x), *details["shape"][1:]))
    interpreter.allocate_tensors()
    interpreter.set_tensor(inputs[4]["index"], x)
    interpreter.set_tensor(inputs[1]["index"], np.full(len(x), t, np.float32))
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_xnnpack_runs_the_whole_network_at_any_batch(files, quantize):
    for batch in (None, 5):
        assert delegation(files[quantize], batch) == (1, {})


@pytest.mark.parametrize("quantize", ["none", *INTEGERS])
def test_xnnpack_runs_the_whole_network_at_a_fixed_batch(fixed_files, quantize):
    data = fixed_files[quantize]
    assert delegation(data) == (1, {})
    shapes = [d["shape_signature"] for d in Interpreter(model_content=data).get_input_details()]
    assert sorted(map(tuple, shapes)) == [(BATCH,), (BATCH, 8, 8, 1)]


def test_what_is_left_between_partitions_is_counted():
    """XNNPACK has no cumulative sum."""

    @tf.function(input_signature=[tf.TensorSpec((4,), tf.float32)], autograph=False)
    def function(x):
        return tf.nn.relu(tf.cumsum(tf.nn.relu(x * 2.0)) + 1.0) * 3.0

    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    assert delegation(converter.convert()) == (2, {"CUMSUM": 1})


def test_int8_computes_in_integers_but_where_eight_bits_are_too_few(files):
    graph = Graph(files["int8"])
    int8, float32 = (np.int8, np.int8), (np.float32, np.float32)
    convolutions = graph.inputs("CONV_2D")
    assert len(convolutions) > 10 and set(convolutions) == {int8}
    assert int8 in graph.inputs("FULLY_CONNECTED") and int8 in graph.inputs("CONCATENATION")
    for name in ("SIN", "COS", "SOFTMAX", "RSQRT"):
        assert {types[0] for types in graph.inputs(name)} == {np.float32}, name
    assert set(graph.inputs("BATCH_MATMUL")) == {float32}
    # The sinusoids of a rounded timestep would be noise.
    assert "MUL" in graph.before("SIN") and "DEQUANTIZE" not in graph.before("SIN")
    assert "DEQUANTIZE" in graph.before("SOFTMAX")
    details = Interpreter(model_content=files["int8"])
    ends = details.get_input_details() + details.get_output_details()
    assert {end["dtype"] for end in ends} == {np.float32}


@pytest.mark.parametrize(("quantize", "inputs"), [("int8", np.int8), ("dynamic", np.float32)])
def test_mixed_precision_keeps_the_first_and_the_last_convolution_float(files, quantize, inputs):
    plain = Graph(files[quantize]).inputs("CONV_2D")
    assert set(plain) == {(inputs, np.int8)}
    mixed = Graph(files[f"{quantize}-mixed"]).inputs("CONV_2D")
    assert mixed[0] == mixed[-1] == (np.float32, np.float32)
    assert mixed[1:-1] == plain[1:-1]


def test_the_convolutions_at_the_ends_are_found(files):
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(files["none"]))
    tensors, ends = model.subgraphs[0].tensors, end_convolutions(model)
    shapes = [tuple(t.shape) for name in ends for t in tensors if t.name.decode() == name]
    assert shapes == [(1, 8, 8, 8), (1, 8, 8, 1)]


def test_errors_are_small_at_every_timestep(files, samples):
    early, late = samples.t.max(), samples.t.min()
    found = {name: [] for name in QUANTIZE}
    for t in (early, np.median(samples.t), late):
        x = samples.x[np.argsort(np.abs(samples.t - t))[:8]]
        exact = run(files["none"], x, t)
        for name in QUANTIZE:
            error = run(files[name], x, t) - exact
            found[name].append(np.sqrt(np.mean(error**2) / np.mean(exact**2)))
    assert found["none"] == [0.0] * 3
    for name, tolerance in TOLERANCE.items():
        assert min(found[name]) > 0 and max(found[name]) < tolerance, (name, found[name])
    assert max(found["float16"]) < min(found["dynamic-mixed"])
    for name in ("dynamic", "int8"):
        # Random weights are as sensitive at the ends as elsewhere.
        assert np.mean(found[f"{name}-mixed"]) < 1.02 * np.mean(found[name])


def test_files_are_smaller(files):
    for name in QUANTIZE[1:]:
        assert len(files[name]) < 0.97 * len(files["none"]), name


def test_ranges_do_not_depend_on_the_order_of_samples_or_the_batch(files, fixed_files, samples):
    backwards = Samples(samples.x[::-1], samples.t[::-1])
    assert quantized(files["none"], "int8", backwards) == files["int8"]
    x = samples.x[:BATCH]
    expected = run(files["int8"], x, 400)
    np.testing.assert_allclose(run(fixed_files["int8"], x, 400), expected, atol=1e-5)


def test_ranges_come_from_the_samples(files, samples):
    data = quantized(files["none"], "int8", Samples(0.01 * samples.x, samples.t))
    x = samples.x[:8]
    exact = run(files["none"], x, 400)
    near, far = (np.abs(run(file, x, 400) - exact).mean() for file in (files["int8"], data))
    assert far > 3 * near


def test_convert_quantises_with_the_samples_it_is_given(unet, files, samples, monkeypatch):
    monkeypatch.setattr(tflite, "_from_tensorflow", lambda *args, **options: files["none"])
    assert convert(unet, quantize="int8-mixed", calibration=samples) == files["int8-mixed"]
    assert convert(unet, quantize="dynamic") == files["dynamic"]


def test_export_calibrates_each_width_on_its_share(tiny_unet, tiny_schedule, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        tflite, "write_tflite", lambda unet, folder, **options: given.update(options)
    )
    monkeypatch.setattr(compiled, "CompiledDenoiser", lambda unet: lambda x, t, width: 0.5 * x)
    out = tmp_path / "out"
    options = {"quantize": "int8-mixed", "batch": 2}
    export.export("tflite", tiny_unet, TABLE, tiny_schedule, out, **options)
    assert (given["quantize"], given["batch"]) == ("int8-mixed", 2)
    assert set(given["calibration"]) == set(tiny_unet.widths)
    calls = network_calls(tiny_schedule, TABLE)
    for width, found in given["calibration"].items():
        assert set(found.t) == set(own_timesteps(calls, width))
    export.export(
        "tflite", tiny_unet, TABLE, tiny_schedule, out, quantize="dynamic", overwrite=True
    )
    assert given["calibration"] is None


def test_each_width_gets_its_own_samples(tiny_unet, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tflite, "convert", lambda unet, **options: seen.append((unet, options)) or b"file"
    )
    samples = {1.0: "those of 1", 0.5: "those of 0.5"}
    options = {"quantize": "int8", "batch": 2}
    names = tflite.write_tflite(tiny_unet, tmp_path, calibration=samples, **options)
    assert names == {1.0: "unet_1_0.tflite", 0.5: "unet_0_5.tflite"}
    for (subnet, given), width in zip(seen, (1.0, 0.5), strict=True):
        assert subnet.base_channels == 8 * width
        assert given == {**options, "calibration": f"those of {width:g}"}


def test_a_fixed_batch_gives_the_same_images_at_any_batch_size(unet, fixed_bundle, schedule):
    assert json.loads((fixed_bundle / "manifest.json").read_text())["batch"] == BATCH
    expected = DiffusionModel(unet, TABLE).sample(schedule, 7, seed=5)
    assert expected.std() > 40
    sampler = EdgeSampler(Bundle.load(fixed_bundle))
    assert sampler.default_batch == BATCH
    for batch_size in (None, 1, BATCH, 5, 7):
        images = sampler.sample(7, 5, batch_size=batch_size)
        assert images.shape == (7, 8, 8, 1)
        assert np.abs(images.astype(int) - expected).max() <= 1, batch_size


def test_each_image_of_a_padded_batch_has_its_own_timestep(unet, fixed_bundle):
    x = np.random.default_rng(0).standard_normal((5, 8, 8, 1)).astype(np.float32)
    t = np.array([0, 100, 500, 900, 999], np.float32)
    found = EdgeSampler(Bundle.load(fixed_bundle)).denoise(x, t, 1.0)
    np.testing.assert_allclose(found, np.asarray(unet(x, t)), atol=1e-5)


def test_bad_arguments_are_refused(unet, schedule, tmp_path):
    for options, match in [
        ({"quantize": "int4"}, "`quantize` \\(='int4'\\) must be one of none, float16, dynamic"),
        ({"quantize": "int8"}, "`quantize` \\(='int8'\\) needs `calibration`"),
        ({"quantize": "int8-mixed"}, "needs `calibration`"),
        ({"batch": 0}, "`batch` \\(=0\\) must be at least 1"),
    ]:
        with pytest.raises(InputError, match=match):
            convert(unet, **options)
    with pytest.raises(InputError, match=r"`batch` \(=2\) is for tflite and bundle"):
        export.export("savedmodel", unet, TABLE, schedule, tmp_path / "out", batch=2)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_offer_every_precision():
    for command in ("export", "latency"):
        (option,) = [p for p in cli.ddsm.commands[command].params if p.name == "quantize"]
        assert isinstance(option.type, click.Choice)
        assert tuple(option.type.choices) == QUANTIZE


def test_the_export_command_passes_precision_and_batch_on(tiny_run, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(export, "export", lambda *args, **options: given.update(options))
    arguments = ["-o", str(tmp_path / "out"), "--quantize", "int8-mixed", "--batch", "2"]
    assert cli.run(["export", str(tiny_run), "bundle", *arguments]) == 0
    assert (given["quantize"], given["batch"]) == ("int8-mixed", 2)


def test_quantising_is_silent(files, samples, capfd):
    quantized(files["none"], "int8", samples)
    assert capfd.readouterr() == ("", "")
