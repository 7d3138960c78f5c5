"""KID, classifier score, precision and recall, class by class, extrapolation; FID's Inception.

torch-fidelity is the independent implementation; without it those tests are skipped.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.metrics import Statistics, frechet_distance
from ddsm_tf.metrics import inception as inception_module
from ddsm_tf.metrics.inception import (
    InceptionNetwork,
    assign_weights,
    build_inception,
    convert_inception,
    resize_bilinear,
    tensors_digest,
    weight_names,
)
from ddsm_tf.metrics.inception_score import classifier_score
from ddsm_tf.metrics.infinity import frechet_distance_at_infinity
from ddsm_tf.metrics.kid import kernel_distance, polynomial_kernel
from ddsm_tf.metrics.precision_recall import precision_and_recall
from ddsm_tf.metrics.suite import METRICS, MetricSuite


def normal(count, dimension, seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1.0, (count, dimension))


def test_kernel_distance_of_the_definition():
    x, y = normal(5, 3, 0), normal(5, 3, 1, 1.0)
    # All pairs by hand; with as many features as a subset has, every subset is all of them.
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(5) for j in range(5)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 20
    between = sum(k(x[i], y[j]) for i, j in pairs) / 25
    mean, spread = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(within - 2 * between, rel=1e-9)
    assert spread == pytest.approx(0.0, abs=1e-9)
    assert polynomial_kernel(x, y).shape == (5, 5)


def test_kernel_distance_is_unbiased():
    x, y = normal(2000, 8, 0), normal(2000, 8, 1)
    mean, spread = kernel_distance(x, y, subset_size=200, subsets=50)
    assert abs(mean) < 0.02
    assert kernel_distance(x, y + 1.0, subset_size=200)[0] > 10 * spread


def test_classifier_score_by_hand():
    # Four classes told apart with certainty, in equal numbers, score 4; no certainty scores 1.
    certain = np.eye(4)[np.arange(400) % 4] * 100
    assert classifier_score(certain, splits=1)[0] == pytest.approx(4.0, rel=1e-6)
    assert classifier_score(np.zeros((40, 4)), splits=4) == pytest.approx((1.0, 0.0), abs=1e-12)
    p = np.array([[0.9, 0.1], [0.3, 0.7]])
    marginal = p.mean(axis=0)
    expected = np.exp(np.mean((p * np.log(p / marginal)).sum(axis=1)))
    assert classifier_score(np.log(p), splits=1)[0] == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall_by_hand():
    # On a line, k = 1: real balls reach 1 each; generated ones 1, 1 and 8.
    real = np.array([[0.0], [1.0], [10.0], [11.0]])
    generated = np.array([[0.5], [1.5], [9.5]])
    # 0.5, 1.5 and 9.5 lie within 1 of a real one; 0, 1, and by the ball of 8 both others.
    assert precision_and_recall(real, generated, neighbours=1) == (1.0, 1.0)
    far = np.array([[0.5], [1.5], [30.0], [31.0]])
    assert precision_and_recall(real, far, neighbours=1) == (0.5, 0.5)
    with pytest.raises(InputError, match="neighbours"):
        precision_and_recall(real[:1], generated, neighbours=1)


def test_extrapolation_removes_the_bias():
    reference = Statistics.of(normal(50_000, 16, 0))
    features = normal(400, 16, 1)
    plain = frechet_distance(Statistics.of(features), reference)
    extrapolated = frechet_distance_at_infinity(features, reference)
    # Equal distributions: all of the distance is bias.
    assert plain > 0.15
    assert abs(extrapolated) < 0.35 * plain
    with pytest.raises(InputError, match="at least 20"):
        frechet_distance_at_infinity(features[:19], reference)


def fake_network(images):
    """Features of an image: means of its quarters; logits: brightness against darkness."""
    x = images.astype(float) / 255
    half = x.shape[1] // 2
    quarters = [x[:, a : a + half, b : b + half] for a in (0, half) for b in (0, half)]
    features = np.stack([q.mean(axis=(1, 2, 3)) for q in quarters], axis=1)
    brightness = features.mean(axis=1)
    return features.astype(np.float32), np.stack([brightness, -brightness], axis=1) * 10


def random_images(count, seed, high=256):
    return np.random.default_rng(seed).integers(0, high, (count, 4, 4, 1), dtype=np.uint8)


def test_suite_names_numbers_by_their_network(tmp_path):
    real, labels = random_images(60, 0), np.arange(60) % 2
    suite = MetricSuite(fake_network, "classifier features", False, real, labels)
    results = suite(random_images(60, 1), METRICS, np.arange(60) % 2)
    assert list(results) == list(METRICS)
    assert not any(word in str(results) for word in ("FID", "KID", "Inception"))
    published = MetricSuite(fake_network, "Inception features", True, real).names()
    assert (published["fid"], published["kid"], published["is"]) == (
        "FID",
        "KID",
        "Inception Score",
    )
    features = fake_network(random_images(60, 1))[0]
    expected = frechet_distance(Statistics.of(features), Statistics.of(fake_network(real)[0]))
    assert results["fid"]["value"] == pytest.approx(expected)
    assert set(results["per_class"]["classes"]) == {"0", "1"}
    with pytest.raises(InputError, match="must be among"):
        suite(real, ["psnr"])
    with pytest.raises(InputError, match="needs a model with classes"):
        suite(real, ["per_class"])


def test_classes_are_judged_by_themselves():
    real, labels = random_images(200, 0), np.arange(200) % 2
    real[labels == 1] //= 4
    suite = MetricSuite(fake_network, "x", False, real, labels)
    good = suite(real, ["per_class"], labels)["per_class"]["value"]
    swapped = suite(real, ["per_class", "fid"], 1 - labels)
    # As one set the images are the same; class by class they are wrong.
    assert swapped["fid"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert good == pytest.approx(0.0, abs=1e-6)
    assert swapped["per_class"]["value"] > 0.1
    with pytest.raises(InputError, match="at least 2 of a class"):
        suite(real[:2], ["per_class"], np.arange(2))


def test_real_features_are_kept_by_images_and_network(tmp_path):
    calls = []

    def counted(images):
        calls.append(len(images))
        return fake_network(images)

    def suite(images, digest="a"):
        return MetricSuite(counted, "x", False, images, cache=tmp_path, network_digest=digest)

    first = suite(random_images(9, 0))
    again = suite(random_images(9, 0))
    assert calls == [9]
    np.testing.assert_array_equal(first.real, again.real)
    suite(random_images(9, 1))
    suite(random_images(9, 0), "b")
    assert calls == [9, 9, 9]
    broken = next(tmp_path.glob("*.npy"))
    for file in tmp_path.glob("*.npy"):
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match="delete it"):
        suite(random_images(9, 0))
    assert broken.exists()


def test_evaluate_command(tiny_run, run_here):
    asked = "fid,kid,is,precision_recall,fid_infinity"
    done = run_here("evaluate", tiny_run, "-n", 40, "--metrics", asked, "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    assert list(metrics) == asked.split(",")
    assert metrics["fid"]["name"] == "Fréchet distance (classifier features)"
    assert metrics["fid"]["value"] == pytest.approx(json.loads(done.stdout)["distance"], rel=1e-5)
    text = run_here("evaluate", tiny_run, "-n", 40, "--metrics", "kid").stdout
    assert "kernel distance (classifier features): value" in text
    assert "depend on how many images there are (here 40)" in text
    assert run_here("evaluate", tiny_run, "--metrics", "psnr").returncode == 2
    missing = run_here("evaluate", tiny_run, "--metrics", "fid", "--inception", "none.npz")
    assert missing.returncode == 2 and "convert-inception" in missing.stderr


def test_resize_reads_as_tensorflow_one_did():
    image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1) * 10
    # Output i reads input i · 2 / 4: 0, 0.5, 1 and 1.5, of which the last is cut to 1.
    expected = [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]
    np.testing.assert_allclose(resize_bilinear(image, 4)[0, :, :, 0], expected)
    same = np.random.default_rng(0).integers(0, 256, (1, 7, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_bilinear(same, 7), same)


@pytest.fixture(scope="module")
def random_tensors():
    """Random weights of the published file's names and shapes."""
    random = np.random.default_rng(0)
    model = build_inception()
    shapes = {}
    for layer in model.layers:
        unit, _, kind = layer.name.rpartition(".")
        if kind == "conv":
            shapes[f"{unit}.conv.weight"] = np.array(layer.kernel.shape)[[3, 2, 0, 1]]
        elif kind == "bn":
            for part in inception_module._PARTS[1:]:
                shapes[f"{unit}.{part}"] = layer.gamma.shape
    shapes["fc.weight"] = (1008, 2048)
    tensors = {}
    for name, shape in shapes.items():
        size = np.prod(shape[1:]) if len(shape) > 1 else 1
        value = random.normal(0, np.sqrt(2.0 / size) if len(shape) > 1 else 0.1, shape)
        if name.endswith(("bn.weight", "running_var")):
            value = 1.0 + np.abs(value)
        tensors[name] = value.astype(np.float32)
    return tensors


