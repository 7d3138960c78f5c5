"""Model optimization: an exact twin, files that compress, and networks that still predict noise."""

import json
import zlib

import numpy as np
import pytest
import tf_keras
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from conftest import TINY, eagerly, randomise

from ddsm_tf.cli import run as run_cli
from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.errors import InputError
from ddsm_tf.export import export
from ddsm_tf.export import optimize as optimization_module
from ddsm_tf.export.fine_tuning import NoisedImages
from ddsm_tf.export.optimize import Optimization, optimize, to_tflite
from ddsm_tf.export.tflite import convert, foreign_operators
from ddsm_tf.export.twin import twin_of, weights_back
from ddsm_tf.models import SlimmableUNet
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.training.run import Run

TABLE = NoiseTable.linear(1000)
IMAGES = np.random.default_rng(0).integers(0, 2, (50, 4, 4, 1), np.uint8) * np.uint8(255)
STEPS = 25


@pytest.fixture(scope="module")
def small():
    """A plain network with as few layers as there can be, and large kernels."""
    unet = SlimmableUNet(
        image_size=4,
        channels=1,
        base_channels=32,
        channel_multipliers=(1,),
        attention_resolutions=(),
        blocks_per_level=1,
        widths=(1.0,),
        name="unet",
    )
    return randomise(unet)


def optimized(unet, method):
    settings = Optimization(method, steps=STEPS, batch_size=32, learning_rate=3e-3)
    steps = []
    network = optimize(
        unet.subnet(1.0), settings, IMAGES, TABLE, on_step=lambda: steps.append(None)
    )
    assert len(steps) == STEPS
    return network


@pytest.fixture(scope="module")
def float_file(small):
    return convert(small.subnet(1.0))


@pytest.fixture(scope="module")
def pruned(small):
    return optimized(small, "prune")


@pytest.fixture(scope="module")
def clustered(small):
    return optimized(small, "cluster")


@pytest.fixture(scope="module")
def clustered_file(clustered):
    return to_tflite(clustered)


@pytest.fixture(scope="module")
def rounded(small):
    return optimized(small, "qat")


@pytest.fixture(scope="module")
def rounded_file(rounded):
    return to_tflite(rounded)


@pytest.fixture(scope="module")
def batch():
    return NoisedImages(IMAGES, TABLE, 400, 1, seed=9)[0]


def run_file(data, *inputs):
    interpreter = Interpreter(model_content=data)
    kinds = {(value.ndim, value.dtype): value for value in inputs}
    values = {
        details["index"]: kinds[len(details["shape"]), np.dtype(details["dtype"])]
        for details in interpreter.get_input_details()
    }
    for index, value in values.items():
        interpreter.resize_tensor_input(index, value.shape)
    interpreter.allocate_tensors()
    for index, value in values.items():
        interpreter.set_tensor(index, value)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def kernels(data, kind, dtype):
    """The file's constants of a type that are as large as the kernels between the two ends."""
    model = schema.ModelT.InitFromPackedBuf(data)
    tensors = [tensor for tensor in model.subgraphs[0].tensors if tensor.type == kind]
    buffers = [model.buffers[tensor.buffer].data for tensor in tensors]
    values = [np.frombuffer(bytes(data), dtype) for data in buffers if data is not None]
    # Constants of the normalisation are large, too, but hold two values.
    return [value for value in values if value.size >= 1024 and len(np.unique(value)) > 2]


def float_kernels(data):
    return kernels(data, schema.TensorType.FLOAT32, np.float32)


def layers_between_the_ends(unet):
    layers = [layer for layer in unet._flatten_layers() if hasattr(layer, "kernel")]
    return [layer for layer in layers if layer not in (unet.input_conv, unet.output_conv)]


def loss_of(output, batch):
    return float(np.mean(batch.weight * (np.asarray(output) - batch.target) ** 2))


def loss_with(unet, change, batch):
    """The loss of the network with every kernel between the ends changed, and no more."""
    changed = unet.subnet(1.0)
    for layer in layers_between_the_ends(changed):
        layer.kernel.assign(change(layer.kernel.numpy()))
    return loss_of(changed(*batch.inputs), batch)


