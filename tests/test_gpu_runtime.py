"""What LLM does on a GPU beside computing, on one that is not there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint

pytest.importorskip("triton")

from pretend_gpu import pretend_gpu  # noqa: E402

from mtpkern.engine import LLM  # noqa: E402


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_checkpoint(
        tmp_path / "trunk",
        dtype=torch.bfloat16,
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        num_hidden_layers=2,
        max_position_embeddings=1280,
    )


def load(directory: Path, **options: Any) -> LLM:
    return LLM(directory, device="cuda", **{"heads": "none", "max_batch": 4} | options)


def test_graphs_share_one_pool_and_only_their_memory_is_counted(directory: Path) -> None:
    with pretend_gpu() as gpu:
        gpu.cached = 1 << 30  # what loading left
        llm = load(directory, num_speculative_tokens=3)
        assert len(gpu.graphs) == len(llm._graphs) == 6
        assert len(set(gpu.graphs)) > 1
        assert llm.graph_bytes == max(gpu.graphs), "the largest, not the sum"
        assert gpu.cached == 0
