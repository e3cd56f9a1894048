"""Threads: as many as there are physical cores that the process may use, unless told otherwise."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from head_files import write_mtp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtpkern import threads
from mtpkern.config import SamplingParams
from mtpkern.engine import LLM
from mtpkern.errors import UserError
from mtpkern.threads import physical_cores, use_threads


@pytest.fixture(autouse=True)
def kept() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight CPUs, two to a core: 0 and 4, 1 and 5, ..., without a quota."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def test_two_threads_of_one_core_count_once(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert physical_cores() == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 6}, raising=False)
    assert physical_cores() == 2


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("250000 100000", 3), ("x", 4)])
def test_a_container_has_as_many_cores_as_its_quota(machine: Path, quota: str, cores: int) -> None:
    (machine / "cpu.max").write_text(quota + "\n")
    assert physical_cores() == cores


def test_a_system_that_lists_no_cores_counts_its_cpus(machine: Path) -> None:
    for file in machine.glob("*/topology/*"):
        file.unlink()
    assert physical_cores() == 8


def test_threads_are_what_was_asked_for_and_else_no_more_than_cores(machine: Path) -> None:
    assert use_threads(3) == torch.get_num_threads() == 3
    assert use_threads(None) == 3, "fewer than cores are kept"
    torch.set_num_threads(7)
    assert use_threads(None) == torch.get_num_threads() == 4
    with pytest.raises(UserError, match=r"threads must be an integer in 1\.\.1024, got 0"):
        use_threads(0)


def test_a_prompt_wakes_none_of_torch_s_threads(tmp_path: Path) -> None:
    """They would spin beside the kernels' for milliseconds: no operation of torch is large."""
    trunk, heads = tiny_checkpoint(tmp_path / "trunk"), write_mtp(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, max_length=512)
    large: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            computed = isinstance(out, Tensor) and not func.is_view
            if computed and "empty" not in func.name() and out.numel() >= 128 * 48:
                large.append(func.name())
            return out

    with Watch():
        llm.generate([[5 + i % 50 for i in range(300)]], SamplingParams(max_tokens=2))
    assert not large  # of 128 rows, a chunk of the prompt
