"""The compact sampler: NumPy and ai_edge_litert, no TensorFlow."""

from ddsm_tf.edge.bundle import Bundle
from ddsm_tf.edge.sampler import EdgeSampler

__all__ = ["Bundle", "EdgeSampler"]
