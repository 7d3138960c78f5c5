"""Training at several widths through `fit`, and sampling."""

import functools
import itertools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import randomise

from ddsm_tf.errors import InputError
from ddsm_tf.models import SGD, Adam, DiffusionModel, SlimmableUNet
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import sample_images
from ddsm_tf.schedule import StepSchedule

FOUR = (1.0, 0.75, 0.5, 0.25)
SHAPE = (4, 4, 1)
EMA_MOMENTUM = 0.7


def make_model(widths=(1.0, 0.5), **options):
    """One level, no attention: what matters here is around the network."""
    unet = SlimmableUNet(
        image_size=4,
        channels=1,
        base_channels=4 * len(widths),
        channel_multipliers=(1,),
        attention_resolutions=(),
        blocks_per_level=1,
        widths=widths,
    )
    return DiffusionModel(randomise(unet), NoiseTable.linear(1000), **options)


def random_images(count=4, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *SHAPE)).astype(np.float32)


def weights_of(model):
    return [weight.numpy() for weight in model.trainable_variables]


def record_calls(monkeypatch):
    """A list that fills with (x, t, width) whenever Python runs the network's `call`."""
    calls, call = [], SlimmableUNet.call

    @functools.wraps(call)
    def recorded(self, x, t, width=None, training=False):
        calls.append((x, t, width))
        return call(self, x, t, width=width, training=training)

    monkeypatch.setattr(SlimmableUNet, "call", recorded)
    return calls


class Recorder(keras.callbacks.Callback):
    """What each step did: images counted per width, weights, and the average swapped in."""

    def __init__(self):
        super().__init__()
        self.counts, self.weights, self.swapped, self.restored = [], [], None, None

    def on_train_batch_end(self, batch, logs=None):
        trackers = self.model.loss_trackers
        self.counts.append({width: float(each.count) for width, each in trackers.items()})
        self.weights.append(weights_of(self.model))
        with self.model.averaged_weights():
            self.swapped = weights_of(self.model)
        self.restored = weights_of(self.model)


class Fit:
    """Eight compiled steps of four images, of which the tests below look at one thing each."""

    def __init__(self):
        with pytest.MonkeyPatch.context() as patch:
            calls = record_calls(patch)
            self.model = make_model(FOUR, seed=3)
            optimizer = SGD(0.01, use_ema=True, ema_momentum=EMA_MOMENTUM)
            self.model.compile(optimizer, jit_compile=False)
            self.recorder = Recorder()
            history = self.model.fit(
                random_images(32), batch_size=4, verbose=0, callbacks=[self.recorder]
            )
            self.logs = {name: values[-1] for name, values in history.history.items()}
            self.traced_widths = [width for _, _, width in calls]


@pytest.fixture(scope="module")
def fit():
    return Fit()


def test_fit_logs_the_loss_of_each_width(fit):
    assert set(fit.logs) == {"loss", "loss_1", "loss_0.75", "loss_0.5", "loss_0.25"}
    counts = fit.recorder.counts[-1]
    assert counts[1.0] == counts[0.25] == counts[0.75] + counts[0.5] == 32
    total = sum(fit.logs[f"loss_{width:g}"] * counts[width] for width in FOUR)
    assert fit.logs["loss"] == pytest.approx(total / 32, rel=1e-5)


def test_each_step_trains_the_sandwich_of_its_number(fit):
    counts = [dict.fromkeys(FOUR, 0.0), *fit.recorder.counts]
    trained = [
        tuple(width for width in FOUR if after[width] > before[width])
        for before, after in itertools.pairwise(counts)
    ]
    assert set(trained) == {(1.0, 0.75, 0.25), (1.0, 0.5, 0.25)}
    # Another model of the same seed agrees; this is what a resumed run relies on.
    other = make_model(FOUR, seed=3)
    assert trained == [other._choose_widths(step) for step in range(8)]


def test_choice_of_widths_is_even_and_depends_on_the_seed():
    choices = [
        [model._choose_widths(step)[1] for step in range(200)]
        for model in (make_model(FOUR, seed=0), make_model(FOUR, seed=1))
    ]
    assert choices[0] != choices[1]
    assert all(70 < chosen.count(0.5) < 130 for chosen in choices)


def test_one_compiled_step_per_sandwich(fit):
    first, second = fit.traced_widths[:3], fit.traced_widths[3:]
    assert sorted([first, second]) == [[1.0, 0.5, 0.25], [1.0, 0.75, 0.25]]


