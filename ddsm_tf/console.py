"""What both commands do with exit codes, errors and chatty native libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from ddsm_tf.errors import (
    EXTRAS,
    ForeseenFailure,
    InputError,
    MissingExtraError,
    missing_extra,
)

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def run_safely(program: str, action: Callable[[], int]) -> int:
    """Run `action`; returns its exit code, or that of its error, which is printed as one line."""
    try:
        return action()
    except InputError as error:
        return say(program, str(error), BAD_INPUT)
    except (ForeseenFailure, MissingExtraError) as error:
        return say(program, str(error), FAILED)
    except KeyboardInterrupt as error:
        return say(program, str(error) or "interrupted", INTERRUPTED)
    except Exception as error:
        if debugging():
            raise
        return say(program, _describe(error), FAILED)


def say(program: str, message: str, code: int) -> int:
    """Print one line on stderr; returns `code`."""
    print(f"{program}: " + " ".join(message.split()), file=sys.stderr)
    return code


def _describe(error: BaseException) -> str:
    """One line for an error that nobody foresaw, or that the system reports."""
    # Not a module inside of a library: that one is there, and broken or of another version.
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return str(missing_extra(error.name, EXTRAS[error.name]))
    if isinstance(error, OSError):
        where = f"`{error.filename}`: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return f"{reason} (set DDSM_DEBUG=1 for the traceback)"


def debugging() -> bool:
    """Whether tracebacks and native messages are wanted."""
    return bool(os.environ.get("DDSM_DEBUG"))


def without_stderr(action: Callable[[], Any]) -> Any:
    """Run `action` with file descriptor 2 turned aside; returns its result.

    Native code writes there before any log level is read.
    """
    if debugging():
        return action()
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        return action()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
