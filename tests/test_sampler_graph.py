"""The sampler SavedModel: a process without this package gets the images of Keras."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import NOISY_SCHEDULE

from ddsm_tf.export.sampler_graph import SamplerGraph
from ddsm_tf.models import DiffusionModel
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.seeds import ImageNoise
from ddsm_tf.serving.inputs import schedule_inputs

TABLE = NoiseTable.linear(1000)
SEED = 2**40 + 3
SHAPE = (8, 8, 1)
OTHERS = [
    StepSchedule.uniform(0.5, even_timesteps(1000, 6)),
    StepSchedule((900, 500, 20), (0.5, 1.0, 0.5), sampler="ddpm"),
    StepSchedule.uniform(1.0, (800, 400, 7), sampler="ddpm", variance="fixed_small"),
    StepSchedule.uniform(1.0, (999,), eta=1.0),
]

ELSEWHERE = """
import sys
sys.modules["ddsm_tf"] = None
import numpy as np
import tensorflow as tf

inputs = np.load(sys.argv[2])
signatures = tf.saved_model.load(sys.argv[1]).signatures
call = lambda name, **inputs: signatures[name](**inputs)["images"]
integer = lambda value: tf.constant(value, tf.int64)
seed = integer(inputs["seed"])
rows = {"seed": [seed, seed, integer(9)], "index": integer([4, 1, 0])}
np.savez(
    sys.argv[3],
    sample=call("sample", seed=seed, count=integer(5)),
    default=call("serving_default", seed=seed, count=integer(1)),
    rows=call("sample_images", **rows),
    noise=call("sample_noise", noise=tf.constant(inputs["noise"])),
)
"""


@pytest.fixture(scope="module")
def folder(tiny_savedmodels):
    return tiny_savedmodels / "sampler" / "1"


@pytest.fixture(scope="module")
def sampler(folder):
    return tf.saved_model.load(str(folder)).signatures


@pytest.fixture(scope="module")
def model(tiny_unet):
    return DiffusionModel(tiny_unet, TABLE)


def share_within_one(images, expected):
    assert images.dtype == np.uint8 and images.shape == expected.shape
    return np.mean(np.abs(images.astype(int) - expected.astype(int)) <= 1)


def own_schedule(signatures, schedule, /, count=4, seed=SEED, **changed):
    inputs = {**schedule_inputs(schedule, count, seed), **changed}
    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    return signatures["sample_schedule"](**inputs)["images"].numpy()


def test_a_process_without_this_package_gets_the_images_of_keras(folder, model, tmp_path):
    noise = ImageNoise(SEED, 0, 3, SHAPE)
    draws = np.stack([noise.draw() for _ in range(10)], axis=1)
    np.savez(tmp_path / "in.npz", seed=SEED, noise=draws)
    files = [folder, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, files)], check=True, timeout=120)
    found = np.load(tmp_path / "out.npz")
    expected = model.sample(NOISY_SCHEDULE, 5, seed=SEED)
    assert expected.std() > 40
    assert share_within_one(found["sample"], expected) >= 0.999
    assert share_within_one(found["default"], expected[:1]) >= 0.999
    assert share_within_one(found["noise"], expected[:3]) >= 0.999
    rows = [expected[4], expected[1], model.sample(NOISY_SCHEDULE, 1, seed=9)[0]]
    assert share_within_one(found["rows"], np.stack(rows)) >= 0.999


@pytest.mark.parametrize("schedule", OTHERS, ids=lambda schedule: schedule.describe())
def test_a_schedule_of_the_caller_s_own(sampler, model, schedule):
    expected = model.sample(schedule, 4, seed=SEED)
    assert share_within_one(own_schedule(sampler, schedule), expected) >= 0.999


def test_only_the_network_of_a_step_s_width_runs():
    calls = tf.Variable([0, 0])

    def network(branch):
        def denoise(x, t):
            with tf.control_dependencies([calls.scatter_add(tf.IndexedSlices([1], [branch]))]):
                return tf.identity(x)

        return denoise

    graph = SamplerGraph({1.0: network(0), 0.5: network(1)}, TABLE, OTHERS[1], SHAPE)
    tf.function(graph.sample)(tf.constant(0, tf.int64), tf.constant(2, tf.int64))
    assert calls.numpy().tolist() == [1, 2]


BAD = {
    "`widths` must be among": {"widths": tf.constant([0.3])},
    "`widths` must be as many": {"widths": tf.constant([0.5, 0.5])},
    r"`timesteps` must lie in \[0, 1000\)": {"timesteps": tf.constant([1000])},
    "`timesteps` must fall": {"timesteps": tf.constant([3, 3]), "widths": tf.constant([1.0, 1.0])},
    "`timesteps` must hold": {
        "timesteps": tf.constant([], tf.int32),
        "widths": tf.constant([], tf.float32),
    },
    "`sampler` must be": {"sampler": tf.constant("leapfrog")},
    "`variance` must be": {"variance": tf.constant("learned"), "sampler": tf.constant("ddpm")},
    "`eta` must lie": {"eta": tf.constant(1.5)},
    "`eta` is for ddim": {"eta": tf.constant(0.5), "sampler": tf.constant("ddpm")},
    "`variance` is for ddpm": {"variance": tf.constant("fixed_small")},
    "`count` must lie": {"count": tf.constant(0, tf.int64)},
    "`seed` must lie": {"seed": tf.constant(-1, tf.int64)},
}


@pytest.mark.parametrize("rule", BAD)
def test_a_bad_request_is_refused_with_its_rule(sampler, rule):
    with pytest.raises(tf.errors.InvalidArgumentError, match=rule):
        own_schedule(sampler, StepSchedule((5,), (1.0,)), **BAD[rule])


def test_too_little_noise_and_too_many_images_are_refused(sampler):
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have 10 draws"):
        sampler["sample_noise"](noise=tf.zeros((2, 9, *SHAPE)))
    count = tf.constant(10**6, tf.int64)
    with pytest.raises(tf.errors.InvalidArgumentError, match="`count` must lie"):
        sampler["sample"](seed=tf.constant(0, tf.int64), count=count)
    many = tf.zeros(1025, tf.int64)
    with pytest.raises(tf.errors.InvalidArgumentError, match="`index` must have at most 1024"):
        sampler["sample_images"](seed=many, index=many)
    with pytest.raises(tf.errors.InvalidArgumentError, match="`noise` must have at most 1024"):
        sampler["sample_noise"](noise=tf.zeros((1025, 10, *SHAPE)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="`index` must be"):
        sampler["sample_images"](seed=tf.constant([0], tf.int64), index=tf.constant([-1], tf.int64))


def test_broken_weights_give_no_images():
    graph = SamplerGraph({1.0: lambda x, t: x * float("nan")}, TABLE, OTHERS[3], SHAPE)
    with pytest.raises(tf.errors.InvalidArgumentError, match="NaN"):
        tf.function(graph.sample)(tf.constant(0, tf.int64), tf.constant(2, tf.int64))
