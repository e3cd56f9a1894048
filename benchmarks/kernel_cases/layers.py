"""The ops of a decoder layer, of the trunk or of a sequential head."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from model_shapes import ModelShape
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from mtpkern.cache import rotary_tables
from mtpkern.kernels.gate_up_silu import gate_up_silu
from mtpkern.kernels.linear import linear
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache
from mtpkern.kernels.rms_norm import rms_norm
from mtpkern.kernels.rope_cache import rope_cache
from mtpkern.kernels.verify_attention import split_size, verify_attention, workspace_size

from .case import DTYPE, EPS, PAGE_SIZE, Call, KernelCase, normal, normed

CONTEXTS = (1024, 8192, 32768)  # keys per sequence, those of the window included


def rms_norm_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """The norm of the hidden state before heads."""
    R, E = B * T, model.E

    def inputs(device: str) -> Call:
        x, w, out = normal(device, R, E), normal(device, E), normal(device, R, E)
        in_dtype = partial(F.rms_norm, x, (E,), w, EPS)
        return Call(
            lambda pdl: rms_norm(x, w, EPS, out=out, pdl=pdl),
            lambda: normed(x, w),
            in_dtype,
            in_dtype,
        )

    yield KernelCase("final", f"R={R} E={E}", DTYPE.itemsize * (2 * R * E + E), inputs)


def qkv_rope_cache_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    R, E, Hq, Hk, D = B * T, model.E, model.Hq, model.Hk, model.D
    N, pages = (Hq + 2 * Hk) * D, -(-R // PAGE_SIZE) + 2

    def inputs(device: str) -> Call:
        x, norm_w = normal(device, R, E), normal(device, E)
        w = normal(device, N, E, scale=E**-0.5)
        k_pages, v_pages = (normal(device, pages, PAGE_SIZE, Hk, D) for _ in range(2))
        k_before, v_before = k_pages.clone(), v_pages.clone()
        slots = torch.randperm(pages * PAGE_SIZE, device=device)[:R]
        positions = 1000 + 7 * torch.arange(R, device=device)
        frequencies = 10000.0 ** -(torch.arange(0, D, 2) / D)
        cos, sin = (t.to(device) for t in rotary_tables(frequencies, 1.0, 1000 + 7 * R))
        gains = {}
        if model.qk_norm:
            gains = {"q_norm": normal(device, D), "k_norm": normal(device, D)}
        out = normal(device, R, Hq, D)

        def launch(pdl: bool) -> tuple[Tensor, ...]:
            given = (x, norm_w, EPS, w, k_pages, v_pages, slots, positions, cos, sin)
            return qkv_rope_cache(*given, **gains, out=out, pdl=pdl), *written

        def appended(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            qk, v = F.linear(x, w).view(R, -1, D).split((Hq + Hk, Hk), 1)
            if gains:
                q, k = qk.split((Hq, Hk), 1)
                qk = torch.cat([normed(q, gains["q_norm"]), normed(k, gains["k_norm"])], 1).to(
                    x.dtype
                )
            c, s = cos[positions, None].to(x.dtype), sin[positions, None].to(x.dtype)
            q, k = (qk * c + qk.roll(D // 2, -1) * s).split((Hq, Hk), 1)
            return (
                q,
                k_before.to(x.dtype).flatten(0, 1).index_copy(0, slots, k),
                v_before.to(x.dtype).flatten(0, 1).index_copy(0, slots, v),
            )

        def in_dtype() -> tuple[Tensor, ...]:
            return appended(F.rms_norm(x, (E,), norm_w, EPS), w)

        written = (k_pages.flatten(0, 1), v_pages.flatten(0, 1))
        return Call(launch, lambda: appended(normed(x, norm_w), w.double()), in_dtype, in_dtype)

    # The norm is a launch of its own: its rows are written and read again.
    moved = DTYPE.itemsize * (N * E + E + 3 * R * E + R * N) + R * (2 * 8 + 2 * 4 * D // 2)
    if model.qk_norm:
        moved += DTYPE.itemsize * (R * (Hq + Hk) * D + 2 * D)
    yield KernelCase("qkv", f"R={R} Hq={Hq} Hk={Hk} D={D} E={E}", moved, inputs)


def rope_cache_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """A prompt's rows after a library's matmul, here with the row counts of steps."""
    R, Hq, Hk, D = B * T, model.Hq, model.Hk, model.D
    N, pages = (Hq + 2 * Hk) * D, -(-R // PAGE_SIZE) + 2

    def inputs(device: str) -> Call:
        qkv, out = normal(device, R, N), normal(device, R, Hq, D)
        caches = [normal(device, pages, PAGE_SIZE, Hk, D) for _ in range(2)]
        before = [cache.clone() for cache in caches]
        slots = torch.randperm(pages * PAGE_SIZE, device=device)[:R]
        positions = 1000 + 7 * torch.arange(R, device=device)
        frequencies = 10000.0 ** -(torch.arange(0, D, 2) / D)
        cos, sin = (t.to(device) for t in rotary_tables(frequencies, 1.0, 1000 + 7 * R))
        plan = (slots, positions, cos, sin)
        gains = {}
        if model.qk_norm:
            gains = {"q_norm": normal(device, D), "k_norm": normal(device, D), "eps": EPS}

        def launch(pdl: bool) -> tuple[Tensor, ...]:
            q = rope_cache(qkv, *caches, *plan, **gains, out=out, pdl=pdl)
            return q, *(cache.flatten(0, 1) for cache in caches)

        def appended(dtype: torch.dtype) -> tuple[Tensor, ...]:
            heads = qkv.to(dtype).view(R, -1, D)
            q, k, v = heads.split((Hq, Hk, Hk), 1)
            if gains:
                q, k = normed(q, gains["q_norm"]), normed(k, gains["k_norm"])
            qk = torch.cat([q, k], 1).to(dtype)
            c, s = cos[positions, None].to(dtype), sin[positions, None].to(dtype)
            q, k = (qk * c + qk.roll(D // 2, -1) * s).split((Hq, Hk), 1)
            rows = (before_.to(dtype).flatten(0, 1) for before_ in before)
            pairs = zip(rows, (k, v), strict=True)
            return q, *(cache.index_copy(0, slots, new) for cache, new in pairs)

        in_dtype = partial(appended, DTYPE)
        return Call(launch, partial(appended, torch.float64), in_dtype, in_dtype)

    moved = 2 * DTYPE.itemsize * R * N + R * (2 * 8 + 2 * 4 * D // 2)
    moved += DTYPE.itemsize * 2 * D if model.qk_norm else 0
    yield KernelCase("append", f"R={R} Hq={Hq} Hk={Hk} D={D}", moved, inputs)


def verify_attention_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """A chain of T rows per sequence after full contexts, pages in random order."""
    Hq, Hk, D = model.Hq, model.Hk, model.D
    for keys in CONTEXTS[: None if B <= 8 else 2]:
        pages = keys // PAGE_SIZE

        def inputs(device: str, keys: int = keys, pages: int = pages) -> Call:
            q, out = normal(device, B, T, Hq, D), normal(device, B, T, Hq, D)
            k_pages, v_pages = (normal(device, B * pages, PAGE_SIZE, Hk, D) for _ in range(2))
            table = torch.randperm(B * pages, device=device, dtype=torch.int32).view(B, pages)
            lengths = torch.full((B,), keys - T, device=device)
            size = workspace_size(B, T, Hq, Hk, D, pages, PAGE_SIZE)
            workspace = torch.empty(size, device=device)
            given = (q, k_pages, v_pages, table, lengths)
            dense = [t[table.view(-1)].view(B, keys, Hk, D) for t in (k_pages, v_pages)]
            mask = causal_lower_right(T, keys) if T > 1 else None

            def truth() -> Tensor:
                rows = torch.arange(T, device=device)[:, None] + keys - T
                unseen = torch.arange(keys, device=device) > rows
                exact = []
                for row, k, v in zip(q, *dense, strict=True):
                    grouped = row.double().view(T, Hk, -1, D)
                    scores = torch.einsum("thgd,nhd->hgtn", grouped, k.double()) * D**-0.5
                    p = scores.masked_fill(unseen, float("-inf")).softmax(-1)
                    exact.append(torch.einsum("hgtn,nhd->thgd", p, v.double()).reshape(T, Hq, D))
                return torch.stack(exact)

            def in_dtype() -> Tensor:
                heads_first = (t.transpose(1, 2) for t in (q, *dense))
                y = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
                return y.transpose(1, 2)

            return Call(
                lambda pdl: verify_attention(*given, workspace=workspace, out=out, pdl=pdl),
                truth,
                in_dtype,
                in_dtype,
            )

        moved = DTYPE.itemsize * (2 * B * keys * Hk * D + 2 * B * T * Hq * D)
        moved += 2 * 4 * (D + 2) * B * T * Hq * -(-keys // split_size(B, T, Hq, Hk, D, keys))
        moved += 4 * B * pages + 8 * B
        yield KernelCase(f"{keys} keys", f"B={B} T={T} Hq={Hq} Hk={Hk} D={D}", moved, inputs)


def linear_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """The output and the down projection, with the residual added."""
    R, N = B * T, model.E
    for name, K in (("o", model.Hq * model.D), ("down", model.F)):

        def inputs(device: str, K: int = K) -> Call:
            x, w = normal(device, R, K), normal(device, N, K, scale=K**-0.5)
            residual, out = normal(device, R, N), torch.empty(R, N, device=device, dtype=DTYPE)

            def in_dtype() -> Tensor:
                return F.linear(x, w) + residual

            return Call(
                lambda pdl: linear(x, w, residual=residual, out=out, pdl=pdl),
                lambda: F.linear(x.double(), w.double()) + residual.double(),
                in_dtype,
                in_dtype,
            )

        moved = DTYPE.itemsize * (N * K + R * K + 2 * R * N)
        yield KernelCase(name, f"R={R} N={N} K={K}", moved, inputs)


def gate_up_silu_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    R, N, E = B * T, model.F, model.E

    def inputs(device: str) -> Call:
        x, norm_w = normal(device, R, E), normal(device, E)
        w = normal(device, 2 * N, E, scale=E**-0.5)
        out = normal(device, R, N)

        def gated(x: Tensor, w: Tensor) -> Tensor:
            gate, up = F.linear(x, w).chunk(2, dim=-1)
            return F.silu(gate) * up

        def in_dtype() -> Tensor:
            return gated(F.rms_norm(x, (E,), norm_w, EPS), w)

        return Call(
            lambda pdl: gate_up_silu(x, norm_w, EPS, w, out=out, pdl=pdl),
            lambda: gated(normed(x, norm_w), w.double()),
            in_dtype,
            in_dtype,
        )

    moved = DTYPE.itemsize * (2 * N * E + E + 3 * R * E + R * N)  # the norm is a launch of its own
    yield KernelCase("mlp", f"R={R} F={N} E={E}", moved, inputs)
