"""What a sandwich step costs beside a full-width step. Minutes: run with `pytest -m slow`."""

import time

import numpy as np
import pytest

from ddsm_tf.cost import macs_per_width
from ddsm_tf.models import Adam, DiffusionModel, SlimmableUNet
from ddsm_tf.noise import NoiseTable

WIDTHS = (1.0, 0.75, 0.5, 0.25)
BATCH = 8
PAIRS = 12


def make_model(widths):
    unet = SlimmableUNet(image_size=32, channels=3, base_channels=128, widths=widths)
    model = DiffusionModel(unet, NoiseTable.linear(1000))
    model.compile(Adam(2e-4, use_ema=True, global_clipnorm=1.0))
    return model


def seconds(model, images):
    started = time.perf_counter()
    model.train_on_batch(images)
    return time.perf_counter() - started


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sandwich_step_costs_what_its_macs_predict():
    full, sandwich = make_model((1.0,)), make_model(WIDTHS)
    macs = macs_per_width(sandwich.unet)
    images = np.random.default_rng(0).uniform(-1, 1, (BATCH, 32, 32, 3)).astype(np.float32)
    choices = sandwich._width_choices()
    order = [choices[i % len(choices)] for i in range(PAIRS + len(choices))]
    sandwich._choose_widths = lambda step: order[step]
    ratios = []
    for step, widths in enumerate(order):
        # One after the other, since the machine's speed drifts.
        ratio = seconds(sandwich, images) / seconds(full, images)
        if step >= len(choices):  # before that, steps are compiled
            ratios.append(ratio / (sum(macs[width] for width in widths) / macs[1.0]))
    print(f"measured / predicted: median {np.median(ratios):.3f}, {sorted(np.round(ratios, 3))}")
    assert np.median(ratios) <= 1.15
