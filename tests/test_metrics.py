"""The Fréchet distance against closed forms, and the classifier whose features it takes."""

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.images import to_float
from ddsm_tf.metrics import (
    FeatureNetwork,
    FrechetDistance,
    Statistics,
    classifier,
    frechet_distance,
)
from ddsm_tf.metrics.classifier import train_classifier
from ddsm_tf.training.data import load_images


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", 8, 1)


@pytest.fixture(scope="module")
def network(digits):
    return train_classifier(digits.images, digits.labels, seed=0)


def gaussian(mean, covariance):
    return Statistics(np.asarray(mean, float), np.asarray(covariance, float), 100)


def test_distance_of_diagonal_gaussians_has_a_closed_form():
    # |Δμ|² + Σ (σ₁ - σ₂)² = (9 + 16) + (1 - 2)² + (3 - 5)².
    first, second = gaussian([0, 0], [[1, 0], [0, 9]]), gaussian([3, 4], [[4, 0], [0, 25]])
    assert frechet_distance(first, second) == pytest.approx(30.0, abs=1e-9)


def test_distance_is_unchanged_by_a_rotation():
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    scales = np.array([1.0, 2.0, 3.0, 0.5, 0.1])
    first = gaussian(np.zeros(5), np.diag(scales**2))
    second = gaussian(np.ones(5), np.diag((2 * scales) ** 2))
    turned = [gaussian(turn @ s.mean, turn @ s.covariance @ turn.T) for s in (first, second)]
    expected = 5.0 + np.sum(scales**2)
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(*turned) == pytest.approx(expected, abs=1e-9)


def test_distance_agrees_with_scipy_for_covariances_that_do_not_commute():
    import scipy.linalg

    random = np.random.default_rng(1)
    sets = [random.normal(size=(50, 6)) @ random.normal(size=(6, 6)) for _ in range(2)]
    first, second = (Statistics.of(features) for features in sets)
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance).real
    expected = np.sum((first.mean - second.mean) ** 2) + np.trace(
        first.covariance + second.covariance - 2 * root
    )
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_distance_of_singular_covariances_is_finite_and_zero_for_equal_sets():
    features = np.random.default_rng(2).normal(size=(3, 8))
    statistics = Statistics.of(features)
    assert np.linalg.matrix_rank(statistics.covariance) == 2
    assert frechet_distance(statistics, statistics) == pytest.approx(0.0, abs=1e-9)
    moved = Statistics.of(features + 2.0)
    assert frechet_distance(statistics, moved) == pytest.approx(8 * 4.0, abs=1e-6)


def test_statistics_are_unbiased():
    statistics = Statistics.of(np.array([[0.0, 0.0], [2.0, 4.0]]))
    assert statistics.mean.tolist() == [1.0, 2.0]
    assert statistics.covariance.tolist() == [[2.0, 4.0], [4.0, 8.0]]


@pytest.mark.parametrize(
    "features", [np.zeros(3), np.zeros((1, 3)), np.array([[np.nan, 0.0], [0.0, 0.0]])]
)
def test_bad_features_are_refused(features):
    with pytest.raises(InputError, match="features"):
        Statistics.of(features)


def test_different_dimensions_are_refused():
    with pytest.raises(InputError, match="dimension"):
        frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))


def test_classifier_learns_the_digits(network, digits):
    assert network.accuracy >= 0.97
    features = network(digits.images[:100])
    assert features.shape == (100, 64) and features.dtype == np.float32
    # Before the activation: after it, none would be as far below zero.
    assert features.min() < -1.0
    covariance = Statistics.of(network(digits.images)).covariance
    assert np.linalg.eigvalsh(covariance)[0] > 1e-6


def test_distance_orders_images_by_their_quality(network, digits):
    distance = FrechetDistance(network, digits.images)
    random = np.random.default_rng(0)
    some = digits.images[random.permutation(len(digits.images))[:500]]
    noisy = np.clip(some + random.normal(0, 40, some.shape), 0, 255).astype(np.uint8)
    noise = random.integers(0, 256, some.shape, dtype=np.uint8)
    one_class = digits.images[digits.labels == 3][:150]
    real, blurred, pure = distance(some), distance(noisy), distance(noise)
    assert real < 6 < blurred < pure
    assert distance(one_class) > 10 * real
    assert "FID" not in distance.name


def test_classifier_is_fixed_by_its_seed_and_survives_a_file(network, digits, tmp_path):
    short = [train_classifier(digits.images, digits.labels, seed=s, steps=5) for s in (3, 3, 4)]
    features = [one(digits.images[:10]) for one in short]
    np.testing.assert_allclose(features[0], features[1], atol=1e-5)
    assert np.abs(features[0] - features[2]).max() > 0.01
    network.save(tmp_path / "classifier.keras")
    loaded = FeatureNetwork.load(tmp_path / "classifier.keras")
    np.testing.assert_array_equal(loaded(digits.images[:50]), network(digits.images[:50]))
    # Weights alone, not what trained them.
    weights = 4 * network.classifier.count_params()
    assert (tmp_path / "classifier.keras").stat().st_size < 1.5 * weights + 50_000


def test_only_some_images_are_floats_at_a_time(network, digits, monkeypatch):
    images = digits.images[:70]
    features, logits = network.features_and_logits(images)
    counts = []

    def counted(some):
        counts.append(len(some))
        return to_float(some)

    monkeypatch.setattr(classifier, "AT_A_TIME", 32)
    monkeypatch.setattr(classifier, "to_float", counted)
    again = network.features_and_logits(images)
    assert counts == [32, 32, 6] * 2
    np.testing.assert_allclose(again[0], features, atol=1e-5)
    np.testing.assert_allclose(again[1], logits, atol=1e-5)


def test_images_without_labels_are_told_apart_by_their_turns(digits):
    network = train_classifier(digits.images, None, steps=150)
    assert network.classifier.output_shape == (None, 4)
    assert network.accuracy > 0.7


def test_bad_images_labels_and_files_are_refused(network, digits, tmp_path):
    with pytest.raises(InputError, match="images"):
        network(digits.images.astype(np.float32))
    with pytest.raises(InputError, match="images"):
        network(digits.images[:, :4])
    with pytest.raises(InputError, match="labels"):
        train_classifier(digits.images, digits.labels[:5])
    with pytest.raises(InputError, match="square"):
        train_classifier(digits.images[:, :4], None)
    (tmp_path / "broken.keras").write_bytes(b"PK")
    with pytest.raises(InputError, match="delete it to train another"):
        FeatureNetwork.load(tmp_path / "broken.keras")
