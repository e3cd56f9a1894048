"""Status on stderr for whatever takes over a second: a bar on a terminal, lines elsewhere.

    with status.phase("loading", total=30, unit="layers") as phase:
        for layer in layers:
            ...
            phase.advance()

A phase that ends within a second shows nothing. On a terminal its bar disappears when it ends. A
file or a pipe gets one line after a second, one every half minute, and one with the duration at the
end; a phase inside another gets lines only if none was printed for half a minute. Functions of the
library take a Status, by default SILENT; their other messages go to the logger "mtpkern". No torch
is imported here.
"""

import argparse
import logging
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

# Seconds until a phase is shown, between two updates of a bar, and between two lines.
SHOWN_AFTER, REDRAWN_AFTER, REPEATED_AFTER = 1.0, 0.2, 30.0
_BAR_WIDTH, _LEAST_BAR_WIDTH, _LEAST_NAME_WIDTH = 20, 5, 12
_COLUMNS = 80  # of a terminal whose size is unknown
_LEAST_WIDTH = 40  # of a terminal that text is wrapped for


class _Bar(tqdm):
    monitor_interval = 0  # Status has a thread of its own


class Phase:
    """One thing that takes a while: what it is, its progress, and when it started."""

    def __init__(self, what: str, total: int | None, unit: str, note: str = ""):
        self.what, self.total, self.unit, self.note = what, total, unit, note
        self.done = 0
        self.started = time.time()
        self.announced = False  # whether its first line was printed
        self.bar: _Bar | None = None

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more units as done; `note` replaces the text at the end of the line."""
        self.done += count
        if note is not None:
            self.note = note

    @property
    def seconds(self) -> float:
        return time.time() - self.started

    def _amount(self) -> str:
        if self.unit == "B":
            text = tqdm.format_sizeof(self.done, "B", 1000)
            return text if self.total is None else f"{text}/{tqdm.format_sizeof(self.total, 'B')}"
        if self.total is None:
            return f"{self.done} {self.unit}".rstrip() if self.done else ""
        return f"{self.done}/{self.total} {self.unit}".rstrip()

    def line(self, duration: str) -> str:
        return f"{self.what}: " + ", ".join(filter(None, [self._amount(), self.note, duration]))

    def brief(self) -> str:
        """Its name and progress, as shown in front of a phase inside it."""
        return f"{self.what} {self._amount()}".rstrip()

    def draw(self, stream: TextIO, around: "list[Phase]") -> None:
        """Draw or redraw the bar on a terminal, after the names of the phases `around` this one."""
        if self.bar is None:
            self.bar = _Bar(
                bar_format=" ", file=stream, leave=False, position=0, dynamic_ncols=True
            )
            self.bar.start_t = self.started
        facts = ", ".join(filter(None, [self._amount(), self.note]))
        # On a narrow terminal the names around this phase give way first, then the bar, the facts
        # and the end of its name; percentage and times stay.
        columns = self.bar.format_dict["ncols"] or _COLUMNS
        room = columns - len(": 100%, 00:00<00:00" if self.total else ": 00:00")
        if room - len(facts) < min(len(self.what), _LEAST_NAME_WIDTH):
            facts = ""
        room -= len(f", {facts}" if facts else "")
        name = ": ".join([*(phase.brief() for phase in around), self.what])
        if len(name) > room:
            name = self.what
        if len(name) > room:
            name = f"{name[: room - 3]}..."
        width = min(_BAR_WIDTH, room - len(name) - len("||"))
        # tqdm formats this text, so its braces are escaped.
        name, facts = (text.replace("{", "{{").replace("}", "}}") for text in (name, facts))
        if self.total:
            bar = f"|{{bar:{width}}}|" if width >= _LEAST_BAR_WIDTH else ""
            numbers = f"{name}: {{percentage:3.0f}}%{bar} {facts}".rstrip()
            form = f"{numbers}, {{elapsed}}<{{remaining}}"
        else:
            form = ", ".join(filter(None, [f"{name}: {{elapsed}}", facts]))
        self.bar.n, self.bar.total, self.bar.bar_format = self.done, self.total, form
        self.bar.refresh()

    def erase(self) -> None:
        if self.bar is not None:
            self.bar.clear()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Status:
    """Shows phases on `stream` (None: sys.stderr), or nothing if `quiet`.

    Phases nest; the innermost one is shown, after the names of those around it. One thread at a
    time may use a Status.
    """

    def __init__(
        self, stream: TextIO | None = None, *, quiet: bool = False, delay: float | None = None
    ):
        """`delay`: seconds until a phase is shown; None is SHOWN_AFTER."""
        self.stream, self.quiet = stream or sys.stderr, quiet
        self.delay = SHOWN_AFTER if delay is None else delay
        self.terminal = not quiet and steerable(self.stream)
        self._phases: list[Phase] = []
        self._printed_at = 0.0
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def phase(self, what: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        """Show `what` while the block runs; the unit "B" counts bytes."""
        phase = Phase(what, total, unit)
        if self.quiet:
            yield phase
            return
        with self._lock:
            if self._phases:
                self._phases[-1].erase()
            self._phases.append(phase)
        if self._thread is None:
            self._over.clear()
            self._thread = threading.Thread(target=self._tick, name="status", daemon=True)
            self._thread.start()
        try:
            yield phase
            if not self.terminal:
                with self._lock:
                    if phase.announced:
                        self._print(phase.line(f"{phase.seconds:.1f} s"))
        finally:
            with self._lock:
                self._phases.remove(phase)
                phase.close()
            if not self._phases:
                self._over.set()
                self._thread.join()
                self._thread = None

    def say(self, text: str) -> None:
        """Print a permanent line above any bar, unless quiet."""
        if not self.quiet:
            with self.paused():
                self._print(text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Clear the bar's line, and do not redraw it while the block prints something else."""
        with self._lock:
            if self._phases:
                self._phases[-1].erase()
            yield

    @contextmanager
    def logging(self, level: int = logging.DEBUG) -> Iterator[None]:
        """Print the log records of the package above any bar while the block runs."""
        logger, handler = logging.getLogger("mtpkern"), _Handler(self)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(level)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)

    def _tick(self) -> None:
        """Show the innermost phase repeatedly until none is left."""
        while not self._over.wait(min(REDRAWN_AFTER, self.delay)):
            with self._lock:
                if self._phases and self._phases[-1].seconds >= self.delay:
                    try:
                        self._show(self._phases[-1])
                    except OSError:  # a closed stderr does not stop the work
                        return

    def _show(self, phase: Phase) -> None:
        around = self._phases[:-1]
        if self.terminal:
            phase.draw(self.stream, around)
            return
        due = time.time() - self._printed_at >= REPEATED_AFTER
        if phase.announced and due:
            left = ""
            if phase.total and phase.done:
                rest = phase.seconds * (phase.total - phase.done) / phase.done
                left = f", {tqdm.format_interval(rest)} left"
            self._print(phase.line(f"{phase.seconds:.0f} s so far{left}"))
        elif not phase.announced and (due or not around):
            phase.announced = True
            self._print(f"{phase.what} ...")

    def _print(self, text: str) -> None:
        self.stream.write(wrapped(text, self.stream, indent=2) + "\n")
        self.stream.flush()
        self._printed_at = time.time()


