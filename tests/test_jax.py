"""A network trained under JAX is the same network under TensorFlow."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
from conftest import TINY, TINY_SETTINGS, randomise, slow_but

from ddsm_tf.models import Adam, DiffusionModel, SlimmableUNet, TunedDiffusionModel
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule

SCHEDULE = StepSchedule((900, 600, 350, 100, 20, 0), (0.5, 0.5, 1.0, 0.5, 1.0, 1.0), eta=0.5)
COUNT = 6
COMPILE = DiffusionModel.compile
ENVIRONMENT = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # nearly all of the time goes into compiling
}


def noisy_images():
    random = np.random.default_rng(1)
    return random.standard_normal((3, 8, 8, 1), np.float32), np.array([0, 300, 999])


def train_and_save(folder):
    """In a process under JAX: train, and save the network and what it gives."""
    assert keras.backend.backend() == "jax"
    folder = Path(folder)
    unet = randomise(SlimmableUNet(**TINY))
    model = DiffusionModel(unet, NoiseTable.linear(1000))
    model.compile(Adam(0.002, use_ema=True, ema_momentum=0.5, global_clipnorm=0.5))
    images = np.random.default_rng(0).uniform(-1, 1, (8, *unet.image_shape)).astype(np.float32)
    before = weights_of(model)
    x, t = noisy_images()
    model.denoise(x, t, 0.5)  # compiled now, and yet to see the weights to come
    # `fit` ends with weights and average in one buffer, which a second `fit` must not trip over.
    losses = [
        value
        for _ in range(2)
        for value in model.fit(images, batch_size=4, epochs=2, verbose=0).history["loss"]
    ]
    trained = weights_of(model)
    model.trainable_variables[0].assign(model.trainable_variables[0] + 1.0)
    with model.averaged_weights():
        averaged = weights_of(model)
    model.trainable_variables[0].assign(trained[0])
    unet.save(folder / "unet.keras")
    train_run(folder / "run")
    outputs = {f"output_{width}": model.denoise(x, t, width) for width in unet.widths}
    np.savez(
        folder / "out.npz",
        losses=losses,
        moved=max(np.abs(a - b).max() for a, b in zip(trained, before, strict=True)),
        drift=max(np.abs(a - b).max() for a, b in zip(trained, averaged, strict=True)),
        images=model.sample(SCHEDULE, COUNT, seed=4, batch_size=4),
        **outputs,
    )


def train_run(folder):
    """What `ddsm train` does, on a configuration that does not ask for XLA."""
    from ddsm_tf.training.presets import get_preset
    from ddsm_tf.training.run import Run
    from ddsm_tf.training.train import train

    # More than the 32 bits that JAX takes.
    config = get_preset("digits").changed([*TINY_SETTINGS, "steps=4", "seed=5000000000"])
    assert not config.jit_compile
    with mock.patch.object(DiffusionModel, "compile", autospec=True, side_effect=COMPILE) as seen:
        train(Run.create(folder, config))
    assert seen.call_args.kwargs == {"jit_compile": True}


WIDTHS = (1.0, 0.5, 0.25)
# Model, its options, and the widths that each of the steps trains.
STEPS = {
    "redrawn": (DiffusionModel, {}, [WIDTHS] * 3),
    "distilled": (DiffusionModel, {"distillation": 0.3}, [WIDTHS] * 3),
    # Each width has timesteps of its own.
    "tuned": (
        TunedDiffusionModel,
        {"schedule": StepSchedule((600, 300), (0.25, 1.0))},
        [(1.0,), (0.25,), (1.0,)],
    ),
}


def save_steps(case, file):
    """In a process under JAX: some steps, width by width as `fit` has them, and in one piece."""
    import jax

    from ddsm_tf.models.jax_step import SandwichStep

    kind, options, trained = STEPS[case]
    small = {**TINY, "base_channels": 16, "channel_multipliers": (1,), "attention_resolutions": ()}
    results = {}
    for name in ("by_width", "in_one"):
        keras.utils.set_random_seed(1)  # of dropout
        unet = randomise(SlimmableUNet(**{**small, "widths": WIDTHS, "dropout": 0.2}))
        model = kind(unet, NoiseTable.linear(1000), **options)
        model.compile(Adam(0.01, use_ema=True, global_clipnorm=0.5), jit_compile=True)
        model.optimizer.build(model.trainable_variables)
        kinds = (model.trainable_variables, model.non_trainable_variables)
        kinds += (model.optimizer.variables, model.metrics_variables)
        state = tuple([jax.numpy.array(variable.value) for variable in each] for each in kinds)
        if name == "by_width":
            step = SandwichStep(model)
        else:
            step = jax.jit(lambda w, s, d, m=model: m._step_at(w)(s, d), static_argnums=0)
        random = np.random.default_rng(5)
        for choice in trained:
            images = random.uniform(-1, 1, (4, *unet.image_shape)).astype(np.float32)
            logs, state = step(choice, state, (images,))
        results |= {f"{name} log {key}": value for key, value in logs.items()}
        for place, values in enumerate(state):
            results |= {f"{name} {place} {index}": value for index, value in enumerate(values)}
    np.savez(file, **results)


def weights_of(model):
    return [keras.ops.convert_to_numpy(weight) for weight in model.trainable_variables]


def under_jax(call):
    """Run a function of this file in a process under JAX."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += f"import test_jax; test_jax.{call}"
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jax")
    under_jax(f"train_and_save({str(folder)!r})")
    return folder


