"""Warm-up, and clipping on one device."""

import keras
import numpy as np
import pytest

from ddsm_tf.models import SGD, Adam, LinearWarmup

# Two tensors and three steps; the norms are 5, 0.05 and 13, so a limit of 1 leaves the second.
GRADIENTS = [
    ([3.0, 0.0], [[4.0]]),
    ([0.03, 0.0], [[-0.04]]),
    ([-12.0, 3.0], [[4.0]]),
]


def trained(optimizer):
    variables = [keras.Variable([1.0, 2.0]), keras.Variable([[3.0]])]
    for step in GRADIENTS:
        optimizer.apply([keras.ops.convert_to_tensor(part) for part in step], variables)
    return np.concatenate([variable.numpy().ravel() for variable in variables])


def clipped(limit):
    """Each step's gradients as one vector, scaled as a whole to a norm of at most `limit`."""
    for first, second in GRADIENTS:
        vector = np.concatenate([first, np.ravel(second)])
        yield vector * min(1.0, limit / np.linalg.norm(vector))


@pytest.mark.parametrize("limit", [None, 1.0, 0.01])
def test_sgd_clips_by_the_global_norm(limit):
    expected = np.array([1.0, 2.0, 3.0]) - 0.5 * sum(clipped(limit or np.inf))
    np.testing.assert_allclose(trained(SGD(0.5, global_clipnorm=limit)), expected, rtol=1e-5)


@pytest.mark.parametrize("limit", [None, 1.0])
def test_adam_clips_by_the_global_norm(limit):
    expected, mean, square = np.array([1.0, 2.0, 3.0]), 0.0, 0.0
    for step, gradient in enumerate(clipped(limit or np.inf), start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        scale = np.sqrt(1.0 - 0.999**step) / (1.0 - 0.9**step)
        expected -= 0.1 * scale * mean / (np.sqrt(square) + 1e-7)
    np.testing.assert_allclose(trained(Adam(0.1, global_clipnorm=limit)), expected, rtol=1e-5)


def test_clipping_changes_adam():
    # Adam forgets the scale of a gradient that is constant; here it is not.
    assert np.abs(trained(Adam(0.1)) - trained(Adam(0.1, global_clipnorm=1.0))).max() > 0.01


@pytest.mark.parametrize(
    ("steps", "rates"),
    [(4, [0.25, 0.5, 0.75, 1.0, 1.0]), (1, [1.0] * 5), (0, [1.0] * 5)],
)
def test_warmup(steps, rates):
    schedule = LinearWarmup(0.2, steps)
    found = [float(schedule(step)) for step in range(5)]
    np.testing.assert_allclose(found, 0.2 * np.array(rates), rtol=1e-6)


def test_optimizer_takes_the_warmup():
    # Rates of 0.5, 1 and 1.
    expected = np.array([1.0, 2.0, 3.0])
    for rate, gradient in zip((0.5, 1.0, 1.0), clipped(np.inf), strict=True):
        expected -= rate * gradient
    np.testing.assert_allclose(trained(SGD(LinearWarmup(1.0, 2))), expected, rtol=1e-5)


@pytest.mark.parametrize("make", [SGD, Adam])
def test_optimizer_config_round_trip(make):
    optimizer = make(LinearWarmup(0.1, 7), global_clipnorm=0.5, use_ema=True, ema_momentum=0.9)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(copy) is make
    assert copy.get_config() == optimizer.get_config()
    assert copy.global_clipnorm == 0.5 and copy.ema_momentum == 0.9
