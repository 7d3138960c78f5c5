"""A preset's data-sheet: size, cost, memory, the paper's numbers and the commands to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddsm_tf.cost import Cost, forward_cost
from ddsm_tf.training.config import RunConfig
from ddsm_tf.training.presets import ABOUT


@dataclass(frozen=True)
class Published:
    """What the DDSM paper (arXiv 2310.03337, table 1 and section 4) says of a data set.

    Attributes:
        gflops: of a step at full width, 2 · MACs without attention's matrix products; None where
            the paper gives none.
        step_aware_gflops: mean of the steps of its schedule.
        fid, step_aware_fid: at full width and with its schedule.
        saved: share of the FLOPs.
    """

    gflops: float | None
    step_aware_gflops: float | None
    fid: float | None
    step_aware_fid: float | None
    saved: float


PUBLISHED = {
    "cifar10": Published(12.14, 6.20, 3.713, 3.552, 0.49),
    "celeba_hq": Published(49.88, 19.58, 6.755, 6.039, 0.61),
    "lsun_bedroom": Published(None, None, None, None, 0.59),
    "afhq": Published(None, None, None, None, 0.71),
    "imagenet64": Published(82.06, 19.40, 27.000, 24.714, 0.76),
}

# Raw weight, gradient, Adam's two moments and the moving average, float32 each.
FLOATS_PER_WEIGHT = 5
# What a training step keeps of each value that a layer puts out: the value and a share of its
# gradient. JAX's compiler planned 0.72 GB of temporaries for batch 16 of CIFAR-10's network at base
# 64 and two widths, where 2 gives 0.73 GB.
FLOATS_PER_ACTIVATION = 2
GIB = 2**30


def training_memory(config: RunConfig, costs: dict[float, Cost]) -> float:
    """Bytes that a training step of the whole batch is expected to need on one device.

    The widths of a step run one after another, and what the backward pass needs of all of them is
    kept: the widest, the narrowest and the middle ones.
    """
    widths = list(costs)
    middle = sorted(widths[1:-1], reverse=True)[: config.middle_widths]
    trained = {widths[0], *middle, widths[-1]}
    bytes_per_value = 2 if config.mixed_precision == "mixed_bfloat16" else 4
    activations = sum(costs[width].activations for width in trained) * config.batch_size
    weights = costs[widths[0]].parameters * FLOATS_PER_WEIGHT * 4
    return weights + activations * FLOATS_PER_ACTIVATION * bytes_per_value


def costs_of(unet: Any) -> dict[float, Cost]:
    """Width → what a forward pass costs there, widest first."""
    return {width: forward_cost(unet, width) for width in unet.widths}


def data_sheet(config: RunConfig, costs: dict[float, Cost]) -> str:
    """The data-sheet of a preset as text.

    Args:
        config: the preset.
        costs: see `costs_of`.
    """
    denoised = "latents" if config.autoencoder else "images "
    lines = [
        f"{config.preset}: {ABOUT[config.preset]}",
        f"  data            {config.data}",
        f"  {denoised}         {config.image_size} × {config.image_size} × {config.channels}"
        + (f", {config.num_classes} classes" if config.num_classes else ""),
        f"  training        {config.steps:,} steps of {config.batch_size} images, Adam "
        f"{config.learning_rate:g}, predicting {config.prediction}",
        f"  sampling        {config.sampling_steps} steps of {config.sampler}",
        f"  memory          about {training_memory(config, costs) / GIB:.1f} GiB to train on one "
        "device; fewer images a device need less",
        "  width   parameters   GMACs a step   of them attention's matrices",
    ]
    for width, cost in costs.items():
        lines.append(
            f"  {width:<7g} {cost.parameters / 1e6:8.2f} M   {cost.total_macs / 1e9:12.3f}   "
            f"{cost.attention_macs / 1e9:.3f}"
        )
    lines += [*_published(config.preset, next(iter(costs.values()))), *_commands(config)]
    return "\n".join(lines)


def _published(preset: str, full: Cost) -> list[str]:
    paper = PUBLISHED.get(preset)
    if paper is None:
        return ["  the paper       has no numbers for it"]
    gflops = 2 * full.macs / 1e9
    if paper.gflops is None:
        return [
            f"  the paper       {100 * paper.saved:.0f} % of the FLOPs saved; it does not say of "
            f"how many (here {gflops:.2f} GFLOPs a step)"
        ]
    return [
        f"  the paper       {paper.gflops} GFLOPs a step, here {gflops:.2f} "
        f"({100 * (gflops / paper.gflops - 1):+.1f} %; without attention's matrices, as there)",
        f"                  FID {paper.fid} at full width; {paper.step_aware_fid} at "
        f"{paper.step_aware_gflops} GFLOPs, {100 * paper.saved:.0f} % saved",
    ]


def _commands(config: RunConfig) -> list[str]:
    run = f"{config.preset}-run"
    first = []
    if config.autoencoder:
        command = f"ddsm autoencoder {config.preset} --out {config.autoencoder}"
        first = [f"  autoencoder     {command}"]
    return [
        *first,
        f"  train           ddsm train {config.preset} --out {run}",
        f"  search          ddsm search {run}",
        f"  evaluate        ddsm evaluate {run} -n 10000",
        f"  export          ddsm export {run} bundle -o {run}-bundle",
    ]
