"""Fixtures and helpers of the serving tests: exported models, and a loopback server of them.

TensorFlow Serving's stubs are imported inside, for every test session loads this file.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import NOISY_SCHEDULE

from ddsm_tf.noise import NoiseTable

TABLE = NoiseTable.linear(1000)
SHAPE = (8, 8, 1)
MODELS = ["ddsm", "ddsm_unet_0_5", "ddsm_unet_1_0"]
TRANSPORTS = ["grpc", "rest"]


@pytest.fixture(scope="session")
def write_serving(tiny_unet, tiny_savedmodels):
    """`serving.write_serving(folder, **options)` of `tiny_unet`.

    Models are copied instead of written: tracing them again would take half a minute each.
    """
    from ddsm_tf.export import serving
    from ddsm_tf.schedule import width_name

    def sampler(unet, noise_table, schedule, path, autoencoder=None):
        assert schedule == NOISY_SCHEDULE and not Path(path).name.isdigit()
        shutil.copytree(tiny_savedmodels / "sampler" / "1", path, dirs_exist_ok=True)

    def denoisers(unet, folder):
        for width in unet.widths:
            shutil.copytree(tiny_savedmodels / width_name(width), folder / width_name(width))

    def write(folder, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serving, "write_sampler", sampler)
            patch.setattr(serving, "write_savedmodels", denoisers)
            return serving.write_serving(tiny_unet, TABLE, NOISY_SCHEDULE, folder, **options)

    return write


@pytest.fixture(scope="session")
def served_folder(write_serving, tmp_path_factory):
    """Two versions whose denoisers are exchanged, with base paths that are true here."""
    folder = tmp_path_factory.mktemp("serving") / "models"
    for _ in range(2):
        write_serving(folder, mount=str(folder))
    narrow, wide = folder / "ddsm_unet_0_5", folder / "ddsm_unet_1_0"
    (narrow / "2").rename(folder / "kept")
    (wide / "2").rename(narrow / "2")
    (folder / "kept").rename(wide / "2")
    return folder


def warmup_requests(version):
    """The requests in a version's warm-up file."""
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    from ddsm_tf.export.warmup import WARMUP_FILE

    records = tf.data.TFRecordDataset(str(version / WARMUP_FILE)).as_numpy_iterator()
    logs = [prediction_log_pb2.PredictionLog.FromString(record) for record in records]
    assert all(log.WhichOneof("log_type") == "predict_log" for log in logs)
    return [log.predict_log.request for log in logs]


def share_within_one(images, expected):
    """The share of pixels that differ by at most 1."""
    assert images.dtype == np.uint8 and images.shape == expected.shape
    return np.mean(np.abs(images.astype(int) - expected.astype(int)) <= 1)
