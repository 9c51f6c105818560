"""Ctrl-C, SIGTERM and SIGHUP end a command by an exception, so that it can say how to go on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["STOPS", "HungUp", "Terminated", "stoppable"]

IMPATIENCE = 2.0  # seconds after a signal in which others are not heard


class Terminated(KeyboardInterrupt):
    """A run was asked to end by SIGTERM, as by Ctrl-C."""


class HungUp(KeyboardInterrupt):
    """A run has lost its terminal and was asked to end by SIGHUP, as by Ctrl-C."""


STOPS: dict[signal.Signals, type[KeyboardInterrupt]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: HungUp,
}


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise each signal's exception in the main thread, but not a second one right after the first.

    A signal that the surroundings ignore, as ``nohup`` does, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -IMPATIENCE

    def stop(number: int, frame: Any) -> None:
        nonlocal last
        since, last = time.monotonic() - last, time.monotonic()
        if since >= IMPATIENCE:  # else what the first one began would end in a traceback
            raise STOPS[signal.Signals(number)]

    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in STOPS}
    replaced = [number for number, handler in before.items() if handler in usual]
    for number in replaced:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, before[number])
