"""Atomic writes: nothing is lost or left behind, whatever happens inside the block."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.files import atomic_file, atomic_folder, check_folder, read_json, write_json


@contextlib.contextmanager
def umask(mask):
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("old")


def test_file_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "a" / "b" / "model.keras"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".keras"
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["model.keras"]


def test_file_is_replaced_in_one_go(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["x.txt"]


def test_open_reader_of_the_old_file_is_not_disturbed(tmp_path):
    # Writing into the file, instead of renaming another over it, would change what it reads.
    path = tmp_path / "x.txt"
    path.write_text("old")
    with path.open() as reader:
        with atomic_file(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_failed_block_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_interrupt_leaves_no_temporary(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "x.txt"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_file_without_overwrite(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with (
        pytest.raises(InputError, match=r"x\.txt.*exists already"),
        atomic_file(path, overwrite=False),
    ):
        pytest.fail("the block must not run")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_file_mode_honours_the_umask(mask, mode, tmp_path):
    with umask(mask):
        write_json(tmp_path / "x.json", 1)
        assert os.umask(mask) == mask  # asking for the mask must not change it
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_folder_mode_honours_the_umask(mask, mode, tmp_path):
    with umask(mask), atomic_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "run").stat().st_mode & 0o777 == mode


def test_folder_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "run"
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x.txt").write_text("new")
        assert not path.exists()
    assert (path / "sub" / "x.txt").read_text() == "new"
    assert names(path.parent) == ["run"]


def test_folder_without_overwrite(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="--overwrite"), atomic_folder(tmp_path / "run"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("exists", [True, False])
def test_failed_block_keeps_the_old_folder(exists, tmp_path):
    if exists:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "old.txt").write_text("old")
    with (
        pytest.raises(RuntimeError, match="disk"),
        atomic_folder(tmp_path / "run", replaces=["*.txt"]) as temporary,
    ):
        (temporary / "half.txt").write_text("half")
        raise RuntimeError("disk")
    assert names(tmp_path) == (["run"] if exists else [])
    if exists:
        assert names(tmp_path / "run") == ["old.txt"]


def test_overwrite_replaces_the_whole_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.txt").write_text("old")
    with atomic_folder(tmp_path / "run", replaces=["*.txt"]) as temporary:
        (temporary / "new.txt").write_text("new")
        assert names(tmp_path / "run") == ["old.txt"]
    assert names(tmp_path / "run") == ["new.txt"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["old.txt", "photo.jpg"], r"holds 'photo\.jpg', unlike"),
        (["old.txt", "below/old.txt"], "holds 'below/old.txt', unlike"),
        (["old.dat"], r"holds no \*\.txt, unlike"),
    ],
)
def test_only_an_earlier_output_is_replaced(files, words, tmp_path):
    make(tmp_path / "run", *files)
    with (
        pytest.raises(InputError, match=words),
        atomic_folder(tmp_path / "run", replaces=["*.txt", "*.dat"]),
    ):
        pytest.fail("the block must not run")
    assert [(tmp_path / "run" / file).read_text() for file in files] == ["old"] * len(files)
    assert names(tmp_path) == ["run"]


def test_a_link_to_a_folder_is_no_part_of_an_output(tmp_path):
    make(tmp_path, "run/old.txt", "other/kept.txt")
    (tmp_path / "run" / "linked").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="holds 'linked'"):
        check_folder(tmp_path / "run", ["*.txt"])


def test_an_empty_folder_is_replaced_but_no_file(tmp_path):
    (tmp_path / "run").mkdir()
    with atomic_folder(tmp_path / "run", replaces=["*.txt"]) as temporary:
        make(temporary, "new.txt")
    assert names(tmp_path / "run") == ["new.txt"]
    make(tmp_path, "x.txt")
    with pytest.raises(InputError, match=r"`out` .*x\.txt.* is a file"):
        check_folder(tmp_path / "x.txt", ["*.txt"])


def test_a_folder_is_made_where_a_link_leads(tmp_path):
    make(tmp_path, "disk/run/old.txt")
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    with atomic_folder(tmp_path / "run", replaces=["*.txt"]) as temporary:
        make(temporary, "new.txt")
    assert (tmp_path / "run").is_symlink()
    assert names(tmp_path / "disk" / "run") == ["new.txt"]
    assert names(tmp_path / "disk") == ["run"]


@pytest.mark.parametrize("out", [".", "..", "../below", "{tmp}/run"])
def test_the_working_directory_stays(out, tmp_path, monkeypatch):
    (tmp_path / "run" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "below")
    with (
        pytest.raises(InputError, match="holds the working directory"),
        atomic_folder(out.format(tmp=tmp_path), replaces=["*.txt"]),
    ):
        pytest.fail("the block must not run")
    assert (names(tmp_path), names(tmp_path / "run")) == (["run"], ["below"])


def test_a_mount_point_stays(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "run")
    with pytest.raises(InputError, match="is a mount point"):
        check_folder(tmp_path / "run", ["*.txt"])
    check_folder(tmp_path / "other", ["*.txt"])


def test_what_comes_into_the_folder_meanwhile_stays(tmp_path):
    make(tmp_path, "run/old.txt")
    with (
        pytest.raises(InputError, match=r"holds 'photo\.jpg'"),
        atomic_folder(tmp_path / "run", replaces=["*.txt"]),
    ):
        make(tmp_path, "run/photo.jpg")
    assert names(tmp_path / "run") == ["old.txt", "photo.jpg"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("moved", ["run", ".run-*"], ids=["old", "new"])
def test_the_old_folder_is_there_again_if_it_cannot_be_replaced(moved, tmp_path, monkeypatch):
    make(tmp_path, "run/old.txt")
    replace = Path.replace

    def fails(self, target):
        if self.parent == tmp_path and self.match(moved):
            raise OSError("busy")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with (
        pytest.raises(OSError, match="busy"),
        atomic_folder(tmp_path / "run", replaces=["*.txt"]) as temporary,
    ):
        make(temporary, "new.txt")
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["old.txt"]


def test_an_old_folder_that_cannot_be_put_back_is_not_removed(tmp_path, monkeypatch):
    make(tmp_path, "run/old.txt")
    replace = Path.replace

    def comes_between(self, target):
        if self.match(".run-*"):
            make(tmp_path, "run/strange.txt")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", comes_between)
    with (
        pytest.raises(OSError, match="not empty"),
        atomic_folder(tmp_path / "run", replaces=["*.txt"]),
    ):
        pass
    assert names(tmp_path / "run") == ["strange.txt"]
    (kept,) = tmp_path.glob(".run-old-*/run/*")
    assert kept.name == "old.txt"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_json_refuses_what_json_lacks(value, tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, value)
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["x.json"]


def test_json_round_trip(tmp_path):
    value = {"text": "naïve ε", "number": 0.1 + 0.2, "list": [1, None, True]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", argument="x") == value
    assert (tmp_path / "x.json").read_text(encoding="utf-8").endswith("}\n")


def test_read_json_size_limit(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1, 2]")
    assert read_json(path, argument="x", max_bytes=6) == [1, 2]
    with pytest.raises(InputError, match=r"`x` .*larger than 5 bytes"):
        read_json(path, argument="x", max_bytes=5)


def test_read_json_names_the_argument(tmp_path):
    with pytest.raises(InputError, match=r"`thing` .*none\.json.*cannot be read"):
        read_json(tmp_path / "none.json", argument="thing")
    (tmp_path / "x.json").write_text('{"a": 1,')
    with pytest.raises(InputError, match=r"`thing` .*x\.json.*not valid JSON"):
        read_json(tmp_path / "x.json", argument="thing")


def test_read_json_names_the_file_that_holds_nan(tmp_path):
    (tmp_path / "x.json").write_text("[NaN]")
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / "x.json", argument="thing")
    assert "x.json" in str(caught.value)


def test_read_json_refuses_an_endless_integer(tmp_path):
    # Python refuses to parse more than 4300 digits, with a ValueError that is no JSONDecodeError.
    (tmp_path / "x.json").write_text("1" * 5000)
    with pytest.raises(InputError, match="`thing`"):
        read_json(tmp_path / "x.json", argument="thing")
