"""A whole step on the CPU: against the definitions, bit for bit, among threads and processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_machine import as_floats, floats, program, same_bits
from cpu_model import (
    BATCH,
    EPS,
    HK,
    LAYERS,
    POSITIONS,
    D,
    E,
    Model,
    V,
    decoded,
    normal,
    sequence,
    tensors,
)
from paged import make_paged

from mtpkern.kernels.cpu._compile import Kernels, host_target
from mtpkern.kernels.cpu._threads import AVERAGED, PENALTY, Helpers
from mtpkern.kernels.cpu.weights import pack
from mtpkern.kernels.gate_up_silu import gate_up_silu_ref
from mtpkern.kernels.linear import linear_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache_ref
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.kernels.verify_attention import verify_attention_ref

ROOT = Path(__file__).resolve().parents[2]


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(same_bits(a[name], b[name]) for name in a)


def test_layers_are_the_definitions():
    model, ids = Model("fp32"), sequence(9)
    out = model.run(ids[None], [0])
    paged = make_paged(1, POSITIONS // 64, 64, HK, D, torch.float32)
    embedding = normal(V, E, seed=99)
    x, placed = embedding[ids], paged.placed([0], 9)
    for index in range(LAYERS):
        w = tensors(index)
        k, v = paged.k[0], paged.v[0]
        q = qkv_rope_cache_ref(x, w["in"], EPS, w["qkv"], k, v, *placed)
        attended = verify_attention_ref(q[None], k, v, paged.page_table, torch.tensor([0]))
        x = linear_ref(attended.view(9, -1), w["o"], residual=x)
        gated = gate_up_silu_ref(x, w["post"], EPS, w["gate_up"])
        x = linear_ref(gated, w["down"], residual=x)
        if index < 2:
            torch.testing.assert_close(
                torch.from_numpy(out[f"tap {index}"]), x, atol=1e-5, rtol=1e-5
            )
    logits = linear_ref(rms_norm_ref(x, torch.ones(E), EPS), embedding)
    torch.testing.assert_close(torch.from_numpy(out["hidden"]), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(out["logits"][:, :V]), logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0", "q8", "bf16", "fp32"])
def test_windows_of_any_width_give_the_same_bits(format, dtype):
    ids = sequence()
    one = decoded(Model(format, dtype=dtype), ids, 1)
    assert np.isfinite(one["logits"]).all()
    for width in (2, 3, 5, 8, 20):
        assert equal(decoded(Model(format, dtype=dtype), ids, width), one)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    ids = sequence()
    expected = decoded(Model(), ids, 5)
    for _ in range(5):
        assert equal(decoded(Model(threads=threads), ids, 5), expected)


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch():
    ids = np.stack([sequence(seed=seed) for seed in range(BATCH)])
    model = Model(batch=BATCH)
    together = [model.run(ids[:, start : start + 5], [start] * BATCH) for start in range(0, 40, 5)]
    for b in range(BATCH):
        alone = decoded(Model(), ids[b], 5)
        for start, step in zip(range(0, 40, 5), together, strict=True):
            for name, value in step.items():
                assert same_bits(value[5 * b : 5 * b + 5], alone[name][start : start + 5]), name


def test_rejected_rows_leave_no_trace():
    ids = sequence()
    expected = decoded(Model(), ids, 1)
    model = Model()
    for position in range(32):
        window = np.concatenate([ids[position : position + 1], sequence(7, seed=position)])
        out = model.run(window[None], [position])
        assert same_bits(out["logits"][:1], expected["logits"][position : position + 1])


def test_a_callers_floating_point_mode_neither_matters_nor_changes():
    """Denormals times one: a caller that flushes them to zero gets them all the same."""
    p = program(2, threads=2)
    x, out = p.buffer(32), p.buffer(512)
    x[:] = 1e-40
    p.linear(x, pack(floats(torch.ones(512, 32))), out)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        p.run(2)
        kept = float(torch.tensor(1e-38) * 0.01)
    finally:
        torch.set_flush_denormal(False)
    assert (np.abs(out - 32e-40) < 1e-43).all()
    assert kept == 0.0, "the caller's mode was not restored"


def test_callers_may_run_at_the_same_time():
    """Four programs share two helpers, none waits for them, all get their bits."""
    ids = [sequence(seed=seed) for seed in range(4)]
    expected = [decoded(Model(), some, 4) for some in ids]
    models = [Model(threads=3) for _ in ids]
    found: list[bool] = []

    def call(index: int) -> None:
        for _ in range(10):
            found.append(equal(decoded(models[index], ids[index], 4), expected[index]))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [True] * 40


def test_a_late_helper_harms_no_later_step():
    """A helper is held back, and let go in the middle of later steps."""

    class Late(Helpers):
        """Calls helpers for a step only when some later one runs."""

        def __init__(self) -> None:
            super().__init__(2)
            self.held: list = []

        def call(self, job) -> None:
            self.held.append(job)
            if len(self.held) > 3:
                super().call(self.held.pop(0))

    ids = sequence()
    expected = decoded(Model(), ids, 1)
    model = Model()
    model.program.helpers = Late()
    assert equal(decoded(model, ids, 1), expected)


def test_a_helper_of_an_earlier_step_takes_no_chunk_of_a_later_one():
    model = Model()
    model.run(sequence(4)[None], [0])
    p = model.program
    p._done[:], p._tickets[..., 0] = 0, 9 << 32  # step 9 has just begun
    model.hidden[:] = -1.0
    p._run(p._at, 8, 0)
    assert (p._tickets[..., 0] == 9 << 32).all() and (p._done == 0).all()
    assert (model.hidden == -1.0).all()
    p._run(p._at, 9, 0)
    assert (model.hidden != -1.0).all(1)[:4].all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on_with_helpers_of_its_own():
    ids = sequence()
    model = Model(threads=3)
    expected = decoded(model, ids, 4)
    child = os.fork()
    if child == 0:
        os._exit(0 if equal(decoded(model, ids, 4), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert equal(decoded(model, ids, 4), expected)


def test_a_second_process_compiles_nothing_and_imports_no_compiler(tmp_path):
    source = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
from cpu_model import Model, decoded, sequence
from mtpkern.kernels.cpu._compile import Kernels
kernels = Kernels(directory=Path({str(tmp_path)!r}))
out = decoded(Model(compiled=kernels), sequence(), 4)
print(sorted(kernels.compiled), "numba" in sys.modules, out["logits"].sum())
"""

    def run() -> str:
        command = [sys.executable, "-c", source]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    first, second = run(), run()
    assert first.startswith("['q8_0', 'run_program'] True")
    assert second.startswith("[] False")
    assert first.split()[-1] == second.split()[-1]
    # A damaged file is compiled again.
    broken = next(tmp_path.glob("q8_0-*.o"))
    broken.write_bytes(broken.read_bytes()[:-1])
    assert run().startswith("['q8_0'] False")


