"""Class labels through the network, training, guidance and sampling."""

import keras
import numpy as np
import pytest
from keras import ops

from ddsm_tf import cost
from ddsm_tf.errors import InputError
from ddsm_tf.labels import check_labels, labels_in_turn, parse_labels
from ddsm_tf.models import DiffusionModel, SlimmableUNet
from ddsm_tf.models.objective import timestep_probabilities
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import sample_images
from ddsm_tf.schedule import StepSchedule

CLASSES = 3
SHAPE = (8, 8, 1)
SIZE = {
    "image_size": 8,
    "channels": 1,
    "base_channels": 16,
    "channel_multipliers": (1,),
    "attention_resolutions": (),
    "blocks_per_level": 1,
    "widths": (1.0, 0.5),
}


def make_unet(num_classes=CLASSES, seed=0):
    keras.utils.set_random_seed(seed)
    unet = SlimmableUNet(num_classes=num_classes, **SIZE)
    random = np.random.default_rng(seed)
    for variable in unet.trainable_variables:
        # Some start at zero, which would hide what goes into them.
        variable.assign(random.normal(0, 0.3, variable.shape))
    return unet


@pytest.fixture(scope="module")
def unet():
    return make_unet()


def images(count=4, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (count, *SHAPE)).astype(np.float32)


def test_every_label_gives_another_output_at_every_width(unet):
    x, t = np.repeat(images(1), 4, axis=0), np.full(4, 100)
    for width in unet.widths:
        outputs = np.asarray(unet(x, t, np.arange(4, dtype=np.int32), width=width))
        apart = np.abs(outputs[:, None] - outputs[None]).max(axis=(2, 3, 4))
        assert (apart[~np.eye(4, dtype=bool)] > 1e-3).all()


def test_subnet_is_the_slimmable_call_with_labels(unet):
    x, t, labels = images(), np.array([0, 10, 500, 999]), np.array([0, 1, 2, 3], np.int32)
    subnet = unet.subnet(0.5)
    assert subnet.num_classes == CLASSES
    np.testing.assert_allclose(subnet(x, t, labels), unet(x, t, labels, width=0.5), atol=1e-5)
    # A row a class and one for none, 4 · base_channels wide.
    plain = cost.forward_cost(make_unet(0), 0.5)
    assert cost.forward_cost(unet, 0.5).parameters - plain.parameters == 4 * 32
    assert cost.forward_cost(unet, 0.5).macs == plain.macs


@pytest.mark.parametrize("with_labels", [True, False])
def test_labels_go_with_classes_only(with_labels):
    network = make_unet(0 if with_labels else CLASSES)
    given = {"labels": np.zeros(2, np.int32)} if with_labels else {}
    with pytest.raises(InputError, match="`labels`"):
        network(images(2), np.zeros(2), **given)
    with pytest.raises(InputError, match="`labels`"):
        DiffusionModel(network, NoiseTable.linear(10)).denoise(
            images(2), 0, 1.0, given.get("labels")
        )


def test_training_learns_the_classes(tmp_path):
    # Class k is a flat grey image, so a network that knows k knows the image.
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, 2048).astype(np.int32)
    flat = np.broadcast_to((labels - 1.0)[:, None, None, None] * 0.8, (2048, *SHAPE))
    keras.utils.set_random_seed(1)
    model = DiffusionModel(
        SlimmableUNet(num_classes=CLASSES, **{**SIZE, "widths": (1.0,)}),
        NoiseTable.linear(100, 1e-3, 0.2).predicting("x0"),
        seed=3,
    )
    model.compile(keras.optimizers.Adam(1e-2))
    batches = (
        ((flat[rows].astype(np.float32), labels[rows]),)
        for rows in random.integers(0, 2048, (250, 32))
    )
    model.fit(batches, steps_per_epoch=250, shuffle=False, verbose=0)
    schedule = StepSchedule.uniform(1.0, tuple(range(99, -1, -9)), train_timesteps=100)
    asked = np.array([0, 1, 2] * 4)
    sampled = model.sample(schedule, 12, seed=0, labels=asked).mean(axis=(1, 2, 3))
    by_class = [sampled[asked == k].mean() for k in range(CLASSES)]
    assert by_class == pytest.approx([25.5, 127.5, 229.5], abs=25)
    # In turn, where nobody asks; the same images.
    np.testing.assert_array_equal(
        model.sample(schedule, 6, seed=0), model.sample(schedule, 6, seed=0, labels=asked[:6])
    )
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.saving.load_model(path)
    assert (again.label_dropout, again.unet.num_classes) == (0.1, CLASSES)


