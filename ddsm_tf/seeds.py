"""Gaussian noise that a seed fixes on every runtime."""

from __future__ import annotations

import numpy as np

from ddsm_tf.errors import invalid


class ImageNoise:
    """A stream of Gaussian noise for each image of a batch.

    Image i of seed s has a stream of its own, so it is the same image whatever the batch, the
    number of images or the runtime. `RandomState` is used because NumPy freezes its streams
    for good (NEP 19); the newer `Generator` may change them between releases.

    Args:
        seed: integer in [0, 2**63).
        first: index of the first image.
        count: number of images N.
        image_shape: (H, W, C).
    """

    def __init__(self, seed: int, first: int, count: int, image_shape: tuple[int, ...]) -> None:
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 2**63:
            raise invalid("seed", seed, "must be an integer in [0, 2**63)")
        seed = int(seed)
        self._shape = tuple(image_shape)
        self._streams = [
            # The seed as two words of 32 bits: lists of larger numbers are flattened and collide.
            np.random.RandomState(
                np.random.MT19937(np.random.SeedSequence([seed % 2**32, seed >> 32, index]))
            )
            for index in range(first, first + count)
        ]

    def draw(self) -> np.ndarray:
        """The next standard normal noise of every image, float32 (N, H, W, C)."""
        noise = np.empty((len(self._streams), *self._shape), np.float32)
        for image, stream in zip(noise, self._streams, strict=True):
            image[...] = stream.standard_normal(self._shape)
        return noise
