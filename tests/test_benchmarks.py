"""What the benchmarks share, and that RESULTS.md says what they measured."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import TINY, randomise

from ddsm_tf.errors import InputError
from ddsm_tf.metrics import train_classifier
from ddsm_tf.models import SlimmableUNet
from ddsm_tf.training.evaluate import classifier_of
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.run import Run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablations  # noqa: E402
import capacity  # noqa: E402
import measuring  # noqa: E402
import names  # noqa: E402
import resnet56  # noqa: E402
import schedule_results  # noqa: E402
import speed_results  # noqa: E402
import tables  # noqa: E402

import results  # noqa: E402


def test_results_md_is_what_the_measurements_make():
    page = results.page(ROOT / "results")
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == page
    measured = [json.loads(file.read_text()) for file in (ROOT / "results").glob("*.json")]
    assert page.count("```sh") == sum(len(each["provenance"]) for each in measured) >= 1
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


def test_settings_of_a_file_are_those_of_all_its_stages(tmp_path):
    settings = {"threads": 2, "widths": (1.0, 0.5)}
    measuring.Stages(tmp_path / "out.json", []).settle("network", settings)
    again = measuring.Stages(tmp_path / "out.json", [])
    again.settle("network", settings)
    with pytest.raises(InputError, match=r"`threads` \(=1\) is 2 in .*out.json"):
        again.settle("network", {**settings, "threads": 1})
    assert again.content["network"] == {"threads": 2, "widths": [1.0, 0.5]}


def test_a_named_machine_has_a_file_and_a_title_of_its_own(tmp_path):
    assert measuring.results_file(tmp_path, "speed", None).name == "speed.json"
    assert measuring.results_file(tmp_path, "speed", "arm").name == "speed_arm.json"
    features = ["avx2", "avx512f", "avx512_vnni"]
    for count, best in ((3, "AVX-512 VNNI"), (2, "AVX-512"), (1, "AVX2"), (0, "no SIMD")):
        assert tables.instructions([{"machine": {"features": features[:count]}}]) == best


def test_differences_are_of_the_same_seeds():
    full, row = {"distances": [10.0, 12.0, 14.0]}, {"distances": [11.0, 12.0, 16.0]}
    assert schedule_results.distance_cell(full) == "12.00 ± 2.00"
    # Apart by 1, 0, 2: a standard deviation of 1, over the root of 3.
    assert schedule_results.difference_cell(row, full) == "+1.00 ± 0.58 (+8%)"


def test_speed_is_worked_out_within_a_round(monkeypatch):
    # One image: a full step of 1e9 MACs in 20 ms is 50 GMAC/s of a ceiling of 100 and of 80.
    monkeypatch.setattr(speed_results.ceilings, "CONVOLUTION_MACS", 1e9)
    monkeypatch.setattr(speed_results, "PAPER_STEPS", {1.0: 1, 0.5: 3})
    rounds = {
        "convolution, A": [0.010, 0.0125],
        "convolution, B": [0.020, 0.020],
        "Ours, 1.0": [0.020, 0.020],
        "Ours, 0.5": [0.008, 0.012],
        f"{names.TORCH}, 1.0": [0.030, 0.010],
        f"{names.TORCH}, 0.5": [0.020, 0.005],
    }
    macs = {"1.0": 1e9, "0.5": 2e8}
    found = {"rounds": rounds, "error": {"Ours": 0.0, names.TORCH: 1e-6}}
    lines = list(speed_results._batch(1, found, macs))
    assert lines[0] == "Batch 1. Convolution: A 90, B 50 GMAC/s."
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert cells[:3] == ["Ours", "20.0 (20.0 to 20.0)", "10.0 (9.0 to 11.0)"]
    assert cells[3].startswith("0.56 (0.53 to 0.59)")
    # MACs saved: 1 - (1 + 3 · 0.2) / 4 = 0.6. Time saved: 1 - (20 + 24) / 80, 1 - (20 + 36) / 80.
    assert cells[4].startswith("0.62 (0.56 to 0.69)")
    # 30 / 20 and 10 / 20.
    assert cells[5].startswith("1.00 (0.75 to 1.25) ×")


def test_trajectories_and_training_steps_beside_what_macs_predict():
    network = {"macs_saved": 0.5}
    rounds = {
        ("Ours", names.FULL): np.array([4.0, 4.0]),
        ("Ours", names.STEP_AWARE): np.array([3.0, 2.0]),
        (names.TORCH, names.FULL): np.array([6.0, 6.0]),
    }
    cells = speed_results._trajectory(rounds, "Ours", network)
    # A quarter and a half of the time, over half of the MACs.
    assert cells[3].startswith("0.75 (0.62 to 0.88)") and cells[4].startswith("2.50 (2.25 to 2.75)")
    steps = {
        "preset": "digits",
        "base_channels": 8,
        "batch": 4,
        "threads": 2,
        "macs": {"1.0": 4e6, "0.5": 1e6},
        "rounds": {"1": [2.0, 2.0], "1, 0.5": [3.0, 3.0], names.UPDATE: [0.5, 0.5]},
    }
    provenance = [{"machine": {"features": ["avx2"]}}]
    lines = list(speed_results.training({"steps": steps, "provenance": provenance}))
    assert lines[0] == "## Speed of a training step: AVX2"
    # Predicted 5 / 4, measured 3 / 2.
    assert "| 1.25 | 1.20 (1.20 to 1.20) |" in lines[-2]


def test_a_network_alone_trains_as_many_macs():
    config = dataclasses.replace(get_preset("digits"), steps=1000, batch_size=16, middle_widths=1)
    comparison = mock.Mock(config=config, macs={1.0: 8.0, 0.5: 2.0, 0.25: 1.0})
    model = mock.Mock()
    model.unet.widths = (1.0, 0.5, 0.25)
    # The baseline's step is all widths, 11. One random width costs 11 / 3 on average.
    model._width_choices = lambda: [(1.0,), (0.5,), (0.25,)]
    steps = ablations.Ablations.equal_steps
    assert steps(comparison, model, 16) == 3000
    assert steps(comparison, model, 4) == 12000
    model._width_choices = lambda: [(1.0, 0.5, 0.25)]
    assert steps(comparison, model, 16) == 1000


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


def test_all_sizes_have_one_judge(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    networks = [train_classifier(images, np.arange(40) % 2, seed=s, steps=1) for s in (0, 1)]
    runs = [Run(tmp_path / name, get_preset("digits")) for name in "ab"]
    for run, network in zip(runs, networks, strict=True):
        network.save(run.path / "classifier.keras")
    digest = networks[0].digest()
    capacity.share_classifier(runs)
    assert classifier_of(runs[1], None).digest() == digest
    # An earlier search of the second run judged by its own.
    networks[1].save(runs[1].path / "schedules" / "float32" / "ddim-20" / "classifier.keras")
    with pytest.raises(InputError, match=r"another classifier; delete .*ddim-20"):
        capacity.share_classifier(runs)


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
