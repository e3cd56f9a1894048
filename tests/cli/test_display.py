"""What commands print fits a terminal, with one token in the singular."""

import io
import sys
from typing import Any

import pytest

from mtpkern import Stats
from mtpkern.cli.display import print_table, summary, wrapped


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROWS = [("cpu", "a name of some length, and what it runs with"), ("path", "/" + "x" * 60)]


def test_a_table_is_wrapped_on_a_terminal_and_has_a_line_per_row_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "42")
    print_table(iter(ROWS))
    assert capsys.readouterr().out.splitlines() == [f"{name:<16} {text}" for name, text in ROWS]
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_table(iter(ROWS))
    *lines, last = terminal.getvalue().splitlines()
    assert all(len(line) <= 42 for line in lines)
    assert lines[0] == "cpu              a name of some length," and lines[1].startswith(" " * 17)
    assert last.strip() == ROWS[1][1], "what has no spaces is not broken"


def test_only_a_terminal_has_its_lines_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    line = "one word after another " * 4
    assert wrapped(line, io.StringIO()) == line
    assert max(map(len, wrapped(line, Terminal(), indent=2).splitlines())) <= 40


def test_a_summary_counts_in_the_singular_too() -> None:
    one = summary(Stats(1, prompt_tokens=1, new_tokens=1, steps=1, steps_by_k={1: 1}))
    assert "1 token in 1 step, 1.00 per step" in one and "prompt of 1 token," in one
    chosen = {0: 1, 2: 3}
    several = summary(Stats(2, prompt_tokens=3, new_tokens=9, steps=4, steps_by_k=chosen), 0.5)
    assert "9 tokens in 4 steps" in several and "K chosen: 0 in 1 step, 2 in 3\n" in several
    assert several.endswith("loaded in 0.5 s")


def test_a_summary_leaves_out_positions_at_which_nothing_was_drafted() -> None:
    stats = Stats(4, prompt_tokens=3)
    for k, accepted in ((0, 0), (2, 1), (1, 0)):
        stats.count_step(k, "heads", k, accepted, accepted + 1)
    assert "accepted by position: 0.50 0.00; K chosen" in summary(stats)
