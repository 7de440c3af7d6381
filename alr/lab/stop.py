"""Ctrl-C, SIGTERM and a closed terminal as a wish: training stops where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator


def listen() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, after `alr/__init__.py` let it end the process while modules were loaded."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Stop:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a wish that the loop grants between two steps, when its state is whole.

    SIGHUP comes when the terminal or the ssh connection closes; a run under nohup, which ignores it, goes on.

    A second signal stops at once.  Within `patience` seconds it counts as the first: torchrun sends it on to processes
    that the terminal has told already.
    """

    def __init__(self, patience: float = 0.0):
        self.patience, self.asked, self.at_once, self.since = patience, False, False, 0.0
        self.old = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                wanted.append(signal.SIGHUP)
            self.old = {s: signal.signal(s, self._heard) for s in wanted}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def _heard(self, number: int, _) -> None:
        if self.asked and number == getattr(signal, "SIGHUP", None):
            return                                      # system and shell both send it: nobody has lost patience
        if self.at_once or (self.asked and time.monotonic() - self.since >= self.patience):
            raise KeyboardInterrupt
        if not self.asked:
            with contextlib.suppress(OSError):          # the terminal may be gone
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
