"""The drafters, each against its definition, written out slowly; and none of them moves a token."""

import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIG, tiny_checkpoint
from families import write_family
from safetensors.torch import save_file
from torch import Tensor

from mtpkern.checkpoint import load_tensors
from mtpkern.config import ModelConfig, ModelLoadError, SamplingParams, UserError
from mtpkern.convert import convert
from mtpkern.cpu_ops import _Cpu
from mtpkern.draft_length import DraftLength
from mtpkern.engine import LLM
from mtpkern.heads import HEADS, NGRAM, NONE, CompanionDrafter, Drafts, NoDrafter
from mtpkern.kernels.rms_norm import rms_norm_ref
from mtpkern.sequential_heads import MtpDrafter

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12] * 3
E, V, L = TINY_CONFIG["hidden_size"], TINY_CONFIG["vocab_size"], TINY_CONFIG["num_hidden_layers"]


def write_mtp(directory: Path, *, taps: tuple[int, ...] = (1, 2, 3), reduced: bool = True) -> Path:
    """A random sequential head for the tiny model, with other head counts than the trunk's."""
    directory.mkdir()
    heads, kv_heads, head_dim, width = 4, 2, 10, 72
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    tensors = {
        "input_proj.weight": normal(E, 2 * E),
        "self_attn.q_proj.weight": normal(heads * head_dim, E),
        "self_attn.k_proj.weight": normal(kv_heads * head_dim, E),
        "self_attn.v_proj.weight": normal(kv_heads * head_dim, E),
        "self_attn.o_proj.weight": normal(E, heads * head_dim),
        "mlp.gate_proj.weight": normal(width, E),
        "mlp.up_proj.weight": normal(width, E),
        "mlp.down_proj.weight": normal(E, width),
    }
    for name in ("hidden", "token", "input", "post_attention", "final"):
        tensors[f"{name}_layernorm.weight"] = 1 + normal(E)
    if len(taps) > 1:
        tensors["fc.weight"] = normal(E, len(taps) * E)
    settings: dict[str, Any] = {
        "model_type": "mtpkern_mtp",
        "hidden_size": E,
        "tap_layers": list(taps),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
    }
    if reduced:
        tensors["draft_vocab"] = torch.arange(3, V, 2, dtype=torch.int32)
        settings["draft_vocab_size"] = len(tensors["draft_vocab"])
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def write_medusa(directory: Path, heads: int = 3, depth: int = 2) -> Path:
    directory.mkdir()
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for h in range(heads):
        for d in range(depth):
            name = f"{h}.{d}.linear"
            tensors[f"{name}.weight"] = torch.randn(E, E, generator=generator) / E**0.5
            tensors[f"{name}.bias"] = torch.randn(E, generator=generator)
    save_file(tensors, directory / "model.safetensors")
    settings = {"model_type": "mtpkern_medusa", "num_heads": heads, "num_layers": depth}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def published_medusa(heads: int = 3, depth: int = 2) -> dict[str, Tensor]:
    """What a medusa_lm_head.pt holds: blocks, and behind them each head's own vocabulary."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for h in range(heads):
        for d in range(depth):
            name = f"{h}.{d}.linear"
            tensors[f"{name}.weight"] = torch.randn(E, E, generator=generator) / E**0.5
            tensors[f"{name}.bias"] = torch.randn(E, generator=generator)
        tensors[f"{h}.{depth}.weight"] = torch.randn(V, E, generator=generator)
    return tensors


def write_published(directory: Path) -> Path:
    source = directory.with_name(f"{directory.name}.pt")
    torch.save(published_medusa(), source)
    convert(source, directory)
    return directory


def write_eagle3(directory: Path, *, reduced: bool = True) -> Path:
    """A random EAGLE-3 head in the published layout, for a trunk of eight layers."""
    source = directory.with_name(f"{directory.name}-published")
    source.mkdir()
    heads, kv_heads, head_dim, width = 4, 2, 12, 72
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    rows = V // 2 if reduced else V
    tensors = {
        "fc.weight": normal(E, 3 * E),
        "midlayer.self_attn.q_proj.weight": normal(heads * head_dim, 2 * E),
        "midlayer.self_attn.k_proj.weight": normal(kv_heads * head_dim, 2 * E),
        "midlayer.self_attn.v_proj.weight": normal(kv_heads * head_dim, 2 * E),
        "midlayer.self_attn.o_proj.weight": normal(E, heads * head_dim),
        "midlayer.mlp.gate_proj.weight": normal(width, E),
        "midlayer.mlp.up_proj.weight": normal(width, E),
        "midlayer.mlp.down_proj.weight": normal(E, width),
        "lm_head.weight": normal(rows, E),
    }
    for name in (
        "midlayer.input_layernorm",
        "midlayer.hidden_norm",
        "midlayer.post_attention_layernorm",
        "norm",
    ):
        tensors[f"{name}.weight"] = 1 + normal(E)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": E,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "max_position_embeddings": 2048,
        "vocab_size": V,
    }
    if reduced:
        config["draft_vocab_size"] = rows
        ids = torch.arange(1, V, 2)[:rows]
        tensors["d2t"] = ids - torch.arange(rows)
        tensors["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(config))
    convert(source, directory)
    return directory


class Recorder:
    """Wraps a drafter and keeps what it drafted: known tokens -> drafts, and also their logits."""

    def __init__(self, inner: Any):
        self.inner, self.taps, self.heads = inner, inner.taps, inner.heads
        self.drafted: list[tuple[list[int], list[int]]] = []
        self.seen: list[tuple[list[int], list[int], Tensor]] = []  # logits [drafts, vocabulary]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def guess(self, step: Any, count: int) -> Any:
        batch, rows = step.tokens.shape[0], []

        def kept(cpu: Any, *arguments: Any) -> Any:
            projected = project(cpu, *arguments)
            rows.append(projected[1].logits.clone())
            return projected

        project = _Cpu._project
        with mock.patch.object(_Cpu, "_project", kept):  # what drafts are chosen from
            drafts = self.inner.guess(step, count)
        logits = torch.cat([row.view(batch, -1, row.shape[1]) for row in rows], 1)
        for b in range(batch):
            if step.advance[b]:
                known = step.tokens[b, : int(step.lengths[b]) + 1].tolist()
                length = int(torch.as_tensor(drafts.length).expand(batch)[b])
                meant = drafts.tokens[b, :length].tolist()
                self.drafted.append((known, meant))
                self.seen.append((known, meant, logits[b]))
        return drafts


def watch(llm: LLM) -> Recorder:
    """Put a recorder before an LLM's heads."""
    if isinstance(llm.drafter, CompanionDrafter):
        llm.drafter.drafter = recorder = Recorder(llm.drafter.drafter)
    else:
        llm.drafter = recorder = Recorder(llm.drafter)
    return recorder


