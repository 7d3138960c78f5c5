"""The published metrics of a set of images, named for the network that they were measured on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.files import atomic_file
from ddsm_tf.metrics.frechet import Statistics, frechet_distance
from ddsm_tf.metrics.inception_score import SPLITS, classifier_score
from ddsm_tf.metrics.infinity import frechet_distance_at_infinity
from ddsm_tf.metrics.kid import kernel_distance
from ddsm_tf.metrics.precision_recall import precision_and_recall

METRICS = ("fid", "kid", "is", "precision_recall", "per_class", "fid_infinity")
"""What `--metrics` takes. Only published Inception weights give FID, KID and the Inception Score;
on other networks the same formulas have other names."""

FeaturesAndLogits = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def check_metrics(metrics: Sequence[str], *, with_classes: bool) -> None:
    """Check that metrics can be measured.

    Args:
        metrics: names.
        with_classes: whether images and real ones have labels.

    Raises:
        InputError: an unknown metric, or "per_class" without labels.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise invalid("metrics", metric, f"must be among {', '.join(METRICS)}")
    if "per_class" in metrics and not with_classes:
        rule = "needs a model with classes, and data with labels"
        raise invalid("metrics", "per_class", rule)


class MetricSuite:
    """Judges images against real ones.

    Args:
        network: uint8 images → features and logits.
        network_name: what the features are of, such as "classifier features".
        is_published: whether the network is FID's own.
        images: the real ones, uint8 (N, H, W, C).
        labels: theirs, or None.
        cache: folder for the real images' features; None keeps none.
        network_digest: tells kept features of one network from those of another.
    """

    def __init__(
        self,
        network: FeaturesAndLogits,
        network_name: str,
        is_published: bool,
        images: Any,
        labels: np.ndarray | None = None,
        *,
        cache: str | os.PathLike | None = None,
        network_digest: str = "",
    ) -> None:
        self._network = network
        self.network_name = network_name
        self.is_published = is_published
        self.labels = labels
        self.real = self._real_features(images, cache, network_digest)

    def names(self) -> dict[str, str]:
        """What each number is called."""
        if self.is_published:
            frechet, kernel, score = "FID", "KID", "Inception Score"
        else:
            frechet, kernel, score = (
                f"{kind} ({self.network_name})"
                for kind in ("Fréchet distance", "kernel distance", "classifier score")
            )
        return {
            "fid": frechet,
            "kid": kernel,
            "is": score,
            "precision_recall": f"precision and recall ({self.network_name})",
            "per_class": f"{frechet}, class by class",
            "fid_infinity": f"{frechet}, extrapolated to infinitely many images",
        }

    def __call__(
        self, images: np.ndarray, metrics: Sequence[str], labels: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Measure images.

        Args:
            images: uint8 (N, H, W, C).
            metrics: of `METRICS`.
            labels: of the images, for "per_class".

        Returns:
            Metric → its numbers, under `name` what they are called.

        Raises:
            InputError: an unknown metric, too few images, or no labels for "per_class".
        """
        check_metrics(metrics, with_classes=labels is not None and self.labels is not None)
        features, logits = self._network(images)
        results, names = {}, self.names()
        for metric in metrics:
            values = self._measure(metric, features, logits, labels)
            results[metric] = {"name": names[metric], **values}
        return results

    def _measure(
        self, metric: str, features: np.ndarray, logits: np.ndarray, labels: np.ndarray | None
    ) -> dict[str, Any]:
        if metric == "fid":
            return {"value": frechet_distance(Statistics.of(features), Statistics.of(self.real))}
        if metric == "kid":
            mean, spread = kernel_distance(features, self.real)
            return {"value": mean, "spread": spread}
        if metric == "is":
            mean, spread = classifier_score(logits, splits=min(SPLITS, max(1, len(logits) // 10)))
            return {"value": mean, "spread": spread}
        if metric == "precision_recall":
            precision, recall = precision_and_recall(self.real, features)
            return {"precision": precision, "recall": recall}
        if metric == "per_class":
            return self._per_class(features, labels)
        return {"value": frechet_distance_at_infinity(features, Statistics.of(self.real))}

    def _per_class(self, features: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
        """The distance of each class's images to that class's real ones, and the mean."""
        distances = {}
        for label in np.unique(labels):
            ours, theirs = features[labels == label], self.real[self.labels == label]
            if len(ours) >= 2 and len(theirs) >= 2:
                distances[str(int(label))] = frechet_distance(
                    Statistics.of(ours), Statistics.of(theirs)
                )
        if not distances:
            raise invalid("images", len(labels), "must be at least 2 of a class, real and sampled")
        return {"value": float(np.mean(list(distances.values()))), "classes": distances}

    def _real_features(
        self, images: Any, cache: str | os.PathLike | None, network_digest: str
    ) -> np.ndarray:
        if cache is None:
            return self._network(np.asarray(images))[0]
        digest = hashlib.sha256(f"{network_digest} {images.shape}".encode())
        for first in range(0, len(images), 1024):
            digest.update(np.ascontiguousarray(images[first : first + 1024]))
        path = Path(cache) / f"{digest.hexdigest()[:32]}.npy"
        if not path.exists():
            features = self._network(np.asarray(images))[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, features)
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise invalid("features", str(path), f"cannot be read ({error}); delete it") from error
