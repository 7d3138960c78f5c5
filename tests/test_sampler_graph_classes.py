"""The sampler graph with every solver, classes, guidance, and decoded latents."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, randomise

from ddsm_tf.errors import InputError
from ddsm_tf.export.sampler_graph import SamplerGraph
from ddsm_tf.export.savedmodel import SavedModelDenoiser, denoiser_function, write_savedmodels
from ddsm_tf.export.schedule_graph import calls_of
from ddsm_tf.labels import IN_TURN
from ddsm_tf.models import DiffusionModel, SlimmableUNet
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import network_calls
from ddsm_tf.schedule import SAMPLERS, StepSchedule, even_timesteps
from ddsm_tf.serving.inputs import schedule_inputs

CLASSES = 3
TABLE = NoiseTable.linear(1000).predicting("v")
TIMESTEPS = even_timesteps(1000, 5)
GUIDED = StepSchedule(
    TIMESTEPS,
    (1.0, 0.5, 0.5, 1.0, 0.5),
    sampler="heun",
    churn=2.0,
    guidance_scale=2.5,
    guidance_widths=(0.5, 0.5, 1.0, 1.0, 0.5),
)
SCHEDULES = [
    *(StepSchedule.uniform(1.0, (900, 640, 320, 40), sampler=name) for name in SAMPLERS),
    StepSchedule.uniform(1.0, (900, 640, 320, 40), eta=0.7),
    StepSchedule.uniform(1.0, (900, 640, 320, 40), sampler="ddpm", variance="fixed_small"),
    StepSchedule.uniform(1.0, (990, 640, 320, 40), sampler="euler", churn=3.0, churn_noise=1.01),
    StepSchedule.uniform(
        1.0, (990, 640, 320, 40), sampler="heun", churn=1.0, churn_min=0.3, churn_max=2.0
    ),
    *(StepSchedule.uniform(1.0, (500,), sampler=name) for name in ("heun", "dpmpp_2m")),
]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "edm"])
def test_factors_in_the_graph_are_the_hosts(prediction):
    table = NoiseTable.edm(1000) if prediction == "edm" else TABLE.predicting(prediction)
    function = tf.function(lambda **options: calls_of(table, options))
    for schedule in SCHEDULES:
        inputs = schedule_inputs(schedule, 1, 0)
        options = {name: tf.constant(inputs[name]) for name in inputs if name not in UNUSED}
        places, timesteps, factors = function(**options)
        calls = network_calls(schedule, table)
        assert places.numpy().tolist() == [call.step for call in calls]
        assert timesteps.numpy().tolist() == [call.timestep for call in calls]
        expected = np.array([list(call.row) for call in calls], np.float32)
        # float32 of 1.01 is not 1.01; all else is float64.
        np.testing.assert_allclose(factors, expected, rtol=2e-6, atol=1e-7)


UNUSED = {"seed", "first", "count", "widths"}


@pytest.fixture(scope="module")
def unet():
    return randomise(SlimmableUNet(**TINY, num_classes=CLASSES, name="unet"))


@pytest.fixture(scope="module")
def signatures(unet):
    denoisers = {width: denoiser_function(unet.subnet(width)) for width in unet.widths}
    graph = SamplerGraph(denoisers, TABLE, GUIDED, unet.image_shape, CLASSES)
    functions = graph.signatures()
    # Those of a saved model take their inputs by name.
    wanted = ("sample_images", "sample_schedule")
    return {name: functions[name].get_concrete_function() for name in wanted}


@pytest.fixture(scope="module")
def model(unet):
    return DiffusionModel(unet, TABLE)


def assert_same_images(found, expected):
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.mean(np.abs(found.astype(int) - expected.astype(int)) <= 1) > 0.999
    assert expected.std() > 10


def test_the_default_schedule_with_classes(signatures, model):
    seeds, index = tf.fill((4,), tf.constant(9, tf.int64)), tf.constant([0, 1, 2, 3], tf.int64)

    def sample(labels):
        labels = tf.constant(labels, tf.int32)
        call = signatures["sample_images"]
        return call(seed=seeds, index=index, labels=labels)["images"].numpy()

    assert_same_images(sample([IN_TURN]), model.sample(GUIDED, 4, 9))
    np.testing.assert_array_equal(sample([IN_TURN] * 4), sample([0, 1, 2, 0]))
    asked = np.array([2, 2, 0, 3])
    assert_same_images(sample(asked), model.sample(GUIDED, 4, 9, labels=asked))
    for bad in ([4], [-1], [0, 1]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="`labels` must"):
            sample(bad)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_schedule_of_the_callers_own(signatures, model, sampler):
    options = {"churn": 3.0} if sampler in ("euler", "heun") else {}
    schedule = StepSchedule(
        TIMESTEPS, (0.5, 1.0, 0.5, 1.0, 1.0), sampler=sampler, guidance_scale=1.5, **options
    )
    inputs = schedule_inputs(schedule, 3, 4, labels=np.array([2, 0, 1]))
    found = signatures["sample_schedule"](**named(inputs))["images"].numpy()
    assert_same_images(found, model.sample(schedule, 3, 4, labels=np.array([2, 0, 1])))


def named(inputs):
    return {name: tf.constant(value) for name, value in inputs.items()}


def test_without_guidance_the_other_branch_does_not_count(signatures, model):
    schedule = StepSchedule(TIMESTEPS, (0.5,) * 5)
    inputs = schedule_inputs(schedule, 3, 4, labels=np.array([1]))
    found = signatures["sample_schedule"](**named(inputs))["images"].numpy()
    assert_same_images(found, model.sample(schedule, 3, 4, labels=1))


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ("`guidance_scale` must", {"guidance_scale": np.float32(-1)}),
        ("`guidance_widths` must be as many", {"guidance_widths": np.ones(2, np.float32)}),
        ("`guidance_widths` must be among", {"guidance_widths": np.full(5, 0.3, np.float32)}),
        ("`churn` is for euler and heun", {"churn": np.float32(1.0)}),
        ("`churn`, `churn_min` and `churn_noise`", {"churn_noise": np.float32(-1.0)}),
        ("`churn`, `churn_min` and `churn_noise`", {"churn_noise": np.float32(1e9)}),
        ("`churn`, `churn_min` and `churn_noise`", {"churn": np.float32("nan")}),
        ("`churn_max` must be at most", {"churn_max": np.float32("nan")}),
        ("`guidance_scale` must", {"guidance_scale": np.float32("nan")}),
    ],
)
def test_bad_requests(signatures, rule, changed):
    inputs = schedule_inputs(StepSchedule.uniform(1.0, TIMESTEPS), 1, 0, labels=np.array([1]))
    with pytest.raises(tf.errors.InvalidArgumentError, match=rule):
        signatures["sample_schedule"](**named({**inputs, **changed}))


@pytest.mark.slow
def test_denoisers_take_labels(unet, tmp_path):
    write_savedmodels(unet, tmp_path)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    labels = np.array([1, 3], np.int32)
    expected = DiffusionModel(unet, TABLE).denoise(x, 300, 0.5, labels)
    denoise = SavedModelDenoiser(tmp_path)
    np.testing.assert_allclose(denoise(x, 300, 0.5, labels), expected, atol=1e-5)
    with pytest.raises(InputError, match=r"`labels` \(=None\) must be given"):
        denoise(x, 300, 0.5)


@pytest.mark.slow
def test_latents_are_decoded_and_not_clipped(tiny_unet):
    table, schedule = NoiseTable.linear(1000), StepSchedule.uniform(1.0, TIMESTEPS)

    def double(x, repeat, join):
        wide = repeat(repeat(x, 2, axis=1), 2, axis=2)
        return join([0.2 * wide, -0.1 * wide, 0.0 * wide + 0.5], axis=3)

    denoisers = {w: denoiser_function(tiny_unet.subnet(w)) for w in tiny_unet.widths}
    graph = SamplerGraph(
        denoisers,
        table,
        schedule,
        tiny_unet.image_shape,
        decode=lambda x: double(x, tf.repeat, tf.concat),
    )
    found = graph.signatures()["sample"](tf.constant(5, tf.int64), tf.constant(2, tf.int64))
    decode = lambda x: double(x, np.repeat, np.concatenate)  # noqa: E731
    model = DiffusionModel(tiny_unet, table, clip=False, decode=decode)
    images = found["images"].numpy()
    assert images.shape == (2, 16, 16, 3)
    assert_same_images(images, model.sample(schedule, 2, 5))
