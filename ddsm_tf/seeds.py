"""Gaussian noise that a seed fixes on every runtime.

The generator is Philox4x32-10, which turns a counter and a key into random words without any state
(Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), and normal variables come from
the words by Box and Muller's transform. Both are a few lines of arithmetic on whole arrays, so that
NumPy on a device and a TensorFlow graph on a server draw the same noise.

    key      seed mod 2³², seed div 2³²
    counter  block of four values in the image, draw, image mod 2³², image div 2³²
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddsm_tf.errors import invalid

WORD = 2**32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class ImageNoise:
    """A stream of Gaussian noise for each image of a batch.

    Image i of seed s has a stream of its own, so it is the same image whatever the batch, the
    number of images or the runtime.

    Args:
        seed: integer in [0, 2**63).
        first: index of the first image.
        count: number of images N.
        image_shape: (H, W, C).
    """

    def __init__(self, seed: int, first: int, count: int, image_shape: tuple[int, ...]) -> None:
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 2**63:
            raise invalid("seed", seed, "must be an integer in [0, 2**63)")
        self._shape = (count, *image_shape)
        self._seed = np.uint64(seed)
        self._images = np.arange(first, first + count, dtype=np.uint64)[:, None]
        self._draws = 0

    def draw(self) -> np.ndarray:
        """The next standard normal noise of every image, float32 (N, H, W, C)."""
        values = math.prod(self._shape[1:])
        blocks = np.arange(-(-values // 4), dtype=np.uint64)
        words = philox(counter_of(blocks, np.uint64(self._draws), self._images), split(self._seed))
        self._draws += 1
        normal = box_muller([word.astype(np.float64) for word in words], np)
        noise = normal.reshape(len(normal), -1)[:, :values].astype(np.float32)
        return noise.reshape(self._shape)


def counter_of(blocks: Any, draw: Any, images: Any) -> tuple[Any, ...]:
    """The counter of each block of each image, four words that broadcast to (N, blocks).

    Args:
        blocks: uint64 (blocks,), which four values of the image.
        draw: uint64 scalar, how often noise was drawn before.
        images: uint64 (N, 1), index of each image.
    """
    return blocks, draw, *split(images)


def split(number: Any) -> tuple[Any, Any]:
    """The low and the high word of 64-bit numbers."""
    return number % WORD, number // WORD


def philox(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, ...]:
    """Philox4x32-10 on NumPy arrays or tensors.

    Args:
        counter: four words, each uint64 below 2³²; they broadcast.
        key: two words likewise.

    Returns:
        Four random words.
    """
    a, b, c, d = counter
    key = list(key)
    for _ in range(_ROUNDS):
        low_a, high_a = split(a * _MULTIPLIERS[0])
        low_c, high_c = split(c * _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ key[0], low_c, high_a ^ d ^ key[1], low_a
        key = [(word + add) % WORD for word, add in zip(key, _KEY_INCREMENTS, strict=True)]
    return a, b, c, d


def box_muller(words: Sequence[Any], xp: Any) -> Any:
    """Four standard normal values of four random words.

    Args:
        words: each float64 of one shape, whole numbers below 2³².
        xp: NumPy, or another library with its names, such as `keras.ops`.

    Returns:
        float64 of that shape and a last axis of 4, none beyond ±6.8.
    """
    pairs = []
    for radius_word, angle_word in (words[:2], words[2:]):
        # Half a step up: the logarithm of 0 is not finite.
        radius = xp.sqrt(-2.0 * xp.log((radius_word + 0.5) / WORD))
        angle = angle_word * (2.0 * math.pi / WORD)
        pairs += [radius * xp.cos(angle), radius * xp.sin(angle)]
    return xp.stack(pairs, axis=-1)
