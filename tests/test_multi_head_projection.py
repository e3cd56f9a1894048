"""multi_head_projection: the LM head and every parallel head as the equations say."""

import torch
import torch.nn.functional as F

from mtpkern.kernels.linear import pack_ref
from mtpkern.kernels.multi_head_projection import multi_head_projection_ref


def test_each_head_is_its_stack_of_residual_blocks_through_the_same_vocabulary() -> None:
    torch.manual_seed(0)
    width, vocabulary, rows = 24, 101, 5
    x, norm, head = torch.randn(rows, width), torch.randn(width), torch.randn(vocabulary, width)
    raw = [[(torch.randn(width, width), torch.randn(width)) for _ in range(2)] for _ in range(3)]
    blocks = [[pack_ref(w, b) for w, b in stack] for stack in raw]
    normed, logits = multi_head_projection_ref(x, norm, 1e-5, pack_ref(head), blocks)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(logits[:, 0], expected @ head.T, atol=1e-4, rtol=1e-4)
    for h, stack in enumerate(raw):
        hidden = expected
        for w, b in stack:
            hidden = hidden + F.silu(hidden @ w.T + b)
        torch.testing.assert_close(logits[:, 1 + h], hidden @ head.T, atol=1e-2, rtol=1e-4)


def test_heads_beside_it_do_not_move_the_language_models_bits() -> None:
    torch.manual_seed(0)
    x, norm, head = torch.randn(5, 24).bfloat16(), torch.ones(24).bfloat16(), torch.randn(101, 24)
    vocabulary = pack_ref(head.bfloat16())
    blocks = [[pack_ref(torch.randn(24, 24).bfloat16(), torch.randn(24).bfloat16())]] * 4
    alone = multi_head_projection_ref(x[2:3], norm, 1e-5, vocabulary)[1]
    beside = multi_head_projection_ref(x, norm, 1e-5, vocabulary, blocks)[1]
    torch.testing.assert_close(beside[2, 0], alone[0, 0], atol=0, rtol=0)