def compressed(data):
    return len(zlib.compress(data, 9))


def test_the_twin_computes_what_the_network_computes():
    subnet = randomise(SlimmableUNet(**{**TINY, "dropout": 0.2}, name="unet")).subnet(0.5)
    twin = twin_of(subnet)
    random = np.random.default_rng(0)
    x = random.standard_normal((5, 8, 8, 1)).astype(np.float32)
    t = np.array([0, 3, 500, 700, 999], np.float32)
    expected = np.asarray(subnet(x, t))
    assert expected.std() > 0.1
    np.testing.assert_allclose(twin.model([x, t]).numpy(), expected, rtol=0, atol=1e-6)
    assert twin.model.count_params() == subnet.count_params()
    kinds = [type(layer) for layer in twin.model.layers]
    own = [type(layer).__name__ for layer in subnet._flatten_layers()]
    assert kinds.count(tf_keras.layers.Conv2D) == own.count("SlimmableConv2D") > 20
    assert kinds.count(tf_keras.layers.Dense) == own.count("SlimmableDense") > 5


def test_weights_go_back_exactly(small):
    subnet = small.subnet(1.0)
    twin = twin_of(subnet)
    twin.model.set_weights([2.0 * weight for weight in twin.model.get_weights()])
    weights_back(twin)
    for found, start in zip(subnet.trainable_variables, small.trainable_variables, strict=True):
        np.testing.assert_array_equal(found.numpy(), 2.0 * start.numpy())


def test_pruned_kernels_are_half_zeros_in_the_file(small, pruned, float_file):
    data = to_tflite(pruned)
    count = len(layers_between_the_ends(small))
    assert len(float_kernels(float_file)) == len(float_kernels(data)) == count
    assert all(np.mean(kernel == 0) < 0.01 for kernel in float_kernels(float_file))
    assert all(0.5 <= np.mean(kernel == 0) < 0.51 for kernel in float_kernels(data))
    assert compressed(data) < 0.65 * compressed(float_file)
    assert (small.input_conv.kernel.numpy() != 0).all()
    assert (pruned.input_conv.kernel.numpy() != 0).all()


def test_clustered_kernels_have_sixteen_values_in_the_file(small, clustered_file, float_file):
    found = [len(np.unique(kernel)) for kernel in float_kernels(clustered_file)]
    assert len(found) == len(layers_between_the_ends(small))
    assert max(found) == 16 and min(found) >= 8
    assert compressed(clustered_file) < 0.35 * compressed(float_file)
    assert abs(len(clustered_file) - len(float_file)) < 0.02 * len(float_file)


def test_fine_tuning_lowers_the_loss(small, pruned, clustered, rounded, batch):
    def halved(kernel):
        return np.where(np.abs(kernel) > np.median(np.abs(kernel)), kernel, 0)

    def sixteen(kernel):
        values = np.linspace(kernel.min(), kernel.max(), 16)
        return values[np.abs(kernel[..., None] - values).argmin(-1)]

    start = loss_of(small(*batch.inputs), batch)
    assert loss_of(pruned(*batch.inputs), batch) < 0.8 * loss_with(small, halved, batch)
    assert loss_of(clustered(*batch.inputs), batch) < 0.8 * loss_with(small, sixteen, batch)
    assert loss_of(rounded(*batch.inputs), batch) < 0.8 * start


def test_dynamic_int8_goes_on_top(clustered, clustered_file):
    data = to_tflite(clustered, quantize="dynamic")
    assert len(data) < 0.5 * len(clustered_file)
    int8 = kernels(data, schema.TensorType.INT8, np.int8)
    assert len(int8) == len(layers_between_the_ends(clustered))