@pytest.fixture(scope="module")
def of_jax(folder):
    return np.load(folder / "out.npz")


@pytest.fixture(scope="module")
def unet(folder):
    assert keras.backend.backend() == "tensorflow"
    return keras.saving.load_model(folder / "unet.keras", safe_mode=True)


def test_jax_trains(of_jax):
    assert of_jax["losses"].shape == (4,) and np.isfinite(of_jax["losses"]).all()
    assert of_jax["losses"][-1] < of_jax["losses"][0]
    assert of_jax["moved"] > 1e-3
    # `fit` leaves the moving average as weights.
    assert of_jax["drift"] < 1e-6


def test_a_run_trained_under_jax_is_one_under_tensorflow(folder):
    from ddsm_tf.training.callbacks import read_history
    from ddsm_tf.training.run import Run

    run = Run.open(folder / "run")
    assert run.checkpoints.steps() == [4]
    history = read_history(run.path / "logs" / "history.jsonl")
    assert [entry["step"] for entry in history] == [2, 4]
    images = run.load_model().sample(run.schedule("full"), 3, seed=0)
    assert images.shape == (3, 8, 8, 1) and images.std() > 20


@pytest.mark.parametrize("case", slow_but(STEPS, "distilled"))
def test_steps_width_by_width_are_those_in_one_piece(tmp_path, case):
    under_jax(f"save_steps({case!r}, {str(tmp_path / 'steps.npz')!r})")
    steps = dict(np.load(tmp_path / "steps.npz"))
    in_one = {name: value for name, value in steps.items() if name.startswith("in_one")}
    assert len(in_one) > 70 and len(steps) == 2 * len(in_one)
    for name, expected in in_one.items():
        found = steps[name.replace("in_one", "by_width")]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-5, err_msg=name)
    # All of the loss is there, and of every width.
    logs = {name.removeprefix("in_one log "): v for name, v in in_one.items() if " log " in name}
    assert set(logs) == {"loss", "loss_1", "loss_0.5", "loss_0.25"}
    if case == "tuned":
        assert logs.pop("loss_0.5") == 0.0
    assert min(logs.values()) > 0.1


@pytest.mark.parametrize("width", TINY["widths"])
def test_network_gives_the_same_under_tensorflow(unet, of_jax, width):
    x, t = noisy_images()
    expected = of_jax[f"output_{width}"]
    assert expected.std() > 0.05
    np.testing.assert_allclose(unet(x, t, width=width), expected, atol=1e-5)


def test_samples_are_the_same_under_tensorflow(unet, of_jax):
    found = DiffusionModel(unet, NoiseTable.linear(1000)).sample(SCHEDULE, COUNT, seed=4)
    assert found.dtype == of_jax["images"].dtype == np.uint8 and found.std() > 20
    difference = np.abs(found.astype(int) - of_jax["images"])
    assert (difference <= 1).mean() >= 0.999
    assert (difference == 0).mean() > 0.98
