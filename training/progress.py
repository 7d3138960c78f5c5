"""Progress bars: on a terminal only, on stderr."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(total: int, label: str, *, initial: int = 0) -> Any:
    """A tqdm bar with the time left; silent where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, initial=initial, disable=None, dynamic_ncols=True)


def announce(text: str) -> None:
    """A line on stderr, where that is a terminal: what is being waited for."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
