"""Ctrl-C: one line that says what is kept, exit status 130, and no traceback.

Nothing but the standard library is imported here: this is there before the rest of the command line is.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn, TypeVar

T = TypeVar("T")

STATUS = 128 + signal.SIGINT
"""What shells give a program that Ctrl-C ended."""

CLEANING_SECONDS = 2.0
"""So long after a Ctrl-C another one is not heeded, so that what is half-written can be removed in peace."""


def _nothing() -> str:
    return "Nothing was written."


@dataclass
class Interruption:
    """What is known of a Ctrl-C in this process."""

    seen_at: float | None = None
    """When it was pressed last, in seconds of `time.monotonic`."""

    quiet: bool = False
    """Say nothing: another process does."""

    kept: Callable[[], str] = _nothing
    """What there is of the work, asked for at the end. A command may set it."""


interruption = Interruption()


def end_interrupted() -> NoReturn:
    """Say that Ctrl-C was pressed and what is kept, and end with `STATUS`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not interruption.quiet:
        sys.stderr.write(f"Interrupted. {interruption.kept()}\n")
    sys.exit(STATUS)


def run_interruptible(command: Callable[[], T]) -> T:
    """What a command gives; Ctrl-C ends the program with one line, once everything within has cleaned up.

    A library may turn the interruption into an error of its own, which counts as one then.
    """
    if threading.current_thread() is not threading.main_thread():
        return command()  # no signal is handled here
    before = signal.signal(signal.SIGINT, _on_signal)
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        return command()
    except BaseException as error:
        done = isinstance(error, SystemExit) and error.code in (0, None)
        if done or (interruption.seen_at is None and not isinstance(error, KeyboardInterrupt)):
            raise
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)
        # All is done, and libraries are being taken down: they have nothing to say of a Ctrl-C.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    # The error with its frames is gone here, and now the progress bars in them end their lines.
    gc.collect()
    end_interrupted()


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if interruption.seen_at is None or now - interruption.seen_at > CLEANING_SECONDS:
        interruption.seen_at = now
        raise KeyboardInterrupt


def _unraisable(error: sys.UnraisableHookArgs) -> None:
    """Where Python cannot raise, as in a finaliser, Ctrl-C would be shown and lost: it comes again a moment later."""
    if not issubclass(error.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(error)
        return
    interruption.seen_at = None
    again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()
