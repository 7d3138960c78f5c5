"""The distance that the search minimises."""

from __future__ import annotations

import numpy as np

from ddsm_tf.metrics.classifier import FeatureNetwork
from ddsm_tf.metrics.frechet import Statistics, frechet_distance


class FrechetDistance:
    """Fréchet distance of images to reference images, on a classifier's features.

    Not FID: that one is defined on features of an Inception network.

    Args:
        network: gives the features.
        reference_images: uint8 (N, H, W, C).

    Attributes:
        name: what to call the distance in tables and plots.
    """

    name = "Fréchet distance (classifier features)"

    def __init__(self, network: FeatureNetwork, reference_images: np.ndarray) -> None:
        self.network = network
        self.reference = Statistics.of(network(reference_images))

    def __call__(self, images: np.ndarray) -> float:
        """The distance of uint8 (N, H, W, C) images, N ≥ 2; 0 is best.

        The estimate has a bias that falls with N: compare only sets of one size.
        """
        return frechet_distance(Statistics.of(self.network(images)), self.reference)
