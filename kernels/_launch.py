"""Shared by all launchers: Triton where it is installed, kernel symbols, tile sizes, checks.

The sizes depend on a weight's shape and on the tier of rows only, so that every launch of an op
uses the same ones and a row's bits do not depend on them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

# There is no wheel for macOS and Windows; the definitions work without it.
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Triton is imported when the first kernel is compiled, since it takes 0.2 s and 70 MB, which the
# CPU does without. Until then, in every module that has kernels, `tl` is None, device functions are
# plain Python and constants are integers; `import_triton` replaces them.
tl: Any = None  # triton.language

# The globals of the modules that have kernels, by id.
_scopes: dict[int, dict[str, Any]] = {}
_devices: set[Callable[..., Any]] = set()
_imported = False

# The blocks that saturate the device, at least: one per multiprocessor of an H100.
FILL = 132

# Row counts that share one pass over the weights. Rows are padded to the smallest tier that fits;
# more rows than the largest tier take further passes.
TIERS = (8, 16, 32, 64, 128, 192)

# Elements of a weight's row in a chunk of K, by their bytes. The segments of a matmul interleave in
# chunks. Float32 is multiplied without tensor cores, with all of a tile's inputs in registers.
CHUNK_OF_K = {2: 128, 4: 32}

# Columns per block of the launch that adds up the segments of a matmul with more than 16 rows.
BLOCK_END = 512

# Arguments that count rows, sequences and the like, in the letters of the README. By default Triton
# specialises a kernel for the value 1 and for multiples of 16, and the bits might differ.
COUNTS = ("B", "R", "S", "T")

# Arguments with a row per sequence: a view of a batch may begin at any slot, and so at any multiple
# of a row's bytes. By default Triton specialises a kernel for multiples of 16 bytes. All are read
# one number at a time; tensors that are read 16 bytes at a time (x, weights, K, V) are not listed.
PER_SEQUENCE = (
    *("page_table_ptr", "lengths_ptr", "known_ptr", "tokens_ptr", "window_ptr", "tree_ptr"),
    "ids_ptr",
    *("active_ptr", "limits_ptr", "ends_ptr", "source_ptr", "drafted_ptr", "clock_ptr", "ring_ptr"),
)
PER_SEQUENCE_STRIDES = ("stride_pb", "stride_tb")


def jit(
    *named: str, do_not_specialize: tuple[str, ...] = (), definition: str | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Compile a kernel `_<op>_kernel` as mtpkern_<op>_<values of the constants `named`>.

    `do_not_specialize` names further counts. `definition` is the function that an error recommends
    where the kernel cannot run; None: <name of the kernel's file>_ref.
    """

    def decorate(fn: Callable[..., Any]) -> Any:
        reference = definition or f"{fn.__module__.rpartition('.')[2]}_ref"
        return _Kernel(fn, named, do_not_specialize, reference)

    return decorate


class _Kernel:
    """A kernel whose launch raises an error that names its definition where it cannot run."""

    def __init__(
        self,
        fn: Callable[..., Any],
        named: tuple[str, ...],
        do_not_specialize: tuple[str, ...],
        definition: str,
    ):
        _record(fn)
        self.fn, self.named, self.definition = fn, named, definition
        self.do_not_specialize = (*COUNTS, *PER_SEQUENCE_STRIDES, *do_not_specialize)
        self.arguments = fn.__code__.co_varnames

    @functools.cached_property
    def compiled(self) -> Any:
        """Triton's function, or None where Triton is not installed."""
        op = self.fn.__name__.strip("_").removesuffix("_kernel")

        def symbol(specialization: Any) -> str:
            values = (specialization.constants[name] for name in self.named)
            return "_".join([f"mtpkern_{op}", *(str(int(value)) for value in values)])

        if not HAS_TRITON:
            return None
        return import_triton().jit(
            self.fn,
            repr=symbol,
            do_not_specialize=self.do_not_specialize,
            do_not_specialize_on_alignment=PER_SEQUENCE,
            launch_metadata=_costs,
        )

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """A launch over `grid`: the kernel's arguments, `num_warps`, `pdl` and further options."""

        def launch(*args: Any, num_warps: int, pdl: bool, **options: Any) -> None:
            self.check(**dict(zip(self.arguments, args, strict=False)))
            options |= {"PDL": pdl, "launch_pdl": pdl, "enable_fp_fusion": True}
            self.compiled[grid](*args, num_warps=num_warps, **options)

        return launch

    def check(self, **arguments: Any) -> None:
        """Raise the error of a launch with `arguments`, for an op that launches another first."""
        op = self.definition.removesuffix("_ref")
        if self.compiled is None:
            raise ImportError(
                f"{op} needs Triton, which is not installed; {self.definition} does not"
            )
        for name, value in arguments.items():
            if isinstance(value, Tensor) and not _is_reachable(value):
                raise ValueError(
                    f"{op} needs tensors on a GPU, got {name.removesuffix('_ptr')} on the CPU; "
                    f"its definition, {self.definition}, takes those"
                )


def _is_reachable(tensor: Tensor) -> bool:
    """Whether a GPU can read the tensor: it can read the host's pinned memory, too."""
    return tensor.device.type != "cpu" or tensor.is_pinned()


