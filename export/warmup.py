"""Warm-up requests: TensorFlow Serving replays them while it loads a version.

The file is `assets.extra/tf_serving_warmup_requests`, a TFRecord of `PredictionLog`s. A request
that fails keeps its version from loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from ddsm_tf.errors import missing_extra
from ddsm_tf.labels import IN_TURN
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import step_coefficients
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.seeds import ImageNoise
from ddsm_tf.serving.inputs import schedule_inputs

try:
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2
except ImportError as error:
    raise missing_extra("tensorflow-serving-api", "serving") from error

WARMUP_FILE = Path("assets.extra") / "tf_serving_warmup_requests"

Requests = Mapping[str, Mapping[str, np.ndarray]]
"""Signature → name of an input → its value."""


def denoiser_requests(image_shape: tuple[int, int, int], num_classes: int = 0) -> Requests:
    """One image for each signature of a denoiser."""
    inputs = {"x": ImageNoise(0, 0, 1, image_shape).draw(), "t": np.zeros(1, np.float32)}
    if num_classes:
        inputs["labels"] = np.zeros(1, np.int32)
    return {"serve": inputs, "serving_default": inputs}


def sampler_requests(
    image_shape: tuple[int, int, int],
    widths: Iterable[float],
    noise_table: NoiseTable,
    schedule: StepSchedule,
    num_classes: int = 0,
) -> Requests:
    """One image for each signature of a sampler; `sample_schedule` visits each width once."""
    one = {"seed": np.int64(0), "count": np.int64(1)}
    rows = {"seed": np.zeros(1, np.int64), "index": np.zeros(1, np.int64)}
    draws = 1 + sum(bool(row.x_from_noise) for row in step_coefficients(schedule, noise_table))
    source = ImageNoise(0, 0, 1, image_shape)
    noise = np.stack([source.draw() for _ in range(draws)], axis=1)
    label = np.full(1, IN_TURN, np.int32) if num_classes else None
    labels = {} if label is None else {"labels": label}
    own = schedule_inputs(_each_width_once(widths, noise_table, num_classes), 1, 0, labels=label)
    return {
        "sample": {**one, **labels},
        "serving_default": {**one, **labels},
        "sample_images": {**rows, **labels},
        "sample_noise": {"noise": noise, **labels},
        "sample_schedule": own,
    }


def batchable(requests: Requests) -> Requests:
    """Those that a batching model answers: it refuses scalars and unequal numbers of rows."""
    return {name: inputs for name, inputs in requests.items() if _has_rows(inputs)}


def write_warmup(folder: Path, model: str, requests: Requests) -> None:
    """Write the requests into a version's folder."""
    path = folder / WARMUP_FILE
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in requests.items():
            writer.write(_log(model, signature, inputs).SerializeToString(deterministic=True))


def _has_rows(inputs: Mapping[str, np.ndarray]) -> bool:
    sizes = {np.shape(value)[:1] for value in inputs.values()}
    return len(sizes) == 1 and () not in sizes


def _log(
    model: str, signature: str, inputs: Mapping[str, np.ndarray]
) -> prediction_log_pb2.PredictionLog:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return prediction_log_pb2.PredictionLog(
        predict_log=prediction_log_pb2.PredictLog(request=request)
    )


def _each_width_once(
    widths: Iterable[float], noise_table: NoiseTable, num_classes: int
) -> StepSchedule:
    """One step at each width, with classes guided, so that both branches are warm."""
    widths = tuple(widths)[: noise_table.train_timesteps]
    timesteps = even_timesteps(noise_table.train_timesteps, len(widths))
    return StepSchedule(
        timesteps,
        widths,
        train_timesteps=noise_table.train_timesteps,
        guidance_scale=2.0 if num_classes else 1.0,
    )
