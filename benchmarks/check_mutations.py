"""The mutation check: faults planted in the kernels one at a time, each of which a test must catch.

    python benchmarks/check_mutations.py                 # all, about ten minutes
    python benchmarks/check_mutations.py --only linear   # those whose file or description has it

Works on a temporary copy of the checkout, on a CPU, through ttsem. First the tests must pass as
they are. Then, per fault, the tests of its op run until one fails. A fault that no test catches,
or that does not compile (a compiler is not a test), is listed and makes the exit code 1.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common import Finish, run

from mtpkern.arguments import Parser, at_least

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    """One change to kernels/<file>.py: `old`, which occurs there once, becomes `new`.

    The tests of `op` must catch it; the file is that op's unless it is given.
    """

    op: str
    what: str
    old: str
    new: str
    file: str = ""

    def path(self, place: Path) -> Path:
        return place / "kernels" / f"{self.file or self.op}.py"


FAULTS = [
    Fault(
        "linear",
        "the last input column is left out",
        "in_k = k < K\n",
        "in_k = k < K - 1\n",
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "the last input column is left out for many rows",
        "in_k = k < K - begin\n",
        "in_k = k < K - begin - 1\n",
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "columns past the end of x are read",
        "mask=(r < R)[None, :] & in_k[:, None], other=0.0)\n        acc =",
        "mask=(r < R)[None, :] & (k >= 0)[:, None], other=0.0)\n        acc =",
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "columns past the end of many rows are read",
        "mask=(r < R)[None, :] & in_k[:, None], other=0.0)\n        tail_x =",
        "mask=(r < R)[None, :] & (k >= 0)[:, None], other=0.0)\n        tail_x =",
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "rows past the end of the weights are read",
        "mask=in_n[:, None] & in_k[None, :],",
        "mask=(in_n | True)[:, None] & in_k[None, :],",
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "the tail begins one row late",
        "tail_r = tl.program_id(0) * (ROWS + TAIL) + ROWS + tl.arange",
        "tail_r = tl.program_id(0) * (ROWS + TAIL) + ROWS + 1 + tl.arange",
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "a further pass over the weights is of the first rows again",
        "    r = tl.program_id(0) * (ROWS + TAIL) + tl.arange(0, ROWS)",
        "    r = tl.arange(0, ROWS)",
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "the residual is read with the output's stride",
        "residual_ptr + r.to(tl.int64)[None, :] * stride_rr",
        "residual_ptr + r.to(tl.int64)[None, :] * stride_or",
    ),
    Fault(
        "linear",
        "rows that are not there are stored",
        "in_out = (n < N)[:, None] & (r < R)[None, :]",
        "in_out = (n < N)[:, None] & (r < R + 1)[None, :]",
    ),
    Fault(
        "linear",
        "the sum is rounded at every step",
        '        acc = tl.dot(w, x, acc, input_precision="ieee")\n',
        '        acc = tl.dot(w, x, acc, input_precision="ieee").to(tl.bfloat16).to(tl.float32)\n',
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "the bias is not added to many rows",
        "stride_ps, SEGMENTS)\n    _store_rows(acc, r, n, bias_ptr,",
        "stride_ps, SEGMENTS)\n    _store_rows(acc, r, n, None,",
    ),
    Fault(
        "linear",
        "the tail reads the weights a second time",
        "                tail_acc = tl.dot(w, tail_x,",
        "                in_w = (n < N)[:, None] & in_k[None, :]\n"
        "                ptrs = w_ptr + n.to(tl.int64)[:, None] * stride_wn + k[None, :]\n"
        "                w = tl.load(ptrs, mask=in_w, other=0.0)\n"
        "                tail_acc = tl.dot(w, tail_x,",
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "the grid has a block of columns too few",
        "(ceil_div(N, block_n),)",
        "(max(1, N // block_n),)",
    ),
    Fault(
        "linear",
        "the grid has a block of columns too few for many rows",
        "ceil_div(N, block_n), segments * H)",
        "max(1, N // block_n), segments * H)",
        "_skinny_matmul",
    ),
    Fault(
        "linear",
        "a tile of columns is skipped",
        "        n = first_n + i * CHUNK + tl.arange(0, CHUNK)\n        _store_sums(accs[i],",
        "        n = first_n + tl.arange(0, CHUNK)\n        _store_sums(accs[i],",
        "_skinny_matmul",
    ),
    Fault(
        "width_invariance",
        "segments are added in descending order",
        "tl.load(partial_ptr + i * stride_ps + offsets",
        "tl.load(partial_ptr + (SEGMENTS - 1 - i) * stride_ps + offsets",
        "_skinny_matmul",
    ),
    Fault(
        "width_invariance",
        "the smallest tier adds inputs without segments",
        "        if SEGMENT < K:\n",
        "        if SEGMENT > K:\n",
        "_skinny_matmul",
    ),
    Fault(
        "width_invariance",
        "segments follow the tier",
        "length, tier = segment(H * N, K), row_tier(R)",
        "length, tier = segment(H * N * row_tier(R), K), row_tier(R)",
        "_skinny_matmul",
    ),
    Fault(
        "width_invariance",
        "a segment leaves a stale partial sum",
        "partial_ptr += segment.to(tl.int64) * stride_ps",
        "partial_ptr += segment.to(tl.int64) * 0",
        "_skinny_matmul",
    ),
    Fault(
        "rms_norm",
        "eps is left out of the mean",
        "tl.rsqrt(tl.sum(x * x) / E + eps)",
        "tl.rsqrt(tl.sum(x * x) / E)",
    ),
    Fault(
        "rms_norm",
        "the mean is of the padded width",
        "tl.sum(x * x) / E",
        "tl.sum(x * x) / BLOCK_E",
    ),
    Fault(
        "rms_norm",
        "rows are taken in order, whatever ids say",
        "row = tl.load(ids_ptr + r)",
        "row = r",
    ),
    Fault(
        "gate_up_silu",
        "gate and up are swapped",
        "    y = gate / (1 + tl.exp(-gate)) * up",
        "    y = up / (1 + tl.exp(-up)) * gate",
    ),
    Fault(
        "gate_up_silu",
        "the bias of up is the gate's",
        "bias_ptr + F + f, mask",
        "bias_ptr + f, mask",
    ),
    Fault(
        "gate_up_silu",
        "many rows are multiplied without their norm",
        "    x = rms_norm(x, norm_w, eps, pdl=pdl)\n",
        "    x = rms_norm(x, norm_w, eps, pdl=pdl) if R <= 16 else x\n",
    ),
    Fault(
        "gate_up_silu",
        "the sums of up are the gate's",
        "partial_ptr, offsets + F, in_f",
        "partial_ptr, offsets, in_f",
    ),
    Fault(
        "qkv_rope_cache",
        "the sine has the wrong sign",
        "return low * cos - high * sin, high * cos + low * sin",
        "return low * cos + high * sin, high * cos - low * sin",
    ),
    Fault(
        "qkv_rope_cache",
        "the second half of a head is the first where sums are added",
        "partial_ptr, offsets + D // 2, in_n",
        "partial_ptr, offsets, in_n",
    ),
    Fault(
        "qkv_rope_cache",
        "V is rotated too",
        "head < HEADS + KV_HEADS, positions_ptr",
        "head < HEADS + 2 * KV_HEADS, positions_ptr",
    ),
    Fault(
        "qkv_rope_cache",
        "a slot of -1 is written",
        "in_k = (slot >= 0)[:, None]",
        "in_k = (slot >= -1)[:, None]",
    ),
    Fault(
        "qkv_rope_cache",
        "V is written with K's page stride",
        "v_rows = page * stride_vp",
        "v_rows = page * stride_kp",
    ),
    Fault(
        "qkv_rope_cache",
        "V is written with K's head stride",
        "(head - HEADS - KV_HEADS).to(tl.int64) * stride_vh",
        "(head - HEADS - KV_HEADS).to(tl.int64) * stride_kh",
    ),
    Fault(
        "qkv_rope_cache",
        "the slot's page is one off",
        "page, offset = slot // page_size, slot % page_size",
        "page, offset = slot // page_size, (slot + 1) % page_size",
    ),
    Fault(
        "qkv_rope_cache",
        "the last pair of a head takes the next head's dimensions",
        "n = pair // (D // 2) * D + pair % (D // 2)",
        "n = (pair + 1) // (D // 2) * D + pair % (D // 2)",
    ),
    Fault(
        "qkv_rope_cache",
        "K's heads are normalised with q's gain",
        "ptr, norm_ptr = k_ptr + offset + (head - HEADS).to(tl.int64) * stride_kh, k_norm_ptr",
        "ptr, norm_ptr = k_ptr + offset + (head - HEADS).to(tl.int64) * stride_kh, q_norm_ptr",
    ),
    Fault(
        "qkv_rope_cache",
        "the second half of a head is left out of its norm",
        "tl.sum(low * low + high * high) / D",
        "tl.sum(low * low) * 2 / D",
    ),
    Fault(
        "medusa_blocks",
        "all heads read the first head's weights",
        "    w_ptr += h * stride_wh\n",
        "    w_ptr += 0 * h * stride_wh\n",
    ),
    Fault(
        "medusa_blocks",
        "the residual is the first head's at every depth",
        "    x_ptr += h * stride_xh\n    acc = multiply_rows(",
        "    x_ptr += 0 * h * stride_xh\n    acc = multiply_rows(",
    ),
    Fault(
        "medusa_blocks",
        "the residual of many rows is the first head's at every depth",
        "SEGMENTS)\n    x_ptr += h * stride_xh\n",
        "SEGMENTS)\n    x_ptr += 0 * h * stride_xh\n",
    ),
    Fault(
        "medusa_blocks",
        "many rows of all heads read the first head's weights",
        "    w_ptr += h * stride_wh + begin\n",
        "    w_ptr += 0 * h * stride_wh + begin\n",
        "_skinny_matmul",
    ),
    Fault(
        "medusa_blocks",
        "the residual is left out",
        "y = x.to(tl.float32) + gate / (1 + tl.exp(-gate))",
        "y = gate / (1 + tl.exp(-gate))",
    ),
    Fault(
        "medusa_blocks",
        "a block overwrites what its neighbours still read",
        "other = torch.empty_like(heads) if depth > 1 else heads",
        "other = heads",
    ),
    Fault(
        "qkv_rope_cache",
        "a value is NaN",
        "low, high = tl.where(low == low, low, 0.0), tl.where(high == high, high, 0.0)",
        "low, high = tl.where(low == low, low, 0.0), high",
    ),
    Fault(
        "verify_attention",
        "a key that is NaN reaches rows that do not see it",
        's = tl.where(sees, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))',
        's = tl.dot(q, k, input_precision="ieee") * scale\n'
        '        s += tl.where(sees, 0.0, float("-inf"))',
    ),
    Fault(
        "verify_attention",
        "a row sees the key behind its own",
        "sees = n[None, :] <= position[:, None]",
        "sees = n[None, :] <= position[:, None] + 1",
    ),
    Fault(
        "verify_attention",
        "a row does not see its own key",
        "sees = n[None, :] <= position[:, None]",
        "sees = n[None, :] < position[:, None]",
    ),
    Fault(
        "verify_attention",
        "a split begins one key late",
        "begin = tl.maximum(begin_of_split, first",
        "begin = tl.maximum(begin_of_split + 1, first",
    ),
    Fault(
        "verify_attention",
        "the keys are of the next page",
        "page_table_ptr + n // PAGE_SIZE, mask",
        "page_table_ptr + (n + 1) // PAGE_SIZE, mask",
    ),
    Fault(
        "verify_attention",
        "V is read with K's page stride",
        "v_rows = page * stride_vp",
        "v_rows = page * stride_kp",
    ),
    Fault(
        "verify_attention",
        "keys that nobody sees are read",
        "in_v = in_reach[:, None] & (d < D)[None, :]",
        "in_v = (n >= 0)[:, None] & (d < D)[None, :]",
    ),
    Fault(
        "verify_attention",
        "the sum is not rescaled when the maximum moves",
        "z = tl.fma(z_next, weight, z * decay)",
        "z = tl.fma(z_next, weight, z)",
        "_split_kv",
    ),
    Fault(
        "verify_attention",
        "the values are not rescaled when the maximum moves",
        "acc.shape), acc * decay[:, None])",
        "acc.shape), acc)",
        "_split_kv",
    ),
    Fault(
        "verify_attention",
        "granules form a chain within a split",
        "if (start + KEYS) % (FAN * KEYS) == 0:",
        "if start < 0:",
    ),
    Fault(
        "verify_attention",
        "a slice begins at the first key that is seen, aligned to nothing",
        "first // KEYS * KEYS)\n",
        "first)\n",
    ),
    Fault(
        "verify_attention",
        "splits count from the first key that is seen",
        "begin_of_split = (first // split_size + split) * split_size",
        "begin_of_split = first + split * split_size",
    ),
    Fault(
        "verify_attention",
        "the sliding window is one key too long",
        "sees &= n[None, :] > position[:, None] - WINDOW",
        "sees &= n[None, :] >= position[:, None] - WINDOW",
    ),
    Fault(
        "verify_attention",
        "a tree's row sees all nodes",
        "((ancestors[:, None] >> node[None, :]) & 1 != 0)",
        "((ancestors[:, None] >> node[None, :]) & 1 >= 0)",
    ),
    Fault(
        "verify_attention",
        "a tree's positions are those of a chain",
        "position = length + node_depth(ancestors)",
        "position = length + t",
    ),
    Fault(
        "verify_attention",
        "packed rows take another group's query heads",
        "t, h = r // GROUP, kv_head * GROUP + r % GROUP",
        "t, h = r // GROUP, kv_head + (r % GROUP) * KV_HEADS",
    ),
    Fault(
        "verify_attention",
        "the merge leaves out the last split",
        "(split <= last)",
        "(split <= tl.maximum(last - 1, first))",
        "_split_kv",
    ),
    Fault(
        "verify_attention",
        "the merge loses a split",
        "        m, z, acc = merged(m, z, acc, m_2, z_2, acc_2)\n",
        "",
        "_split_kv",
    ),
    Fault(
        "verify_attention",
        "the merge goes on in a chain where the tree ends a group",
        "if (split_size < TOP // FAN) &",
        "if (split_size < 0) &",
        "_split_kv",
    ),
    Fault(
        "verify_attention",
        "the merge reads splits from where the row itself begins to see",
        "* splits - first_of_all // split_size",
        "* splits - first",
        "_split_kv",
    ),
    Fault(
        "verify_attention",
        "a row that sees nothing is NaN",
        "out = acc / tl.where(z == 0.0, 1.0, z)[:, None]",
        "out = acc / z[:, None]",
        "_split_kv",
    ),
    Fault(
        "multi_head_projection",
        "columns behind the vocabulary win",
        "ranks = tl.where((v < V)[None, :], rank(logits, v[None, :]), LOWEST)",
        "ranks = rank(logits, v[None, :])",
    ),
    Fault(
        "multi_head_projection",
        "the sum of exponentials counts columns behind the vocabulary",
        "total = sum_columns(tl.where((v < V)[None, :], p, 0.0))",
        "total = sum_columns(p)",
    ),
    Fault(
        "multi_head_projection",
        "a rank holds the column and not its complement",
        "(0x7FFFFFFF - column).to(tl.int64)",
        "column.to(tl.int64)",
        "_ranking",
    ),
    Fault(
        "multi_head_projection",
        "the second best is the best again",
        "ranks = tl.where(ranks == best[:, None], LOWEST, ranks)",
        "ranks = tl.where(ranks == best[:, None] + 1, LOWEST, ranks)",
    ),
    Fault(
        "multi_head_projection",
        "the merge does not rescale a tile's sum",
        "scaled = sums * tl.exp(_finite(ranked_value(ranks)) - shift)",
        "scaled = sums",
    ),
    Fault(
        "multi_head_projection",
        "chunks of rows are one row apart",
        "            r = first + c * CHUNK + rows\n",
        "            r = first + c + rows\n",
    ),
    Fault(
        "accept",
        "a draft is compared with its own target",
        "draft = tl.load(window_ptr + b * stride_wb + t + 1,",
        "draft = tl.load(window_ptr + b * stride_wb + t,",
    ),
    Fault(
        "accept",
        "agreeing drafts behind a fallen one count",
        "tl.min(tl.where(agrees, agrees.shape[0], t))",
        "tl.sum(agrees.to(tl.int32))",
    ),
    Fault(
        "accept",
        "the bonus is the target of the next row",
        "tl.load(target_ptr + b * stride_tb + accepted))",
        "tl.load(target_ptr + b * stride_tb + accepted + 1))",
    ),
    Fault(
        "accept",
        "target is read with the window's stride",
        "tl.load(target_ptr + b * stride_tb + t,",
        "tl.load(target_ptr + b * stride_wb + t,",
    ),
    Fault(
        "advance",
        "a draft is compared with its own target",
        "draft = tl.load(window_ptr + b * stride_wb + t + 1,",
        "draft = tl.load(window_ptr + b * stride_wb + t,",
    ),
    Fault(
        "advance",
        "a finished sequence advances",
        "count = (accepted + 1) * active",
        "count = accepted + 1",
    ),
    Fault(
        "advance",
        "the bonus is the target of the next row",
        "tl.sum(tl.where(t == accepted, target, 0))",
        "tl.sum(tl.where(t == accepted + 1, target, 0))",
    ),
    Fault(
        "advance",
        "tokens lie one place early",
        "stride_tb + length - count + 1 + t",
        "stride_tb + length - count + t",
    ),
    Fault(
        "advance",
        "a draft stands behind a row that chose no token",
        "in_drafts & (draft == target) & finite, t)",
        "in_drafts & (draft == target), t)",
    ),
    Fault(
        "advance",
        "NaN is a finite logit",
        'finite = tl.abs(largest) < float("inf")',
        'finite = tl.abs(largest) != float("inf")',
    ),
    Fault(
        "advance",
        "a finished sequence is broken",
        "broken = tl.max(((t == accepted) & ~finite).to(tl.int64)) * active",
        "broken = tl.max(((t == accepted) & ~finite).to(tl.int64))",
    ),
    Fault(
        "advance",
        "a rejected row breaks a sequence",
        "broken = tl.max(((t == accepted) & ~finite)",
        "broken = tl.max((in_window & ~finite)",
    ),
    Fault(
        "advance",
        "a broken sequence goes on",
        "goes_on &= broken == 0",
        "goes_on &= broken >= 0",
    ),
    Fault(
        "advance",
        "the largest logits are read with the target's stride",
        "largest_ptr + b * stride_ab",
        "largest_ptr + b * stride_gb",
    ),
    Fault(
        "advance",
        "an end token ends also where it was not emitted",
        "ended |= emitted & (target ==",
        "ended |= in_window & (target ==",
    ),
    Fault(
        "advance",
        "a sequence goes on at its limit",
        "(length + 1 < tl.load(limits_ptr + b))",
        "(length + 1 <= tl.load(limits_ptr + b))",
    ),
    Fault(
        "advance",
        "the ring's slot is the step before's",
        "ring_ptr += clock % ring_slots",
        "ring_ptr += (clock - 1) % ring_slots",
    ),
    Fault(
        "advance",
        "a negative log-probability spoils its word's step",
        ".to(tl.int64) & 0xFFFFFFFF",
        ".to(tl.int64)",
    ),
    Fault(
        "kv_rollback",
        "one row too few moves",
        "count = tl.load(accepted_ptr + b) + 1\n",
        "count = tl.load(accepted_ptr + b)\n",
    ),
    Fault(
        "kv_rollback",
        "a finished sequence moves too",
        "        count *= tl.load(active_ptr + b)\n",
        "        count += 0 * tl.load(active_ptr + b)\n",
    ),
    Fault(
        "kv_rollback",
        "the target lies in the source's page",
        "k_target = target_page * stride_kp",
        "k_target = source_page * stride_kp",
    ),
    Fault(
        "kv_rollback",
        "V is read with K's slot stride",
        "v_source = source_page * stride_vp + source % PAGE_SIZE * stride_vs",
        "v_source = source_page * stride_vp + source % PAGE_SIZE * stride_ks",
    ),
    Fault(
        "kv_rollback",
        "only the first layer moves",
        "    v_ptr += layer * stride_vl + head * stride_vh\n",
        "    v_ptr += 0 * layer * stride_vl + head * stride_vh\n",
    ),
    Fault(
        "kv_rollback",
        "a row is written before another is read",
        "    tl.store(v_ptr + v_target",
        "    k = tl.load(k_ptr + k_source[:, None] + d[None, :], mask=mask, other=0.0)\n"
        "    tl.store(k_ptr + k_target[:, None] + d[None, :], k, mask=mask)\n"
        "    tl.store(v_ptr + v_target",
    ),
    Fault(
        "kv_rollback",
        "lengths advance without the bonus",
        "advance = tl.load(accepted_ptr + b, mask=b < B, other=0) + 1\n",
        "advance = tl.load(accepted_ptr + b, mask=b < B, other=0)\n",
    ),
    Fault(
        "ngram",
        "the end matches itself",
        "    match = start < pattern\n",
        "    match = start <= pattern\n",
    ),
    Fault(
        "ngram",
        "a block's last start is left out",
        "    match = start < pattern\n",
        "    match = (start < pattern) & (start % BLOCK != BLOCK - 1)\n",
    ),
    Fault(
        "ngram",
        "the copy begins a token early",
        "copied = latest + SIZE + k % period",
        "copied = latest + SIZE - 1 + k % period",
    ),
    Fault(
        "ngram",
        "a copy does not go on periodically",
        "copied = latest + SIZE + k % period",
        "copied = latest + SIZE + k",
    ),
    Fault(
        "ngram",
        "the earliest match of a block wins",
        "tl.max(tl.where(match, start, -1)))",
        "(tl.min(tl.where(match, start, 2**40)) + 1) % (2**40 + 1) - 1)",
    ),
    Fault(
        "ngram",
        "the last block is lost",
        "searched = tl.cdiv(tl.maximum(pattern, 0), BLOCK)",
        "searched = tl.maximum(pattern, 0) // BLOCK",
    ),
    Fault(
        "ngram",
        "blocks past the first 128 are lost",
        "for first in range(0, searched, 128):",
        "for first in range(0, tl.minimum(searched, 128), 128):",
    ),
    Fault(
        "ngram",
        "the earliest block with a match wins",
        "latest = tl.maximum(latest, tl.max(found))",
        "earliest = tl.min(tl.where(found < 0, 2**40, found))\n"
        "        latest = tl.where(earliest == 2**40, latest, earliest)",
    ),
    Fault(
        "rope_cache",
        "the sine has the wrong sign",
        "low * cos - high * sin, high * cos + low * sin",
        "low * cos + high * sin, high * cos - low * sin",
    ),
    Fault(
        "rope_cache",
        "V is rotated too",
        "cos, sin = tl.where(is_v[:, None], 1.0, cos), tl.where(is_v[:, None], 0.0, sin)",
        "cos, sin = cos + 0.0, sin + 0.0",
    ),
    Fault(
        "rope_cache",
        "V is normalised too",
        "low = tl.where(is_v[:, None], low, low * factor[:, None] * gain_low)",
        "low = low * factor[:, None] * tl.where(is_v[:, None], 1.0, gain_low)",
    ),
    Fault(
        "rope_cache",
        "K's heads are normalised with q's gain",
        "tl.where(is_q[:, None], q_norm_ptr + d[None, :], k_norm_ptr + d[None, :])",
        "tl.where(is_q[:, None], q_norm_ptr + d[None, :], q_norm_ptr + d[None, :])",
    ),
    Fault(
        "rope_cache",
        "the second half of a head is left out of its norm",
        "tl.sum(low * low + high * high, 1) / D",
        "tl.sum(low * low, 1) * 2 / D",
    ),
    Fault(
        "rope_cache",
        "a slot of -1 is written",
        "live = (slot >= 0) & in_row",
        "live = (slot >= -1) & in_row",
    ),
    Fault(
        "rope_cache",
        "the slot's page is one off",
        "page, offset = slot // page_size, slot % page_size",
        "page, offset = slot // page_size, (slot + 1) % page_size",
    ),
    Fault(
        "rope_cache",
        "V is written with K's page stride",
        "v_rows = v_ptr + page * stride_vp",
        "v_rows = v_ptr + page * stride_kp",
    ),
    Fault(
        "rope_cache",
        "V is written with K's slot stride",
        "offset * stride_vs + v_head",
        "offset * stride_ks + v_head",
    ),
    Fault(
        "rope_cache",
        "V is written with K's head stride",
        "v_head * stride_vh",
        "v_head * stride_kh",
    ),
    Fault(
        "rope_cache",
        "heads of the last block are written past the row",
        "in_row = (h < HEADS + 2 * KV_HEADS)[:, None] & in_d",
        "in_row = (h < HEADS + 3 * KV_HEADS)[:, None] & in_d",
    ),
    Fault(
        "rope_cache",
        "a row's q lies a head's stride on",
        "q_rows = q_ptr + r * stride_qr",
        "q_rows = q_ptr + r * D",
    ),
    Fault(
        "rope_cache",
        "x is read with q's row stride",
        "qkv_ptr + r * stride_xr",
        "qkv_ptr + r * stride_qr",
    ),
    Fault(
        "sample",
        "columns behind the last one win",
        "tl.where(v < columns, rank(logits, v), LOWEST)",
        "rank(logits, v)",
    ),
    Fault(
        "sample",
        "blocks after the first do not count",
        "range(0, columns, BLOCK)",
        "range(0, tl.minimum(columns, BLOCK), BLOCK)",
    ),
    Fault(
        "sample",
        "the highest of equal columns wins",
        "(0x7FFFFFFF - column).to(tl.int64)",
        "(0x7FFFFFFF - column + 2 * column).to(tl.int64)",
        "_ranking",
    ),
    Fault(
        "sample",
        "negative logits rank upside down",
        "key = bits ^ ((bits >> 31) & 0x7FFFFFFF)",
        "key = bits",
        "_ranking",
    ),
    Fault(
        "window_slots",
        "a finished sequence has slots",
        "        live &= tl.load(active_ptr + b, mask=in_rows, other=0) != 0\n",
        "        live &= tl.load(active_ptr + b, mask=in_rows, other=0) >= 0\n",
    ),
    Fault(
        "window_slots",
        "the page is the first row's",
        "page = tl.load(page_table_ptr + b * stride_pb + place // page_size",
        "page = tl.load(page_table_ptr + b * stride_pb + length // page_size",
    ),
    Fault(
        "window_slots",
        "a node counts among its own ancestors",
        "return tl.maximum(bits.to(tl.int32) - 1, 0)",
        "return bits.to(tl.int32)",
    ),
]


class Verdict(NamedTuple):
    """What became of a fault: `caught` by the test `by`, with its message."""

    fault: Fault
    caught: bool
    by: str
    seconds: float


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="faults whose file or description has it")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="faults tried at a time")
    return run(parser, measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    faults = [f for f in FAULTS if args.only in f.op + f.file or args.only in f.what]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        ops = dict.fromkeys(fault.op for fault in faults)
        with args.status.phase("testing without faults", len(ops), "ops") as phase:
            for op in ops:
                result = run_tests(checkout(Path(work) / f"sound_{op}"), op)
                if result.returncode:
                    with args.status.paused():
                        print(result.stdout[-3000:], result.stderr[-1000:], sep="\n")
                        print(f"tests/kernels/test_{op}.py fails without any fault")
                    return 1
                phase.advance()
        print("| op | fault | caught by | seconds |\n|---|---|---|---|", flush=True)
        places = [Path(work) / str(i) for i in range(len(faults))]
        verdicts = []
        with args.status.phase("planting faults", len(faults)) as phase:
            for verdict in pool.map(plant, faults, places):
                fault, caught, by, seconds = verdict
                by = by if caught else f"**{by}**"
                with args.status.paused():
                    print(f"| {fault.op} | {fault.what} | {by} | {seconds:.0f} |", flush=True)
                verdicts.append(verdict)
                phase.advance()
    survivors = [verdict.fault.what for verdict in verdicts if not verdict.caught]
    report = {"schema": 1, "faults": len(faults), "caught": len(faults) - len(survivors)}
    rows = [v.fault._asdict() | v._asdict() | {"fault": v.fault.what} for v in verdicts]
    line = report | {"survivors": survivors}
    return finish(report | {"rows": rows}, 1 if survivors else 0, line)


def plant(fault: Fault, place: Path) -> Verdict:
    """Run the tests of a fault's op on a copy that has the fault."""
    file = fault.path(checkout(place))
    source = file.read_text(encoding="utf-8")
    if source.count(fault.old) != 1:
        times = source.count(fault.old)
        return Verdict(fault, False, f"the text to replace occurs {times} times", 0.0)
    file.write_text(source.replace(fault.old, fault.new), encoding="utf-8")
    begin = time.monotonic()
    result = run_tests(place, fault.op)
    caught, by = reading(result.returncode, result.stdout.splitlines())
    shutil.rmtree(place)
    return Verdict(fault, caught, by, time.monotonic() - begin)


