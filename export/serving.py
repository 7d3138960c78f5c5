"""A folder that TensorFlow Serving serves: numbered versions, labels, batching, warm-up."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ddsm_tf.errors import invalid
from ddsm_tf.export.requirements import check_backend
from ddsm_tf.export.savedmodel import VERSION, write_sampler, write_savedmodels
from ddsm_tf.export.serving_files import (
    ModelsConfig,
    write_missing_files,
    write_model_batching,
)
from ddsm_tf.export.warmup import batchable, denoiser_requests, sampler_requests, write_warmup
from ddsm_tf.files import atomic_folder
from ddsm_tf.labels import check_conditional
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule, width_name
from ddsm_tf.serving import denoiser_model
from ddsm_tf.serving.arguments import check_model


def write_serving(
    unet: Any,
    noise_table: NoiseTable,
    schedule: StepSchedule,
    folder: str | os.PathLike,
    *,
    model: str = "ddsm",
    label: str | None = None,
    mount: str | None = None,
    batch_sampler: bool = False,
    autoencoder: Any = None,
) -> Path:
    """Add a version of the sampler and of every denoiser to a folder that a server polls.

    A version appears whole, by a rename, under the next number; nothing that is there is replaced
    but `models.config`, which gets the version's label. `DIR/ddsm/1/` is the sampler,
    `DIR/ddsm_unet_0_5/1/` a denoiser. Files for batching, monitoring, docker compose and Kubernetes
    are written where they are missing.

    Args:
        unet: the trained `SlimmableUNet`.
        noise_table: the one it was trained with.
        schedule: the sampler's default schedule.
        folder: the server's models; made if missing.
        model: name of the sampler; the denoisers' begin with it.
        label: that the version gets, taken from the one that has it; "stable" for the first version
            and "canary" for later ones if left out.
        mount: where the server sees `folder`; if left out, as before, and "/models" at first. Once
            written it can be changed by hand only.
        batch_sampler: let the server join the rows of several requests for samples. The signatures
            with scalar inputs (`sample`, `sample_schedule`) are then refused by the server.
        autoencoder: the `KLAutoencoder` whose latents the network denoises, or None.

    Returns:
        The sampler's new version folder.

    Raises:
        InputError: an argument breaks its rule, Keras runs on another backend than TensorFlow, or
            `models.config` cannot take the version.
    """
    check_backend()
    schedule.check_model(unet.widths, noise_table.train_timesteps)
    check_conditional(schedule.guidance_scale, unet.num_classes)
    check_model(model, None, label)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise invalid("serving", str(folder), "is a file, not a folder")
    config = ModelsConfig(folder)
    names = [model, *(denoiser_model(model, width) for width in unet.widths)]
    mount = config.choose_mount(mount)
    label = label or config.next_label(model)
    config.check(names)
    version = next_version(folder, names)
    with ExitStack() as stack:
        # Left in reverse order: the sampler appears last, when its denoisers are there.
        paths = [stack.enter_context(atomic_folder(folder / n / str(version))) for n in names]
        made = {"batch": batch_sampler, "autoencoder": autoencoder}
        _write_sampler(paths[0], model, unet, noise_table, schedule, **made)
        _write_denoisers(dict(zip(names[1:], paths[1:], strict=True)), unet)
    # Read again: somebody may have moved a label in the meantime.
    config = ModelsConfig(folder)
    config.check(names)
    for name in names:
        config.add(name, mount, version, label)
    config.write()
    write_missing_files(folder, model, mount)
    return folder / model / str(version)


def next_version(folder: Path, models: Iterable[str]) -> int:
    """One more than the highest version of any of the models; they are numbered together."""
    names = [path.name for model in models for path in (folder / model).glob("*")]
    return 1 + max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def _write_sampler(
    path: Path,
    model: str,
    unet: Any,
    noise_table: NoiseTable,
    schedule: StepSchedule,
    *,
    batch: bool,
    autoencoder: Any,
) -> None:
    write_sampler(unet, noise_table, schedule, path, autoencoder)
    shape, classes = unet.image_shape, unet.num_classes
    requests = sampler_requests(shape, unet.widths, noise_table, schedule, classes)
    if batch:
        write_model_batching(path)
        requests = batchable(requests)
    write_warmup(path, model, requests)


def _write_denoisers(paths: dict[str, Path], unet: Any) -> None:
    """Write a denoiser into each path, in the order of the widths."""
    beside = next(iter(paths.values())).parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=".denoisers-") as staging:
        write_savedmodels(unet, Path(staging))
        for width, (model, path) in zip(unet.widths, paths.items(), strict=True):
            for part in (Path(staging) / width_name(width) / VERSION).iterdir():
                part.rename(path / part.name)
            write_model_batching(path)
            write_warmup(path, model, denoiser_requests(unet.image_shape, unet.num_classes))
