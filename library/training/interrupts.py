"""Ctrl-C during training: finish the step, save, then stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger(__name__)


@dataclass
class StopRequest:
    """Whether the user asked to stop; read by the loop after each optimizer step."""

    is_set: bool = False


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop; a second one stops at once.

    Outside the main thread, where Python delivers no signals, the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        if request.is_set:
            raise KeyboardInterrupt
        request.is_set = True
        log.warning("stopping after this step; the network is saved first (once more: stop at once, without saving)")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            if handler is not None:  # None: not installed by Python, so Python cannot put it back
                signal.signal(number, handler)