def test_the_file_after_qat_rounds_as_training_did(small, rounded, rounded_file, float_file, batch):
    assert foreign_operators(rounded_file) == []
    x_t, t = batch.inputs
    emulated = np.asarray(rounded(x_t, t))
    error = run_file(rounded_file, x_t, t) - emulated
    assert 0 < np.std(error) < 0.05 * np.std(emulated)
    # All but the two dense layers of the timestep embedding.
    int8 = kernels(rounded_file, schema.TensorType.INT8, np.int8)
    assert len(int8) == len(layers_between_the_ends(small)) - 2
    assert len(float_kernels(rounded_file)) == 2
    assert len(rounded_file) < 0.5 * len(float_file)


def test_ranges_start_from_what_the_network_shows(small, rounded):
    layers = {layer.name: layer for layer in rounded.model.layers}
    rounding = [layer for name, layer in layers.items() if name.startswith("quant_")]
    assert len(rounding) == len(layers_between_the_ends(small)) - 2
    for name in ("input", "post_activation"):
        ends = [[w.numpy() for w in layer.weights if f"/{name}_m" in w.name] for layer in rounding]
        assert all(low <= 0 < high for low, high in ends)
        # tfmot would start from 6 and come down by some per cent in so few steps.
        assert min(high for _, high in ends) < 1.5 < 3 < max(high for _, high in ends)


@pytest.fixture
def without_training(monkeypatch):
    """`optimize` that returns the network as it is, and a list of what it was asked for."""
    calls = []

    def stand_in(subnet, optimization, images, noise_table, *, labels=None, on_step=None):
        assert labels is None
        on_step()
        calls.append((subnet.base_channels, optimization, images, noise_table))
        return subnet

    monkeypatch.setattr(optimization_module, "optimize", stand_in)
    return calls


def test_the_command_optimizes_every_width(tiny_run, tmp_path, without_training):
    out = tmp_path / "bundle"
    words = "--optimize cluster --optimize-steps 7 --clusters 8 --quantize float16"
    assert run_cli(["export", str(tiny_run), "bundle", "-o", str(out), *words.split()]) == 0
    run = Run.open(tiny_run)
    training, held_out = run.load_split()
    assert len(held_out.images) > 0
    assert [channels for channels, *_ in without_training] == [8, 4]
    for _, optimization, images, table in without_training:
        assert optimization == Optimization("cluster", steps=7, clusters=8, seed=run.config.seed)
        np.testing.assert_array_equal(images, training.images)
        np.testing.assert_array_equal(table.betas, run.noise_table.betas)
    assert json.loads((out / "manifest.json").read_text())["quantize"] == "cluster, float16"
    for file in out.glob("*.tflite"):
        [subgraph] = schema.ModelT.InitFromPackedBuf(file.read_bytes()).subgraphs
        assert schema.TensorType.FLOAT16 in [tensor.type for tensor in subgraph.tensors]
    images = EdgeSampler(Bundle.load(out)).sample(2, seed=0)
    assert images.shape == (2, 8, 8, 1)


def test_the_command_refuses_what_does_not_go_together(tiny_run, tmp_path, capfd, monkeypatch):
    def not_yet(run):
        raise AssertionError("images are read, and may be encoded, only for what can be exported")

    monkeypatch.setattr(Run, "load_split", not_yet)

    def refused(message, kind, *words):
        arguments = ["export", str(tiny_run), kind, "-o", str(tmp_path / "out"), *words]
        assert run_cli(arguments) == 2
        stderr = capfd.readouterr().err
        assert message in stderr and stderr.count("\n") == 1

    refused("is for tflite and bundle", "savedmodel", "--optimize", "prune")
    refused("int8 already", "tflite", "--optimize", "qat", "--quantize", "dynamic")
    refused("needs --optimize prune, cluster or qat", "tflite", "--optimize-steps", "5")
    refused("needs --optimize prune", "tflite", "--optimize", "cluster", "--sparsity", "0.7")
    refused("needs --optimize cluster", "tflite", "--optimize", "qat", "--clusters", "8")
    refused("--optimize-steps", "tflite", "--optimize", "qat", "--optimize-steps", "0")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    refused("exists already", "bundle", "--optimize", "prune")
    refused("holds 'precious'", "bundle", "--optimize", "prune", "--overwrite")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "quantise"),
        ("steps", 0),
        ("steps", 2.5),
        ("batch_size", True),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("sparsity", 1.0),
        ("clusters", 1),
        ("clusters", 257),
        ("seed", -1),
        ("weighting", "snr"),
        ("label_dropout", 1.5),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(InputError, match="optimize" if field == "method" else field):
        Optimization(**{"method": "prune", field: value})


