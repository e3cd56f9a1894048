"""A step on a GPU: no value travels to the host, and nothing is launched that need not be."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG, tiny_checkpoint
from head_files import write_hydra, write_medusa, write_mtp, write_published
from llama_layouts import write_layout

from mtpkern.decode import DecodeState, decode_step
from mtpkern.drafters.base import Drafter, DraftInput, Drafts, NoDrafter
from mtpkern.drafters.load import open_heads
from mtpkern.drafters.ngram import CompanionDrafter, NgramDrafter
from mtpkern.model import Llama
from mtpkern.ops.gpu import TRITON

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
K = 3


@pytest.fixture
def predict_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import predict_steps

    return predict_steps


def drafter_of(kind: str, trunk: Llama, state: DecodeState, directory: Path) -> Drafter:
    if kind == "none":
        return NoDrafter()
    if kind == "n-gram":
        return NgramDrafter(TRITON)
    if kind == "modules":  # included in the checkpoint
        included = open_heads(directory.parent / "trunk", trunk.config)
        return included.build(trunk, state.cache, TRITON)
    write = {"mtp": write_mtp, "medusa": write_medusa, "published": write_published}
    write["hydra"] = write_hydra
    heads = open_heads(write[kind.split(" ")[0]](directory), trunk.config).build(
        trunk, state.cache, TRITON
    )
    return CompanionDrafter(NgramDrafter(TRITON), heads, TRITON) if "n-gram" in kind else heads


KINDS = [
    "none",
    "n-gram",
    "medusa",
    "published medusa",
    "mtp",
    "mtp with n-gram",
    "hydra",
    "medusa with n-gram",
    "modules",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forced", [False, True])
def test_no_value_of_a_step_travels_to_the_host(
    predict_steps: Any, tmp_path: Path, kind: str, forced: bool
) -> None:
    counts = torch.zeros(8, dtype=torch.int64, device="meta") if forced else None
    directory = tmp_path / "trunk"
    if kind == "modules":
        write_layout("mimo", directory, modules=K)
    else:
        tiny_checkpoint(directory)
    trunk, state = predict_steps.meta_state(directory, 2, K, forced=counts)
    drafter = drafter_of(kind, trunk, state, tmp_path / "heads")
    for k in (0, 1, K):
        with predict_steps.traced():
            one = drafter if k else NoDrafter()
            decode_step(state.view(2, k), trunk, one, TRITON, logprobs=True)


def test_a_drafter_that_looks_is_found(predict_steps: Any, tmp_path: Path) -> None:
    class Looks(NgramDrafter):
        def guess(self, step: DraftInput, count: int) -> Drafts:
            drafts = super().guess(step, count)
            return drafts if bool(drafts.tokens.any()) else drafts

    trunk, state = predict_steps.meta_state(tiny_checkpoint(tmp_path / "trunk"), 2, K)
    with predict_steps.traced(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        decode_step(state, trunk, Looks(TRITON), TRITON)


def test_a_step_launches_eight_kernels_a_layer_and_reads_each_weight_once(
    predict_steps: Any, tmp_path: Path
) -> None:
    layers = TINY_CONFIG["num_hidden_layers"]
    trunk, state = predict_steps.meta_state(tiny_checkpoint(tmp_path / "trunk"), 2, K)
    with predict_steps.traced() as trace:
        decode_step(state.view(2, 0), trunk, NoDrafter(), TRITON, logprobs=True)
    once = ("window_slots", "vocabulary_tiles", "vocabulary_merge", "advance")
    assert trace.kernels == {
        "rms_norm": 2 * layers + 1,
        "qkv_rope_cache": layers,
        "verify_attention": layers,
        "merge_splits": layers,
        "linear": 2 * layers,
        "gate_up_silu": layers,
    } | dict.fromkeys(once, 1)
    # The embedding's rows, and log-probabilities from a value and its normaliser.
    assert trace.others == {"embedding": 1, "sub": 1}
    matrices = [
        w for layer in trunk.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)
    ]
    weights = sum(w.data.numel() for w in matrices) + trunk.lm_head.numel()
    assert trace.weight_bytes == 2 * weights
    slot = 2 * 2 * TINY_CONFIG["num_key_value_heads"] * trunk.config.head_dim
    assert trace.cached_slots_bytes == 2 * layers * slot


def test_a_sequential_head_launches_little_beside_its_kernels(
    predict_steps: Any, tmp_path: Path
) -> None:
    trunk, state = predict_steps.meta_state(tiny_checkpoint(tmp_path / "trunk"), 2, K)
    heads = open_heads(write_mtp(tmp_path / "h"), trunk.config).build(trunk, state.cache, TRITON)
    with predict_steps.traced() as trace:
        decode_step(state, trunk, heads, TRITON, logprobs=True)
    others = dict(trace.others)
    # The trunk's two; three taps side by side; where pairs begin, the row that was accepted, K - 2
    # times how far ahead, the drafts side by side, and what the step is told of them.
    assert others == {
        "embedding": 1,
        "sub": 2,
        "cat": 1,
        "gather": 1,
        "add": K - 2,
        "stack": 1,
        "copy_": 1,
        "fill_": 2,
    }


def test_drafts_of_parallel_heads_cost_no_second_read(predict_steps: Any, tmp_path: Path) -> None:
    trunk, state = predict_steps.meta_state(tiny_checkpoint(tmp_path / "trunk"), 1, K)
    heads = open_heads(write_medusa(tmp_path / "h"), trunk.config).build(trunk, state.cache, TRITON)
    read = []
    for k, drafter in ((0, NoDrafter()), (K, heads)):
        with predict_steps.traced() as trace:
            decode_step(state.view(1, k), trunk, drafter, TRITON)
        read.append(trace.weight_bytes)
        assert trace.kernels["vocabulary_tiles"] == 1
    blocks = heads.parallel_heads[0]
    assert read[1] - read[0] == blocks.numel() * blocks.element_size()


# Bytes of weights, bytes from the L2, flops, instructions per pass.
@pytest.mark.parametrize(
    ("counts", "bound", "seconds"),
    [
        ((3 << 30, 1 << 30, 0, 1), "memory", (3 << 30) / 3.0e12),
        ((1 << 30, 6 << 30, 0, 1), "L2", (6 << 30) / 5.5e12),
        ((1 << 30, 1 << 30, 10**12, 1), "tensor cores", 1e12 / (0.62 * 989e12)),
        # 2^18 passes of 4 warps, on 132 multiprocessors that issue 4 instructions per cycle.
        ((1 << 30, 1 << 30, 0, 9999), "issue", 2**18 * 9999 / 132 / 1.755e9 / 0.7),
    ],
)
def test_the_slowest_of_four_bounds_decides(
    predict_steps: Any,
    monkeypatch: pytest.MonkeyPatch,
    counts: tuple[int, int, int, int],
    bound: str,
    seconds: float,
) -> None:
    from bounds import Matmul

    weights, requested, flops, instructions = counts
    multiplied = Matmul(weights, requested, flops, 1 << 18, 4096, passes_of_block=16)
    monkeypatch.setattr(predict_steps, "matmul", lambda *_: multiplied)
    monkeypatch.setattr(predict_steps, "l2_bytes", lambda *_: requested)
    counted = {"loop": 0, "unrolled": 16 * instructions}
    monkeypatch.setattr(predict_steps, "_issued", lambda *_: counted)
    trace = predict_steps.Trace()
    function = type("Function", (), {"arg_names": ()})
    trace.matmuls = [("linear", function, (), (1,), {"num_warps": 4})] * 2
    found, deciding = predict_steps.matmul_seconds(trace)
    assert found == pytest.approx(2 * seconds) and deciding == f"linear: {bound}"


def test_the_prediction_runs_and_states_its_assumptions(predict_steps: Any, capsys: Any) -> None:
    assert predict_steps.main(["--model", "tiny", "--context", "64"]) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured" in out and "| tiny | 1 | 4 | mtp |" in out


@pytest.mark.slow
def test_a_step_of_8b_is_predicted_to_take_little_longer_than_reading_its_bytes(
    predict_steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain and with four drafts, by all four bounds, every launch included."""
    import triton

    # Counting instructions needs a compiler for an H100, and leaves that driver active.
    monkeypatch.setattr(triton.runtime.driver, "_active", predict_steps.Device(90))
    name = "llama-3.1-8b"
    directory = predict_steps.write_config(predict_steps.MODELS[name], tmp_path / name)
    args = predict_steps.parser().parse_args(["-K", "4"])
    rows = list(islice(predict_steps.predict(name, directory, 1, args), 2))
    assert [(row["drafter"], row["num_speculative_tokens"]) for row in rows] == [
        ("none", 0),
        ("n-gram", 4),
    ]
    assert all(1 < row["over_bytes"] <= 1.10 for row in rows)