def seen_labels(model, labels, training=True):
    """The labels that the network gets in a call of the model."""
    seen = []
    network, call = model.unet, type(model.unet).call

    def spy(self, x, t, labels=None, **options):
        seen.append(np.asarray(labels))
        return call(self, x, t, labels, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(network), "call", spy)
        model((images(len(labels)), labels), training=training)
    return seen


def test_a_share_of_the_labels_is_dropped(unet):
    labels = np.arange(4000, dtype=np.int32) % CLASSES
    model = DiffusionModel(unet, NoiseTable.linear(10), label_dropout=0.25)
    seen = np.array(seen_labels(model, labels))
    dropped = seen == CLASSES
    for of_width, without in zip(seen, dropped, strict=True):
        np.testing.assert_array_equal(of_width[~without], labels[~without])
        assert without.mean() == pytest.approx(0.25, abs=0.03)
    # Each width draws its own.
    assert dropped.shape == (2, 4000)
    assert dropped.all(axis=0).mean() == pytest.approx(0.25**2, abs=0.02)
    for seen in seen_labels(model, labels[:50], training=False):
        np.testing.assert_array_equal(seen, labels[:50])


@pytest.mark.parametrize("bad", [np.zeros((2, 1), np.int32), np.zeros(2, np.float32)])
def test_labels_of_another_kind(unet, bad):
    with pytest.raises(InputError, match="`labels`"):
        DiffusionModel(unet, NoiseTable.linear(10))((images(2), bad))


def test_inputs_without_labels(unet):
    with pytest.raises(InputError, match=r"`inputs`.*3 classes"):
        DiffusionModel(unet, NoiseTable.linear(10))(images(2))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "edm"])
def test_loss_is_the_weighted_error_of_the_target(prediction):
    # A network that puts out zero: its last convolution starts there.
    table = NoiseTable.edm(50) if prediction == "edm" else NoiseTable.linear(50)
    table = table.predicting(prediction)
    network = SlimmableUNet(**SIZE)
    model = DiffusionModel(network, table, weighting="min_snr")
    data = np.full((4000, *SHAPE), 0.5, np.float32)
    losses = model(data)
    # Mean over t of weight · (a² · 0.25 + b²), with a and b the factors of image and noise.
    snr = 1 / table.sigmas**2
    signal, noise = table.signal_and_noise_scale()
    a, b, x0 = {
        "epsilon": (0 * snr, 0 * snr + 1, noise / signal),
        "v": (noise, signal, noise),
        "x0": (0 * snr + 1, 0 * snr, 0 * snr + 1),
        "edm": (
            table.sigmas / (0.5 * np.sqrt(table.sigmas**2 + 0.25)),
            0.5 / np.sqrt(table.sigmas**2 + 0.25),
            table.sigmas * 0.5 / np.sqrt(table.sigmas**2 + 0.25),
        ),
    }[prediction]
    weights = timestep_probabilities(table) if prediction == "edm" else np.full(50, 1 / 50)
    expected = (weights * np.minimum(snr, 5) * x0**2 * (a**2 * 0.25 + b**2)).sum()
    found = float(ops.mean(losses["loss_1"]))
    assert found == pytest.approx(expected, rel=0.06)