def test_moving_average(fit):
    recorder = fit.recorder
    average = recorder.weights[0]
    for weights in recorder.weights[1:]:
        average = [
            EMA_MOMENTUM * old + (1 - EMA_MOMENTUM) * new
            for old, new in zip(average, weights, strict=True)
        ]
    raw = recorder.weights[-1]
    assert max(np.abs(a - b).max() for a, b in zip(average, raw, strict=True)) > 1e-3
    # `averaged_weights` swaps it in and puts the raw weights back; `fit` leaves it in place.
    for mean, old, inside, after, final in zip(
        average, raw, recorder.swapped, recorder.restored, weights_of(fit.model), strict=True
    ):
        np.testing.assert_allclose(inside, mean, atol=1e-6)
        assert np.array_equal(after, old)
        np.testing.assert_allclose(final, mean, atol=1e-6)


def test_averaged_weights_come_back_after_an_error(fit):
    model = fit.model
    average = weights_of(model)
    model.trainable_variables[0].assign_add(keras.ops.ones_like(model.trainable_variables[0]))
    moved = weights_of(model)
    with pytest.raises(RuntimeError, match="inside"), model.averaged_weights():
        np.testing.assert_allclose(weights_of(model)[0], average[0], atol=1e-6)
        raise RuntimeError("inside")
    assert np.array_equal(weights_of(model)[0], moved[0])
    model.trainable_variables[0].assign(average[0])


def test_averaged_weights_without_an_average():
    model = make_model((1.0,))
    before = weights_of(model)
    for optimizer in (None, SGD(0.1), SGD(0.1, use_ema=True)):
        model.compile(optimizer)
        # Without a step there is no average, and zeros must not be taken for one.
        with model.averaged_weights():
            assert all(map(np.array_equal, weights_of(model), before))


@pytest.mark.parametrize(
    ("widths", "middle_widths", "expected"),
    [
        (FOUR, 0, [(1.0, 0.25)]),
        (FOUR, 2, [FOUR]),
        (FOUR, 9, [FOUR]),
        ((1.0, 0.5), 1, [(1.0, 0.5)]),
        ((1.0,), 1, [(1.0,)]),
    ],
)
def test_sandwiches(widths, middle_widths, expected):
    assert make_model(widths, middle_widths=middle_widths)._width_choices() == expected


def asked_steps(monkeypatch, model, data, **fit_options):
    """Fit without learning; returns the step numbers for which widths were chosen."""
    steps, choose = [], model._choose_widths
    monkeypatch.setattr(model, "_choose_widths", lambda n: (steps.append(n), choose(n))[1])
    model.fit(data, verbose=0, shuffle=False, **fit_options)
    return steps


def batches(images):
    return tf.data.Dataset.from_tensor_slices(images).batch(2)


def test_widths_go_on_where_training_stopped(monkeypatch):
    model = make_model((1.0,))
    model.compile(SGD(0.0), run_eagerly=True)
    model.optimizer.iterations.assign(5)
    assert asked_steps(monkeypatch, model, batches(random_images(4)), epochs=2) == [5, 6, 7, 8]
    assert asked_steps(monkeypatch, model, batches(random_images(2))) == [9]


def test_widths_count_steps_where_the_length_is_unknown(monkeypatch):
    model = make_model((1.0,))
    model.compile(SGD(0.0), run_eagerly=True)
    data = batches(random_images(4)).filter(lambda _: True)
    # Each epoch ends by a call that finds no data; its step is asked for again.
    assert asked_steps(monkeypatch, model, data, epochs=2) == [0, 1, 2, 2, 3, 4]


def copied_draws(model):
    """A copy of the model's random state, which draws what the model will."""
    copy = keras.random.SeedGenerator(0)
    copy.state.assign(model.seed_generator.state)
    return copy


def draw(generator, count):
    """t and noise as a model draws them."""
    t = keras.random.randint((count,), 0, 1000, seed=generator)
    return np.asarray(t), np.asarray(keras.random.normal((count, *SHAPE), seed=generator))


def draw_like(model, count):
    """The t and noise that the model will draw next."""
    return draw(copied_draws(model), count)


def outputs_like(model, images, redrawn=False):
    """Width → the noise and output of the model's next call, computed outside of it."""
    generator, drawn, found = copied_draws(model), None, {}
    for width in model.unet.widths:
        if redrawn or drawn is None:
            drawn = draw(generator, len(images))
        t, noise = drawn
        signal = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[t][:, None, None, None]
        x_t = (np.sqrt(signal) * images + np.sqrt(1.0 - signal) * noise).astype(np.float32)
        found[width] = noise, np.asarray(model.unet(x_t, t, width=width))
    return found


