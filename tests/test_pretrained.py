"""The trained networks that come with the project."""

from pathlib import Path

import numpy as np
import pytest

from ddsm_tf.metrics import FeatureNetwork
from ddsm_tf.training.run import Run

FOLDER = Path(__file__).parent.parent / "pretrained"
# A classifier is surer of each network's images than this, and less sure of noise.
SURE = {"fashion_mnist": 0.79, "cifar10_16": 0.5}
COUNT = 64


@pytest.fixture(scope="module", params=list(SURE))
def run(request):
    return Run.open(FOLDER / request.param)


@pytest.fixture(scope="module")
def model(run):
    return run.load_model()


def confidence(classifier, images):
    """The mean probability of the likeliest class, and how many classes were likeliest."""
    logits = classifier.features_and_logits(images)[1].astype(np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities.max(axis=1).mean(), len(set(probabilities.argmax(axis=1)))


def test_it_draws_things_of_every_kind_at_its_schedule(run, model):
    classifier = FeatureNetwork.load(run.path / "classifier.keras")
    schedule = run.schedule(None)
    assert len(set(schedule.widths)) > 1, "the searched one"
    sure, classes = confidence(classifier, model.sample(schedule, COUNT, seed=0))
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, *model.unet.image_shape), np.uint8)
    assert sure > SURE[run.path.name] > confidence(classifier, noise)[0]
    assert classes >= 8


def test_its_schedule_changes_images_little(run, model):
    full = model.sample(run.schedule("full"), 16, seed=0).astype(float)
    chosen = model.sample(run.schedule(None), 16, seed=0).astype(float)
    others = model.sample(run.schedule("full"), 16, seed=1).astype(float)
    assert 0 < np.abs(chosen - full).mean() < 0.5 * np.abs(others - full).mean()