def checkout(place: Path) -> Path:
    """Copy what the tests need."""
    place.mkdir()
    without = shutil.ignore_patterns("__pycache__", "*.safetensors", ".*")
    for folder in ("kernels", "mtpkern", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, place / folder, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def run_tests(place: Path, op: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ttsem.sanitize", "pytest", "-q", "-x", "-m", "kernel"]
    # Ours alone: a kernel compiled elsewhere would show its own source lines.
    environment = os.environ | {
        "PYTHONPATH": str(place),
        "TRITON_CACHE_DIR": str(place.parent / "triton"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, f"tests/kernels/test_{op}.py"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )


def reading(code: int, lines: Iterable[str]) -> tuple[bool, str]:
    """Whether a test caught the fault, and which, out of what pytest printed."""
    lines = list(lines)
    if code == 0:
        return False, "SURVIVED"
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if code != 1 or not failed:
        return False, f"pytest ended with {code}: {lines[-1] if lines else 'nothing printed'}"
    name = failed[0].split(" - ")[0].split("::")[-1]
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E  ")]
    if any("CompilationError" in error or "Unjudged" in error for error in errors):
        return False, "does not compile"
    stray = r"(?:reads|writes) \d+ element\(s\).*?`\w+`"
    race = r"program instances .*? both touch"
    fault = re.search(rf"KernelFault: .*?({stray}|{race})", "\n".join(errors))
    return True, f"`{name}`" + (f": {fault[1]}" if fault else "")


if __name__ == "__main__":
    sys.exit(main())