def squared_error(a, b):
    return np.square(a - b).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_squared_error_summed_over_widths(training):
    model = make_model(FOUR)
    images = random_images(6)
    for _ in range(2):  # the second call must draw anew
        outputs = outputs_like(model, images, redrawn=training)
        losses = model(images, training=training)
        assert list(losses) == ["loss_1", "loss_0.75", "loss_0.5", "loss_0.25"]
        expected = np.array([squared_error(output, noise) for noise, output in outputs.values()])
        np.testing.assert_allclose(list(losses.values()), expected, rtol=1e-4)
        assert float(model.losses[0]) == pytest.approx(expected.mean(axis=1).sum(), rel=1e-4)


def test_loss_draws_new_noise_at_every_call():
    model = make_model((1.0,))
    first, second = (draw_like(model, 4)[1] for _ in range(2) if model(random_images()))
    assert np.abs(first - second).max() > 0.5


@pytest.mark.parametrize(
    ("options", "training", "shared"),
    [({}, True, False), ({}, False, True), ({"distillation": 0.3}, True, True)],
)
def test_which_widths_see_the_same_noisy_images(monkeypatch, options, training, shared):
    model = make_model(FOUR, **options)
    calls = record_calls(monkeypatch)
    model(random_images(), training=training)
    assert [width for _, _, width in calls] == list(FOUR)
    for (x, t, _), (other_x, other_t, _) in itertools.combinations(calls, 2):
        assert np.array_equal(x, other_x) == np.array_equal(t, other_t) == shared


def test_distilled_loss():
    model = make_model(FOUR, distillation=0.3)
    images = random_images()
    for training in (True, False):
        outputs = outputs_like(model, images)
        losses = model(images, training=training)
        for width, (noise, output) in outputs.items():
            expected = squared_error(output, noise)
            if training and width < 1.0:
                expected = 0.7 * expected + 0.3 * squared_error(output, outputs[1.0][1])
            np.testing.assert_allclose(losses[f"loss_{width:g}"], expected, rtol=1e-4)


def test_distillation_does_not_train_the_teacher():
    model = make_model((1.0, 0.5), distillation=1.0)
    kernel = model.unet.middle[0].input_conv.kernel
    with tf.GradientTape(persistent=True) as tape:
        losses = model(random_images(), training=True)
        narrow, wide = (tf.reduce_mean(losses[name]) for name in ("loss_0.5", "loss_1"))
    gradient = tape.gradient(narrow, kernel.value).numpy()
    assert np.abs(gradient[:, :, :4, :4]).max() > 1e-6
    # Only the teacher reads these rows and columns.
    assert not gradient[:, :, 4:].any() and not gradient[..., 4:].any()
    assert np.abs(tape.gradient(wide, kernel.value).numpy()[:, :, 4:]).max() > 1e-6


def test_evaluate_covers_every_width():
    model = make_model(FOUR, middle_widths=0)
    model.compile(SGD(0.1), run_eagerly=True)
    images = random_images()
    outputs = outputs_like(model, images)
    logs = model.evaluate(images, verbose=0, return_dict=True)
    for width, (noise, output) in outputs.items():
        expected = squared_error(output, noise).mean()
        assert logs[f"loss_{width:g}"] == pytest.approx(expected, rel=1e-4)


def test_fit_compiled_by_xla_takes_the_same_step(monkeypatch):
    # XLA has random numbers of its own, so both models are given the same.
    t, noise = np.array([5, 300, 700, 999]), random_images(seed=1)
    models = [make_model((1.0,)) for _ in range(2)]
    before, losses = weights_of(models[0]), []
    for model, options in zip(models, [{"jit_compile": True}, {"run_eagerly": True}], strict=True):
        monkeypatch.setattr(model._draws, "timesteps_and_noise", lambda *_: (t, noise))
        model.compile(SGD(0.1), **options)
        history = model.fit(random_images(), batch_size=4, shuffle=False, verbose=0).history
        losses += history["loss"]
    assert models[0].jit_compile and losses[0] == pytest.approx(losses[1], rel=1e-4)
    compiled, eager = map(weights_of, models)
    for one, other in zip(compiled, eager, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(compiled, before, strict=True)) > 0.01