def agree(draft: int, logits: Tensor, expected: Tensor, ids: Tensor | None = None) -> None:
    """A draft and its logits [Vd] are those of a definition; row i is of token ids[i]."""
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    row = int(expected.argmax())
    assert draft == (row if ids is None else ids[row])


def trunk_states(directory: Path, tokens: list[int]) -> list[Tensor]:
    """Hidden states [S, E] after each layer, the last one normed, by a slow float32 forward."""
    config, w = ModelConfig.from_json(directory), load_tensors(directory)
    x = w["model.embed_tokens.weight"][tokens]
    states = []
    for i in range(config.num_layers):
        named = {
            name.removeprefix(f"model.layers.{i}."): tensor
            for name, tensor in w.items()
            if name.startswith(f"model.layers.{i}.")
        }
        sizes = (config.num_heads, config.num_kv_heads, config.head_dim, config.rope.theta)
        x = slow_layer(x, named, *sizes)
        states.append(x)
    states[-1] = rms_norm_ref(states[-1], w["model.norm.weight"], 1e-5)
    return states


def slow_layer(
    x: Tensor, w: dict[str, Tensor], heads: int, kv_heads: int, head_dim: int, theta: float
) -> Tensor:
    """One Llama layer over a whole sequence x [S, E], in float32."""
    count = x.shape[0]
    inner = rms_norm_ref(x, w["input_layernorm.weight"], 1e-5)
    q, k, v = (
        (inner @ w[f"self_attn.{name}_proj.weight"].T + w.get(f"self_attn.{name}_proj.bias", 0))
        .view(count, -1, head_dim)
        .transpose(0, 1)
        for name in "qkv"
    )
    angle = torch.arange(count)[:, None] / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = angle.cos(), angle.sin()

    def rotate(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (rotate(k), v))
    scores = rotate(q) @ k.transpose(1, 2) / head_dim**0.5
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1)
    x = x + out @ w["self_attn.o_proj.weight"].T
    inner = rms_norm_ref(x, w["post_attention_layernorm.weight"], 1e-5)
    gate, up = (inner @ w[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


def check_mtp(heads: Path, trunk: Path, seen: tuple[list[int], list[int], Tensor]) -> None:
    """Hold what a sequential head drafted to its definition: everything anew for every draft."""
    known, drafts, logits = seen
    w, settings = load_tensors(heads), json.loads((heads / "config.json").read_text())
    embedding = load_tensors(trunk)["model.embed_tokens.weight"]
    ids = w["draft_vocab"].long() if "draft_vocab" in w else torch.arange(V)
    states = trunk_states(trunk, known[:-1])
    hidden = torch.cat([states[tap - 1] for tap in settings["tap_layers"]], -1)
    if "fc.weight" in w:
        hidden = hidden @ w["fc.weight"].T
    tokens = known[1:]
    for draft, row in zip(drafts, logits, strict=True):
        pair = [
            rms_norm_ref(hidden, w["hidden_layernorm.weight"], 1e-5),
            rms_norm_ref(embedding[tokens], w["token_layernorm.weight"], 1e-5),
        ]
        x = torch.cat(pair, -1) @ w["input_proj.weight"].T
        sizes = (settings["num_attention_heads"], settings["num_key_value_heads"])
        x = slow_layer(x, w, *sizes, settings["head_dim"], settings["rope_theta"])
        out = rms_norm_ref(x[-1:], w["final_layernorm.weight"], 1e-5)
        agree(draft, row, (out @ embedding[ids].T)[0], ids)
        # The next row pairs what this one made with the token that it drafted.
        hidden, tokens = torch.cat([hidden, out]), [*tokens, draft]


@pytest.mark.slow
@pytest.mark.parametrize("taps", [(3,), (1, 3), (1, 2, 3)])
@pytest.mark.parametrize("ngram", [False, True])
def test_a_sequential_head_drafts_what_its_definition_says(
    taps: tuple[int, ...], ngram: bool, tmp_path: Path
) -> None:
    """Also when committed pairs waited because the n-gram's copy was used in between."""
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_mtp(tmp_path / "heads", taps=taps, reduced=len(taps) != 2)
    llm = LLM(trunk, heads=heads, ngram=ngram, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    assert isinstance(recorder.inner, MtpDrafter)
    prompts = [PROMPT, [30, 31], [50 + i % 9 for i in range(140)]]
    completions = llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    if ngram:
        assert any("ngram" in c.stats.source_steps for c in completions)
        assert any("heads" in c.stats.source_steps for c in completions)
    assert len(recorder.drafted) > 10
    for seen in recorder.seen[:: -(-len(recorder.seen) // 20)]:
        check_mtp(heads, trunk, seen)


@pytest.mark.parametrize("ngram", [False, True])
def test_a_mimo_checkpoint_drafts_with_the_layer_it_brings_along(
    ngram: bool, tmp_path: Path
) -> None:
    """Prompts of one token and of many: the first pair of each has an embedding of zeros."""
    model = write_family("mimo", tmp_path)
    llm = LLM(tmp_path, ngram=ngram, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    llm.generate([[9], [5, 6, 7, 8, 9] * 3], SamplingParams(max_tokens=30))
    prefix = "model.mtp_layers.0."
    w = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_tensors(tmp_path).items()
        if name.startswith(prefix)
    }
    embedding, head = (t.weight for t in (model.get_input_embeddings(), model.lm_head))
    assert len(recorder.drafted) > 10
    for known, drafts, logits in recorder.seen[::3]:
        with torch.inference_mode():
            hidden = model.model(torch.tensor([known[:-1]])).last_hidden_state[0]
            tokens = list(known[1:])
            for draft, row in zip(drafts, logits, strict=True):
                token = embedding[tokens].clone()
                token[0] = 0
                pair = [
                    rms_norm_ref(hidden, w["hidden_layernorm.weight"], 1e-5),
                    rms_norm_ref(token, w["token_layernorm.weight"], 1e-5),
                ]
                x = torch.cat(pair, -1) @ w["input_proj.weight"].T
                x = slow_layer(x, w, 4, 2, 12, 10000.0)
                out = rms_norm_ref(x[-1:], w["final_layernorm.weight"], 1e-5)
                agree(draft, row, (out @ head.T)[0])
                hidden, tokens = torch.cat([hidden, out]), [*tokens, draft]


def test_parallel_heads_draft_what_their_definition_says(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_medusa(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    llm.generate([PROMPT, [30, 31]], SamplingParams(max_tokens=30, ignore_eos=True))
    w, embedding = load_tensors(heads), load_tensors(trunk)["model.embed_tokens.weight"]
    assert len(recorder.drafted) > 20
    for known, drafts, logits in recorder.seen[::3]:
        normed = trunk_states(trunk, known[:-1])[-1][-1]
        for h, draft in enumerate(drafts):
            hidden = normed
            for d in range(2):
                block = F.linear(hidden, w[f"{h}.{d}.linear.weight"], w[f"{h}.{d}.linear.bias"])
                hidden = hidden + F.silu(block)
            agree(draft, logits[h], embedding @ hidden)


def test_published_medusa_heads_draft_through_vocabularies_of_their_own(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_published(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    llm.generate([PROMPT, [30, 31]], SamplingParams(max_tokens=30, ignore_eos=True))
    w = published_medusa()
    assert len(recorder.drafted) > 20
    for known, drafts, logits in recorder.seen[::3]:
        hidden = trunk_states(trunk, known[:-1])[-1][-1]
        for h, draft in enumerate(drafts):
            x = hidden
            for d in range(2):
                x = x + F.silu(w[f"{h}.{d}.linear.weight"] @ x + w[f"{h}.{d}.linear.bias"])
            agree(draft, logits[h], w[f"{h}.2.weight"] @ x)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "norm_before_residual", "norm_before_fc", "embedding"])
@pytest.mark.parametrize("ngram", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_an_eagle3_head_drafts_what_its_definition_says(
    reduced: bool, ngram: bool, variant: str, tmp_path: Path
) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)
    heads = write_eagle3(tmp_path / "heads", reduced=reduced)
    config = heads / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {variant or "x": True}))
    more = {"norm_before_fc": {"input_norm.weight": 1 + torch.randn(3 * E) / 5}}
    more["embedding"] = {"embed_tokens.weight": torch.randn(V, E)}
    tensors = dict(load_tensors(heads)) | more.get(variant, {})
    save_file({n: t.clone() for n, t in tensors.items()}, heads / "model.safetensors")
    llm = LLM(trunk, heads=heads, ngram=ngram, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    prompts = [PROMPT, [30], [50 + i % 9 for i in range(140)]]
    llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    w = load_tensors(heads)
    embedding = load_tensors(trunk)["model.embed_tokens.weight"]
    embedding = w.get("embed_tokens.weight", embedding)
    assert len(recorder.drafted) > (5 if ngram else 20)
    rows = len(w["lm_head.weight"])
    ids = torch.arange(rows) + (w["d2t"] if reduced else 0)
    for known, drafts, logits in recorder.seen[::5]:
        states = trunk_states(trunk, known[:-1])
        hidden = torch.cat([states[layer - 1] for layer in (2, 4, 5)], -1)
        if variant == "norm_before_fc":
            hidden = rms_norm_ref(hidden, w["input_norm.weight"], 1e-5)
        hidden = hidden @ w["fc.weight"].T
        tokens, norm_first = list(known[1:]), variant == "norm_before_residual"
        for draft, row in zip(drafts, logits, strict=True):
            new = eagle3_layer(hidden, embedding[tokens], w, norm_first=norm_first)[-1:]
            hidden = torch.cat([hidden, new])
            last = rms_norm_ref(hidden[-1], w["norm.weight"], 1e-5)
            agree(draft, row, w["lm_head.weight"] @ last, ids)
            tokens.append(draft)


def eagle3_layer(
    hidden: Tensor, token: Tensor, w: dict[str, Tensor], *, norm_first: bool = False
) -> Tensor:
    """The head's layer over all pairs [S, E], in float32, without a cache."""
    count, heads, kv_heads, D = len(hidden), 4, 2, 12
    names = ("input_layernorm", "hidden_norm")
    halves = [
        rms_norm_ref(half, w[f"midlayer.{name}.weight"], 1e-5)
        for half, name in zip((token, hidden), names, strict=True)
    ]
    x = torch.cat(halves, -1)
    q, k, v = (
        (x @ w[f"midlayer.self_attn.{name}_proj.weight"].T).view(count, -1, D).transpose(0, 1)
        for name in "qkv"
    )
    angle = torch.arange(count)[:, None] / 500.0 ** (torch.arange(0, D, 2) / D)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(t: Tensor) -> Tensor:
        turned = torch.complex(*t.chunk(2, -1)) * turn
        return torch.cat([turned.real, turned.imag], -1)

    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (rotate(k), v))
    out = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
    residual = halves[1] if norm_first else hidden
    x = residual + out.transpose(0, 1).reshape(count, -1) @ w["midlayer.self_attn.o_proj.weight"].T
    inner = rms_norm_ref(x, w["midlayer.post_attention_layernorm.weight"], 1e-5)
    gate, up = (inner @ w[f"midlayer.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["mtp", "medusa", "published", "eagle3"])
@pytest.mark.parametrize("ngram", [False, True])
def test_heads_never_change_a_token(
    kind: str, ngram: bool, temperature: float, tmp_path: Path
) -> None:
    layers = 8 if kind == "eagle3" else L
    trunk = tiny_checkpoint(tmp_path / "trunk", dtype=torch.bfloat16, num_hidden_layers=layers)
    write: dict[str, Any] = {"mtp": write_mtp, "medusa": write_medusa, "eagle3": write_eagle3}
    heads = write.get(kind, write_published)(tmp_path / "heads")
    params = SamplingParams(60, temperature, seed=3, logprobs=True, ignore_eos=True)
    llm = LLM(trunk, heads=heads, ngram=ngram, num_speculative_tokens=3, max_length=256)
    prompts = [PROMPT, [30, 31], list(range(40, 90))]
    for drafted, prompt in zip(llm.generate(prompts, params), prompts, strict=True):
        plain = llm.generate(prompt, params, speculate=False)[0]
        assert (drafted.token_ids, drafted.logprobs) == (plain.token_ids, plain.logprobs)
        assert plain.stats.steps == 60


def test_a_long_run_of_copies_is_taken_in_before_it_overflows(tmp_path: Path) -> None:
    """The heads' pending rows hold 64: a text that only repeats itself must not lose any."""
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_mtp(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, num_speculative_tokens=2, max_length=400)

    class AlwaysCopies:
        def guess(self, step: Any, count: int) -> Drafts:
            drafts = llm.ops.ngram(step.tokens, step.lengths + 1, count, 1)[0]
            return Drafts(drafts, torch.full((drafts.shape[0],), NGRAM), torch.tensor([count]))

    recorder = watch(llm)
    llm.drafter.ngram = AlwaysCopies()  # type: ignore[assignment]
    events = llm.stream(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True))
    for _ in range(150):
        next(events)
    assert not recorder.drafted, "copies alone must not make the heads guess"
    llm.drafter.ngram = NoDrafter()  # type: ignore[assignment]
    assert list(events)[-1].completion
    assert recorder.drafted
    for seen in recorder.seen:
        check_mtp(heads, trunk, seen)


def test_heads_that_were_asleep_go_on_behind_a_gap_of_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the gap, here NaN, has no part in their drafts, and no token changes."""
    trunk, heads = tiny_checkpoint(tmp_path / "trunk"), write_mtp(tmp_path / "heads")
    params = SamplingParams(max_tokens=90, ignore_eos=True, logprobs=True)
    steps = itertools.count()

    def watching(self: DraftLength) -> int:
        return HEADS if next(steps) % 60 not in range(10, 40) else NONE

    monkeypatch.setattr(DraftLength, "watching", watching)
    monkeypatch.setattr(DraftLength, "use_heads", lambda self: True)
    monkeypatch.setattr(DraftLength, "least_chance", lambda self: 0.0)
    monkeypatch.setattr(
        DraftLength, "choose", lambda self, w: max((len(s.chances) for s in w), default=0)
    )
    seen = {}
    for filler in (0.0, 9.0, torch.nan):
        llm = LLM(trunk, heads=heads, ngram=False, max_length=256, max_batch=2)
        plain = llm.generate([PROMPT, PROMPT[:3]], params, speculate=False)
        with torch.inference_mode():
            llm.drafter.drafter.cache.k.fill_(filler)
            llm.drafter.drafter.cache.v.fill_(filler)
        recorder, steps = watch(llm), itertools.count()
        drafted = llm.generate([PROMPT, PROMPT[:3]], params)
        assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
        assert [c.logprobs for c in drafted] == [c.logprobs for c in plain]
        assert all(logits.isfinite().all() for _, _, logits in recorder.seen)
        seen[filler] = recorder.drafted
    assert len(seen[0.0]) > 40
    assert seen[0.0] == seen[9.0] == seen[torch.nan]


def test_a_sequence_near_its_end_waits_beside_one_with_many_copies(tmp_path: Path) -> None:
    """The head takes in as many rows of each as of the one that waits for most."""
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_mtp(tmp_path / "heads")
    llm = LLM(trunk, heads=heads, num_speculative_tokens=2, max_length=160, max_batch=2)

    class CopiesUnlessLast:
        def guess(self, step: Any, count: int) -> Drafts:
            drafts = llm.ops.ngram(step.tokens, step.lengths + 1, count, 1)[0]
            source = torch.where(step.tokens[:, 0] == 77, 0, NGRAM)
            return Drafts(drafts, source, torch.tensor([count]))

    assert isinstance(llm.drafter, CompanionDrafter)
    llm.drafter.ngram = CopiesUnlessLast()  # type: ignore[assignment]
    prompts = [PROMPT, [i % 50 for i in range(130)], [77, *(i % 50 for i in range(157))]]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for drafted, prompt in zip(llm.generate(prompts, params), prompts, strict=True):
        (plain,) = llm.generate(prompt, params, speculate=False)
        assert drafted.token_ids == plain.token_ids


def test_heads_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_mtp(tmp_path / "heads")
    config = heads / "config.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"model_type": "eagle9"}, "model_type eagle9 is not supported; supported: mtpkern_mtp"),
        ({"num_attention_heads": 5}, "self_attn.q_proj.weight must be"),
        ({"tap_layers": [1, 2]}, "tap_layers must ascend to 3"),
        ({"head_dim": None}, "is not complete"),
    ):
        config.write_text(json.dumps(good | change))
        with pytest.raises(ModelLoadError, match=message):
            LLM(trunk, heads=heads)
    config.write_text(json.dumps(good))
    with pytest.raises(UserError, match="no such directory; names: auto, none"):
        LLM(trunk, heads="nowhere")
    medusa = write_medusa(tmp_path / "medusa")
    with pytest.raises(UserError, match="at most 3, the number of heads, got 4"):
        LLM(trunk, heads=medusa, num_speculative_tokens=4)
    assert LLM(trunk, heads=medusa).k == 3
    tensors = load_tensors(heads)
    for changed, message in (
        ({"self_attn.q_proj.bias": torch.ones(40)}, "q_proj.bias has no place in such heads"),
        ({"draft_vocab": tensors["draft_vocab"] + 2}, f"vocabulary of {V} does not have"),
    ):
        save_file(tensors | changed, heads / "model.safetensors")
        with pytest.raises(ModelLoadError, match=message):
            LLM(trunk, heads=heads)


def test_an_eagle3_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)
    heads = write_eagle3(tmp_path / "heads")
    config = heads / "config.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"vocab_size": V + 1}, f"vocab_size must be {V} to match the model, got {V + 1}"),
        ({"hidden_size": E + 2, "draft_vocab_size": 5}, r"must be \["),
        ({"norm_output": True}, "norm_output=True is not supported in EAGLE-3 heads"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=False is not"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, "layer_ids=.1, 2, 3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
    ):
        config.write_text(json.dumps(good | change))
        with pytest.raises(ModelLoadError, match=message):
            LLM(trunk, heads=heads)
    eagle = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
    config.write_text(json.dumps(good | {"eagle_config": eagle}))
    tensors = load_tensors(heads)
    embedding = load_tensors(trunk)["model.embed_tokens.weight"]
    save_file(tensors | {"embed_tokens.weight": embedding.half()}, heads / "model.safetensors")
    LLM(trunk, heads=heads)
    for changed, message in (
        ({"embed_tokens.weight": embedding[:-1].contiguous()}, r"embed_tokens.weight must be \["),
        ({"midlayer.mlp.gate_proj.bias": torch.ones(72)}, "gate_proj.bias has no place"),
        ({"layers.1.mlp.down_proj.weight": torch.ones(2)}, "EAGLE-3 heads of one layer are"),
        ({"lm_head.weight": torch.ones(V // 2, E, dtype=torch.int8)}, "must hold floats"),
    ):
        save_file(tensors | changed, heads / "model.safetensors")
        with pytest.raises(ModelLoadError, match=message):
            LLM(trunk, heads=heads)


def test_an_eagle3_heads_rotation_is_read_wherever_it_stands(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)
    heads = write_eagle3(tmp_path / "heads")
    config = heads / "config.json"
    settings = json.loads(config.read_text())
    drafts = []
    for rope in ({"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0}}, {}):
        settings.pop("rope_theta", None)
        config.write_text(json.dumps(settings | rope))
        llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=3, max_length=300)
        recorder = watch(llm)
        llm.generate([50 + i % 9 for i in range(140)], SamplingParams(20, ignore_eos=True))
        drafts.append(recorder.drafted)
    assert drafts[0] == drafts[1] != drafts[2]