class _Handler(logging.Handler):
    """Prints log records as lines of a Status."""

    def __init__(self, status: Status):
        super().__init__()
        self.status = status

    def emit(self, record: logging.LogRecord) -> None:
        self.status.say(self.format(record))


SILENT = Status(quiet=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --verbose, which `from_arguments` reads."""
    group = parser.add_mutually_exclusive_group()
    # Without a default: a subcommand's would overwrite a flag given before its name.
    for flag, text in (
        ("--quiet", "show no status on stderr"),
        ("--verbose", "also show the library's log on stderr"),
    ):
        group.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)


@contextmanager
def from_arguments(args: argparse.Namespace) -> Iterator[Status]:
    """The Status that --quiet and --verbose ask for."""
    status = Status(quiet=getattr(args, "quiet", False))
    if getattr(args, "verbose", False):
        with status.logging():
            yield status
    else:
        yield status


def steerable(stream: TextIO) -> bool:
    """Whether a stream is a terminal that understands control characters."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    """Whether a stream shows colours, and its reader has not declined them (NO_COLOR)."""
    return steerable(stream) and not os.environ.get("NO_COLOR")


def wrapped(line: str, stream: TextIO, *, indent: int = 0) -> str:
    """A line broken at spaces to fit `stream` if that is a terminal, all but the first indented."""
    if not stream.isatty():
        return line
    return textwrap.fill(
        line,
        max(shutil.get_terminal_size().columns, _LEAST_WIDTH),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
