"""Sampling from a bundle with LiteRT."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ddsm_tf.edge.bundle import Bundle
from ddsm_tf.edge.network import Decoder, Network
from ddsm_tf.errors import invalid
from ddsm_tf.sampling import clip_to_range, sample_images
from ddsm_tf.schedule import StepSchedule

DEFAULT_BATCH = 16
DECODER = "decoder"


class EdgeSampler:
    """Samples images from a bundle; each width's network loads when a step first needs it.

    Args:
        bundle: what `Bundle.load` gave.
        threads: CPU threads of the interpreter; None leaves it to LiteRT.
        max_resident: networks to keep in memory, where the decoder of latents counts as one; None
            keeps all that were needed. With fewer than sampling needs, the one not used for longest
            goes before another comes, and is loaded again at its next step.

    Raises:
        InputError: an argument is below 1.

    Example:
        >>> from ddsm_tf.edge import Bundle, EdgeSampler
        >>> from ddsm_tf.images import save_images
        >>> bundle = Bundle.load("bundle")
        >>> sampler = EdgeSampler(bundle, threads=2, max_resident=1)
        >>> images = sampler.sample(16, seed=0, batch_size=4)   # uint8 (16, H, W, C)
        >>> save_images(images, "images.png")
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, max_resident: int | None = None
    ) -> None:
        for argument, value in (("threads", threads), ("max_resident", max_resident)):
            if value is not None and value < 1:
                raise invalid(argument, value, "must be at least 1")
        self.bundle = bundle
        self.threads = threads
        self.max_resident = max_resident
        # By width, the decoder under `DECODER`; the one used last at the end.
        self._loaded: OrderedDict[float | str, Network | Decoder] = OrderedDict()

    def denoise(
        self,
        x: np.ndarray,
        t: int | np.ndarray,
        width: float,
        labels: np.ndarray | None = None,
    ) -> np.ndarray:
        """The network's output for x, float32 (N, H, W, C), at timestep t, a scalar or (N,).

        Models with classes need `labels`, int32 (N,).

        Raises:
            InputError: the bundle has no such width, or its file is no such network.
        """
        return self.network(width)(x, t, labels)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images of latents, where the bundle's networks denoise these.

        Raises:
            InputError: the bundle has no decoder, or its file is none.
        """
        if self.bundle.decoder is None:
            raise invalid("decoder", None, "is not in the bundle; its networks denoise images")
        return self._resident(DECODER, self._load_decoder)(latents)

    @property
    def resident(self) -> tuple[float, ...]:
        """The widths whose networks are in memory, the one used last at the end."""
        return tuple(key for key in self._loaded if key != DECODER)

    def network(self, width: float) -> Network:
        """The network of a width, loaded if it is not in memory."""
        if width not in self.bundle.networks:
            rule = f"is not in the bundle; it has {list(self.bundle.widths)}"
            raise invalid("width", width, rule)
        return self._resident(width, partial(self._load, width))

    def _resident(self, key: float | str, load: Callable[[], Any]) -> Any:
        """What is loaded under a key, loaded now if it is not in memory."""
        if key not in self._loaded:
            # Before the new one comes, so that memory never has to hold one more.
            while self.max_resident and len(self._loaded) >= self.max_resident:
                self._loaded.popitem(last=False)
            self._loaded[key] = load()
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _load(self, width: float) -> Network:
        bundle, name = self.bundle, self.bundle.networks[width].file.name
        content = bundle.tflite(width)
        shape, classes = bundle.image_shape, bundle.num_classes
        return Network(content, name, shape, self.threads, bundle.batch, classes)

    def _load_decoder(self) -> Decoder:
        bundle, stored = self.bundle, self.bundle.decoder
        content = stored.file.read(bundle.folder)
        shapes = bundle.image_shape, stored.image_shape
        return Decoder(content, stored.file.name, *shapes, self.threads, bundle.batch)

    @property
    def default_batch(self) -> int:
        """Images at a time where nobody says: the bundle's fixed batch, or 16."""
        return self.bundle.batch or DEFAULT_BATCH

    def sample(
        self,
        count: int,
        seed: int = 0,
        *,
        labels: np.ndarray | None = None,
        schedule: StepSchedule | None = None,
        batch_size: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Sample images: those of `DiffusionModel.sample` with the same schedule and seed.

        Args:
            count: number of images N.
            seed: image i depends on seed, i and its class only.
            labels: classes of a model that has them, integers (N,) or one for all; None takes them
                in turn. The number of classes stands for none of them.
            schedule: None takes the bundle's default; others are in `bundle.schedules`.
            batch_size: images at a time; 1 needs the least memory. None takes the bundle's fixed
                batch, or 16.
            on_step: called after every step of every batch with the step's index.

        Returns:
            uint8 (N, H, W, C); decoded, where the networks denoise latents.

        Raises:
            InputError: the schedule has a width or a number of timesteps that is not the bundle's,
                or the labels do not fit.
        """
        schedule = schedule or self.bundle.schedule
        schedule.check_model(self.bundle.widths, self.bundle.noise_table.train_timesteps)
        return sample_images(
            self.denoise,
            schedule,
            self.bundle.noise_table,
            self.bundle.image_shape,
            count,
            seed=seed,
            batch_size=batch_size or self.default_batch,
            labels=labels,
            num_classes=self.bundle.num_classes,
            clip=None if self.bundle.decoder else clip_to_range,
            decode=self.decode if self.bundle.decoder else None,
            on_step=on_step,
        )
