"""Multiply-accumulates and parameters, against the paper's figures and a count by hand."""

import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import TINY

from ddsm_tf import cost
from ddsm_tf.errors import InputError
from ddsm_tf.models import SlimmableUNet
from ddsm_tf.models.layers import ChannelAxis, SlimmableDense
from ddsm_tf.schedule import StepSchedule

MILLION = 1e6


@pytest.fixture(scope="module")
def cifar_unet():
    """The default network, which is the paper's for CIFAR-10."""
    return SlimmableUNet(base_channels=128, image_size=32)


@pytest.mark.parametrize(
    ("width", "macs", "total_macs"),
    [(1.0, 6066, 6222), (0.75, 3415, 3533), (0.5, 1521, 1599), (0.25, 383, 422)],
)
def test_network_of_the_paper(cifar_unet, width, macs, total_macs):
    found = cost.forward_cost(cifar_unet, width)
    assert found.macs == pytest.approx(macs * MILLION, rel=0.01)
    assert found.total_macs == pytest.approx(total_macs * MILLION, rel=0.01)
    if width == 1.0:
        assert found.parameters == cifar_unet.count_params() == 35_746_307


@pytest.mark.parametrize("width", [0.75, 0.25])
def test_parameters_are_those_of_the_subnet(width):
    unet = SlimmableUNet(**{**TINY, "base_channels": 16, "widths": (1.0, 0.75, 0.5, 0.25)})
    assert cost.forward_cost(unet, width).parameters == unet.subnet(width).count_params()


def count_by_hand(c):
    """(macs, attention_macs) of `TINY` where its first level has c channels."""
    wide, embedding = 2 * c, 4 * c

    def conv(pixels, inputs, outputs, size=3):
        return pixels * size**2 * inputs * outputs

    def block(pixels, inputs, outputs):
        macs = conv(pixels, inputs, outputs) + conv(pixels, outputs, outputs)
        shortcut = conv(pixels, inputs, outputs, 1) if inputs != outputs else 0
        return macs + embedding * outputs + shortcut

    attention = 4 * conv(16, wide, wide, 1)
    macs = [
        8 * embedding + embedding**2,  # the sinusoids are never slimmed
        conv(64, 1, c),
        block(64, c, c),
        conv(16, c, c),  # stride 2
        block(16, c, wide) + attention,
        block(16, wide, wide) + attention + block(16, wide, wide),
        block(16, wide + wide, wide) + attention,
        block(16, wide + c, wide) + attention,
        conv(64, wide, wide),  # after doubling
        block(64, wide + c, c),
        block(64, c + c, c),
        conv(64, c, 1),
    ]
    return sum(macs), 4 * 2 * 16**2 * wide


@pytest.mark.parametrize(("width", "channels"), [(1.0, 8), (0.5, 4)])
def test_count_by_hand(width, channels):
    found = cost.forward_cost(SlimmableUNet(**TINY), width)
    assert (found.macs, found.attention_macs) == count_by_hand(channels)


def test_macs_per_width_include_attention(monkeypatch):
    unet = SlimmableUNet(**{**TINY, "widths": (0.5, 1)})
    monkeypatch.setattr(
        cost, "forward_cost", lambda unet, width: cost.Cost(int(100 * width), attention_macs=7)
    )
    assert list(cost.macs_per_width(unet).items()) == [(1.0, 107), (0.5, 57)]


def test_calls_are_counted_in_the_innermost_tally():
    layer = SlimmableDense(ChannelAxis(8, 2), ChannelAxis(16, 2))
    x = np.zeros((5, 4), np.float32)
    layer(x, width=0.5)
    with cost.tally() as outer:
        layer(x, width=0.5)
        with cost.tally() as inner:
            layer(keras.KerasTensor((5, 8)))
    layer(x, width=0.5)
    assert outer == cost.Cost(macs=4 * 8, parameters=4 * 8 + 8)
    assert inner == cost.Cost(macs=8 * 16, parameters=8 * 16 + 16)


def test_unknown_width():
    with pytest.raises(InputError, match=r"`width` \(=0.3\)"):
        cost.forward_cost(SlimmableUNet(**TINY), 0.3)


COSTS = {1.0: 16.0, 0.5: 4.0, 0.25: 1.0}


def test_schedule_cost():
    schedule = StepSchedule((900, 600, 300, 0), (0.25, 0.5, 0.5, 1.0))
    assert cost.schedule_cost(schedule, COSTS) == 25.0
    assert cost.cost_fraction(schedule, COSTS) == 25.0 / 64.0
    # The share is of the widest there is, whether or not the schedule uses it.
    assert cost.cost_fraction(StepSchedule.uniform(0.5, (2, 1, 0)), COSTS) == 0.25


