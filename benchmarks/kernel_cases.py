"""Every kernel at the shapes of real models: what is launched, checked, timed and compiled.

`OPS` has one entry per op. `bench_kernels.py` runs the cases on a GPU; `check_codegen.py` compiles
them on any machine, from tensors without data (device "meta").
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from checkout import ROOT  # noqa: F401
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from mtpkern.cache import rotary_tables
from mtpkern.kernels.accept import accept, accept_ref
from mtpkern.kernels.advance import Progress, advance, advance_ref
from mtpkern.kernels.gate_up_silu import gate_up_silu
from mtpkern.kernels.kv_rollback import kv_rollback
from mtpkern.kernels.linear import linear
from mtpkern.kernels.medusa_blocks import medusa_blocks
from mtpkern.kernels.multi_head_projection import BLOCK_V, Projection, multi_head_projection
from mtpkern.kernels.ngram import BLOCK, ngram, ngram_ref
from mtpkern.kernels.qkv_rope_cache import qkv_rope_cache
from mtpkern.kernels.rms_norm import rms_norm
from mtpkern.kernels.rope_cache import rope_cache
from mtpkern.kernels.sample import sample
from mtpkern.kernels.verify_attention import split_size, verify_attention, workspace_size
from mtpkern.kernels.window_slots import window_slots

DTYPE = torch.bfloat16
EPS = 1e-5
PAGE_SIZE = 64
CONTEXTS = (1024, 8192, 32768)  # keys of a sequence, those of the window included
K = 4  # parallel heads


class Model(NamedTuple):
    """The sizes of a model, in the letters of the README."""

    E: int
    F: int
    Hq: int
    Hk: int
    D: int
    V: int
    L: int
    qk_norm: bool = False


MODELS = {
    "smollm2-135m": Model(E=576, F=1536, Hq=9, Hk=3, D=64, V=49152, L=30),
    "llama-3.2-1b": Model(E=2048, F=8192, Hq=32, Hk=8, D=64, V=128256, L=16),
    "llama-3.1-8b": Model(E=4096, F=14336, Hq=32, Hk=8, D=128, V=128256, L=32),
    "qwen3-8b": Model(E=4096, F=12288, Hq=32, Hk=8, D=128, V=151936, L=36, qk_norm=True),
}

# Sequences and window rows [B, T] of a step: plain decoding, K = 4, and K = 4 in batches.
STEPS = ((1, 1), (1, 5), (8, 5), (32, 5))
# Steps at the tiers of rows that STEPS leaves out: 20 and 125 rows.
OTHER_TIERS = ((4, 5), (25, 5))


class Call(NamedTuple):
    """One set of inputs, ready to run. The first three return the same tensors, or tuples of them.

    `truth` computes in float64, and may look at what the launch before it left; `in_dtype` as torch
    does in the inputs' dtype, whose error sets the tolerance. `baseline` is timed against the
    kernel.
    """

    launch: Callable[[bool], object]  # takes pdl
    truth: Callable[[], object]
    in_dtype: Callable[[], object]
    baseline: Callable[[], object]


class Case(NamedTuple):
    """An op at one shape. `inputs` makes a new set of random inputs on a device at every call."""

    name: str
    shape: str
    bytes_moved: int
    inputs: Callable[[str], Call]


def normal(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE) * scale


def linear_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """The output and the down projection, residual added."""
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
        yield Case(name, f"R={R} N={N} K={K}", moved, inputs)


def rms_norm_cases(model: Model, B: int, T: int) -> Iterator[Case]:
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

    yield Case("final", f"R={R} E={E}", DTYPE.itemsize * (2 * R * E + E), inputs)


def normed(x: Tensor, w: Tensor) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * w.double()


def gate_up_silu_cases(model: Model, B: int, T: int) -> Iterator[Case]:
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

    moved = DTYPE.itemsize * (2 * N * E + E + 3 * R * E + R * N)  # with the normed rows, as above
    yield Case("mlp", f"R={R} F={N} E={E}", moved, inputs)


def qkv_rope_cache_cases(model: Model, B: int, T: int) -> Iterator[Case]:
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
        heads = (normal(device, D), normal(device, D)) if model.qk_norm else (None, None)
        out = normal(device, R, Hq, D)

        def launch(pdl: bool) -> tuple[Tensor, ...]:
            given = dict(q_norm=heads[0], k_norm=heads[1], out=out, pdl=pdl)
            plan = (slots, positions, cos, sin)
            return qkv_rope_cache(x, norm_w, EPS, w, k_pages, v_pages, *plan, **given), *written

        def appended(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            qk, v = F.linear(x, w).view(R, -1, D).split((Hq + Hk, Hk), 1)
            if heads[0] is not None:
                q, k = qk.split((Hq, Hk), 1)
                qk = torch.cat([normed(q, heads[0]), normed(k, heads[1])], 1).to(x.dtype)
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

    # The normed rows are written by a launch of their own, and read again.
    moved = DTYPE.itemsize * (N * E + E + 3 * R * E + R * N) + R * (2 * 8 + 2 * 4 * D // 2)
    if model.qk_norm:
        moved += DTYPE.itemsize * (R * (Hq + Hk) * D + 2 * D)
    yield Case("qkv", f"R={R} Hq={Hq} Hk={Hk} D={D} E={E}", moved, inputs)


def rope_cache_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """A prompt's rows behind a library's matmul; counts of rows are those of steps here."""
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
    yield Case("append", f"R={R} Hq={Hq} Hk={Hk} D={D}", moved, inputs)


def verify_attention_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """A chain of T rows a sequence behind full contexts, pages in random order."""
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
        moved += 2 * 4 * (D + 2) * B * T * Hq * -(-keys // split_size(B, T, Hq, Hk, keys))
        moved += 4 * B * pages + 8 * B
        yield Case(f"{keys} keys", f"B={B} T={T} Hq={Hq} Hk={Hk} D={D}", moved, inputs)


def medusa_blocks_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """One residual block for each of K parallel heads."""
    R, E = B * T, model.E

    def inputs(device: str) -> Call:
        w, bias = normal(device, K, 1, E, E, scale=E**-0.5), normal(device, K, 1, E)
        out = normal(device, 1 + K, R, E).transpose(0, 1)
        x = out[:, 0]  # where the norm before it left them

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
    yield Case("K heads", f"R={R} H={K} E={E}", moved, inputs)


def multi_head_projection_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """The LM head alone, with all K heads, and with what sampling needs."""
    E, V = model.E, model.V
    tiles = -(-V // BLOCK_V)
    # Name, rows, top_k, and whether logits are wanted: one of given ids, and the whole rows.
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
                """The largest logits twice: as they are, and as those of the ids found."""
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

        moved = DTYPE.itemsize * (V * E + R * E) + 2 * tiles * R * (8 * top_k + 4)
        moved += R * (12 * top_k + 4) + (R * (8 + 4) + 4 * R * V if wanted else 0)
        yield Case(name, f"R={R} V={V} E={E} top_k={top_k}", moved, inputs)


def accept_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """Drafts of which about one half stands."""

    def inputs(device: str) -> Call:
        window, target = (torch.randint(2, (B, T + 1), device=device)[:, :T] for _ in range(2))
        out = window.new_empty(B), window.new_empty(B)
        decided = partial(accept_ref, window, target)
        return Call(lambda pdl: accept(window, target, out=out, pdl=pdl), decided, decided, decided)

    yield Case("greedy", f"B={B} T={T}", 8 * B * (2 * T - 1) + 16 * B, inputs)


def advance_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """A step's end: drafts of which about one half stands. What it changes in place, it goes on
    changing; the bonus is compared, and where each sequence stands is set back before each call.
    """
    begin = 1000

    def inputs(device: str) -> Call:
        drafts, target = (torch.randint(2, (B, T), device=device) for _ in range(2))
        largest, logprobs = (torch.randn(B, T, device=device) for _ in range(2))
        ids = torch.zeros(B, dtype=torch.int64, device=device)
        progress = Progress(
            tokens=torch.zeros(B, begin + 200, dtype=torch.int64, device=device),
            lengths=ids + begin,
            active=ids + 1,
            limits=ids + begin + 100,
            ends=torch.full((B, 2), -1, device=device),
            source=ids.clone(),
            drafted=ids.clone(),
            clock=ids.clone(),
            ring=torch.zeros(8, B, 1 + 2 * T, dtype=torch.int64, device=device),
        )
        window = drafts.clone()

        def run(op: Callable[..., tuple[Tensor, Tensor]], **options: Any) -> tuple[Tensor, ...]:
            progress.lengths.fill_(begin)
            window.copy_(drafts)
            return *op(window, target, largest, logprobs, progress, **options), window

        reference = partial(run, advance_ref)
        return Call(lambda pdl: run(advance, pdl=pdl), reference, reference, reference)

    yield Case("chain", f"B={B} T={T}", B * (8 * (5 * T + 14 + 2) + 8 * T), inputs)


def kv_rollback_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """All rows of a chain stay; of a tree every second one, so that all of those but one move. The
    lengths are set back before each call, here and in the baseline.
    """
    L, Hk, D, page_size = model.L, model.Hk, model.D, 16
    kept = torch.arange(0, T, 2)
    for name, path_rows in (("chain", None), ("tree", kept)):

        def inputs(device: str, path_rows: Tensor | None = path_rows) -> Call:
            k, v = (normal(device, L, 2 * B, page_size, Hk, D) for _ in range(2))
            before = k.clone(), v.clone()
            table = torch.randperm(2 * B, device=device, dtype=torch.int32).view(B, 2)
            begin = torch.full((B,), 13, device=device)
            lengths = begin.clone()
            count = T if path_rows is None else len(path_rows)
            accepted = torch.full((B,), count - 1, device=device)
            path = None
            if path_rows is not None:
                path = path_rows.to(device).expand(B, -1).contiguous()

            def launch(pdl: bool) -> tuple[Tensor, ...]:
                lengths.copy_(begin)
                kv_rollback(k, v, table, lengths, accepted, path=path, pdl=pdl)
                return k, v, lengths

            def committed() -> tuple[Tensor, ...]:
                after = [t.clone() for t in before]
                move(*after)
                return *after, begin + count

            def move(k: Tensor, v: Tensor) -> None:
                if path is None:
                    return
                places = (13 + torch.arange(count, device=device).expand(B, -1), 13 + path)
                to, of = ((table.long().gather(1, p // page_size), p % page_size) for p in places)
                for cache in (k, v):
                    cache[:, to[0], to[1]] = cache[:, of[0], of[1]]

            def baseline() -> tuple[Tensor, ...]:
                lengths.copy_(begin)
                move(k, v)
                lengths.add_(accepted + 1)
                return k, v, lengths

            return Call(launch, committed, committed, baseline)

        moved = 24 * B
        if path_rows is not None:
            pairs = list(enumerate(path_rows.tolist()))[1:]
            pages = {(13 + row) // page_size for pair in pairs for row in pair}
            moved += B * (8 * len(path_rows) + 4 * len(pages))
            moved += 4 * DTYPE.itemsize * L * Hk * D * B * len(pairs)
        yield Case(name, f"B={B} T={T} L={L} Hk={Hk} D={D}", moved, inputs)


def sample_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    R, V = B * T, model.V

    def inputs(device: str) -> Call:
        logits, out = torch.randn(R, V, device=device), torch.empty(R, device=device).long()
        likeliest = partial(torch.argmax, logits, 1)
        return Call(lambda pdl: sample(logits, out=out, pdl=pdl), likeliest, likeliest, likeliest)

    yield Case("greedy", f"R={R} V={V}", 4 * R * V + 8 * R, inputs)


def ngram_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    """No match anywhere, which takes longest."""
    known, size = 8000, 3

    def inputs(device: str) -> Call:
        tokens = torch.randint(model.V, (B, known + 100), device=device)
        tokens[:, known - 1] = model.V
        counts = torch.full((B,), known, device=device)
        out = tokens.new_empty(B, T), torch.empty(B, dtype=torch.bool, device=device)

        def searched() -> tuple[Tensor, Tensor]:
            with torch.device(device):
                return ngram_ref(tokens, counts, T, size)

        return Call(
            lambda pdl: ngram(tokens, counts, T, size, out=out, pdl=pdl),
            searched,
            searched,
            searched,
        )

    moved = B * (8 * (known + 1 + T) + 1 + 16 * -(-(known - size) // BLOCK))
    yield Case("no match", f"B={B} K={T} known={known}", moved, inputs)


def window_slots_cases(model: Model, B: int, T: int) -> Iterator[Case]:
    for name in ("chain", "tree"):

        def inputs(device: str, name: str = name) -> Call:
            table = torch.randperm(B * 16, device=device, dtype=torch.int32).view(B, 16)
            lengths = torch.arange(B, device=device) % 15 * PAGE_SIZE + 3
            t = torch.arange(T, device=device)
            tree = ((2 << t) - 1).expand(B, T).contiguous() if name == "tree" else None
            out = lengths.new_empty(B * T), lengths.new_empty(B * T)

            def placed() -> tuple[Tensor, Tensor]:
                place = lengths[:, None] + t
                pages = table.long().gather(1, place // PAGE_SIZE)
                return (pages * PAGE_SIZE + place % PAGE_SIZE).view(-1), place.view(-1)

            return Call(
                lambda pdl: window_slots(lengths, table, T, PAGE_SIZE, tree=tree, out=out, pdl=pdl),
                placed,
                placed,
                placed,
            )

        moved = 12 * B + B * T * (16 + (8 if name == "tree" else 0))
        yield Case(name, f"B={B} T={T}", moved, inputs)


OPS: dict[str, Callable[[Model, int, int], Iterator[Case]]] = {
    "rms_norm": rms_norm_cases,
    "qkv_rope_cache": qkv_rope_cache_cases,
    "rope_cache": rope_cache_cases,
    "linear": linear_cases,
    "gate_up_silu": gate_up_silu_cases,
    "verify_attention": verify_attention_cases,
    "medusa_blocks": medusa_blocks_cases,
    "multi_head_projection": multi_head_projection_cases,
    "accept": accept_cases,
    "advance": advance_cases,
    "kv_rollback": kv_rollback_cases,
    "sample": sample_cases,
    "ngram": ngram_cases,
    "window_slots": window_slots_cases,
}
