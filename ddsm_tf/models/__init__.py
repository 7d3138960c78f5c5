"""Slimmable networks and the diffusion model that trains them, in backend-neutral Keras 3."""

try:
    import keras  # noqa: F401
except ImportError as error:
    from ddsm_tf.errors import missing_extra

    raise missing_extra("keras", "train") from error

from ddsm_tf.models.diffusion import DiffusionModel
from ddsm_tf.models.optimizers import SGD, Adam, LinearWarmup
from ddsm_tf.models.tuned import TunedDiffusionModel
from ddsm_tf.models.unet import SlimmableUNet

__all__ = [
    "SGD",
    "Adam",
    "DiffusionModel",
    "LinearWarmup",
    "SlimmableUNet",
    "TunedDiffusionModel",
]
