"""Networks of one line, which are traced at once, in the places of a UNet and an autoencoder."""

import keras
import numpy as np
import tensorflow as tf

SIZE = (4, 4, 2)


class StandInUNet:
    """Answers tanh(gain · x + the label's number + a little of t), in TensorFlow and in NumPy.

    The gain is the width, so that a step at the wrong width is seen.
    """

    image_shape = SIZE
    widths = (1.0, 0.5)

    def __init__(self, num_classes=3):
        self.num_classes = num_classes
        table = np.linspace(-1.0, 1.0, num_classes + 1).astype(np.float32)
        self.gain, self.table = keras.Variable(1.0), keras.Variable(table)
        self.variables = [self.gain, self.table]

    def subnet(self, width):
        narrow = StandInUNet(self.num_classes)
        narrow.gain.assign(width)
        return narrow

    def __call__(self, x, t, labels=None):
        offset = 0.0 if labels is None else tf.gather(self.table.value, labels)[:, None, None, None]
        return tf.tanh(self.gain.value * x + offset + t[:, None, None, None] / 2000.0)

    def denoise(self, x, t, width, labels=None):
        """What a sampler on the host calls."""
        table = np.linspace(-1.0, 1.0, self.num_classes + 1).astype(np.float32)
        offset = 0.0 if labels is None else table[labels][:, None, None, None]
        t = np.broadcast_to(np.asarray(t, np.float32), len(x))
        return np.tanh(np.float32(width) * x + offset + t[:, None, None, None] / np.float32(2000))


class StandInAutoencoder:
    """Decodes latents (4, 4, 2) to images (8, 8, 3)."""

    latent_shape, image_shape = SIZE, (8, 8, 3)

    def __init__(self):
        self.mixing = keras.Variable(np.float32([[0.3, -0.2, 0.1], [0.1, 0.2, 0.4]]))
        self.variables = [self.mixing]

    def decode(self, latents):
        return tf.tanh(tf.repeat(tf.repeat(latents, 2, 1), 2, 2) @ self.mixing.value)

    def decode_arrays(self, latents):
        mixing = np.float32([[0.3, -0.2, 0.1], [0.1, 0.2, 0.4]])
        return np.tanh(np.repeat(np.repeat(latents, 2, 1), 2, 2) @ mixing)
