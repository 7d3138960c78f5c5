"""Thousands of broken and hostile bundles: one line of error, or the images of the good one."""

import hashlib
import json
import time

import numpy as np
import pytest
from bundle_mutations import (
    MANIFEST,
    by_accident,
    by_manifest,
    by_network_digest,
    by_recipe,
    read_files,
    seal,
    seeds,
    write_files,
)

from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge.manifest import parse_manifest
from ddsm_tf.errors import InputError
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule

RECIPE = "unet_0_5.slices"
# Seconds for one bundle, on a machine that does much else.
LIMIT = 10
# What an attacker may change to get a good bundle of another kind: it says what to sample.
DECIDES = {"noise_table", "schedule", "widths", "networks"}


@pytest.fixture(scope="module")
def files(tiny_bundle):
    """A bundle with few numbers, since every one of them is read thousands of times."""
    files = read_files(tiny_bundle)
    manifest = json.loads(files[MANIFEST])
    schedule = StepSchedule((15, 8, 0), (0.5, 1.0, 0.5), train_timesteps=20)
    manifest["schedule"] = schedule.to_dict()
    manifest["schedules"] = {"full": schedule.with_widths([1.0] * 3).to_dict()}
    manifest["noise_table"] = NoiseTable.linear(20).to_dict()
    return {**files, MANIFEST: seal(manifest)}


@pytest.fixture(scope="module")
def images(files, tmp_path_factory):
    """What the untampered bundle gives."""
    folder = tmp_path_factory.mktemp("good") / "bundle"
    write_files(folder, files)
    images = sample(folder)
    assert images.shape == (2, 8, 8, 1) and images.std() > 20
    return images


def sample(folder):
    return EdgeSampler(Bundle.load(folder)).sample(2, seed=1)


def outcome(folder, mutated, action=sample):
    """What `action` gives for these files, or None for one line of `InputError`; nothing else."""
    write_files(folder, mutated)
    # Of this process: a busy machine does not lengthen it.
    started = time.process_time()
    try:
        return action(folder)
    except InputError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1500
        # It can be printed on any terminal.
        str(error).encode("utf-8")
        return None
    finally:
        assert time.process_time() - started < LIMIT


@pytest.mark.timeout(200)
def test_no_mishap_goes_unnoticed(files, images, tmp_path):
    unchanged = 0
    for seed, random in seeds(0, 800):
        mutated = by_accident(files, random)
        found = outcome(tmp_path / "bundle", mutated)
        if mutated == files:
            unchanged += 1
            np.testing.assert_array_equal(found, images)
        else:
            assert found is None, seed
    assert unchanged < 80


def check_manifests(files, images, folder, first, count):
    accepted = 0
    for seed, random in seeds(first, count):
        mutated, path = by_manifest(files, random)
        found = outcome(folder, mutated)
        if found is None:
            continue
        accepted += 1
        assert found.dtype == np.uint8 and len(found) == 2, seed
        if path and path[0] not in DECIDES:
            np.testing.assert_array_equal(found, images, err_msg=str((seed, path)))
    return accepted


@pytest.mark.timeout(200)
def test_manifests_that_vouch_for_themselves(files, images, tmp_path):
    accepted = check_manifests(files, images, tmp_path / "bundle", 10_000, 800)
    # Notes, names of schedules and other betas are an author's to choose.
    assert 10 < accepted < 400


def check_recipes(files, images, folder, first, count):
    for seed, random in seeds(first, count):
        found = outcome(folder, by_recipe(files, random, RECIPE))
        if found is not None:
            np.testing.assert_array_equal(found, images, err_msg=str(seed))


@pytest.mark.timeout(200)
def test_recipes_behind_digests_that_fit(files, images, tmp_path):
    check_recipes(files, images, tmp_path / "bundle", 20_000, 400)


def assemble(folder):
    """Parse and assemble, whatever digest the result should have: no interpreter sees it."""
    manifest = parse_manifest((folder / MANIFEST).read_bytes())
    bundle = Bundle(folder=folder, **vars(manifest))
    network = bundle.networks[0.5]
    with network.slices_of.open(folder) as source:
        return bundle._recipe(network).assemble(source)


def check_assembly(files, folder, first, count):
    sizes = []
    for _, random in seeds(first, count):
        mutated = by_network_digest(files, random, RECIPE, "0.5")
        found = outcome(folder, mutated, assemble)
        if found is not None:
            sizes.append(len(found))
            manifest = json.loads(mutated[MANIFEST])
            assert len(found) == manifest["networks"]["0.5"]["bytes"]
    return sizes


@pytest.mark.timeout(200)
def test_recipes_behind_any_digest_give_what_they_announce(files, tmp_path):
    sizes = check_assembly(files, tmp_path / "bundle", 30_000, 300)
    assert len(sizes) > 3


def test_what_is_fuzzed_reaches_the_parser(files, images, tmp_path):
    """The attacker's digests are right: else every mutation would be refused at the gate."""
    manifest = json.loads(files[MANIFEST])
    manifest["provenance"]["note"] = "by a stranger"
    folder = tmp_path / "bundle"
    np.testing.assert_array_equal(outcome(folder, {**files, MANIFEST: seal(manifest)}), images)
    random = np.random.default_rng(0)
    mutated = by_recipe({**files}, random, RECIPE)
    digest = hashlib.sha256(mutated[RECIPE]).hexdigest()
    assert json.loads(mutated[MANIFEST])["sha256"][RECIPE] == digest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_longer_campaign(files, images, tmp_path):
    folder = tmp_path / "bundle"
    check_manifests(files, images, folder, 100_000, 20_000)
    check_recipes(files, images, folder, 200_000, 10_000)
    check_assembly(files, folder, 300_000, 10_000)
