"""Ctrl-C at a moment when it must not be felt."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held() -> Iterator[None]:
    """Keep an interrupt until the block has ended, and raise it then; threads other than the main one never feel any.

    Raises
    ------
    KeyboardInterrupt
        At the end of the block, where Ctrl-C was pressed inside it.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    pressed: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        pressed.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def load_torch(threads: int | None) -> None:
    """Import torch, all of it or not at all, and let it have so many threads (None: as many as it has).

    Interrupted inside its C++ part the process would abort without a word.
    """
    with held():
        import torch
    if threads:
        torch.set_num_threads(threads)
