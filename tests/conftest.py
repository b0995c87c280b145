"""Fixtures that several files share."""

import signal

from toy_session import machine, runtime, toy

__all__ = ["machine", "runtime", "toy"]

# A shell that starts the tests in the background lets them ignore interrupts, and with them all that they start: tests
# of Ctrl-C would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
