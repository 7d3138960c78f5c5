"""The client of a model server: gRPC or REST, deadlines, retries, clear errors."""

from ddsm_tf.serving.calls import Signature, TensorInfo, VersionStatus
from ddsm_tf.serving.client import ServingClient, denoiser_model

__all__ = ["ServingClient", "Signature", "TensorInfo", "VersionStatus", "denoiser_model"]
