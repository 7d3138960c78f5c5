"""Named configurations to start from."""

from __future__ import annotations

import dataclasses

from ddsm_tf.errors import invalid
from ddsm_tf.training.config import AutoencoderConfig, RunConfig

# Settled by trying what three minutes on two cores give best: two levels of equal width, a high
# learning rate, all widths at every step, and less noise than for larger images, since 8 × 8 pixels
# are lost at ᾱ = 0.002 already.
DIGITS = RunConfig(
    preset="digits",
    data="digits",
    image_size=8,
    channels=1,
    base_channels=32,
    channel_multipliers=(1, 1),
    attention_resolutions=(),
    blocks_per_level=1,
    beta_end=0.012,
    middle_widths=2,
    steps=1200,
    batch_size=48,
    learning_rate=4e-3,
    learning_rate_decay="cosine",
    warmup_steps=60,
    ema_momentum=0.995,
    checkpoint_every=200,
    log_every=20,
    sample_every=600,
    sampling_steps=25,
    search_segments=5,
    search_trials=32,
    search_images=512,
)

# Few images a step: for the same arithmetic many small steps beat few large ones (RESULTS.md).
# v and not ε: where there is little but noise, ε is nearly the input. Narrow networks copy that
# badly, and what they miss is magnified by 1 / sqrt(ᾱ) (docs/samplers.md).
FASHION_MNIST = RunConfig(
    preset="fashion_mnist",
    data="tfds:fashion_mnist:train",
    image_size=16,
    channels=1,
    base_channels=32,
    channel_multipliers=(1, 2),
    attention_resolutions=(8,),
    blocks_per_level=2,
    prediction="v",
    middle_widths=1,
    steps=16_000,
    batch_size=16,
    learning_rate=1e-3,
    learning_rate_decay="cosine",
    warmup_steps=200,
    horizontal_flip=True,
    checkpoint_every=1000,
    sample_every=2000,
    search_trials=48,
    search_images=1024,
)

# Small enough for CPU cores.
CIFAR10_16 = dataclasses.replace(
    FASHION_MNIST,
    preset="cifar10_16",
    data="tfds:cifar10:train",
    channels=3,
    channel_multipliers=(1, 2, 2),
    steps=18_000,
    search_segments=20,
)

# Settings of the DDPM and DDSM papers for 32 × 32 images.
CIFAR10 = RunConfig(
    preset="cifar10",
    data="tfds:cifar10:train",
    image_size=32,
    channels=3,
    dropout=0.1,
    steps=450_000,
    batch_size=256,
    learning_rate=4e-4,
    warmup_steps=5000,
    ema_momentum=0.9999,
    horizontal_flip=True,
    checkpoint_every=5000,
    log_every=100,
    sample_every=5000,
    search_segments=20,
    search_trials=60,
    search_images=1024,
)

# The papers name no network for the others. These are DDPM's, with ADM's attention at 32, 16 and 8
# (Dhariwal and Nichol, 2021), so that a step costs what the DDSM paper says: 49.25 GFLOPs against
# its 49.88 on CelebA-HQ, 82.42 against 82.06 on ImageNet.
CELEBA_HQ = dataclasses.replace(
    CIFAR10,
    preset="celeba_hq",
    data="tfds:celeb_a_hq/64:train",
    image_size=64,
    attention_resolutions=(32, 16, 8),
    dropout=0.0,
    steps=500_000,
    batch_size=128,
    learning_rate=2e-4,
)

IMAGENET64 = dataclasses.replace(
    CELEBA_HQ,
    preset="imagenet64",
    data="tfds:imagenet_resized/64x64:train",
    channel_multipliers=(1, 2, 3, 4),
    blocks_per_level=3,
    num_classes=1000,
    noise_schedule="cosine",
    steps=1_500_000,
    learning_rate=1e-4,
    search_images=2048,
)

