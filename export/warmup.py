"""Warm-up requests: TensorFlow Serving replays them while it loads a version.

The file is `assets.extra/tf_serving_warmup_requests`, a TFRecord of `PredictionLog`s. A request that
fails keeps the version from loading, and one with scalar inputs fails where a model batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from ddsm_tf.errors import missing_extra
from ddsm_tf.export import VERSION_SIGNATURES