def _costs(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Bytes of weights and FLOPs of a matmul, for profilers that ask for them (Proton).

    The bytes of other kernels depend on counts that are on the device.
    """
    costs, w = {"name": metadata.name}, args.get("w_ptr")
    if w is not None and w.dim() > 1:
        costs["bytes"] = w.numel() * w.element_size()
        costs[f"flops{8 * w.element_size()}"] = 2 * w.numel() * args["R"]
    return costs


class _Constant(int):
    """What `constant` returns before Triton is imported."""


def constant(value: int) -> Any:
    """A constant of a module that its kernels may read."""
    return tl.constexpr(value) if _imported else _Constant(value)


def device(fn: Callable[..., Any]) -> Any:
    """Compile a function that kernels call."""
    _record(fn)
    _devices.add(fn)
    return _jitted(fn) if _imported else fn


def _record(fn: Callable[..., Any]) -> None:
    """Record that the module of `fn` has kernels."""
    _scopes[id(fn.__globals__)] = fn.__globals__


@functools.cache
def import_triton() -> Any:
    """The module triton, imported at the first call; ImportError where it is not installed."""
    global tl, _imported
    triton = importlib.import_module("triton")
    tl, _imported = importlib.import_module("triton.language"), True
    for scope in _scopes.values():
        for name, value in scope.items():
            if name == "tl":
                scope[name] = tl
            elif isinstance(value, _Constant):
                scope[name] = tl.constexpr(int(value))
            elif isinstance(value, FunctionType) and value in _devices:
                scope[name] = _jitted(value)
    return triton


@functools.cache
def _jitted(fn: Callable[..., Any]) -> Any:
    return importlib.import_module("triton").jit(fn)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is no smaller than n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def row_tier(rows: int) -> int:
    """The tier that holds `rows` rows, or the largest one."""
    return next((tier for tier in TIERS if rows <= tier), TIERS[-1])


def segments(N: int, K: int) -> int:
    """Segments into which a matmul [N, K] splits K; their sums are added in this order.

    A segment is every `segments(N, K)`th chunk of K. Four, one per warp of a block of 16 columns,
    unless there are many columns and they are short. The rows play no part, so that a row's sums
    are the same in every tier.
    """
    return 1 if N >= 64 * FILL or (N >= 16 * FILL and 2 * N > 3 * K) else 4


def column_tile(N: int, K: int, tier: int, element_size: int) -> int:
    """Output columns per block: many, since each block reads all of x, but few enough for every
    multiprocessor to have a block, and in float32 few enough for the registers."""
    if tier <= 16:  # a block runs through all segments, and x is small beside the weights
        return 16 if segments(N, K) > 1 else 64
    wide = (128, 64) if tier >= 128 and element_size == 2 else (64,)
    return next((n for n in wide if ceil_div(N, n) * segments(N, K) >= 0.9 * FILL), 32)


def depth_tile(tier: int, element_size: int) -> tuple[int, int]:
    """For more than 16 rows: bytes of a row that a block loads per iteration, and Triton's
    num_stages, which is the number of loads in flight plus one: at most 96 KB, so that two blocks
    fit on a multiprocessor.

    Float32 is multiplied without tensor cores, with all of a tile's inputs in registers.
    """
    deep = 256 if element_size == 2 else 128
    return {32: (deep, 5), 64: (deep, 4), 128: (128, 4), 192: (128, 3)}[tier]


def few_rows_stages(blocks: int, bytes_of_stage: int) -> int:
    """Triton's num_stages for up to 16 rows: as many loads in flight as leave room for an equal
    number of blocks on every multiprocessor. With room for more, some get more than others."""
    kilobytes = {1: 120, 3: 72}.get(ceil_div(blocks, FILL), 96)
    return min(8, 1 + min(kilobytes, shared_kilobytes()) * 1024 // bytes_of_stage)


def shared_kilobytes() -> int:
    """Shared memory that a block may have for its loads on this GPU."""
    return 96 if compute_capability() in (86, 89, 120, 121) else 160


def has_wgmma(element_size: int) -> bool:
    """Whether Triton multiplies tiles with at least 64 rows of the left operand with wgmma.

    On an H200 its sums equal those of mma.sync in every bit (tests/kernels/test_row_invariance.py).
    The tensor cores of sm_100 have instructions of their own, for which this is not known.
    """
    return element_size == 2 and compute_capability() == 90


def compute_capability() -> int:
    """Of this GPU: 90 for sm_90. Where there is none, tensors have no data, and 90 is assumed."""
    try:
        arch: int = import_triton().runtime.driver.active.get_current_target().arch
    except RuntimeError:  # no driver
        return 90
    return arch


def check_shape(name: str, tensor: Tensor, symbols: str, *shape: int) -> None:
    """Raise ValueError unless `tensor` has `shape` and a last stride of 1.

    `symbols` is the shape in letters, as in "[R, K]".
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {symbols}={list(shape)}, got {list(tensor.shape)}")
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have last stride 1, got strides {list(tensor.stride())}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless `tensor` is of `dtype`."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


@device
def wait_for_producer():
    """Let the next kernel start its prologue, then wait for the previous one (sm_90 and newer).

    Belongs before the first read of an earlier kernel's output and before the first write to
    memory that one may still read. Every kernel of a chain needs it: the wait covers the previous
    launch only.
    """
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@device
def prefetch_l2(w_ptr, n, in_n, stride_wn, k, K):
    """Prefetch the lines of 128 bytes at k of the rows n of w [N, K], of which in_n exist."""
    ptrs = w_ptr + n.to(tl.int64)[:, None] * stride_wn + k[None, :]
    # For a row or column that does not exist, any address in w will do.
    ptrs = tl.where(in_n[:, None] & (k < K)[None, :], ptrs, w_ptr)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptrs],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
