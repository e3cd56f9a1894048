"""A foreign decode loop with pages, strides and a tree of its own, around two of our kernels."""

import torch
from torch import Tensor

from mtpkern.kernels.kv_rollback import kv_rollback
from mtpkern.kernels.verify_attention import verify_attention

# Heads before slots, K and V in one tensor: as vLLM lays out its cache.
PAGE, Hq, Hk, D, V = 16, 4, 2, 16, 50
# The last token, two guesses at the next, and one after the second.
TREE, PATHS = [0b0001, 0b0011, 0b0101, 0b1101], [[0, 1, 0], [0, 2, 3], [0, 2, 0]]


class Engine:
    """Attention between an embedding and a vocabulary, two requests, pages from a free list."""

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((V + 1, Hq, D), (V + 1, Hk, D), (V + 1, Hk, D), (V, Hq * D))
        normal = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
        self.q, self.k, self.v, self.head = normal
        self.cache = torch.full((1, 12, Hk, PAGE, 2 * D), float("nan"), device=device)
        self.pages = torch.tensor([[7, 2, 9, 4], [0, 11, 5, 3]], dtype=torch.int32, device=device)
        self.lengths = torch.zeros(2, dtype=torch.int64, device=device)

    def split(self) -> tuple[Tensor, ...]:
        return self.cache.transpose(2, 3).split(D, -1)

    def forward(self, window: Tensor, tree: Tensor | None = None) -> Tensor:
        place = self.lengths[:, None] + torch.arange(window.shape[1], device=window.device)
        page, offset = self.pages.long().gather(1, place // PAGE), place % PAGE
        k, v = self.split()
        k[0, page, offset], v[0, page, offset] = self.k[window], self.v[window]
        out = verify_attention(self.q[window], k[0], v[0], self.pages, self.lengths, tree=tree)
        return (out.flatten(2) @ self.head.T).argmax(-1)


def test_a_foreign_loop_decodes_with_a_tree_to_the_tokens_it_has_without(gpu: str) -> None:
    plain, ours = Engine(gpu), Engine(gpu)
    text = torch.tensor([[3], [8]]).to(gpu)
    for _ in range(41):
        text = torch.cat([text, plain.forward(text[:, -1:])], 1)
        plain.lengths += 1
    tree, text, written = torch.tensor([TREE, TREE]).to(gpu), text.cpu(), [1, 1]
    for step in range(16):
        # By turns the first guess is right, the second and the one after it are, or the second.
        ways, rows = [(step + b) % 3 for b in range(2)], []
        for b, way in enumerate(ways):
            last, a, c = text[b, written[b] - 1 : written[b] + 2].tolist()
            rows.append([(last, a, V, V), (last, V, a, c), (last, V, a, V)][way])
        target = ours.forward(torch.tensor(rows).to(gpu), tree).cpu()
        path = torch.tensor([PATHS[way] for way in ways])
        accepted = torch.tensor([1 + (way == 1) for way in ways]).to(gpu)
        kv_rollback(*ours.split(), ours.pages, ours.lengths, accepted, path=path.to(gpu))
        for b, n in enumerate(accepted.tolist()):
            expected = text[b, written[b] : written[b] + n + 1]
            assert torch.equal(target[b, path[b, : n + 1]], expected)
            written[b] += n + 1
