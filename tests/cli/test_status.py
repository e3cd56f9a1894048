"""Status: a bar on a terminal, few lines elsewhere, nothing when quiet, and a clean line after."""

import argparse
import io
import logging
import os
import re
import struct
import subprocess
import sys
import time

import pytest

from mtpkern import cli, status
from mtpkern.arguments import Parser, run
from mtpkern.status import Status


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that a reader sees: what a carriage return has overwritten is gone."""
        lines = []
        for line in self.getvalue().split("\n"):
            cells: list[str] = []
            for piece in line.split("\r"):
                cells[: len(piece)] = piece
            lines.append("".join(cells).rstrip())
        return lines


@pytest.fixture(autouse=True)
def a_usual_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def test_a_short_phase_shows_nothing():
    for stream in (io.StringIO(), Terminal()):
        with Status(stream, delay=60).phase("loading"):
            pass
        assert stream.getvalue() == ""


def test_a_file_gets_a_line_at_the_start_and_one_with_the_duration():
    stream = io.StringIO()
    with Status(stream, delay=0.01).phase("loading", total=3, unit="layers") as phase:
        wait_for(stream.getvalue)
        phase.advance(3)
        time.sleep(0.1)
    first, last = stream.getvalue().splitlines()
    assert first == "loading ..."
    assert last.startswith("loading: 3/3 layers, 0.") and last.endswith(" s")


def test_a_file_gets_a_line_now_and_then_in_between(monkeypatch):
    monkeypatch.setattr(status, "REPEATED_AFTER", 0.1)
    stream = io.StringIO()
    with Status(stream, delay=0.01).phase("loading", total=8) as phase:
        phase.advance(2, "beta")
        wait_for(
            lambda: stream.getvalue().count("loading: 2/8, beta, 0 s so far, 00:00 left\n") == 2
        )
    assert len(stream.getvalue().splitlines()) == 4


def test_a_terminal_gets_a_bar_that_leaves_a_clean_line():
    stream = Terminal()
    with Status(stream, delay=0.01).phase("loading", total=4, unit="layers") as phase:
        phase.advance(2, "{a note}")
        wait_for(lambda: "2/4 layers, {a note}, 00:00<00:00" in stream.getvalue())
        assert "loading:  50%|" in stream.screen()[-1]
    assert stream.screen() == [""]
    assert "\x1b" not in stream.getvalue(), "no colours, no hidden cursor"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("columns", "bar"), [(70, True), (50, False)])
def test_on_a_narrow_terminal_the_bar_gives_way_to_the_numbers(columns, bar):
    import fcntl
    import termios

    terminal, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    seen = Terminal()
    with open(theirs, "w", encoding="utf-8") as stream, open(terminal, "rb", 0) as reader:
        shown = Status(stream, delay=0.01)
        with shown.phase("measuring a few things"), shown.phase("loading", 30, "layers") as phase:
            phase.advance(15, "a note")

            def numbers_are_shown():
                seen.write(reader.read(4096).decode(errors="replace"))
                return seen.screen()[-1].endswith(" 15/30 layers, a note, 00:00<00:00")

            wait_for(numbers_are_shown)
            line = seen.screen()[-1]
    assert line.startswith("loading:  50%") and len(line) < columns and ("|" in line) == bar


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("total", "shown"),
    [
        (None, r"compiling the [a-z ]+\.\.\.: 0\d:\d\d"),
        (92_900_000, r"compiling the [a-z ]+\.\.\.:  50%, 00:0\d<00:0\d"),
    ],
)
def test_on_a_terminal_of_40_columns_a_long_name_hides_neither_time_nor_percentage(total, shown):
    import fcntl
    import termios

    terminal, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    seen = Terminal()
    with open(theirs, "w", encoding="utf-8") as stream, open(terminal, "rb", 0) as reader:
        what = "compiling the kernels for this machine's CPU"
        with Status(stream, delay=0.01).phase(what, total, "B" if total else "") as phase:
            phase.advance(46_450_000 if total else 0)

            def time_is_shown():
                seen.write(reader.read(4096).decode(errors="replace"))
                return re.search(r"\d\d:\d\d", seen.screen()[-1])

            wait_for(time_is_shown)
    assert re.fullmatch(shown, seen.screen()[-1]) and len(seen.screen()[-1]) < 40


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Status(stream, delay=0.01).phase("loading"):
        wait_for(stream.getvalue)
    assert "\r" not in stream.getvalue() and stream.getvalue().startswith("loading ...\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_a_clean_line(error):
    stream = Terminal()
    shown = Status(stream, delay=0.01)
    with pytest.raises(error):
        with shown.phase("loading", total=4), shown.phase("reading"):
            wait_for(lambda: "reading" in stream.getvalue())
            raise error
    assert stream.screen() == [""]
    before = stream.getvalue()
    time.sleep(0.5)
    assert stream.getvalue() == before, "nothing draws any more"


def test_the_innermost_phase_is_the_one_on_the_line():
    stream = Terminal()
    shown = Status(stream, delay=0.01)
    with shown.phase("outer"):
        wait_for(lambda: "outer" in stream.screen()[-1])
        with shown.phase("inner"):
            wait_for(lambda: "outer: inner: 00:0" in stream.screen()[-1])
        wait_for(lambda: "outer: 00:0" in stream.screen()[-1])
    assert stream.screen() == [""]


def test_a_file_gets_no_lines_of_phases_within_others_unless_they_last():
    stream = io.StringIO()
    shown = Status(stream, delay=0.01)
    with shown.phase("measuring", total=2) as phase:
        wait_for(stream.getvalue)
        for _ in range(2):
            with shown.phase("answering"):
                time.sleep(0.3)
            phase.advance()
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "measuring ...",
        "measuring: 2/2",
    ]


def test_quiet_is_quiet():
    stream = Terminal()
    shown = Status(stream, quiet=True, delay=0.0)
    with shown.phase("loading", total=1) as phase:
        phase.advance()
        shown.say("a line")
        time.sleep(0.3)
    assert stream.getvalue() == ""


def test_a_line_stays_above_the_bar():
    stream = Terminal()
    shown = Status(stream, delay=0.01)
    with shown.phase("loading"):
        wait_for(stream.getvalue)
        shown.say("a line")
        wait_for(lambda: "loading" in stream.screen()[-1])
    assert stream.screen() == ["a line", ""]


def command(*argv: str) -> argparse.Namespace:
    """What a command with a subcommand makes of its arguments."""
    seen = []

    def note(args):
        logging.getLogger("mtpkern.somewhere").debug("a detail")
        seen.append(args)
        return 0

    parser = Parser(prog="tool")
    parser.add_subparsers().add_parser("work").set_defaults(run=note)
    assert run(parser, argv) == 0
    return seen[0]


@pytest.mark.parametrize("before", [True, False])
def test_every_command_has_quiet_and_verbose(capsys, before):
    def with_flag(flag):
        return command(*((flag, "work") if before else ("work", flag)))

    assert with_flag("--quiet").status.quiet and not command("work").status.quiet
    assert capsys.readouterr().err == ""
    with_flag("--verbose")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("mtpkern.somewhere: a detail")
    assert logging.getLogger("mtpkern").handlers == logging.getLogger("mtpkern").handlers[:1]


def test_colours_are_for_terminals_whose_reader_has_not_declined_them(monkeypatch):
    assert status.coloured(Terminal()) and not status.coloured(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert status.steerable(Terminal()) and not status.coloured(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not status.coloured(Terminal())


def test_it_imports_no_torch():
    code = "import sys, mtpkern.status, mtpkern.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_messages_are_wrapped_on_a_terminal_and_plain_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    arguments = ["generate", "the", "--model", "no-such-organisation-or-directory-of-models"]
    errors = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main(arguments) == 2
        status.Status(stream).say("a note on the model, longer than the width of the terminal")
        errors[stream.isatty()] = stream.getvalue().splitlines()
    assert len(errors[False]) == 2 and len(errors[True]) > 4
    # A name of 43 characters is not broken.
    assert sorted(map(len, errors[True]))[-2] <= 40
    assert " ".join(" ".join(errors[True]).split()) == " ".join(errors[False])
