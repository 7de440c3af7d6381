"""Ctrl-C as a wish: training stops where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator


class Stop:
    """Turns Ctrl-C and SIGTERM into a wish that the loop grants between two steps, when its state is whole.

    A second signal stops at once.  Within `patience` seconds it counts as the first: torchrun sends it on to processes
    that the terminal has told already.
    """

    def __init__(self, patience: float = 0.0):
        self.patience, self.asked, self.at_once, self.since = patience, False, False, 0.0
        self.old = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self._heard) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def _heard(self, *_) -> None:
        if self.at_once or (self.asked and time.monotonic() - self.since >= self.patience):
            raise KeyboardInterrupt
        if not self.asked:
            # not print, which a signal may not enter twice
            os.write(2, b"\nstopping after this step; once more to stop at once\n")
            self.asked, self.since = True, time.monotonic()

    @contextlib.contextmanager
    def now(self) -> Iterator[None]:
        """A context in which there is nothing to lose: one Ctrl-C is enough, where no other process has to agree."""
        self.at_once = not self.patience
        try:
            yield
        finally:
            self.at_once = False
