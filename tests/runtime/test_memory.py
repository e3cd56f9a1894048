"""A model that cannot fit into memory is refused before anything of it is read."""

import errno
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import refusing, tiny_checkpoint

from mtpkern import LLM, UserError, cli, memory
from mtpkern.checkpoints.llama import check_checkpoint
from mtpkern.config import resolve_dtype
from mtpkern.kernels.cpu.weights import Weights
from mtpkern.model import Llama
from mtpkern.ops.cpu import CpuOps
from mtpkern.train.teacher import Teacher

# Without padding, so that what is needed is known exactly.
SIZES = {"hidden_size": 96, "intermediate_size": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, **SIZES)


def needed(model: Path, dtype: str = "auto", weights: str | None = None) -> int:
    config, entries = check_checkpoint(model)
    as_run = resolve_dtype(dtype, config)
    return memory.weight_bytes(config, entries, dtype=as_run, weights=weights, packed=True)


def resident(llm: LLM) -> int:
    """Bytes of all packed matrices of a model."""
    trunk, found = llm.trunk, {}

    def visit(value: Any) -> None:
        if isinstance(value, Weights):
            found[id(value.data)] = value.data.nbytes
        elif isinstance(value, tuple):
            for part in value:
                visit(part)

    visit((trunk.embedding, trunk.layers, trunk.vocabulary))
    return sum(found.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [("auto", "auto"), ("float32", "auto"), ("auto", "q4_1"), ("auto", "q8"), ("auto", "bf16")],
)
def test_what_weights_take_is_known_before_they_are_read(
    tmp_path: Path, tied: bool, dtype: str, weights: str
) -> None:
    model = tiny_checkpoint(tmp_path, tie_word_embeddings=tied, **SIZES)
    llm = LLM(model, dtype=dtype, weights=weights, max_batch=1)
    format = None if dtype != "auto" and weights == "auto" else weights
    assert needed(model, dtype, format) == resident(llm)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was begun: nothing may be compiled or loaded."""
    begun: list[str] = []
    monkeypatch.setattr(CpuOps, "compile", refusing(begun, "compiled"))
    monkeypatch.setattr(Llama, "load", refusing(begun, "loaded"))
    return begun


def leave_free(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: size)


@pytest.mark.parametrize("command", ["generate the-fox", "chat"])
def test_a_model_that_does_not_fit_is_refused_in_one_line(
    model: Path,
    command: str,
    unread: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    need = needed(model)
    leave_free(monkeypatch, need - 1)
    assert cli.main([*command.split(), "--model", str(model)]) == 2
    size = f"{need / 1e6:.1f} MB"
    assert capsys.readouterr().err == (
        f"mtpkern: error: {model.name} does not fit into memory: it needs {size} for its weights, "
        f"and {size} is free: give --weights=q8_0, or take a smaller model\n"
    )
    leave_free(monkeypatch, 10)
    assert cli.main([*command.split(), "--model", str(model)]) == 2
    assert capsys.readouterr().err.endswith("0.0 MB is free: take a smaller model\n")
    assert unread == []


@pytest.mark.parametrize("free", [0, None])
def test_what_may_fit_is_not_refused(
    model: Path, free: int | None, unread: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly as much as is needed, or a system that does not say how much is free."""
    leave_free(monkeypatch, None if free is None else needed(model))
    with pytest.raises(UserError, match="compiled"):
        LLM(model, max_length=256, max_batch=4096)


def test_what_is_recommended_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_free(monkeypatch, needed(model, weights="q4_1"))
    with pytest.raises(memory.OutOfMemory, match="give weights=q4_1, or take a smaller model"):
        LLM(model)
    LLM(model, weights="q4_1").close()
    leave_free(monkeypatch, needed(model))
    with pytest.raises(memory.OutOfMemory, match="give dtype=bfloat16, or take a smaller model"):
        LLM(model, dtype="float32")
    LLM(model, dtype="bfloat16").close()