def test_architecture(random_tensors):
    names = weight_names()
    assert sorted(names) == sorted(random_tensors)
    # 94 convolutions, each with batch normalisation, and the last layer.
    assert len(names) == 94 * 5 + 1
    count = sum(int(np.prod(w.shape)) for w in build_inception().weights)
    assert count == sum(value.size for value in random_tensors.values())
    broken = {**random_tensors, "fc.weight": np.zeros((1000, 2048))}
    with pytest.raises(InputError, match=r"`weights` \(='fc.weight'\) has the shape"):
        assign_weights(build_inception(), broken)


def save_converted(path, tensors, sha256="abc", digest=None):
    about = {
        "format": np.array(inception_module.FORMAT),
        "sha256": np.array(sha256),
        "digest": np.array(digest or tensors_digest(tensors)),
    }
    np.savez(path, **about, **tensors)


def test_converted_weights_are_checked(random_tensors, tmp_path):
    path = tmp_path / "inception.npz"
    save_converted(path, random_tensors, digest="0" * 64)
    with pytest.raises(InputError, match="has changed since"):
        InceptionNetwork.load(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(InputError, match="is no file of"):
        InceptionNetwork.load(path)
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"something else")
    with pytest.raises(InputError, match="--allow-other"):
        convert_inception(wrong, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None,
    reason="torch and torch-fidelity are not installed: pip install torch torch-fidelity",
)


