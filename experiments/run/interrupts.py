"""Defer KeyboardInterrupt during critical sections."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from groundscope.core.threads import set_threads


@contextmanager
def defer_interrupt() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block. Has no effect in threads other than the main thread, which receive no signals.

    Raises
    ------
    KeyboardInterrupt
        At the end of the block, if Ctrl-C was pressed inside it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler in (None, signal.SIG_IGN):
        yield
        return
    pressed: list[int] = []

    def record(number: int, _: FrameType | None) -> None:
        pressed.append(number)

    signal.signal(signal.SIGINT, record)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def load_torch(threads: int | None) -> None:
    """Import torch without interruption, and set its number of threads; None keeps torch's choice.

    An interrupt inside the import of its C++ part would abort the process without a message.
    """
    with defer_interrupt():
        set_threads(threads)
