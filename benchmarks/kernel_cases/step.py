"""The ops around the layers of a step: slots, acceptance, commit, n-gram drafts."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from model_shapes import ModelShape
from torch import Tensor

from mtpkern.kernels.accept import accept, accept_ref
from mtpkern.kernels.advance import Progress, advance, advance_ref
from mtpkern.kernels.kv_rollback import kv_rollback
from mtpkern.kernels.ngram import BLOCK, ngram, ngram_ref
from mtpkern.kernels.window_slots import window_slots

from .case import DTYPE, PAGE_SIZE, Call, KernelCase, normal


def window_slots_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
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
        yield KernelCase(name, f"B={B} T={T}", moved, inputs)


def accept_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """Drafts of which about half are accepted."""

    def inputs(device: str) -> Call:
        window, target = (torch.randint(2, (B, T + 1), device=device)[:, :T] for _ in range(2))
        out = window.new_empty(B), window.new_empty(B)
        decided = partial(accept_ref, window, target)
        return Call(lambda pdl: accept(window, target, out=out, pdl=pdl), decided, decided, decided)

    yield KernelCase("greedy", f"B={B} T={T}", 8 * B * (2 * T - 1) + 16 * B, inputs)


def advance_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """The end of a step, with drafts of which about half are accepted. Lengths and window are reset
    before each call, other state is not; the outputs and the window are compared.
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

    yield KernelCase("chain", f"B={B} T={T}", B * (8 * (5 * T + 14 + 2) + 8 * T), inputs)


def kv_rollback_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """A chain of which all rows are kept, and a tree of which every second row is kept, so that all
    of those but the first move. The lengths are reset before each call, in the baseline too.
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
        yield KernelCase(name, f"B={B} T={T} L={L} Hk={Hk} D={D}", moved, inputs)


def ngram_cases(model: ModelShape, B: int, T: int) -> Iterator[KernelCase]:
    """No match anywhere, the slowest case."""
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
    yield KernelCase("no match", f"B={B} K={T} known={known}", moved, inputs)
