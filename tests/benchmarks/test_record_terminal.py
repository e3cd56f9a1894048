"""record_terminal: what a command shows on a terminal, with the times, as text and as a picture."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

# A bar that is redrawn and erased, a question, a colour, a long line, and the terminal's width.
PROGRAM = """
import shutil, sys, time
for i in range(3):
    print(f"\\rworking {i}", end="", flush=True)
    time.sleep(0.2)
print("\\r         \\r", end="")
name = input("> ")
print(f"hello \\x1b[32m{name}\\x1b[0m", sys.stdout.isatty(), shutil.get_terminal_size().columns)
print("x" * 50)
sys.exit(7)
"""


@pytest.fixture
def record_terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import record_terminal

    return record_terminal


def test_a_recording_shows_lines_with_their_times_as_on_a_terminal(
    record_terminal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    out, program = tmp_path / "a recording.txt", tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ["--columns", "40", "--type", "Ada", "--out", str(out), "--"]
    assert record_terminal.main([*options, sys.executable, str(program)]) == 7
    title, *rows = out.read_text().splitlines()
    assert title == f"$ {sys.executable} {program}"
    rows = [row for row in rows if "working" not in row]
    assert [row[11:] for row in rows] == ["> Ada", "hello Ada True 40", "x" * 40, "x" * 10]
    assert float(rows[0][:7]) <= float(rows[1][:7]) and rows[1][7:11] == " s  "
    assert record_terminal.main([*options, "true"]) == 2, "an earlier recording is kept"
    assert out.read_text().startswith(title)


def test_a_bar_is_shown_once_per_second_and_not_in_the_picture(
    record_terminal: Any,
) -> None:
    events = [(0.5, "\rbar 1"), (1.0, "\rbar 2"), (1.2, "\rbar 3"), (2.1, "\rbar 4")]
    events += [(2.2, "\r     \r"), (2.5, "\x1b[32mdone\x1b[0m in"), (4.0, " time\r\n")]
    shown = record_terminal.lines_shown(events)
    assert shown[:-1] == [(1.0, "bar 2", True), (2.1, "bar 4", True)]
    (_, line, overwritten) = shown[-1]
    assert (record_terminal.plain(line), overwritten) == ("done in time", False)
    picture = record_terminal.as_svg("$ tool", events, 40).replace("&#160;", " ")
    assert picture.startswith("<svg") and "done" in picture and "bar" not in picture


# With line editing the prompt comes in pieces, perhaps between escape sequences.
ASKING = """
import sys, time
for _ in range(3):
    for piece in ("\\x1b[?2004h", ">", " ", "\\x1b[0m"):
        print(piece, end="", flush=True)
        time.sleep(0.1)
    print("heard", repr(sys.stdin.readline()))
"""


def test_each_prompt_gets_the_next_answer_and_then_the_end_of_input(
    record_terminal: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", ASKING]
    events, code = record_terminal.record(command, 40, ["one", "two"])
    shown = [record_terminal.plain(line) for _, line, _ in record_terminal.lines_shown(events)]
    assert code == 0
    assert [line for line in shown if "heard" in line] == [
        r"heard 'one\n'",
        r"heard 'two\n'",
        "> heard ''",
    ]


def test_the_picture_breaks_lines_where_the_terminal_does(record_terminal: Any) -> None:
    events = [(0.5, "eleven \x1b[32mletters\x1b[0m, thenceforth\r\n")]
    picture = record_terminal.as_svg("$ tool", events, 20).replace("&#160;", " ")
    texts = re.findall(r"<text class=[^>]*-r\d[^>]*>([^<]*)</text>", picture)
    assert [text.rstrip() for text in texts if text.strip()] == [
        "$ tool",
        "eleven",
        "letters",
        ", then",
        "ceforth",
    ]


def test_a_line_begins_when_the_bar_before_it_was_erased(record_terminal: Any) -> None:
    events = [(1.0, "\rbar 1"), (5.0, "\r     "), (5.2, "\rdone\n")]
    assert record_terminal.lines_shown(events)[-1] == (5.2, "done", False)


def test_a_command_that_does_not_exist_is_one_line(
    record_terminal: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record_terminal.main(["--out", str(tmp_path / "a.txt"), "--", "/no/such/tool"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/no/such/tool: No such file" in line
    assert not list(tmp_path.iterdir())
