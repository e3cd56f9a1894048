"""Signals while training: a step of the optimisers is finished first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextmanager
def held_back() -> Iterator[None]:
    """Deliver the first signal after the block, a second one at once.

    Only the main thread receives signals; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if waiting:
            raise KeyboardInterrupt
        waiting.append(number)

    before = [signal.signal(number, receive) for number in SIGNALS]
    try:
        yield
    finally:
        for which, handler in zip(SIGNALS, before, strict=True):
            signal.signal(which, handler)
    for number in waiting:
        signal.raise_signal(number)
