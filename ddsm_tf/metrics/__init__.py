"""Distances between sets of images."""

from ddsm_tf.metrics.classifier import FeatureNetwork, train_classifier
from ddsm_tf.metrics.distance import FrechetDistance
from ddsm_tf.metrics.frechet import Statistics, frechet_distance

__all__ = [
    "FeatureNetwork",
    "FrechetDistance",
    "Statistics",
    "frechet_distance",
    "train_classifier",
]
