"""SIGTERM and SIGINT: the first asks the loop to save and leave, the second leaves at once."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVED_AND_LEFT = 75  # EX_TEMPFAIL of sysexits.h: not done, try again (with --resume)


class StopRequest:
    """Set by the first signal, read by the loop after every step."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)
        self.signal_number = number
        name = signal.Signals(number).name
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{name}: saving, then leaving; once more: leave at once\n".encode())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handles both signals inside the block; in another thread than the main one, none."""
    request = StopRequest()
    try:
        old = {number: signal.signal(number, request.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # only the main thread may set handlers
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
