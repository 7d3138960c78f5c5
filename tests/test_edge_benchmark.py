"""`ddsm-edge benchmark`: times, memory, and how a schedule compares with full width."""

import dataclasses
import json
import subprocess

import numpy as np
import pytest
from conftest import run_command

from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge import benchmark as edge_benchmark
from ddsm_tf.edge.manifest import StoredDecoder
from ddsm_tf.edge.memory import peak_memory
from ddsm_tf.errors import ForeseenFailure, InputError
from ddsm_tf.latency import WARM_UP
from ddsm_tf.schedule import StepSchedule


def test_benchmark_prints_what_a_latency_search_reads(bundle, tmp_path):
    from ddsm_tf.cost import read_latency

    arguments = ["benchmark", bundle, "--batch", 2, "--threads", 1, "--rounds", 5, "--json"]
    arguments += ["--max-resident", 1]
    done = run_command("ddsm_tf.edge.cli", *arguments)
    result = json.loads(done.stdout)
    assert set(result["widths"]) == {"1.0", "0.5"}
    assert (result["batch"], result["threads"], result["rounds"]) == (2, 1, 5)
    times = result["widths"]["1.0"]
    assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"] < 1000
    (tmp_path / "latency.json").write_text(done.stdout)
    table = read_latency(f"latency:{tmp_path / 'latency.json'}", (1.0, 0.5))
    assert table == {w: result["widths"][str(w)]["median_ms"] for w in (1.0, 0.5)}
    with pytest.raises(InputError, match="median_ms"):
        read_latency(f"latency:{tmp_path / 'latency.json'}", (1.0, 0.75))
    check_schedule(result, Bundle.load(bundle))
    memory = result["peak_memory_mb"]
    assert "decoder" not in result and "decoder" not in memory
    assert set(memory["widths"]) == {"1.0", "0.5"} and memory["max_resident"] == 1
    assert memory["widest"] == memory["widths"]["1.0"]
    assert 20 < memory["widths"]["0.5"] < 400 and 20 < memory["schedule"] < 400


def check_schedule(result, bundle):
    schedule, macs = result["schedule"], [n.macs for n in bundle.networks.values()]
    assert schedule["macs_ratio"] == pytest.approx((macs[0] + macs[1]) / (2 * macs[0]))
    assert schedule["macs_saved"] == pytest.approx(1 - schedule["macs_ratio"])
    wide, narrow = (result["widths"][width]["median_ms"] for width in ("1.0", "0.5"))
    predicted = pytest.approx((wide + narrow) / (2 * wide))
    assert schedule["predicted_time_ratio"] == predicted
    measured = schedule["measured"]
    assert (measured["steps"], measured["pairs"]) == (12, 3)
    assert measured["predicted_time_ratio"] == predicted
    # Each of these steps loads its network anew, and full width loads one.
    assert schedule["time_saved"] == 1 - measured["time_ratio"] and measured["time_ratio"] > 1


class FakeSampler(EdgeSampler):
    """A clock; steps that take as many milliseconds as their width is wide; a decoder of `times`.

    Attributes:
        steps: the widths of all steps so far.
        decoded: what was decoded so far.
        times: milliseconds of each decoding; a second once they have run out.
    """

    def __init__(self, bundle, times=()):
        super().__init__(bundle)
        self.now, self.times = 0.0, iter(times)
        self.steps, self.decoded = [], []

    def perf_counter(self):
        return self.now

    def denoise(self, x, t, width, labels=None):
        assert x.shape == (3, 8, 8, 1)
        self.now += width / 1000
        self.steps.append(width)
        return x

    def decode(self, latents):
        self.decoded.append(latents)
        self.now += next(self.times, 1000.0) / 1000
        return latents


def of_latents(bundle):
    """The loaded bundle, as if it had a decoder."""
    loaded = Bundle.load(bundle)
    decoder = StoredDecoder(loaded.files["unet_1_0.tflite"], (16, 16, 3))
    return dataclasses.replace(loaded, decoder=decoder)