def test_fit_in_mixed_precision():
    images = random_images()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make_model((1.0,))
    finally:
        keras.config.set_dtype_policy("float32")
    seen, check = [], model._check_images
    model._check_images = lambda given: seen.append(np.array(given)) or check(given)
    before = weights_of(model)
    expected = np.mean(list(make_model((1.0,))(images, training=True).values()))
    model.compile(Adam(0.01), run_eagerly=True)
    logs = model.fit(images, batch_size=4, shuffle=False, verbose=0).history
    # The same as in float32: images and noise are not rounded, only the network's work is.
    np.testing.assert_array_equal(seen, [images])
    assert logs["loss"][0] == pytest.approx(expected, rel=0.05)
    assert max(np.abs(a - b).max() for a, b in zip(weights_of(model), before, strict=True)) > 1e-3
    assert all(weight.dtype == np.float32 for weight in weights_of(model))


SCHEDULE = StepSchedule((900, 700, 450, 200, 60, 0), (0.25, 0.25, 1.0, 0.5, 1.0, 1.0), eta=0.5)


def assert_same_images(found, expected):
    """Equal but for rare halves that rounding tips to the other side."""
    assert found.dtype == np.uint8 and found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_samples_are_those_of_the_eager_network(fit):
    unet = fit.model.unet

    def denoise(x, t, width):
        return np.asarray(unet(x, np.full(len(x), t), width=width))

    expected = sample_images(denoise, SCHEDULE, NoiseTable.linear(1000), SHAPE, 5, seed=7)
    found = fit.model.sample(SCHEDULE, 5, seed=7)
    assert found.shape == (5, *SHAPE) and found.std() > 20
    assert_same_images(found, expected)
    assert_same_images(fit.model.sample(SCHEDULE, 5, seed=7, batch_size=2), expected)
    assert (fit.model.sample(SCHEDULE, 5, seed=8) != expected).mean() > 0.5


def test_samples_have_the_present_weights(fit):
    # The compiled graph is kept while training goes on, so it must not keep the weights.
    model = make_model((1.0,))
    x = random_images()
    before = model.denoise(x, 300, 1.0)
    randomise(model.unet, seed=1)
    after = model.denoise(x, 300, 1.0)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after, model.unet(x, np.full(4, 300)), atol=1e-5)


def test_one_compiled_graph_per_width(monkeypatch):
    model = make_model((1.0, 0.5))
    traces = record_calls(monkeypatch)
    seen = []
    schedule = StepSchedule((900, 500, 200, 0), (0.5, 1.0, 0.5, 1.0))
    for _ in range(2):
        # Three batches, the last one smaller.
        model.sample(schedule, 5, batch_size=2, on_step=seen.append)
    assert [width for _, _, width in traces] == [0.5, 1.0]
    assert seen == [0, 1, 2, 3] * 6


def test_sampling_clips_by_default(fit):
    clipped = fit.model.sample(SCHEDULE, 3)
    assert not np.array_equal(clipped, fit.model.sample(SCHEDULE, 3, clip=False))


@pytest.mark.parametrize(
    ("schedule", "argument"),
    [
        (StepSchedule((10, 0), (1.0, 0.6)), "widths"),
        (StepSchedule((10, 0), (1.0, 1.0), train_timesteps=500), "train_timesteps"),
    ],
)
def test_schedule_of_another_model(fit, schedule, argument):
    with pytest.raises(InputError, match=f"^`{argument}` "):
        fit.model.sample(schedule, 1)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, *SHAPE), np.uint8),
        np.zeros((2, *SHAPE), np.int32),
        np.zeros((2, 4, 4), np.float32),
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 8, 4, 1), np.float32),
    ],
    ids=lambda images: f"{images.dtype}-{images.shape}",
)
def test_bad_images(images):
    with pytest.raises(InputError, match=r"`images` \(="):
        make_model((1.0,))(images)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("middle_widths", -1), ("distillation", 1.01), ("distillation", -0.1)],
)
def test_bad_argument(argument, value):
    with pytest.raises(InputError, match=f"^`{argument}` "):
        make_model((1.0,), **{argument: value})


def test_config_round_trip():
    model = make_model(FOUR, middle_widths=2, distillation=0.25, seed=9)
    copy = DiffusionModel.from_config(json.loads(json.dumps(model.get_config())))
    assert (copy.middle_widths, copy.distillation, copy.seed) == (2, 0.25, 9)
    assert copy.unet.get_config() == model.unet.get_config()
    assert np.array_equal(copy.noise_table.betas, model.noise_table.betas)


def test_file_round_trip(tmp_path):
    model = make_model((1.0, 0.5), seed=9)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    x = random_images()
    for width in (1.0, 0.5):
        expected = model.unet(x, np.full(4, 5), width=width)
        assert np.array_equal(loaded.unet(x, np.full(4, 5), width=width), expected)