# In a process of its own: TensorFlow and torchvision do not bear each other everywhere.
REFERENCE = """
import sys
import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import mmd2

given, weights, out = sys.argv[1:]
inputs = dict(np.load(given))
x, y = inputs.pop("x"), inputs.pop("y")
images = {name: inputs.pop(name) for name in list(inputs) if name.startswith("images_")}
state = {name: torch.from_numpy(value) for name, value in inputs.items()}
torch.save({**state, "fc.bias": torch.zeros(1008)}, weights)
network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
found = {}
with torch.no_grad():
    for name, batch in images.items():
        outputs = network(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()))
        found[name], found[f"logits_{name}"] = (output.numpy() for output in outputs)
statistics = [fid_features_to_statistics(torch.from_numpy(f)) for f in (x, y)]
found["fid"] = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
kernels = [(a.astype(float) @ b.T / 16 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
found["kid"] = mmd2(*kernels)
found["is"] = isc_features_to_metric(torch.from_numpy(x), 1, False)["inception_score_mean"]
np.savez(out, **found)
"""
SIZES = (32, 299, 350)


@pytest.fixture(scope="module")
def reference(random_tensors, tmp_path_factory):
    """What torch-fidelity finds with the same weights, and a weight file as the published one."""
    folder = tmp_path_factory.mktemp("torch")
    random = np.random.default_rng(1)
    given = {
        f"images_{size}": random.integers(0, 256, (3, size, size, 3), dtype=np.uint8)
        for size in SIZES
    }
    given["x"], given["y"] = (normal(300, 16, seed).astype(np.float32) for seed in (0, 1))
    np.savez(folder / "given.npz", **given, **random_tensors)
    paths = [folder / name for name in ("given.npz", "weights.pth", "found.npz")]
    subprocess.run([sys.executable, "-c", REFERENCE, *map(str, paths)], check=True)
    with np.load(paths[2]) as found:
        return given, dict(found), paths[1]


@needs_torch
def test_the_network_is_that_of_torch_fidelity(reference, tmp_path):
    given, found, weights = reference
    convert_inception(weights, tmp_path / "inception.npz", allow_other=True)
    ours = InceptionNetwork.load(tmp_path / "inception.npz")
    assert not ours.is_published
    for size in SIZES:
        images = given[f"images_{size}"]
        features, logits = ours.features_and_logits(images)
        for mine, theirs in (
            (features, found[f"images_{size}"]),
            (logits, found[f"logits_images_{size}"]),
        ):
            assert np.abs(mine - theirs).max() < 1e-4 * max(np.abs(theirs).max(), 1.0)
            assert theirs.std() > 1e-3
    grey = given["images_32"][..., :1]
    np.testing.assert_allclose(ours(grey), ours(np.repeat(grey, 3, axis=-1)), rtol=1e-5)


@needs_torch
def test_numbers_are_those_of_torch_fidelity(reference):
    given, found, _ = reference
    x, y = given["x"], given["y"]
    distance = frechet_distance(Statistics.of(x), Statistics.of(y))
    assert distance == pytest.approx(float(found["fid"]), rel=1e-6)
    assert kernel_distance(x, y, subsets=1)[0] == pytest.approx(float(found["kid"]), rel=1e-4)
    assert classifier_score(x, splits=1)[0] == pytest.approx(float(found["is"]), rel=1e-6)


def test_networks_of_other_image_kinds_are_refused(random_tensors):
    network = InceptionNetwork.__new__(InceptionNetwork)
    with pytest.raises(InputError, match="must be uint8"):
        network.features_and_logits(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(InputError, match="must be uint8"):
        network.features_and_logits(np.zeros((1, 8, 8, 4), np.uint8))