def test_schedule_with_a_width_that_has_no_cost():
    with pytest.raises(InputError, match=r"`widths` \(=0.75\) has no cost"):
        cost.schedule_cost(StepSchedule((1, 0), (1.0, 0.75)), COSTS)


def test_cost_per_width_counts_macs_and_parameters():
    unet = SlimmableUNet(**{**TINY, "widths": (0.5, 1.0)})
    macs = cost.cost_per_width("macs", unet)
    assert list(macs.items()) == [(1.0, sum(count_by_hand(8))), (0.5, sum(count_by_hand(4)))]
    parameters = cost.cost_per_width("parameters", unet)
    assert list(parameters) == [1.0, 0.5]
    assert parameters == {width: unet.subnet(width).count_params() for width in unet.widths}
    assert {type(value) for value in [*macs.values(), *parameters.values()]} == {float}


def write_latency(path, medians, **fields):
    widths = {width: {"median_ms": median} for width, median in medians.items()}
    path.write_text(json.dumps({"widths": widths, **fields}))
    return f"latency:{path}"


def test_cost_per_width_reads_a_latency_file(tmp_path):
    unet = SimpleNamespace(widths=(1.0, 0.5, 0.25))
    says = {"format": "ddsm-latency", "version": 1, "rounds": 30}
    # A narrower width may be the slower one; a file may have more widths than the network.
    medians = {"0.25": 3.5, "0.5": 2, "0.75": 9.0, "1.0": 2.5}
    for fields in ({}, says):
        measure = write_latency(tmp_path / "a:b.json", medians, **fields)
        found = cost.cost_per_width(measure, unet)
        assert list(found.items()) == [(1.0, 2.5), (0.5, 2.0), (0.25, 3.5)]
    written_by_hand = write_latency(tmp_path / "hand.json", {"1": 4, "0.50": 2})
    assert cost.read_latency(written_by_hand, (1.0, 0.5)) == {1.0: 4.0, 0.5: 2.0}


LATENCIES = {
    "widths.0.5.median_ms; see `ddsm latency`": '{"widths": {"1.0": {"median_ms": 1}}}',
    "`widths` (=None) must map": "{}",
    "`widths` (=[1]) must map": '{"widths": [1]}',
    "`widths` (='0.0') must be a number in (0, 1]": '{"widths": {"0.0": {"median_ms": 1}}}',
    "`widths` (='-0.5') must be a number": '{"widths": {"-0.5": {"median_ms": 1}}}',
    "`widths` (='wide') must be a number": '{"widths": {"wide": {"median_ms": 1}}}',
    "`widths` (='nan') must be a number": '{"widths": {"nan": {"median_ms": 1}}}',
    "`median_ms` (=0) of width 1.0 must be a positive": '{"widths": {"1.0": {"median_ms": 0}}}',
    "`median_ms` (=-1.5) of width 0.9": '{"widths": {"0.9": {"median_ms": -1.5}}}',
    "`median_ms` (=True)": '{"widths": {"1.0": {"median_ms": true}}}',
    "`median_ms` (='3')": '{"widths": {"1.0": {"median_ms": "3"}}}',
    "`median_ms` (=inf)": '{"widths": {"1.0": {"median_ms": 1e999}}}',
    "401 characters": '{"widths": {"1.0": {"median_ms": 1%s}}}' % ("0" * 400),
    "`median_ms` (=None)": '{"widths": {"1.0": 3}}',
    "NaN is no JSON": '{"widths": {"1.0": {"median_ms": NaN}}}',
    "`format` (='ddsm-bundle') must be 'ddsm-latency'": '{"format": "ddsm-bundle", "version": 1}',
    "`version` (=2) must be 1": '{"format": "ddsm-latency", "version": 2, "widths": {}}',
    "lacks the keys ['widths']": '{"format": "ddsm-latency", "version": 1}',
    "not valid JSON": '{"widths"',
}


@pytest.mark.parametrize("rule", LATENCIES)
def test_a_broken_latency_file_is_one_line_that_names_it(tmp_path, rule):
    (tmp_path / "latency.json").write_text(LATENCIES[rule])
    with pytest.raises(InputError) as caught:
        cost.read_latency(f"latency:{tmp_path / 'latency.json'}", (1.0, 0.5))
    message = str(caught.value)
    assert rule in message and "latency.json" in message and "\n" not in message


@pytest.mark.parametrize("measure", ["watts", "latency", "latency:", "macs:1", ""])
def test_an_unknown_measure(measure):
    with pytest.raises(InputError) as caught:
        cost.cost_per_width(measure, SimpleNamespace(widths=(1.0,)))
    rule = f"`--cost` (={measure!r}) must be macs, parameters or latency:FILE"
    assert str(caught.value) == rule


def test_a_latency_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"`latency` .*none.json.* cannot be read"):
        cost.read_latency(f"latency:{tmp_path / 'none.json'}", (1.0,))
