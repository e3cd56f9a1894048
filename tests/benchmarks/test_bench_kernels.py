"""bench_kernels: its check, its arithmetic and its last line, on small shapes at a fixed time."""

import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from traffic import recorded_traffic

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = dict(E=48, F=112, Hq=4, Hk=2, D=16, V=307, L=3)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; every call is made once and takes 2 ms."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_kernels
    import kernel_cases.layers
    from model_shapes import ModelShape

    def two(calls: Any, repeat: int) -> float:
        for call in calls:
            call()
        return 2.0

    bench_kernels.measured = bench_kernels.milliseconds
    monkeypatch.setattr(bench_kernels, "milliseconds", two)
    monkeypatch.setattr(bench_kernels, "PROBE_BYTES", 2**18)
    monkeypatch.setattr(bench_kernels, "MAX_SETS", 2)
    monkeypatch.setattr(kernel_cases.layers, "CONTEXTS", (512,))
    monkeypatch.setitem(bench_kernels.MODELS, "tiny", ModelShape(**TINY))
    monkeypatch.setitem(bench_kernels.MODELS, "tiny qk", ModelShape(**TINY, qk_norm=True))
    return bench_kernels


def test_a_missing_gpu_is_reported_in_one_line(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "GPU" in captured.err


def test_every_op_is_checked_and_reported(
    bench: ModuleType, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--model", "tiny", "--model", "tiny qk", "--rows", "5"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert {row["op"] for row in report["rows"]} == set(bench.OPS)
    for row in report["rows"]:
        assert row["ratio"] == 1 and row["max_error"] >= 0
        peak = max(report["environment"]["copy_gbps"], report["environment"]["read_gbps"])
        assert row["percent_of_peak"] == pytest.approx(100 * row["gbps"] / peak)


@pytest.mark.parametrize("wrong", [1.0, float("nan"), None])
def test_a_wrong_row_is_named_and_has_no_speed_and_the_others_keep_theirs(
    bench: ModuleType,
    gpu: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: float | None,
) -> None:
    """Wrong values, or none (None), in the first and the last op of three."""
    from common import rows_printed

    def launched(call: Any, pdl: bool) -> Any:
        if wrong is None:
            raise RuntimeError("out of resources\nshared memory")
        return call.launch(pdl) + wrong

    def spoiled(model: Any, B: int, T: int) -> Any:
        for case in bench.OPS["linear"](model, B, T):
            call = case.inputs("cuda")
            changed = call._replace(launch=partial(launched, call))
            yield case._replace(inputs=lambda device, changed=changed: changed)

    linear = bench.OPS["linear"]
    monkeypatch.setattr(bench, "OPS", {"first": spoiled, "linear": linear, "last": spoiled})
    assert bench.main(["--model", "tiny", "--rows", "5"]) == 1
    printed = capsys.readouterr().out
    assert "RED: tiny first o" in printed and "RED: tiny linear" not in printed
    report = json.loads(printed.splitlines()[-1])
    assert [(row["op"], row["case"]) for row in report["rows"]] == [
        ("linear", "o"),
        ("linear", "down"),
    ]
    assert report["rows"] == rows_printed(printed)
    reason = "shared memory" if wrong is None else "error "
    for red, op in zip(report["red"], ["first", "first", "last", "last"], strict=True):
        assert red.startswith(f"tiny {op} ") and f": {reason}" in red


def test_a_row_is_printed_before_the_next_is_checked(
    bench: ModuleType,
    gpu: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from common import rows_printed

    check, checked = bench.check, []

    def one_check(case: Any, pdl: bool) -> tuple[float, float]:
        checked.append(case.name)
        if len(checked) == 2:
            raise KeyboardInterrupt
        return check(case, pdl)

    monkeypatch.setattr(bench, "check", one_check)
    bench.main(["--model", "tiny", "--op", "linear", "--rows", "5"])
    rows = rows_printed(capsys.readouterr().out)
    assert checked == ["o", "down"] and [row["case"] for row in rows] == ["o"]


def test_the_host_waits_only_after_it_has_enqueued_every_timed_step(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common import gpu_milliseconds

    done = []

    class Event:
        def __init__(self, enable_timing: bool):
            pass

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert gpu_milliseconds(lambda: done.append("step"), 3) == [2.0] * 3
    assert done == ["step"] * 2 + ["record", "step"] * 3 + ["record", "wait"]


def test_inputs_are_ready_before_another_stream_reads_them(bench: Any) -> None:
    pretend_gpu = pytest.importorskip("pretend_gpu").pretend_gpu
    streams = []
    with pretend_gpu() as gpu:
        bench.measured([lambda: streams.append(gpu.current)], 2)
        assert streams and all(gpu.default in stream.waited_for for stream in streams)


@pytest.mark.parametrize("pdl", [False, True])
def test_what_is_timed_is_what_was_checked(bench: Any, pdl: bool) -> None:
    launched = []

    def launch(pdl: bool) -> torch.Tensor:
        launched.append(pdl)
        return torch.zeros(1)

    zero = partial(torch.zeros, 1)
    call = bench.Call(launch, zero, zero, zero)
    case = bench.KernelCase("", "", 1 << 30, lambda device: call)
    bench.check(case, pdl)
    bench.launch(call, pdl)()
    assert launched == [pdl, pdl]


def test_the_bandwidth_probe_reads_every_number(bench: ModuleType, gpu: str) -> None:
    x = torch.arange(65536 // 4, device=gpu, dtype=torch.float32)
    out = torch.empty(1, device=gpu)
    bench.read(x, out)
    torch.testing.assert_close(out.double().cpu(), x.double().sum()[None].cpu())


@pytest.mark.parametrize("model", ["tiny", "tiny qk"])
def test_gbps_counts_the_bytes_that_the_kernel_touches(
    bench: ModuleType, gpu: str, model: str
) -> None:
    for op, cases in bench.OPS.items():
        for case in cases(bench.MODELS[model], 2, 5):
            call = case.inputs(gpu)
            with recorded_traffic() as traffic:
                call.launch(False)
            least = case.bytes_moved - case.bytes_varying
            touched, label = traffic.bytes_touched(), f"{op} {case.name} {case.shape}"
            assert least <= touched <= case.bytes_moved, label
