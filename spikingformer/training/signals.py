"""SIGTERM and SIGINT: the first asks the loop to save and stop, the second ends the process at once."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVED_AND_LEFT = 75  # EX_TEMPFAIL of sysexits.h: not done, try again (with --resume)


_LAUNCHER_REPEATS_FOR = 2.0  # seconds: torchrun and SLURM deliver one signal twice, directly and through the launcher


class StopRequest:
    """Set by the first signal, read by the loop after every step.

    launched: by torchrun or SLURM, whose repetition of a signal within 2 s is not a second one.
    """

    def __init__(self, launched: bool = False) -> None:
        self.signal_number: int | None = None
        self._process = os.getpid()
        self._launched = launched
        self._first_at = 0.0

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked reader: the parent ends it, Ctrl-C reaches it as well
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.signal_number is not None:
            if self._launched and time.monotonic() - self._first_at < _LAUNCHER_REPEATS_FOR:
                return
            os._exit(128 + number)
        self.signal_number, self._first_at = number, time.monotonic()
        name = signal.Signals(number).name
        text = f"\n{name}: saving, then stopping; send it again to stop at once\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


@contextmanager
def stop_on_signals(launched: bool = False) -> Iterator[StopRequest]:
    """Handles both signals inside the block; in another thread than the main one, none."""
    request = StopRequest(launched)
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
