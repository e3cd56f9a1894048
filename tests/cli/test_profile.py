"""mtpkern profile: the exact command is printed, and run where the profiler is."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from mtpkern import cli, nvtx_ranges
from mtpkern.cli.main import build_parser
from mtpkern.cli.profile import profiler_command


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_the_command_is_printed_and_run(
    tool: str, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    fake = tmp_path / tool
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    code = cli.main(["profile", "-o", "my report", tool, "a prompt", "--max-tokens", "9"])
    printed, *received = capfd.readouterr().out.splitlines()
    command = shlex.split(printed)
    assert (code, command[0], command[1:]) == (7, tool, received)
    begin = command.index(sys.executable)
    assert command[begin + 1 : begin + 5] == ["-m", "mtpkern", "generate", "--cuda-profile"]
    assert command[-3:] == ["a prompt", "--max-tokens", "9"]
    assert any("my report" in part for part in command)
    assert ("--no-graph" in command) == (tool == "ncu")


def test_a_profiler_that_is_not_there_is_named(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("PATH", "")
    assert cli.main(["profile", "nsys"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("nsys profile ") and "nsys is not installed here" in err


def test_the_generate_command_takes_what_is_passed_on() -> None:
    command = profiler_command("ncu", ["x"], "out")
    arguments = command[command.index("mtpkern") + 1 :]
    assert build_parser().parse_args(arguments).no_graph


def test_a_range_is_balanced_and_free_without_a_profiler(monkeypatch: Any) -> None:
    monkeypatch.setattr(nvtx_ranges, "nvtx", None)
    with nvtx_ranges.span("step"), nvtx_ranges.span("step"):
        pass
    calls: list[str] = []

    class Domain:
        def get_event_attributes(self, message: str) -> str:
            return message

        def push_range(self, attributes: str) -> None:
            calls.append(f"push {attributes}")

        def pop_range(self) -> None:
            calls.append("pop")

    class Fake:
        @staticmethod
        def get_domain(name: str) -> Domain:
            assert name == "mtpkern"
            return Domain()

    monkeypatch.setattr(nvtx_ranges, "nvtx", Fake)
    step = nvtx_ranges.span("step")
    with pytest.raises(KeyError), step:
        raise KeyError
    with step:
        pass
    assert calls == ["push step", "pop"] * 2
