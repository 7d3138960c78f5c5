"""Exports: the same images on Keras, SavedModel and LiteRT, and files that are what they say."""

import functools
import shutil

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.errors import InputError
from ddsm_tf.export import FILES, KINDS, export
from ddsm_tf.export.bundle import DECODER_FILE
from ddsm_tf.export.savedmodel import SavedModelDenoiser, write_savedmodels
from ddsm_tf.export.tflite import convert, foreign_operators
from ddsm_tf.files import check_folder
from ddsm_tf.models import DiffusionModel, SlimmableUNet
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import sample_images
from ddsm_tf.schedule import StepSchedule

COUNT = 10
TABLE = NoiseTable.linear(1000)


@pytest.fixture(scope="module")
def keras_images(tiny_unet, tiny_schedule):
    return DiffusionModel(tiny_unet, TABLE).sample(tiny_schedule, COUNT, seed=5)


def share_within_one(first, second):
    assert first.dtype == second.dtype == np.uint8 and first.shape == second.shape
    return np.mean(np.abs(first.astype(int) - second.astype(int)) <= 1)


def test_keras_images_are_worth_comparing(keras_images):
    assert keras_images.shape == (COUNT, 8, 8, 1)
    assert keras_images.std() > 40
    assert len(np.unique(keras_images.reshape(COUNT, -1), axis=0)) == COUNT


def test_savedmodels_are_traced_once_and_hold_no_gradients(tiny_unet, tmp_path, monkeypatch):
    traced, call = [], SlimmableUNet.call

    @functools.wraps(call)
    def counting(self, *inputs, **options):
        traced.append(self)
        return call(self, *inputs, **options)

    monkeypatch.setattr(SlimmableUNet, "call", counting)
    write_savedmodels(tiny_unet, tmp_path)
    assert len(traced) == len({id(subnet) for subnet in traced}) == len(tiny_unet.widths)
    for path in tmp_path.rglob("saved_model.pb"):
        [graph] = SavedModel.FromString(path.read_bytes()).meta_graphs
        nodes = [node for each in graph.graph_def.library.function for node in each.node_def]
        assert sum(node.op == "Conv2D" for node in nodes) > 20
        assert not [node.name for node in nodes if "_gradient_op_type" in node.attr]


def test_savedmodel_gives_the_same_images(tiny_savedmodels, tiny_schedule, keras_images):
    denoise = SavedModelDenoiser(tiny_savedmodels)
    images = sample_images(denoise, tiny_schedule, TABLE, (8, 8, 1), COUNT, seed=5, batch_size=4)
    assert share_within_one(images, keras_images) >= 0.999


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_litert_gives_the_same_images_at_any_batch_size(tiny_bundle, keras_images, batch_size):
    images = EdgeSampler(Bundle.load(tiny_bundle)).sample(COUNT, 5, batch_size=batch_size)
    assert share_within_one(images, keras_images) >= 0.999


def test_one_step_of_every_width_agrees_to_float_precision(
    tiny_unet, tiny_savedmodels, tiny_bundle
):
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 8, 8, 1)).astype(np.float32)
    t = np.array([0, 500, 999], np.float32)
    edge, server = EdgeSampler(Bundle.load(tiny_bundle)), SavedModelDenoiser(tiny_savedmodels)
    for width in tiny_unet.widths:
        expected = np.asarray(tiny_unet(x, t, width=width))
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(server(x, t, width), expected, atol=1e-5)
        np.testing.assert_allclose(edge.denoise(x, t, width), expected, atol=1e-5)


def test_savedmodels_are_laid_out_for_tf_serving(tiny_savedmodels):
    assert (tiny_savedmodels / "unet_1_0" / "1" / "saved_model.pb").is_file()
    signature = tf.saved_model.load(str(tiny_savedmodels / "unet_0_5" / "1")).signatures["serve"]
    shapes = {
        name: s.shape.as_list() for name, s in signature.structured_input_signature[1].items()
    }
    assert shapes == {"x": [None, 8, 8, 1], "t": [None]}


def test_tflite_files_hold_built_in_operators_only(tiny_bundle):
    bundle = Bundle.load(tiny_bundle)
    for width in bundle.widths:
        assert foreign_operators(bundle.tflite(width)) == []


def test_foreign_operators_are_found():
    function = tf.function(
        lambda x: tf.raw_ops.MatrixDeterminant(input=x),
        input_signature=[tf.TensorSpec((2, 2), tf.float32)],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.SELECT_TF_OPS]
    assert "FlexMatrixDeterminant" in foreign_operators(converter.convert())


def test_the_network_runs_as_one_xnnpack_partition(tiny_bundle):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(tiny_bundle / "unet_1_0.tflite"))
    interpreter.allocate_tensors()
    names = [details["op_name"] for details in interpreter._get_ops_details()]
    assert names.count("DELEGATE") == 1


def test_a_quantised_bundle_gives_the_plain_files(tiny_unet, tiny_schedule, tmp_path):
    out = export("bundle", tiny_unet, TABLE, tiny_schedule, tmp_path / "b", quantize="float16")
    bundle = Bundle.load(out)
    assert bundle.quantize == "float16"
    for width in tiny_unet.widths:
        assert bundle.tflite(width) == convert(tiny_unet.subnet(width), quantize="float16")


def test_bad_arguments_are_refused_and_leave_nothing(tiny_unet, tiny_schedule, tmp_path):
    def refused(match, kind="bundle", schedule=tiny_schedule, table=TABLE, **options):
        with pytest.raises(InputError, match=match):
            export(kind, tiny_unet, table, schedule, tmp_path / "out", **options)

    refused("kind", kind="onnx")
    refused("quantize", kind="savedmodel", quantize="float16")
    refused("quantize", quantize="int4")
    refused("width", schedule=StepSchedule.uniform(0.3, (1, 0)))
    refused("train_timesteps", table=NoiseTable.linear(10))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    refused("exists already")
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_overwrite_replaces_the_whole_folder(tiny_unet, tiny_schedule, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unet_0_75.tflite").write_text("gone")
    export("tflite", tiny_unet, TABLE, tiny_schedule, tmp_path / "out", overwrite=True)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["unet_0_5.tflite", "unet_1_0.tflite"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_an_export_of_the_same_kind_only(
    tiny_unet, tiny_schedule, tiny_savedmodels, tiny_bundle, tmp_path
):
    outputs = {"savedmodel": tiny_savedmodels, "bundle": tiny_bundle}
    outputs["tflite"] = export("tflite", tiny_unet, TABLE, tiny_schedule, tmp_path / "files")
    for kind, output in outputs.items():
        check_folder(output, FILES[kind])
        for other in set(KINDS) - {kind}:
            with pytest.raises(InputError, match="unlike an earlier output"):
                check_folder(output, FILES[other])
    # What a run on latents writes beside the networks.
    for kind in ("tflite", "bundle"):
        output = shutil.copytree(outputs[kind], tmp_path / kind)
        (output / DECODER_FILE).touch()
        check_folder(output, FILES[kind])


def test_a_missing_savedmodel_is_named(tmp_path, tiny_savedmodels):
    with pytest.raises(InputError, match="folder of SavedModels"):
        SavedModelDenoiser(tmp_path / "nothing")
    x = np.zeros((1, 8, 8, 1), np.float32)
    with pytest.raises(InputError, match=r"`width` \(=0.75\)"):
        SavedModelDenoiser(tiny_savedmodels)(x, 0, 0.75)
    with pytest.raises(InputError, match="`labels`"):
        SavedModelDenoiser(tiny_savedmodels)(x, 0, 0.5, np.zeros(len(x), np.int32))