# DDPM's network for 256 × 256 (Ho et al., 2020, appendix B).
LSUN_BEDROOM = dataclasses.replace(
    CELEBA_HQ,
    preset="lsun_bedroom",
    data="tfds:lsun/bedroom:train",
    image_size=256,
    channel_multipliers=(1, 1, 2, 2, 4, 4),
    attention_resolutions=(16,),
    batch_size=64,
    learning_rate=2e-5,
    search_images=512,
)

AFHQ = dataclasses.replace(
    LSUN_BEDROOM,
    preset="afhq",
    data="folder:afhq/train",
    steps=200_000,
    batch_size=32,
    ema_momentum=0.9995,
)

# Latents of 64 × 64 × 4, denoised by CelebA-HQ's network.
LATENT_CELEBA_HQ = dataclasses.replace(
    CELEBA_HQ,
    preset="latent_celeba_hq",
    data="tfds:celeb_a_hq/256:train",
    autoencoder="latent_celeba_hq-autoencoder",
    channels=4,
    search_images=512,
)

# AFHQ's cats at 64 × 64 as latents of 16 × 16 × 4: a latent model that two CPU cores can train.
LATENT_AFHQ = dataclasses.replace(
    FASHION_MNIST,
    preset="latent_afhq",
    data="folder:afhq/train/cat",
    autoencoder="latent_afhq-autoencoder",
    channels=4,
    base_channels=48,
    channel_multipliers=(1, 2),
    prediction="epsilon",
    steps=12_000,
    batch_size=64,
    search_images=512,
)

AUTOENCODERS = {
    "latent_celeba_hq": AutoencoderConfig(
        preset="latent_celeba_hq", data="tfds:celeb_a_hq/256:train", steps=200_000
    ),
    "latent_afhq": AutoencoderConfig(
        preset="latent_afhq",
        data="folder:afhq/train/cat",
        image_size=64,
        base_channels=32,
        channel_multipliers=(1, 2, 2),
        blocks_per_level=1,
        steps=4000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=100,
        checkpoint_every=200,
        sample_every=500,
    ),
}

PRESETS = {
    preset.preset: preset
    for preset in (
        DIGITS,
        FASHION_MNIST,
        CIFAR10,
        CIFAR10_16,
        CELEBA_HQ,
        LSUN_BEDROOM,
        AFHQ,
        IMAGENET64,
        LATENT_CELEBA_HQ,
        LATENT_AFHQ,
    )
}

ABOUT = {
    "digits": "real handwritten digits of scikit-learn, 8×8 grey; minutes on two CPU cores",
    "fashion_mnist": "Fashion-MNIST at 16×16 grey; three quarters of an hour on a CPU core",
    "cifar10": "CIFAR-10 at 32×32, the papers' settings; days on one accelerator",
    "cifar10_16": "CIFAR-10 at 16×16; an hour on a CPU core",
    "celeba_hq": "CelebA-HQ faces at 64×64; days on an accelerator",
    "lsun_bedroom": "LSUN bedrooms at 256×256, DDPM's network; weeks on an accelerator",
    "afhq": "AFHQ animal faces at 256×256 from a folder; days on an accelerator",
    "latent_celeba_hq": "CelebA-HQ at 256×256 as latents of 64×64×4; days on an accelerator",
    "latent_afhq": "AFHQ's cats at 64×64 as latents of 16×16×4; hours on two CPU cores",
    "imagenet64": "ImageNet at 64×64, 1,000 classes, guidance; weeks on several accelerators",
}


def get_preset(name: str) -> RunConfig:
    """The preset of that name.

    Raises:
        InputError: there is none.
    """
    if name not in PRESETS:
        raise invalid("PRESET", name, f"must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def get_autoencoder(name: str) -> AutoencoderConfig:
    """The autoencoder of the preset of that name.

    Raises:
        InputError: there is none.
    """
    if name not in AUTOENCODERS:
        raise invalid("PRESET", name, f"must be one of {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[name]
