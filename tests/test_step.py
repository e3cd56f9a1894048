"""A step on a GPU: no value travels to the host, and nothing is launched that need not be."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG, tiny_checkpoint
from test_heads import write_medusa, write_mtp
from torch.utils._python_dispatch import TorchDispatchMode

from mtpkern.cache import KVCache
from mtpkern.config import ModelConfig
from mtpkern.decode import DecodeState, decode_step
from mtpkern.head_checkpoint import load_heads
from mtpkern.heads import CompanionDrafter, Drafter, DraftInput, Drafts, NgramDrafter, NoDrafter
from mtpkern.model import Llama
from mtpkern.ops import TRITON

triton = pytest.importorskip("triton")

# Tensors without data: whoever wants a value of one, or a shape that depends on it, is refused.
META = torch.device("meta")
K = 3
# What torch does without launching anything.
VIEWS = {
    *("view", "_unsafe_view", "reshape", "select", "slice", "unsqueeze", "expand", "transpose"),
    *("t", "alias", "split_with_sizes", "permute", "detach"),
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
}


class Launches(TorchDispatchMode):
    """Counts what would be launched: the kernels by name, and torch's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.others[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    counts = Launches()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        counts.kernels[self.fn.__name__.strip("_").removesuffix("_kernel")] += 1

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    yield counts


def meta_state(directory: Path, batch: int, forced: bool = False) -> tuple[Llama, DecodeState]:
    config = ModelConfig.from_json(directory)
    trunk = Llama.load(directory, dtype=torch.bfloat16, ops=TRITON, device=META, dummy=True)
    cache = KVCache.empty(
        layers=config.num_layers,
        pages=8,
        page_size=64,
        page_table=torch.zeros(batch, 4, dtype=torch.int32, device=META),
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inverse_frequencies=torch.ones(config.head_dim // 2),
        rope_scaling=1.0,
        dtype=torch.bfloat16,
    )
    counts = torch.zeros(8, dtype=torch.int64, device=META) if forced else None
    ring = torch.zeros(4, batch, 2 * K + 3, dtype=torch.int64, device=META)
    return trunk, DecodeState.empty(cache, 200, K, ring=ring, forced=counts)


def drafter_of(kind: str, trunk: Llama, state: DecodeState, directory: Path) -> Drafter:
    if kind == "none":
        return NoDrafter()
    if kind == "n-gram":
        return NgramDrafter(TRITON)
    write = {"mtp": write_mtp, "medusa": write_medusa}[kind.split(" ")[0]]
    heads = load_heads(write(directory), trunk, state.cache, k=K, ops=TRITON)
    return CompanionDrafter(NgramDrafter(TRITON), heads) if "n-gram" in kind else heads


KINDS = ["none", "n-gram", "medusa", "mtp", "mtp with n-gram", "medusa with n-gram"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forced", [False, True])
def test_no_value_of_a_step_travels_to_the_host(
    launches: Launches, tmp_path: Path, kind: str, forced: bool
) -> None:
    trunk, state = meta_state(tiny_checkpoint(tmp_path / "trunk"), 2, forced)
    drafter = drafter_of(kind, trunk, state, tmp_path / "heads")
    for k in (0, 1, K):
        decode_step(state.view(2, k), trunk, drafter if k else NoDrafter(), TRITON, logprobs=True)


def test_a_drafter_that_looks_is_found(launches: Launches, tmp_path: Path) -> None:
    class Looks(NgramDrafter):
        def guess(self, step: DraftInput, count: int) -> Drafts:
            drafts = super().guess(step, count)
            return drafts if bool(drafts.source.any()) else drafts

    trunk, state = meta_state(tiny_checkpoint(tmp_path / "trunk"), 2)
    with pytest.raises(RuntimeError, match="meta"):
        decode_step(state, trunk, Looks(TRITON), TRITON)


def test_a_step_launches_six_kernels_a_layer_and_few_things_beside(
    launches: Launches, tmp_path: Path
) -> None:
    layers = TINY_CONFIG["num_hidden_layers"]
    trunk, state = meta_state(tiny_checkpoint(tmp_path / "trunk"), 2)
    per_layer = {
        "qkv_rope_cache": layers,
        "verify_attention": layers,
        "merge_splits": layers,
        "linear": 2 * layers,
        "gate_up_silu": layers,
    }
    once = ("window_slots", "rms_norm", "vocabulary_tiles", "vocabulary_merge", "advance")
    with launches:
        decode_step(state.view(2, 0), trunk, NoDrafter(), TRITON, logprobs=True)
    assert launches.kernels == per_layer | dict.fromkeys(once, 1)
    # The embedding's rows, and log-probabilities from a value and its normaliser.
    assert launches.others == {"embedding": 1, "sub": 1}