def test_training_refuses_it_too(
    model: Path, unread: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, needed(model, weights="auto") - 1)
    with pytest.raises(memory.OutOfMemory, match="is free: take a smaller model"):
        Teacher(model, 64)
    assert unread == []


def test_inspect_describes_it_and_does_not_time_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_free(monkeypatch, 10)
    assert cli.main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    assert f"\nplain step       not measured: {model.name} does not fit into memory" in out
    assert "\nparameters " in out and "\nwindow" not in out


def test_a_gpu_has_room_for_the_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda: 5 * 10**9)
    cuda = torch.device("cuda")
    memory.check_fit("m", 3 * 10**9, cuda, cache=2 * 10**9)
    with pytest.raises(memory.OutOfMemory) as raised:
        memory.check_fit("m", 3 * 10**9, cuda, cache=4 * 10**9, lower="max_length")
    assert str(raised.value) == (
        "m does not fit into GPU memory: it needs 3.0 GB for its weights and 4.0 GB for the cache, "
        "and 5.0 GB is free: lower max_length"
    )
    with pytest.raises(memory.OutOfMemory, match="is free: take a smaller model"):
        memory.check_fit("m", 6 * 10**9, cuda, cache=4 * 10**9)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate"),
    ],
)
def test_an_allocation_refused_while_loading_is_one_line(
    model: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(Llama, "load", refuse)
    with pytest.raises(memory.OutOfMemory, match="no memory for the model .*: lower max_length"):
        LLM(model)
    monkeypatch.setattr(Llama, "load", lambda *a, **b: [].pop())
    with pytest.raises(IndexError):
        LLM(model)


MEMINFO = "MemTotal: 900 kB\nMemAvailable: 500 kB\nSwapFree: 100 kB\n"
STAT = "active_file 1024\ninactive_file 2048\nslab_reclaimable 1024\nanon 9\n"


def machine(root: Path, groups: str, **files: str) -> int | None:
    """What is free where these files are below a root; __ stands for a slash."""
    for name, text in {"proc__meminfo": MEMINFO, "proc__self__cgroup": groups, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return memory.host_memory(root)


def test_free_memory_counts_swap_and_the_limits_of_control_groups(tmp_path: Path) -> None:
    kb = 1024
    assert memory.host_memory(tmp_path / "nowhere") is None
    assert machine(tmp_path / "none", "") == 600 * kb
    group = "sys__fs__cgroup__"
    free = {group + "memory.max": "max", group + "memory.current": "7"}
    assert machine(tmp_path / "free", "0::/a/b\n", **free) == 600 * kb
    # An ancestor's limit counts; file cache can be dropped, and swap is free.
    limited = {
        group + "a__memory.max": f"{300 * kb}\n",
        group + "a__memory.current": f"{200 * kb}\n",
        group + "a__memory.stat": STAT,
        group + "a__b__memory.max": "max\n",
    }
    assert machine(tmp_path / "v2", "0::/a/b\n", **limited) == 204 * kb
    no_swap = {group + "a__memory.swap.max": "0\n", group + "a__memory.swap.current": "0\n"}
    assert machine(tmp_path / "swap", "0::/a/b\n", **limited, **no_swap) == 104 * kb
    # In a container a group's path may be the host's.
    inside = {name.replace("a__memory", "memory"): text for name, text in limited.items()}
    assert machine(tmp_path / "inside", "0::/docker/1\n", **inside) == 204 * kb
    older = {
        group + "memory__a__memory.limit_in_bytes": f"{300 * kb}",
        group + "memory__a__memory.usage_in_bytes": f"{250 * kb}",
        group + "memory__a__memory.stat": "total_active_file 0\ntotal_inactive_file 1024\n",
        group + "memory__memory.limit_in_bytes": str(2**63 - 4096),
    }
    assert machine(tmp_path / "v1", "8:pids:/\n4:cpu,memory:/a\n", **older) == 151 * kb
