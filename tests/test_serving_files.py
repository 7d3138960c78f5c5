"""TensorFlow Serving: the files that the server reads, in its own formats."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from loopback_server import check_batch
from serving_fixtures import MODELS, warmup_requests
from tensorflow.python.tools import saved_model_cli
from tensorflow_serving.config import model_server_config_pb2

from ddsm_tf.errors import InputError
from ddsm_tf.export import serving
from ddsm_tf.export.serving_files import server_flags


@pytest.fixture
def export(write_serving, tmp_path):
    return lambda **options: write_serving(tmp_path / "models", **options)


@pytest.fixture
def folder(served_folder):
    return served_folder


def models_config(folder):
    config = model_server_config_pb2.ModelServerConfig()
    text_format.Parse((folder / "models.config").read_text(), config)
    return {entry.name: entry for entry in config.model_config_list.config}


def test_models_config_names_every_model_and_labels_its_versions(export):
    assert export() == export().parent / "1"
    folder = export().parent.parent
    entries = models_config(folder)
    assert sorted(entries) == MODELS
    for name, entry in entries.items():
        assert entry.base_path == f"/models/{name}" and entry.model_platform == "tensorflow"
        assert entry.model_version_policy.WhichOneof("policy_choice") == "all"
        assert dict(entry.version_labels) == {"stable": 1, "canary": 3}
        assert sorted(path.name for path in (folder / name).iterdir()) == ["1", "2", "3"]


def test_another_export_keeps_what_is_there(export):
    folder = export(mount="/srv/m/").parent.parent
    (folder / "ddsm_unet_0_5" / "7").mkdir()
    (folder / "compose.yaml").write_text("mine")
    config = (folder / "models.config").read_text()
    mine = 'model_config_list { config { name: "mine" base_path: "/mine" }'
    (folder / "models.config").write_text(config.replace("model_config_list {", mine))
    first = {path: path.read_bytes() for path in folder.rglob("1/**/*") if path.is_file()}
    assert len(first) > 12
    assert export(label="stable") == folder / "ddsm" / "8"
    assert {path: path.read_bytes() for path in first} == first
    assert (folder / "compose.yaml").read_text() == "mine"
    entries = models_config(folder)
    assert entries["mine"].base_path == "/mine" and entries["ddsm"].base_path == "/srv/m/ddsm"
    assert dict(entries["ddsm"].version_labels) == {"stable": 8}
    assert "--model_config_file=/srv/m/models.config" in (folder / "kubernetes.yaml").read_text()


def test_all_models_of_a_folder_have_one_mount(export):
    folder = export(mount="/srv/m").parent.parent
    export(model="3d.faces")
    entries = models_config(folder)
    assert len(entries) == 6
    assert {Path(entry.base_path).parent for entry in entries.values()} == {Path("/srv/m")}
    before = (folder / "models.config").read_bytes()
    with pytest.raises(InputError, match=r"`mount` .='/other'. differs from '/srv/m'"):
        export(mount="/other")
    assert (folder / "models.config").read_bytes() == before


def edit(config, old, new):
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def test_a_base_path_may_end_in_a_slash(export):
    folder = export(mount="/srv/m").parent.parent
    edit(folder / "models.config", '/srv/m/ddsm"', '/srv/m/ddsm/"')
    assert export() == folder / "ddsm" / "2"
    paths = {name: entry.base_path for name, entry in models_config(folder).items()}
    assert paths == {name: f"/srv/m/{name}" for name in MODELS}


def test_base_paths_in_two_folders_are_refused(export):
    folder = export(mount="/srv/m").parent.parent
    edit(folder / "models.config", "/srv/m/ddsm_unet_1_0", "/other/ddsm_unet_1_0")
    before = (folder / "models.config").read_bytes()
    with pytest.raises(InputError, match=r"`base_path` \(=\['/other', '/srv/m'\]\) of the models"):
        export()
    assert (folder / "models.config").read_bytes() == before
    assert [path.name for path in (folder / "ddsm").iterdir()] == ["1"]


def test_a_service_has_a_name_that_kubernetes_takes(export):
    text = (export(model="3d.Faces").parent.parent / "kubernetes.yaml").read_text()
    assert set(re.findall(r"  name: \"(.*)\"", text)) == {"ddsm-3d-faces"}


def test_a_label_that_moves_meanwhile_stays_moved(export, monkeypatch):
    folder = export().parent.parent
    export()
    write = serving.write_warmup

    def rolls_back(path, model, requests):
        text = (folder / "models.config").read_text()
        (folder / "models.config").write_text(text.replace('"stable"', '"kept"'))
        write(path, model, requests)

    monkeypatch.setattr(serving, "write_warmup", rolls_back)
    export()
    for entry in models_config(folder).values():
        assert dict(entry.version_labels) == {"kept": 1, "canary": 3}


def test_two_exports_do_not_replace_each_other(export, tmp_path, monkeypatch):
    write = serving.write_warmup

    def other_is_quicker(path, model, requests):
        monkeypatch.setattr(serving, "write_warmup", write)
        export()
        write(path, model, requests)

    monkeypatch.setattr(serving, "write_warmup", other_is_quicker)
    with pytest.raises(InputError, match="in the meantime"):
        export()
    folder = tmp_path / "models"
    assert sorted(path.name for name in MODELS for path in (folder / name).iterdir()) == ["1"] * 3


def test_a_version_appears_whole_or_not_at_all(export, monkeypatch):
    folder = export().parent.parent
    before = (folder / "models.config").read_bytes()
    seen = []

    def fails(path, model, requests):
        seen.extend(path.name for name in MODELS for path in (folder / name).iterdir())
        if model == "ddsm_unet_0_5":
            raise OSError("full")

    monkeypatch.setattr(serving, "write_warmup", fails)
    with pytest.raises(OSError, match="full"):
        export()
    # The server ignores names that are no numbers.
    assert {name for name in seen if name.isdigit()} == {"1"} and len(seen) > 6
    assert [path.name for name in MODELS for path in (folder / name).iterdir()] == ["1"] * 3
    assert (folder / "models.config").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("model_config_list {", {}, "is no ModelServerConfig"),
        ("custom_model_config {}", {}, "must have a model_config_list"),
        (
            'model_config_list { config { name: "ddsm" base_path: "/m/ddsm" '
            "model_version_policy { specific { versions: 1 } } } }",
            {},
            "`model_version_policy` of ddsm .*'specific'.* must be `all {}`",
        ),
        ("", {"label": "a-b"}, "`label` .='a-b'. must hold"),
        ("", {"model": "a/b"}, "`model` .='a/b'. must be letters"),
        ("", {"mount": "models"}, "`mount` .='models'. must be an absolute path"),
    ],
)
def test_bad_configuration_is_refused_before_anything_is_written(
    export, tmp_path, text, options, words
):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "models.config").write_text(text)
    with pytest.raises(InputError, match=words):
        export(**options)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["models.config"]


def test_a_batching_sampler_warms_up_what_can_be_batched(export):
    version = export(batch_sampler=True)
    assert (version / "batching_params.pbtxt").is_file()
    requests = warmup_requests(version)
    for request in requests:
        check_batch([tf.make_ndarray(value) for value in request.inputs.values()])
    names = [request.model_spec.signature_name for request in requests]
    assert names == ["sample_images", "sample_noise"]


def message(name, fields):
    """A message type that the official package lacks, by the server's field names and numbers."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package="t", syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    kind = file.message_type.add(name=name)
    for field, number, type_name in fields:
        entry = kind.field.add(name=field, number=number, label=1)
        entry.type = {"bool": 8, "string": 9}.get(type_name, 11)
        if entry.type == 11:
            entry.type_name = f".google.protobuf.{type_name}"
    pool = descriptor_pool.DescriptorPool()
    wrappers = descriptor_pb2.FileDescriptorProto()
    source = descriptor_pool.Default().FindFileByName("google/protobuf/wrappers.proto")
    source.CopyToProto(wrappers)
    pool.Add(wrappers)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}"))()


