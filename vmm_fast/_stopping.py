"""Ctrl-C, SIGTERM and SIGHUP as exceptions, so that a stopped command can say how to resume."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

IMPATIENCE = 2.0  # seconds after a signal in which further ones are ignored


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which asks a run to end as Ctrl-C does."""


class HungUp(KeyboardInterrupt):
    """Raised on SIGHUP, which asks a run to end because its terminal has closed."""


STOPS: dict[signal.Signals, type[KeyboardInterrupt]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
}
if hasattr(signal, "SIGHUP"):  # Windows has none
    STOPS[signal.SIGHUP] = HungUp


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn each signal of :data:`STOPS` into its exception inside a ``with`` block.

    Works in the main thread alone. Signals within :data:`IMPATIENCE` seconds after another are
    ignored. A signal that was ignored before, as by ``nohup``, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -IMPATIENCE

    def stop(number: int, frame: Any) -> None:
        nonlocal last
        since, last = time.monotonic() - last, time.monotonic()
        if since >= IMPATIENCE:  # a second one would interrupt the cleanup that the first began
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