def test_a_directory_that_cannot_be_written_is_not_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    compiled = Kernels(directory=tmp_path / "file")
    assert compiled.tile("fp32")
    assert compiled.compiled == ["fp32"]


def test_the_cache_tells_machines_apart(tmp_path):
    target = host_target()
    names = []
    for some in (target, target._replace(form="portable"), target._replace(features="")):
        Kernels(some, directory=tmp_path).tile("fp32")
        names.append(len(list(tmp_path.iterdir())))
    assert names == [1, 2, 3]


def test_more_rows_than_a_program_holds_are_refused():
    model = Model(max_rows=4)
    with pytest.raises(ValueError, match="rows x batch must be 1..4"):
        model.program.run(5)


def test_tokens_and_positions_out_of_range_are_refused():
    model = Model()
    for ids, length, message in (
        ([V], 0, "ids must be 0"),
        ([-1], 0, "ids must be 0"),
        ([1], POSITIONS, "lengths"),
        ([1, 1], POSITIONS - 1, "lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            model.run(np.array([ids]), [length])


def test_a_helper_that_makes_its_caller_wait_is_left_alone_for_a_while():
    helpers = Helpers(3)
    for _ in range(AVERAGED):
        helpers.learn(100)
    assert helpers.active == 2
    for _ in range(AVERAGED):
        helpers.learn(900)
    assert helpers.active == 1
    for _ in range(AVERAGED):
        helpers.learn(900)
    assert helpers.active == 0
    for _ in range(PENALTY):
        helpers.learn(0)
    assert helpers.active == 2


def test_values_of_the_step_are_those_of_its_logits():
    out = decoded(Model(), sequence(), 4)
    logits = torch.from_numpy(out["logits"][:, :V]).double()
    assert np.array_equal(out["best"][:, 0], logits.argmax(-1).numpy())
    expected = logits.logsumexp(-1).float()
    torch.testing.assert_close(torch.from_numpy(as_floats(out["best"][:, 2])), expected)


def test_float_weights_need_no_rounding():
    w = normal(8, 32, seed=1)
    assert same_bits(floats(w).q, w.numpy())
