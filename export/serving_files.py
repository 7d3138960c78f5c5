"""The files around served models: `models.config`, batching, monitoring and deployment."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import tensorflow as tf

from ddsm_tf.errors import InputError, invalid, missing_extra
from ddsm_tf.files import atomic_file

try:
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2
except ImportError as error:
    raise missing_extra("tensorflow-serving-api", "serving") from error

MODELS = "models.config"
MODEL_BATCHING = "batching_params.pbtxt"
"""The server looks for this name in a version's folder."""

DEFAULT_MOUNT = "/models"
COPIED = ("batching.config", "monitoring.config")
DEPLOYMENT = ("compose.yaml", "kubernetes.yaml")
HEADER = """\
# ModelServerConfig of TensorFlow Serving (--model_config_file). `ddsm export` adds models and
# labels, and keeps the rest but for comments. To roll out or back, change a label's version: the
# server reads the file again every --model_config_file_poll_wait_seconds.
"""


class ModelsConfig:
    """`models.config`: which models the server loads, and what their versions are called.

    All versions of a model are loaded, because the server moves a label only to a version that it
    has loaded already.

    Args:
        folder: holds the file, if there is one.

    Raises:
        InputError: the file is there and is no list of models.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MODELS
        self._config = model_server_config_pb2.ModelServerConfig()
        if self.path.exists():
            self._read()
        self._models = self._config.model_config_list.config

    def _read(self) -> None:
        try:
            text_format.Parse(self.path.read_text(encoding="utf-8"), self._config)
        except (text_format.ParseError, UnicodeDecodeError) as error:
            rule = f"is no ModelServerConfig: {error}; mend or remove it"
            raise invalid(MODELS, str(self.path), rule) from error
        if self._config.HasField("custom_model_config"):
            raise invalid(MODELS, str(self.path), "must have a model_config_list")

    def choose_mount(self, mount: str | None) -> str:
        """Where the server sees the folder: as asked for, as earlier exports wrote it, or /models.

        One base path that is not there keeps the server from reading the whole file again, so all
        models that exports wrote must agree.

        Args:
            mount: what was asked for.

        Raises:
            InputError: `mount` is no such path, or the file says another or several.
        """
        # Other entries are somebody else's models, elsewhere.
        own = [e for e in self._models if (self.path.parent / e.name).is_dir()]
        # A path that was written by hand may end in a slash.
        mounts = sorted({posixpath.dirname(e.base_path.rstrip("/")) for e in own})
        if len(mounts) > 1:
            rule = f"of the models in {self.path} must begin alike; mend that file by hand"
            raise invalid("base_path", mounts, rule)
        known = mounts[0] if mounts else None
        chosen = (mount or known or DEFAULT_MOUNT).rstrip("/")
        check_mount(chosen)
        if known not in (None, chosen):
            rule = f"differs from {known!r}, where {self.path} says that the server sees the models"
            raise invalid("mount", mount, f"{rule}; leave it out, or change that file by hand")
        return chosen

    def next_label(self, model: str) -> str:
        """ "stable" for the first version of a model, "canary" for those after it."""
        return "canary" if self._find(model) else "stable"

    def check(self, models: Sequence[str]) -> None:
        """Raise `InputError` where a model has a version policy that a label cannot follow."""
        for entry in filter(None, map(self._find, models)):
            policy = entry.model_version_policy.WhichOneof("policy_choice")
            if policy != "all":
                rule = "must be `all {}`: a label can be given to loaded versions only"
                raise InputError(
                    f"`model_version_policy` of {entry.name} in {self.path} (={policy!r}) {rule}"
                )

    def add(self, model: str, mount: str, version: int, label: str) -> None:
        """Give a version of a model a label; a model that is new is added."""
        entry = self._find(model)
        if entry is None:
            entry = self._models.add(name=model, model_platform="tensorflow")
            entry.model_version_policy.all.SetInParent()
        entry.base_path = posixpath.join(mount, model)
        entry.version_labels[label] = version

    def write(self) -> None:
        """Replace the file, atomically."""
        with atomic_file(self.path) as temporary:
            text = text_format.MessageToString(self._config)
            temporary.write_text(HEADER + text, encoding="utf-8")

    def _find(self, model: str) -> Any:
        return next((entry for entry in self._models if entry.name == model), None)


def server_flags(mount: str) -> list[str]:
    """Flags of `tensorflow_model_server` beside its ports."""
    return [
        f"--model_config_file={mount}/{MODELS}",
        "--model_config_file_poll_wait_seconds=30",
        "--allow_version_labels_for_unavailable_models=true",
        "--enable_batching=true",
        f"--batching_parameters_file={mount}/batching.config",
        "--enable_per_model_batching_parameters=true",
        f"--monitoring_config_file={mount}/monitoring.config",
        "--rest_api_timeout_in_ms=300000",
    ]


def write_model_batching(folder: Path) -> None:
    """Make the version in `folder` join the rows of several requests."""
    (folder / MODEL_BATCHING).write_text(_template(MODEL_BATCHING), encoding="utf-8")


def write_missing_files(folder: Path, model: str, mount: str) -> None:
    """Write the server's other files and the deployment files; one that is there is kept."""
    values = {
        "model": model,
        "service": _service_name(model),
        "mount": mount,
        "tensorflow": tf.__version__,
        "compose_arguments": _yaml_list(server_flags(mount), 6),
        "kubernetes_arguments": _yaml_list(server_flags(mount), 12),
    }
    for name in (*COPIED, *DEPLOYMENT):
        if not (folder / name).exists():
            text = Template(_template(name)).substitute(values)
            with atomic_file(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")


def check_mount(mount: str) -> None:
    """Raise `InputError` unless `mount` is an absolute path that needs no quotes in YAML."""
    if not re.fullmatch(r"/[A-Za-z0-9._/-]*[A-Za-z0-9._-]", mount):
        rule = "must be an absolute path of letters, digits and . _ - /, such as /models"
        raise invalid("mount", mount, rule)


def _template(name: str) -> str:
    return (resources.files("ddsm_tf.export") / "templates" / name).read_text(encoding="utf-8")


def _service_name(model: str) -> str:
    """What Kubernetes takes as the name of a Service: it begins with a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    return name if name[0].isalpha() else f"ddsm-{name}"


def _yaml_list(values: Sequence[str], indent: int) -> str:
    return "\n".join(f'{" " * indent}- "{value}"' for value in values)
