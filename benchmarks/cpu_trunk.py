"""Packed weights for bench_cpu: random ones in the default model's shapes, or those of a GGUF."""

from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401
import numpy as np
import torch

from mtpkern.errors import UserError, printable
from mtpkern.kernels.cpu.layers import PackedLayer
from mtpkern.kernels.cpu.program import Norm
from mtpkern.kernels.cpu.quants import Array, Quants, from_gguf, joined, quantise
from mtpkern.kernels.cpu.weights import Weights, interleaved, pack

SMOLLM = {"E": 576, "F": 1536, "heads": 9, "kv_heads": 3, "D": 64, "layers": 30, "V": 49152}


class Trunk(NamedTuple):
    """The weights of a Llama, packed."""

    embedding: Weights  # [V, E]
    layers: list[PackedLayer]
    norm: Norm
    vocabulary: Weights  # [V, E]; the embedding itself if they are tied
    heads: int  # query heads


def random_trunk() -> tuple[Trunk, dict[str, int]]:
    """Random weights -> (trunk, sizes by name)."""
    generator = torch.Generator().manual_seed(0)

    def weights(N: int, K: int, format: str, order: Array | None = None) -> Weights:
        w = torch.randn(N, K, generator=generator) / K**0.5
        return pack(quantise(w, format), order=order)

    s = SMOLLM
    norm = Norm(np.ones(s["E"], np.float32), 1e-5)
    made = [
        PackedLayer(
            norm,
            [weights((s["heads"] + 2 * s["kv_heads"]) * s["D"], s["E"], "q4_1")],
            weights(s["E"], s["heads"] * s["D"], "q4_1"),
            norm,
            weights(2 * s["F"], s["E"], "q4_1", interleaved(s["F"])),
            weights(s["E"], s["F"], "q4_1"),
        )
        for _ in range(s["layers"])
    ]
    vocabulary = weights(s["V"], s["E"], "q8_0")
    return Trunk(vocabulary, made, norm, vocabulary, s["heads"]), s


def read_gguf(file: Path) -> tuple[Trunk, dict[str, int]]:
    """A GGUF of the Llama layout, its matrices in their own bits -> (trunk, sizes by name)."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise UserError(f"{printable(file)} is not a GGUF: {printable(error)}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = fields["llama.attention.head_count"]
    kv_heads = fields["llama.attention.head_count_kv"]
    eps = float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}")
    names = {"F16": "fp16", "F32": "fp32"}

    def quants(name: str) -> Quants:
        tensor = tensors[f"{name}.weight"]
        kind = tensor.tensor_type.name
        return from_gguf(np.asarray(tensor.data), names.get(kind, kind.lower()))

    def norm(name: str) -> Norm:
        return Norm(np.ascontiguousarray(tensors[f"{name}.weight"].data, np.float32), eps)

    def halves_apart(w: Quants, count: int) -> Quants:
        rows = np.arange(w.shape[0]).reshape(count, -1, 2)
        return w.take(rows.swapaxes(1, 2).reshape(-1))

    made = []
    for index in range(fields["llama.block_count"]):
        at = f"blk.{index}."
        q, k = quants(at + "attn_q"), quants(at + "attn_k")
        qkv = joined(halves_apart(q, heads), halves_apart(k, kv_heads), quants(at + "attn_v"))
        gate_up = joined(quants(at + "ffn_gate"), quants(at + "ffn_up"))
        made.append(
            PackedLayer(
                norm(at + "attn_norm"),
                [pack(qkv)],
                pack(quants(at + "attn_output")),
                norm(at + "ffn_norm"),
                pack(gate_up, order=interleaved(gate_up.shape[0] // 2)),
                pack(quants(at + "ffn_down")),
            )
        )
    embedding = pack(quants("token_embd"))
    vocabulary = pack(quants("output")) if "output.weight" in tensors else embedding
    shape = {
        "kv_heads": kv_heads,
        "D": embedding.in_features // heads,
        "layers": len(made),
        "V": vocabulary.out_features,
    }
    return Trunk(embedding, made, norm("output_norm"), vocabulary, heads), shape
