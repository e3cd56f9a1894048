"""Small arguments for every operator of mtpkern.library."""

from typing import Any

import torch
from torch import Tensor

from mtpkern.cache import rotary_tables

Given = tuple[tuple[Any, ...], dict[str, Any]]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(limit: int, *shape: int) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(limit))


PAGES = torch.randperm(8, generator=torch.Generator().manual_seed(0)).view(2, 4).int()


LENGTHS = torch.tensor([5, 17])


TREE = torch.tensor([[1, 3, 5]] * 2)


def arguments() -> dict[str, list[Given]]:
    cos, sin = rotary_tables(1 / 100.0 ** (torch.arange(0, 8, 2) / 8), 1.0, 40)
    k, v = random(8, 16, 2, 8), random(8, 2, 16, 8).transpose(1, 2)
    slots = torch.tensor([3, -1, 40]), torch.tensor([1, 0, 30])
    cached = k, v, *slots, cos, sin
    qkv = random(3, 12), random(12), 1e-5, random(64, 12), *cached
    extras = dict(bias=random(64), q_norm=random(8), k_norm=random(8))
    attention = random(2, 3, 4, 8), k.nan_to_num(), v, PAGES, LENGTHS
    caches = random(2, 8, 16, 2, 8), random(2, 8, 2, 16, 8).transpose(2, 3), PAGES
    rollback = *caches, LENGTHS.clone(), torch.tensor([2, 0])
    path = dict(path=torch.tensor([[0, 2, 1]] * 2), active=torch.tensor([1, 1]))
    everything = dict(top_k=3, given=ids(31, 3, 2), logits_rows=2, token_ids=torch.arange(31) * 2)
    plan = dict(active=torch.tensor([1, 0]), tree=TREE)
    mlp = random(3, 12), random(12), 1e-5, random(20, 12)
    return {
        "rms_norm": [((random(3, 12), random(12), 1e-5), {})],
        "linear": [
            ((random(3, 12), random(7, 12)), {}),
            ((random(3, 12), random(7, 12), random(7)), dict(residual=random(3, 7))),
        ],
        "gate_up_silu": [(mlp, {}), ((*mlp, random(20)), {})],
        "qkv_rope_cache": [(qkv, {}), (qkv, extras)],
        "rope_cache": [
            ((random(3, 64), *cached), {}),
            ((random(3, 64), *cached), dict(q_norm=random(8), k_norm=random(8), eps=1e-5)),
        ],
        "verify_attention": [
            (attention, {}),
            (attention, dict(tree=TREE, window=9, scale=0.5)),
        ],
        "medusa_blocks": [((random(3, 12), random(2, 2, 12, 12), random(2, 2, 12)), {})],
        "multi_head_projection": [
            ((random(3, 12), random(31, 12)), {}),
            ((random(3, 12), random(31, 12)), everything),
        ],
        "accept": [((ids(2, 2, 3), ids(2, 2, 3)), {})],
        "kv_rollback": [(rollback, {}), (rollback, path)],
        "sample": [((random(3, 31),), {}), ((random(3, 31), torch.arange(31) + 5), {})],
        "ngram": [((ids(3, 2, 40), torch.tensor([30, 2]), 4), {})],
        "window_slots": [((LENGTHS, PAGES, 3, 16), {}), ((LENGTHS, PAGES, 3, 16), plan)],
    }


OPERATORS = list(arguments())


def moved(given: Given, device: str) -> Given:
    """Copies of the arguments on `device`, with the same strides."""

    def there(value: Any) -> Any:
        return value.clone().to(device) if isinstance(value, Tensor) else value

    return tuple(map(there, given[0])), {name: there(value) for name, value in given[1].items()}
