"""The ops that choose tokens: parallel heads, the vocabulary projection, sampling."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from model_shapes import ModelShape
from torch import Tensor

from mtpkern.kernels.medusa_blocks import medusa_blocks
from mtpkern.kernels.multi_head_projection import TILE, Projection, multi_head_projection
from mtpkern.kernels.sample import sample

from .case import DTYPE, Call, K, KernelCase, normal


def medusa_blocks_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """One residual block for each of K parallel heads."""
    R, E = B * T, model.E

    def inputs(device: str) -> Call:
        w, bias = normal(device, K, 1, E, E, scale=E**-0.5), normal(device, K, 1, E)
        out = normal(device, 1 + K, R, E).transpose(0, 1)
        x = out[:, 0]  # the norm writes its rows there

        def blocks(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
            heads = [x + F.silu(F.linear(x, w[i, 0], bias[i, 0])) for i in range(K)]
            return torch.stack([x, *heads], 1)

        in_dtype = partial(blocks, x, w, bias)
        return Call(
            lambda pdl: medusa_blocks(x, w, bias, out=out, pdl=pdl),
            lambda: blocks(x.double(), w.double(), bias.double()),
            in_dtype,
            in_dtype,
        )

    moved = DTYPE.itemsize * (K * E * E + K * E + R * E + R * K * E)
    yield KernelCase("K heads", f"R={R} H={K} E={E}", moved, inputs)


def multi_head_projection_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """The LM head alone, with all K heads, and with what sampling needs."""
    E, V = model.E, model.V
    tiles = -(-V // TILE)
    # Name, rows, top_k, and whether logits are returned: those of given ids, and whole rows.
    for name, R, top_k, wanted in (
        ("LM head", B * T, 1, False),
        ("all heads", B * T * (1 + K), 4, False),
        ("LM head, logits", B * T, 4, True),
    ):

        def inputs(device: str, R: int = R, top_k: int = top_k, wanted: bool = wanted) -> Call:
            x, w = normal(device, R, E), normal(device, V, E, scale=E**-0.5)
            given = torch.randint(V, (R, 1), device=device) if wanted else None
            out = Projection(
                torch.empty(R, top_k, device=device),
                torch.empty(R, top_k, device=device, dtype=torch.int64),
                torch.empty(R, device=device),
                torch.empty(R, 1, device=device) if wanted else None,
                torch.empty(R, V, device=device) if wanted else None,
            )

            def launch(pdl: bool) -> tuple[Tensor, ...]:
                logits_rows = R if wanted else 0
                options = dict(top_k=top_k, given=given, logits_rows=logits_rows, out=out, pdl=pdl)
                kept = multi_head_projection(x, w, **options)
                values, _, total, scores, logits = kept
                return (values, values, total, *((scores, logits) if wanted else ()))

            def kept(logits: Tensor) -> tuple[Tensor, ...]:
                """The largest logits twice: by value, and looked up by the ids found."""
                found = logits.gather(1, out.ids.clamp(0, V - 1))
                largest, total = logits.topk(top_k).values, logits.logsumexp(1)
                if given is None:
                    return largest, found, total
                return largest, found, total, logits.gather(1, given), logits

            def baseline() -> tuple[Tensor, ...]:
                logits = F.linear(x, w).float()
                return (*logits.topk(top_k), logits.logsumexp(1))

            return Call(
                launch,
                lambda: kept(F.linear(x.double(), w.double())),
                lambda: kept(F.linear(x, w).float()),
                baseline,
            )

        moved = DTYPE.itemsize * (V * E + R * E) + R * (4 * V + 16 * tiles)
        moved += R * (12 * top_k + 4) + (R * (8 + 4) + 4 * R * V if wanted else 0)
        # The top k of a row may lie in fewer tiles, and the last tile may be narrower.
        read_again = 4 * R * TILE * top_k
        shape = f"R={R} V={V} E={E} top_k={top_k}"
        yield KernelCase(name, shape, moved + read_again, inputs, read_again)


def sample_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    R, V = B * T, model.V

    def inputs(device: str) -> Call:
        logits, out = torch.randn(R, V, device=device), torch.empty(R, device=device).long()
        greedy = partial(torch.argmax, logits, 1)
        return Call(lambda pdl: sample(logits, out=out, pdl=pdl), greedy, greedy, greedy)

    yield KernelCase("greedy", f"R={R} V={V}", 4 * R * V + 8 * R, inputs)
