"""Reading and writing files so that nothing is lost: temporary name first, then rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddsm_tf.errors import InputError, invalid


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    The temporary name keeps the suffix, because Keras and Pillow choose the format by it.

    Raises:
        InputError: `path` exists and `overwrite` is false.
        OSError: the disk is full or read-only; `path` is then as it was before.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise invalid("out", str(path), "exists already; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _give_default_mode(temporary)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        # A failing write names no file, and nobody knows the temporary one.
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` if the block succeeds.

    Args:
        path: the folder to make. A link stays, and what it leads to is made or replaced.
        replaces: see `check_folder`.

    Raises:
        InputError: see `check_folder`.
        OSError: the disk is full or read-only; `path` is then as it was before.
    """
    check_folder(path, replaces)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if replaces and path.exists():
            # Once more: the block may have taken minutes.
            check_folder(path, replaces)
            _exchange(temporary, path)
        else:
            _rename_to_new(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: str | os.PathLike, replaces: Sequence[str] = ()) -> None:
    """Raise `InputError` unless a folder can be made at `path` without a loss.

    Nothing may be there but an empty folder or an earlier output of the same kind, and these only
    where `replaces` is given.

    Args:
        path: the folder to make.
        replaces: patterns, as `Path.glob` takes them, of all files of such an output. The first is
            of one that every output has.
    """
    folder = Path(os.path.realpath(path))
    if not folder.exists():
        return
    if not folder.is_dir():
        raise invalid("out", str(path), "is a file; name a folder")
    if os.path.ismount(folder) or Path.cwd().is_relative_to(folder):
        rule = "is a mount point, or holds the working directory; name a folder of its own"
        raise invalid("out", str(path), rule)
    if not replaces:
        raise invalid("out", str(path), "exists already; choose another name or pass --overwrite")
    difference = _unlike_output(folder, replaces)
    if difference:
        rule = f"{difference}, unlike an earlier output; remove it yourself, or choose another name"
        raise invalid("out", str(path), rule)


def _unlike_output(folder: Path, files: Sequence[str]) -> str:
    """What tells a folder from an earlier output, in words; an empty folder differs in nothing."""
    known = {file for pattern in files for file in folder.glob(pattern)}
    for file in folder.rglob("*"):
        if file not in known and (file.is_symlink() or not file.is_dir()):
            return f"holds {str(file.relative_to(folder))!r}"
    if any(folder.iterdir()) and not any(folder.glob(files[0])):
        return f"holds no {files[0]}"
    return ""


def _exchange(temporary: Path, path: Path) -> None:
    """Put a new folder in an old one's place, or leave the old one there."""
    # No folder can be replaced in one step: the old one keeps a name till the new stands.
    retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-old-"))
    old = retired / path.name
    try:
        path.replace(old)
        temporary.replace(path)
    except BaseException:
        if old.exists():
            old.replace(path)
        # Not `rmtree`: an old folder that could not be put back is all there is.
        retired.rmdir()
        raise
    shutil.rmtree(retired)


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except OSError as error:
        if path.exists():
            rule = "was made by somebody else in the meantime; choose another name"
            raise invalid("out", str(path), rule) from error
        raise


def copy_file(original: str | os.PathLike, copy: str | os.PathLike) -> None:
    """Copy a file's content, atomically; what was there is replaced."""
    with atomic_file(copy) as temporary:
        shutil.copyfile(original, temporary)


def write_json(path: str | os.PathLike, value: Any, *, overwrite: bool = True) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike, *, argument: str, max_bytes: int = 64 * 2**20) -> Any:
    """Read a JSON file that a user named.

    Args:
        path: the file.
        argument: what to call it in an error message.
        max_bytes: larger files are refused unread.

    Raises:
        InputError: the file is missing, unreadable, too large or not JSON.
    """
    path = Path(path)
    try:
        if path.stat().st_size > max_bytes:
            raise invalid(argument, str(path), f"is larger than {max_bytes} bytes")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except InputError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise invalid(argument, str(path), f"cannot be read: {reason}") from error
    # ValueError: broken JSON or UTF-8, NaN, or more digits than Python turns into a number.
    except (ValueError, RecursionError) as error:
        raise invalid(argument, str(path), f"is not valid JSON: {error}") from error


def check_keys(
    value: Any,
    *,
    format: str,
    version: int,
    required: Collection[str],
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """The content of a JSON object that says what it is, without `format` and `version`.

    Raises:
        InputError: it is no object, of another format or version, or lacks a key or has one too
            many.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"must be a JSON object of the format {format!r}")
    if value.get("format") != format:
        raise invalid("format", value.get("format"), f"must be {format!r}")
    # True equals 1 in Python and is no version.
    if value.get("version") != version or isinstance(value["version"], bool):
        raise invalid("version", value.get("version"), f"must be {version}; update ddsm_tf")
    content = {key: value[key] for key in value if key not in ("format", "version")}
    missing = sorted(set(required) - set(content))
    unknown = sorted(set(content) - set(required) - set(optional))
    if missing or unknown:
        raise InputError(f"lacks the keys {missing} and has unknown keys {unknown}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON; write a finite number")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _give_default_mode(path: Path) -> None:
    """`mkstemp` makes files private; give them the mode that `open` would have given."""
    path.chmod(0o666 & ~_umask())


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename never outlives its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems refuse to sync a folder; the rename itself is still atomic.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
