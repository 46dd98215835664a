"""Progress bars for long work: on a terminal only, never in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` behind a progress bar on the terminal's standard error; silently where there is no terminal.

    Args:
        items: what to go through; its length, where it has one, gives the bar an end.
        title: words in front of the bar.
        total: number of items where they have no length.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    total = len(items) if isinstance(items, Sequence) else total
    yield from rich_track(items, title, total=total, console=Console(stderr=True), transient=True)