def test_batching_and_monitoring_are_in_the_server_s_own_format(folder):
    # session_bundle_config.proto and monitoring_config.proto of TensorFlow Serving.
    fields = [("max_batch_size", 1, "Int64Value"), ("batch_timeout_micros", 2, "Int64Value")]
    fields += [("max_enqueued_batches", 3, "Int64Value"), ("num_batch_threads", 4, "Int64Value")]
    fields += [("thread_pool_name", 5, "StringValue")]
    fields += [("enable_large_batch_splitting", 8, "BoolValue")]
    fields += [("max_execution_batch_size", 9, "Int64Value")]
    shared, own = message("BatchingParameters", fields), message("BatchingParameters", fields)
    text_format.Parse((folder / "batching.config").read_text(), shared)
    assert shared.num_batch_threads.value >= 1 and shared.thread_pool_name.value
    text_format.Parse((folder / "ddsm_unet_0_5/1/batching_params.pbtxt").read_text(), own)
    assert own.enable_large_batch_splitting.value
    assert own.max_batch_size.value >= own.max_execution_batch_size.value > 1
    assert not (folder / "ddsm/1/batching_params.pbtxt").exists()
    prometheus = message("PrometheusConfig", [("enable", 1, "bool"), ("path", 2, "string")])
    text = (folder / "monitoring.config").read_text()
    (inner,) = re.findall(r"^prometheus_config \{(.*)\}", text, re.DOTALL | re.MULTILINE)
    text_format.Parse(inner, prometheus)
    assert prometheus.enable and prometheus.path.startswith("/monitoring/")


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml"])
def test_deployment_files_agree_with_what_is_written(folder, name):
    text = (folder / name).read_text()
    assert "$" not in text and "\t" not in text
    written = re.findall(r'^ +- "(--.*)"$', text, re.MULTILINE)
    assert written == server_flags(str(folder))
    files = [flag.split("=")[1] for flag in written if "_file=" in flag]
    assert len(files) == 3 and all(Path(file).is_file() for file in files)
    assert re.search(rf"{re.escape(str(folder))}(:ro)?\"?$", text, re.MULTILINE)
    assert set(re.findall(r"\b85\d\d\b", text)) == {"8500", "8501"}
    if name == "kubernetes.yaml":
        assert re.findall(r"path: (\S+)", text) == ["/v1/models/ddsm/metadata"]
        for part in ("startupProbe", "readinessProbe", "livenessProbe", "requests", "limits"):
            assert f" {part}:\n" in text
    if importlib.util.find_spec("yaml"):
        import yaml

        assert all(yaml.safe_load_all(text))


def test_saved_model_cli_shows_the_signatures(folder):
    def show(*options):
        # In this process: the command takes seconds to start.
        with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()) as output:
            where = f"--dir={folder / 'ddsm' / '1'}"
            flags.FLAGS(["saved_model_cli", where, "--tag_set=serve", *options])
            saved_model_cli.show()
        return output.getvalue()

    keys = set(re.findall(r'SignatureDef key: "(\w+)"', show()))
    assert {"sample", "sample_images", "sample_noise", "sample_schedule"} < keys
    rows = show("--signature_def=sample_images")
    assert "Method name is: tensorflow/serving/predict" in rows
    for name in ("seed", "index"):
        assert re.search(rf"inputs\['{name}'\].*\n +dtype: DT_INT64\n +shape: \(-1\)\n", rows)
    assert re.search(r"\['images'\].*\n +dtype: DT_UINT8\n +shape: \(-1, 8, 8, 1\)\n", rows)
