"""Record a command on a terminal of its own, as it looks.

An .svg file gets what the terminal shows at the end. Any other file is a text: each line with the
second at which it began, where a bar that is redrawn counts as one line per second. POSIX only;
needs rich.
"""

import argparse
import codecs
import fcntl
import io
import os
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from contextlib import ExitStack
from pathlib import Path

import checkout  # noqa: F401
from rich.console import Console
from rich.text import Text

from mtpkern.arguments import Parser, at_least, run
from mtpkern.outputs import FORCE, output_file, writing

PROMPT, CTRL_D = "> ", "\x04"
Events = list[tuple[float, str]]  # seconds since the start, and what was printed then


def record(command: list[str], columns: int, answers: list[str]) -> tuple[Events, int]:
    """Run a command on a pseudo-terminal -> events, exit code.

    At each prompt an answer is typed, and Ctrl-D once all of them were.
    """
    terminal, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # Programs prefer these to the terminal's own size.
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    try:
        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment | {"TERM": "xterm-256color"},
            start_new_session=True,
            # As its controlling terminal, it hangs up the command when it is closed.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
    except OSError:
        os.close(terminal)
        raise
    finally:
        os.close(theirs)
    started, decoder = time.monotonic(), codecs.getincrementaldecoder("utf-8")("replace")
    events: Events = []
    unanswered = ""  # what was shown since the last answer
    left = [f"{answer}\n" for answer in answers]
    try:
        while True:
            if not select.select([terminal], [], [], 0.5)[0]:
                if plain(unanswered).endswith(PROMPT):
                    os.write(terminal, (left.pop(0) if left else CTRL_D).encode())
                    unanswered = ""
                continue
            try:
                data = os.read(terminal, 65536)
            except OSError:  # how Linux reports that the command has closed its terminal
                data = b""
            if not data:
                break
            events.append((time.monotonic() - started, decoder.decode(data)))
            unanswered += events[-1][1]
    finally:
        os.close(terminal)
    return events, process.wait()


def lines_shown(events: Events) -> list[tuple[float, str, bool]]:
    """Lines as (seconds at which each began, its text with colours, whether it was overwritten)."""
    lines, line, began, sampled = [], "", 0.0, -1.0
    for seconds, text in events:
        for number, part in enumerate(text.split("\n")):
            if number:
                lines.append((began, _current(line), False))
                line = ""
            began = began if line else seconds
            *erased, line = re.split(r"\r +\r", line + part)
            began = seconds if erased else began
        if "\r" in line.strip("\r") and seconds >= sampled + 1:
            lines.append((seconds, _current(line), True))
            sampled = seconds
    return [*lines, (began, _current(line), False)] if plain(line).strip() else lines


def _current(line: str) -> str:
    """What is visible of a line: the text after its last carriage return."""
    return line.rstrip("\r").rpartition("\r")[2].rstrip(" ")


def plain(text: str) -> str:
    """Text without escape sequences."""
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)


def as_text(title: str, events: Events, columns: int) -> str:
    rows = [title]
    for seconds, line, _ in lines_shown(events):
        text = plain(line)
        first, *others = [text[i : i + columns] for i in range(0, max(1, len(text)), columns)]
        rows += [f"{seconds:7.1f} s  {first}".rstrip(), *(" " * 11 + part for part in others)]
    return "\n".join(rows) + "\n"


def as_svg(title: str, events: Events, columns: int) -> str:
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    for _, line, overwritten in [(0.0, title, False), *lines_shown(events)]:
        if not overwritten:
            text = Text.from_ansi(line)
            for row in text.divide(range(columns, len(text), columns)):
                console.print(row, no_wrap=True)
    return console.export_svg(title="mtpkern")


def _record(args: argparse.Namespace) -> int:
    with ExitStack() as claimed:
        places = [claimed.enter_context(output_file(f, force=args.force)) for f in args.out]
        events, code = record(args.command, args.columns, args.type)
        title = f"$ {shlex.join(args.command)}"
        for place, file in zip(places, args.out, strict=True):
            render = as_svg if file.suffix == ".svg" else as_text
            with writing(file):
                place.write_text(render(title, events, args.columns), encoding="utf-8")
    return code


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        description="Record a command on a terminal of its own, as it looks.",
        epilog="example:\n  python benchmarks/record_terminal.py --out chat.txt chat.svg "
        '--type "Why is the sky blue?" -- mtpkern chat',
    )
    add = parser.add_argument
    add("--out", type=Path, nargs="+", required=True, metavar="FILE", help="texts and .svg files")
    add("--columns", type=at_least(20), default=100, metavar="N", help="width of the terminal")
    add(
        "--type",
        action="append",
        default=[],
        metavar="LINE",
        help="typed at the next prompt; may be repeated, and Ctrl-D follows the last",
    )
    add("--force", action="store_true", help=FORCE)
    add("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    parser.set_defaults(run=_record)
    return run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