@pytest.mark.parametrize("load", [Bundle.load, of_latents])
def test_a_schedule_is_compared_with_full_width_in_turns(bundle, monkeypatch, load):
    # Decoding, the same for every schedule, would hide what the widths save.
    sampler = FakeSampler(load(bundle))
    monkeypatch.setattr(edge_benchmark, "time", sampler)
    schedule = StepSchedule(tuple(range(99, -1, -1)), (0.5,) * 75 + (1.0,) * 25)
    found = edge_benchmark.benchmark_schedule(
        sampler, schedule, {1.0: 4.0, 0.5: 1.0}, batch=3, pairs=3
    )
    assert found["predicted_time_ratio"] == (75 * 1 + 25 * 4) / 400
    assert found["measured"]["time_ratio"] == pytest.approx((9 * 0.5 + 3) / 12)
    assert found["measured"]["steps"] == 12 and found["measured"]["spread"] == pytest.approx(0)
    full, both = [1.0] * 12, [0.5] * 9 + [1.0] * 3
    assert sampler.steps == (full + both + both + full) * 2


def test_the_decoder_is_timed_by_itself(bundle, monkeypatch):
    rounds = []
    sampler = FakeSampler(of_latents(bundle), [8000] * WARM_UP + [5, 3, 4])
    monkeypatch.setattr(edge_benchmark, "time", sampler)
    found = edge_benchmark.benchmark_decoder(
        sampler, batch=3, rounds=3, on_round=lambda: rounds.append(sampler.now)
    )
    expected = {"median_ms": 4.0, "spread_ms": 1.0, "min_ms": 3.0, "max_ms": 5.0}
    assert found == pytest.approx(expected)
    assert len(rounds) == len(sampler.decoded) == WARM_UP + 3 and not sampler.steps
    for latents in sampler.decoded:
        assert (latents.shape, latents.dtype) == ((3, 8, 8, 1), np.float32)
        assert abs(latents.std() - 1) < 0.2  # blank latents might be quicker


@pytest.mark.parametrize(
    ("load", "alone", "together"),
    [
        (Bundle.load, [[1.0], [0.5]], [0.5, 1.0, 0.5]),
        # After its last step a batch is decoded, and then the next one begins.
        (of_latents, [[1.0], [0.5], [None]], [0.5, 1.0, 1.0, None, 0.5]),
    ],
)
def test_memory_is_measured_at_every_change(bundle, monkeypatch, load, alone, together):
    asked = []

    def peak_memory(bundle, stages, *, batch, threads, max_resident):
        assert (batch, threads) == (4, 2)
        asked.append((stages, max_resident))
        return 10.0 * len(asked)

    monkeypatch.setattr(edge_benchmark, "peak_memory", peak_memory)
    sampler = EdgeSampler(load(bundle), threads=2, max_resident=1)
    schedule, done = StepSchedule((900, 600, 300), (0.5, 0.5, 1.0)), []
    found = edge_benchmark.benchmark_memory(
        sampler, schedule, batch=4, on_process=lambda: done.append(None)
    )
    assert asked == [*((stages, None) for stages in alone), (together, 1)]
    assert len(done) == len(asked) == edge_benchmark.memory_processes(sampler.bundle)
    expected = {"widths": {"1.0": 10.0, "0.5": 20.0}, "widest": 10.0, "max_resident": 1}
    expected |= {"decoder": 30.0, "schedule": 40.0} if len(alone) == 3 else {"schedule": 30.0}
    assert found == expected


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
def test_a_shortened_schedule_keeps_its_widths_and_their_order(steps):
    schedule = StepSchedule(tuple(range(99, -1, -1)), (0.5,) * 70 + (0.25, 1.0) * 15)
    short = edge_benchmark.shortened(schedule, steps)
    assert set(short.widths) == {1.0, 0.5, 0.25}
    counts = short.width_counts()
    assert counts[0.5] == max(1, round(0.7 * steps)) and counts[1.0] == max(1, round(0.15 * steps))
    by_timestep = dict(zip(schedule.timesteps, schedule.widths, strict=True))
    assert [by_timestep[t] for t in short.timesteps] == list(short.widths)
    assert edge_benchmark.shortened(schedule, 100) is schedule


def test_a_process_that_measures_memory_and_fails_is_one_line(bundle, monkeypatch):
    loaded = Bundle.load(bundle)
    (bundle / "unet_1_0.tflite").unlink()
    with pytest.raises(ForeseenFailure, match=r"failed: .*unet_1_0.tflite.*missing"):
        peak_memory(loaded, [1.0])
    killed = subprocess.CompletedProcess([], -9, "", "INFO: Created TensorFlow Lite delegate")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: killed)
    with pytest.raises(ForeseenFailure, match=r"killed by signal 9.*make `max_resident`"):
        peak_memory(loaded, [1.0])


def test_nothing_beside_a_bundle_is_imported(bundle, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('a stranger ran code')")
    monkeypatch.chdir(tmp_path)
    assert peak_memory(Bundle.load(bundle), [0.5]) > 20