def test_images_must_be_the_networks(small):
    settings = Optimization("prune", steps=1)
    for images in (None, IMAGES[:0], IMAGES[:, :2], IMAGES.astype(np.float64)):
        with pytest.raises(InputError, match=r"`images` .* uint8 \(N, 4, 4, 1\)"):
            optimize(small, settings, images, TABLE)


@pytest.fixture(scope="module")
def with_classes():
    """A plain network of three classes."""
    options = {"image_size": 4, "channels": 1, "base_channels": 32, "channel_multipliers": (1,)}
    unet = SlimmableUNet(
        **options,
        attention_resolutions=(),
        blocks_per_level=1,
        widths=(1.0,),
        num_classes=3,
        name="unet",
    )
    return randomise(unet)


LABELS = np.arange(50) % 3


def test_the_twin_of_a_network_with_classes(with_classes):
    subnet = with_classes.subnet(1.0)
    twin = twin_of(subnet)
    x = np.random.default_rng(0).standard_normal((4, 4, 4, 1)).astype(np.float32)
    inputs = [x, np.full(4, 500, np.float32), np.array([0, 1, 2, 3], np.int32)]
    expected = np.asarray(subnet(*inputs))
    np.testing.assert_allclose(twin.model(inputs).numpy(), expected, rtol=0, atol=1e-6)
    assert twin.model.count_params() == subnet.count_params()
    unconditional = np.asarray(subnet(*inputs[:2], np.full(4, 3, np.int32)))
    assert np.abs(expected - unconditional)[:3].max() > 0.05


@pytest.mark.parametrize("method", ["cluster", "qat"])
def test_the_file_of_an_optimized_network_takes_labels(with_classes, method):
    settings = Optimization(method, steps=2, batch_size=8, label_dropout=0.1)
    with eagerly():
        network = optimize(with_classes.subnet(1.0), settings, IMAGES, TABLE, labels=LABELS)
    random = np.random.default_rng(0)
    x = random.standard_normal((1, 4, 4, 1)).astype(np.float32).repeat(2, axis=0)
    inputs = [x, np.full(2, 500, np.float32), np.array([0, 1], np.int32)]
    found, expected = run_file(to_tflite(network), *inputs), np.asarray(network(*inputs))
    assert np.std(found - expected) < 0.05 * np.std(expected)
    assert np.abs(found[0] - found[1]).max() > 0.05


def test_labels_must_be_the_networks(small, with_classes):
    settings = Optimization("prune", steps=1)
    with pytest.raises(InputError, match=r"`labels` .* num_classes is 0"):
        optimize(small, settings, IMAGES, TABLE, labels=LABELS)
    with pytest.raises(InputError, match=r"`labels` .* num_classes is 3"):
        optimize(with_classes, settings, IMAGES, TABLE)
    for labels in (LABELS[:9], LABELS + 1, LABELS - 1, LABELS.astype(np.float32)):
        with pytest.raises(InputError, match=r"must be integers \(50,\) in \[0, 2\]"):
            optimize(with_classes, settings, IMAGES, TABLE, labels=labels)


def test_a_precision_after_qat_is_refused(rounded, small, tmp_path):
    with pytest.raises(InputError, match="int8 already"):
        to_tflite(rounded, quantize="float16")
    schedule = StepSchedule.uniform(1.0, (1, 0))
    with pytest.raises(InputError, match="int8 already"):
        settings = {"quantize": "dynamic", "optimization": Optimization("qat"), "images": IMAGES}
        export("bundle", small, TABLE, schedule, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []
