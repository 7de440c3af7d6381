"""Signals as a terminal gives them.

A shell that starts tests in the background, or under nohup, has SIGINT or SIGHUP ignored, and a process that is born with a
signal ignored keeps it so.  The tests of stopping and of closed terminals then see nothing.
"""

import signal


def pytest_configure():
    for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
