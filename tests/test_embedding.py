"""A foreign decode loop that takes two operators and nothing else: its pages, its strides, its tree."""

import torch
from torch import Tensor

from mtpkern.kernels.kv_rollback import kv_rollback
from mtpkern.kernels.verify_attention import verify_attention

# Heads before slots, K and V in one tensor: as vLLM lays out its cache.
PAGE, Hq, Hk, D, V = 16, 4, 2, 16, 50
# The last token, two guesses at the next, and one behind the second.
TREE, PATHS = [0b0001, 0b0011, 0b0101, 0b1101], {1: [0, 1], 2: [0, 2, 3]}


class Engine:
    """Attention between an embedding and a vocabulary, two requests, pages from a free list."""

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((V, Hq, D), (V, Hk, D), (V, Hk, D), (V, Hq * D))
        normal = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
        self.q, self.k, self.v, self.head = normal
        self.cache = torch.full((1, 12, Hk, PAGE, 2 * D), float("nan"), device=device)
        self.pages = torch.tensor([[7, 2, 9, 4], [0, 11, 5, 3]], dtype=torch.int32, device=device)
        self.lengths = torch.zeros(2, dtype=torch.int64, device=device)

    def split(self) -> tuple[Tensor, Tensor]:
        k, v = self.cache.transpose(2, 3).split(D, -1)
        return k, v

    def forward(self, window: Tensor, tree: Tensor | None = None) -> Tensor:
        place = self.lengths[:, None] + torch.arange(window.shape[1], device=window.device)
        page, offset = self.pages.long().gather(1, place // PAGE), place % PAGE
        k, v = self.split()
        k[0, page, offset], v[0, page, offset] = self.k[window], self.v[window]
        out = verify_attention(self.q[window], k[0], v[0], self.pages, self.lengths, tree=tree)
        return (out.flatten(2) @ self.head.T).argmax(-1)


def test_a_foreign_loop_decodes_a_tree_to_the_tokens_it_has_without(gpu: str) -> None:
    plain, speculative = Engine(gpu), Engine(gpu)
    token, texts = torch.tensor([[3], [8]]).to(gpu), []
    for _ in range(41):
        token = plain.forward(token)
        plain.lengths += 1
        texts.append(token)
    text = torch.cat([torch.tensor([[3], [8]]).to(gpu), *texts], 1).cpu()
    tree = torch.tensor([TREE, TREE]).to(gpu)
    written, steps = [1, 1], 0
    while min(written) < 38:
        guesses = [text[b, n - 1 : n + 2].tolist() for b, n in enumerate(written)]
        # By turns the first guess is right, the second branch is, or the second's first half.
        right = [[(g, a, 0, 0), (g, 0, a, c), (g, 0, a, 0)][steps % 3] for g, a, c in guesses]
        right = [[g, x, y + (y == x), z] for g, x, y, z in right]
        window = torch.tensor(right).to(gpu)
        target = speculative.forward(window, tree).cpu()
        first = [1 if t[0] == r[1] else 2 for t, r in zip(target, right, strict=True)]
        deeper = [f == 2 and t[2] == r[3] for f, t, r in zip(first, target, right, strict=True)]
        hit = [t[0] in r[1:3] for t, r in zip(target, right, strict=True)]
        accepted = [int(h) + int(h and d) for h, d in zip(hit, deeper, strict=True)]
        path = torch.tensor([(PATHS[f] + [0, 0])[:3] for f in first]).to(gpu)
        counts = torch.tensor(accepted).to(gpu)
        kv_rollback(*speculative.split(), speculative.pages, speculative.lengths, counts, path=path)
        for b, n in enumerate(accepted):
            emitted = [int(target[b, node]) for node in [0, *path[b, 1 : n + 1].tolist()]]
            assert emitted == text[b, written[b] : written[b] + n + 1].tolist()
            written[b] += n + 1
        steps += 1
    assert steps < 38 / 1.8