def flat_denoiser(x, t, width, labels):
    """An output that tells label and width apart."""
    return np.zeros_like(x) + (0.1 * labels[:, None, None, None] + width).astype(np.float32)


def test_guidance_moves_away_from_the_unconditional_output():
    table = NoiseTable([0.36])
    schedule = StepSchedule.uniform(
        1.0, (0,), train_timesteps=1, guidance_scale=3.0, guidance_widths=(0.5,)
    )
    seen = []

    def denoise(x, t, width, labels):
        seen.append((width, labels.tolist()))
        return flat_denoiser(x, t, width, labels)

    options = {"labels": np.array([0, 2]), "num_classes": CLASSES, "clip": None}
    found = []

    def keep(x0):
        found.append(x0)
        return x0

    sample_images(denoise, schedule, table, SHAPE, 2, decode=keep, **options)
    assert seen == [(1.0, [0, 2]), (0.5, [3, 3])]
    # Conditional 1.0 and 1.2, unconditional 0.8: 0.8 + 3 · (0.2 and 0.4).
    outputs = np.array([1.4, 2.0])[:, None, None, None]
    from ddsm_tf.seeds import ImageNoise

    x = ImageNoise(0, 0, 2, SHAPE).draw()
    np.testing.assert_allclose(found[0], (x - 0.6 * outputs) / 0.8, rtol=1e-5, atol=1e-6)


def test_costs_count_both_branches():
    schedule = StepSchedule(
        (9, 5, 0), (1.0, 1.0, 0.5), guidance_scale=2.0, guidance_widths=(0.5, 0.5, 0.5)
    )
    assert schedule.call_counts() == {1.0: 2, 0.5: 4}
    assert cost.schedule_cost(schedule, {1.0: 10.0, 0.5: 1.0}) == 24.0
    assert cost.cost_fraction(schedule, {1.0: 10.0, 0.5: 1.0}) == pytest.approx(24 / 60)
    again = StepSchedule.from_dict(schedule.to_dict())
    assert again == schedule
    same = StepSchedule((5, 0), (1.0, 0.5), guidance_scale=2.0, guidance_widths=(1.0, 0.5))
    assert same.guidance_widths is None and same.call_counts() == {1.0: 2, 0.5: 2}
    with pytest.raises(InputError, match="guidance_widths"):
        StepSchedule((5, 0), (1.0, 1.0), guidance_widths=(0.5, 0.5))
    with pytest.raises(InputError, match="euler and heun"):
        StepSchedule((5, 0), (1.0, 1.0), sampler="dpmpp_2m", churn=1.0)


def test_labels_as_users_write_them():
    assert labels_in_turn(3, 2, 4).tolist() == [2, 0, 1, 2]
    assert parse_labels("2,0", 5, 3).tolist() == [2, 0, 2, 0, 2]
    assert parse_labels("none", 2, 3).tolist() == [3, 3]
    assert parse_labels(None, 4, 3).tolist() == [0, 1, 2, 0]
    assert parse_labels(None, 4, 0) is None
    assert check_labels(1, 2, 3).tolist() == [1, 1]
    for text in ("3", "-1", "a", "1,,2", "9" * 30):
        with pytest.raises(InputError, match="--class"):
            parse_labels(text, 2, 3)
    with pytest.raises(InputError, match="has none"):
        parse_labels("1", 2, 0)
    for labels in ([0, 4], [0, -1], [0.5, 1.0], [0]):
        with pytest.raises(InputError, match="`labels`"):
            check_labels(np.array(labels), 2, 3)


def test_guidance_needs_classes(unet):
    schedule = StepSchedule.uniform(1.0, (5, 0), train_timesteps=10, guidance_scale=2.0)
    with pytest.raises(InputError, match="num_classes=K"):
        DiffusionModel(make_unet(0), NoiseTable.linear(10)).sample(schedule, 1)
