"""Seeded mutations of a bundle: by accident, and by an attacker who computes every digest anew."""

import copy
import hashlib
import json
import re
import shutil
import zlib

import numpy as np

MANIFEST = "manifest.json"
ZEROS = "0" * 64
NAMES = ["../manifest.json", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "\ud800", "ä"]
NAMES += ["manifest.json", "MANIFEST.JSON", "nothing.tflite", "x" * 5000, "~", "C:x", "a\nb"]
NUMBERS = [0, 1, -1, 2**31, 2**40, 2**63, 2**200, int("9" * 4200), 0.5, 1e-300, 1e308, -0.0]
VALUES = [None, True, False, [], {}, "", "1.0", [[]], [None], {"a": 1}, *NUMBERS, *NAMES]


def read_files(folder):
    """The content of a folder: name → bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_files(folder, files):
    """Make a folder that holds just these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def seal(manifest):
    """A manifest that vouches for itself, as any program could write it."""
    manifest = {**manifest, "manifest_sha256": ZEROS}
    text = dump(manifest)
    return text.replace(ZEROS, hashlib.sha256(text.encode()).hexdigest()).encode()


def dump(value):
    """JSON in which "nested N" stands for a list in a list, N times: too deep for the encoder."""
    return re.sub(r'"nested (\d+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), json.dumps(value))


def vouch(files, manifest):
    """Have the manifest vouch for whatever the files are."""
    for name in set(files) & set(manifest["sha256"]):
        manifest["sha256"][name] = hashlib.sha256(files[name]).hexdigest()
        manifest["bytes"][name] = len(files[name])
    return {**files, MANIFEST: seal(manifest)}


# By accident: no digest follows.


def by_accident(files, random):
    """The files after one mishap: bytes changed, cut, doubled or moved, files swapped or gone."""
    files, names = dict(files), sorted(files)
    kind = random.integers(8)
    one, other = random.choice(names, 2, replace=False)
    if kind == 0:
        del files[one]
    elif kind == 1:
        files[one], files[other] = files[other], files[one]
    elif kind == 2:
        files[f"extra{random.integers(9)}"] = files[one][:100]
    else:
        files[one] = change_bytes(files[one], random)
    return files


def change_bytes(content, random):
    """Bytes with a few of them flipped, cut, doubled, blanked or put in."""
    first, last = sorted(random.integers(0, len(content) + 1, 2))
    kind = random.integers(6)
    if kind == 0:
        return content[:first]
    if kind == 1:
        return content[:first] + content[last:]
    if kind == 2:
        return content[:last] + content[first:]
    if kind == 3:
        return content[:first] + bytes(int(last - first)) + content[last:]
    if kind == 4:
        return content[:first] + random.bytes(random.integers(1, 9)) + content[first:]
    changed = bytearray(content)
    for place in random.integers(0, len(content), random.integers(1, 5)):
        changed[place] ^= 1 << random.integers(8)
    return bytes(changed)


# By an attacker.


def places(value, path=()):
    """The path of every entry in a JSON value; of long lists a few."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value))[:6]:
            yield from places(value[index], (*path, index))


def change_value(value, random):
    """A JSON value with one entry changed, gone, doubled or moved; and which one."""
    value = copy.deepcopy(value)
    everywhere = list(places(value))
    path = everywhere[random.integers(len(everywhere))]
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    kind = random.integers(8)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1:
        parent[path[-1]] = f"nested {random.integers(1, 1100)}"
    elif kind == 2:
        add_entry(parent, parent[path[-1]], random)
    elif kind == 3:
        source = value
        for key in everywhere[random.integers(len(everywhere))]:
            source = source[key]
        parent[path[-1]] = copy.deepcopy(source)
    elif kind == 4 and type(parent[path[-1]]) in (int, float):
        parent[path[-1]] += int(random.integers(-3, 4))
    else:
        parent[path[-1]] = VALUES[random.integers(len(VALUES))]
    return value, path


def add_entry(parent, value, random):
    if isinstance(parent, list):
        parent += [copy.deepcopy(value)] * int(random.integers(1, 3000))
    else:
        parent[str(VALUES[random.integers(len(VALUES))])] = copy.deepcopy(value)


def by_manifest(files, random):
    """A manifest that was changed and vouches for itself; and where."""
    manifest = json.loads(files[MANIFEST])
    if random.integers(10) == 0:
        # Not what an attacker would do, but only here does it pass the digest.
        text = change_bytes(json.dumps({**manifest, "manifest_sha256": ZEROS}).encode(), random)
        digest = hashlib.sha256(text).hexdigest()
        return {**files, MANIFEST: text.replace(ZEROS.encode(), digest.encode())}, None
    changed, path = change_value(manifest, random)
    if path[0] == "manifest_sha256":
        return {**files, MANIFEST: dump(changed).encode()}, path
    return {**files, MANIFEST: seal(changed)}, path


def by_recipe(files, random, recipe):
    """A recipe that was changed, behind digests that fit it."""
    line, literal = zlib.decompress(files[recipe]).split(b"\n", 1)
    kind = random.integers(6)
    if kind == 0:
        data = change_bytes(files[recipe], random)
    elif kind == 1:
        data = zlib.compress(change_bytes(line + b"\n" + literal, random))
    elif kind == 2:
        data = zlib.compress(line + b"\n" + change_bytes(literal, random))
    else:
        header, _ = change_value(json.loads(line), random)
        data = zlib.compress(dump(header).encode() + b"\n" + literal)
    return vouch({**files, recipe: data}, json.loads(files[MANIFEST]))


def by_network_digest(files, random, recipe, width):
    """The same, and the network may be announced as longer or shorter than it was."""
    files = by_recipe(files, random, recipe)
    manifest = json.loads(files[MANIFEST])
    manifest["networks"][width]["bytes"] += int(random.choice([0, 0, 0, 1, -1, 9]))
    return {**files, MANIFEST: seal(manifest)}


def seeds(first, count):
    """Random generators, one a mutation, so that each can be repeated by itself."""
    return ((seed, np.random.default_rng(seed)) for seed in range(first, first + count))
