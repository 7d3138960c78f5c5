"""What the benchmarks share, and that RESULTS.md says what they measured."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, randomise

from ddsm_tf.errors import InputError
from ddsm_tf.models import SlimmableUNet
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.run import Run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import capacity  # noqa: E402
import measuring  # noqa: E402
import resnet56  # noqa: E402
import tables  # noqa: E402

import results  # noqa: E402


def test_results_md_is_what_the_measurements_make():
    page = results.page(ROOT / "results")
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == page
    measured = list((ROOT / "results").glob("*.json"))
    assert page.count("```sh") == len(measured) >= 1
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page):
        assert (ROOT / picture).is_file(), picture


def test_turns_are_fair_and_only_their_last_call_is_timed(monkeypatch):
    now, order = [0.0], []

    def worker(name, seconds):
        def work():
            order.append(name)
            # The first call of a turn fills the caches, the first rounds compile: both are slow.
            now[0] += seconds * (10.0 if order[-2:-1] != [name] else 1.0)
            now[0] += 100.0 if len(order) <= 4 * measuring.WARM_UP else 0.0

        return work

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    found = measuring.take_turns({"slow": worker("slow", 3.0), "fast": worker("fast", 1.0)}, 6)
    rounds = np.array(order).reshape(6 + measuring.WARM_UP, 4)
    assert (rounds[:, 0] == rounds[:, 1]).all() and (rounds[:, 2] == rounds[:, 3]).all()
    assert (rounds[:, 0] != rounds[:, 2]).all()
    assert set(rounds[:, 0]) == {"slow", "fast"}, "the order changes between rounds"
    assert found["fast"].shape == found["slow"].shape == (6,)
    # A turn that follows a turn of the same function finds the caches full already.
    assert set(found["slow"]) == {3.0} and set(found["fast"]) == {1.0}


def test_stages_that_are_done_are_not_measured_again(tmp_path):
    path = tmp_path / "new" / "out.json"
    first = measuring.Stages(path, ["numpy"])
    assert first.measure("a", lambda: {"x": 1}) == {"x": 1}
    second = measuring.Stages(path, ["numpy"])
    assert second.measure("a", lambda: pytest.fail("measured again")) == {"x": 1}
    assert second.measure("b", lambda: 2) == 2
    third = measuring.Stages(path, [])
    assert set(third.content) == {"provenance", "a", "b"}
    (about,) = third.content["provenance"]
    assert about["versions"]["numpy"] == np.__version__
    assert about["machine"]["cpus"] >= 1 and about["commands"][0].startswith("python benchmarks/")


def test_stages_name_every_command_and_machine_that_measured_one(tmp_path):
    path = tmp_path / "out.json"
    measuring.Stages(path, ["no-such-library"]).measure("a", lambda: 1)
    other = measuring.Stages(path, ["no-such-library"])
    other.present["commands"] = ["python benchmarks/other.py"]
    for name in "abc":
        other.measure(name, lambda: 2)
    (kept,) = measuring.Stages(path, []).content["provenance"]
    assert len(kept["commands"]) == 2 and kept["commands"][1] == "python benchmarks/other.py"
    assert kept["versions"]["no-such-library"] is None
    elsewhere = measuring.Stages(path, ["no-such-library"])
    elsewhere.present["machine"]["cpus"] = 1000
    elsewhere.measure("d", lambda: 3)
    here, there = measuring.Stages(path, []).content["provenance"]
    assert here == kept and there["machine"]["cpus"] == 1000
    assert [line for line in tables.measured([here, there]) if "1000 CPUs" in line]


def test_tables():
    assert list(tables.table(["a", "b"], [["1", "2"]])) == ["| a | b |", "|---|---|", "| 1 | 2 |"]
    assert tables.with_quartiles([1.0, 2.0, 3.0, 4.0, 5.0], 1) == "3.0 (2.0 to 4.0)"
    found = measuring.spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == {"median": 3.0, "low": 2.0, "high": 4.0, "count": 5}


def resnet_tensors():
    """A network that adds nothing to its stem, which copies the first colour to channel 3."""
    zeros = np.zeros
    tensors = {"module.conv1.weight": zeros((16, 3, 3, 3), np.float32)}
    tensors["module.conv1.weight"][3, 0, 1, 1] = 1.0
    norms = {"bn1": 16}
    inside = 16
    for stage, channels in enumerate((16, 32, 64), 1):
        for block in range(9):
            name = f"layer{stage}.{block}"
            shapes = {f"{name}.conv1": inside, f"{name}.conv2": channels}
            for conv, given in shapes.items():
                tensors[f"module.{conv}.weight"] = zeros((channels, given, 3, 3), np.float32)
            norms |= {f"{name}.bn1": channels, f"{name}.bn2": channels}
            inside = channels
    for name, channels in norms.items():
        for part, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
            tensors[f"module.{name}.{part}"] = np.full(channels, value, np.float32)
    tensors["module.linear.weight"] = np.eye(10, 64, 24, dtype=np.float32)
    tensors["module.linear.bias"] = np.arange(10, dtype=np.float32)
    return tensors


def test_resnet56_reads_a_pytorch_state_dict(tmp_path):
    np.savez(tmp_path / "weights.npz", **resnet_tensors())
    tensors = resnet56.state_dict(tmp_path / "weights.npz")
    network = resnet56.FeatureNetwork(resnet56.resnet56(tensors))
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    features, logits = network.features_and_logits(images)
    # Shortcuts take every second pixel and pad channels on both sides, 16 → 32 → 64.
    red = (images[:, ::4, ::4, 0] / 255 - 0.485) / 0.229
    expected = np.zeros((5, 64))
    expected[:, 8 + 16 + 3] = np.maximum(red, 0).mean(axis=(1, 2))
    np.testing.assert_allclose(features, expected, atol=1e-4)
    np.testing.assert_allclose(logits, features[:, 24:34] + np.arange(10), atol=1e-5)
    network.save(tmp_path / "classifier.keras")
    again = resnet56.FeatureNetwork.load(tmp_path / "classifier.keras")
    np.testing.assert_array_equal(again(images), features)


def test_resnet56_of_other_tensors_is_refused():
    tensors = {name.removeprefix("module."): value for name, value in resnet_tensors().items()}
    with pytest.raises(InputError, match=r"layer3_8_bn2_bias.*is missing"):
        resnet56.resnet56({k: v for k, v in tensors.items() if k != "layer3.8.bn2.bias"})
    with pytest.raises(InputError, match=r"linear_weight must have \(64, 10\)"):
        resnet56.resnet56({**tensors, "linear.weight": np.zeros((10, 63), np.float32)})


def test_sizes_are_compared_of_runs_that_differ_in_nothing_else():
    small = Run(Path("small"), get_preset("digits"))
    large = dataclasses.replace(small.config, base_channels=64, data="npz:digits.npz:images")
    longer = dataclasses.replace(large, steps=small.config.steps + 1)
    capacity.check_alike([small, Run(Path("large"), large)])
    with pytest.raises(InputError, match=r"steps of longer.*must be .*, as in small"):
        capacity.check_alike([small, Run(Path("large"), large), Run(Path("longer"), longer)])


@pytest.mark.parametrize("width", TINY["widths"])
def test_the_network_in_pytorch_is_the_same(width):
    torch = pytest.importorskip("torch")
    from torch_unet import TorchUNet

    subnet = randomise(SlimmableUNet(**TINY)).subnet(width)
    random = np.random.default_rng(3)
    x = random.standard_normal((3, *subnet.image_shape), np.float32)
    t = np.array([0.0, 300.0, 999.0], np.float32)
    with torch.no_grad():
        found = TorchUNet(subnet)(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t))
    expected = np.asarray(subnet(x, t))
    assert expected.std() > 0.05
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=2e-5)
