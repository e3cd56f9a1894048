"""Published layouts of heads, from files in those layouts, each against its paper written out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_checkpoint
from head_files import (
    FF,
    HK,
    HQ,
    THETA,
    D,
    E,
    L,
    V,
    normal,
    published_hydra,
    published_medusa,
    write_eagle3,
    write_hydra,
    write_layers,
    write_mtp,
)
from llama_layouts import write_layout
from safetensors.torch import load_file, save_file
from slow_drafters import PROMPT, agree, slow_layer, slow_mimo_layer, trunk_states, watch
from torch import Tensor

from mtpkern import reference
from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.llama import fingerprint, load_config
from mtpkern.config import SamplingParams
from mtpkern.convert import convert
from mtpkern.drafters.draft_length import FixedDraftLength
from mtpkern.drafters.load import PRETRAINED, find_heads
from mtpkern.drafters.ngram import NgramDrafter
from mtpkern.engine import LLM
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.kernels.rms_norm import rms_norm_ref

PROMPTS = [PROMPT, [30], [50 + i % 9 for i in range(140)]]


def recorded(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], list[int], Tensor]]:
    """Every few steps: the known tokens, what was drafted after them, and the drafts' logits."""
    recorder = watch(llm)
    llm.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True))
    assert len(recorder.drafted) > 30
    return recorder.seen[::4]


# Meta's multi-token-prediction models (Gloeckle et al. 2024), in consolidated.pth


def write_meta(directory: Path, ahead: int = 3) -> dict[str, Tensor]:
    """A random model that predicts `ahead` tokens at once: a trunk of two layers, and its heads."""
    directory.mkdir()
    torch.manual_seed(11)
    tensors = {"tok_embeddings.weight": torch.randn(V, E), "output.weight": normal(V, E)}
    tensors["norm.weight"] = 1 + normal(E)
    tensors["rope.freqs"] = torch.ones(D // 2)
    layers = [f"layers.{i}" for i in range(3)] + [f"extra_heads.{i}" for i in range(ahead - 1)]
    for name in layers:
        for part, rows in (("wq", HQ * D), ("wk", HK * D), ("wv", HK * D)):
            tensors[f"{name}.attention.{part}.weight"] = 2 * normal(rows, E)
        tensors[f"{name}.attention.wo.weight"] = normal(E, HQ * D)
        tensors[f"{name}.feed_forward.w1.weight"] = normal(FF, E)
        tensors[f"{name}.feed_forward.w3.weight"] = normal(FF, E)
        tensors[f"{name}.feed_forward.w2.weight"] = normal(E, FF)
        tensors[f"{name}.attention_norm.weight"] = 1 + normal(E)
        tensors[f"{name}.ffn_norm.weight"] = 1 + normal(E)
    torch.save(tensors, directory / "consolidated.pth")
    params = {"dim": E, "n_layers": 2 + ahead, "n_heads": HQ, "n_kv_heads": HK, "norm_eps": 1e-5}
    params |= {"n_future_tokens": ahead, "rope_theta": 700.0, "vocab_size": -1}
    (directory / "params.json").write_text(json.dumps(params))
    return tensors


def meta_block(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """A block over a whole sequence x [S, E], rotating neighbours as complex numbers."""
    count = len(x)
    y = rms_norm_ref(x, w[f"{name}.attention_norm.weight"], 1e-5)
    q, k, v = ((y @ w[f"{name}.attention.w{n}.weight"].T).view(count, -1, D) for n in "qkv")
    angle = torch.arange(count)[:, None] / 700.0 ** (torch.arange(0, D, 2) / D)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (
        torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn)
        .flatten(-2)
        .transpose(0, 1)
        for t in (q, k)
    )
    k, v = (t.repeat_interleave(HQ // HK, 0) for t in (k, v.transpose(0, 1)))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
    x = x + out.reshape(count, -1) @ w[f"{name}.attention.wo.weight"].T
    y = rms_norm_ref(x, w[f"{name}.ffn_norm.weight"], 1e-5)
    gate, up = (y @ w[f"{name}.feed_forward.{n}.weight"].T for n in ("w1", "w3"))
    return x + (F.silu(gate) * up) @ w[f"{name}.feed_forward.w2.weight"].T


def test_metas_models_convert_and_draft_with_the_heads_they_bring_along(tmp_path: Path) -> None:
    w = write_meta(tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "model")
    llm = LLM(tmp_path / "model", ngram=False, num_speculative_tokens=2, max_length=300)
    (plain,) = llm.generate(PROMPT, SamplingParams(max_tokens=20), speculate=False)
    for known, drafts, logits in recorded(llm, PROMPTS):
        x = w["tok_embeddings.weight"][known[:-1]]
        for i in range(2):
            x = meta_block(x, w, f"layers.{i}")
        # Every head is fed from below the trunk's last layer, which is head 0.
        own, *ahead = (
            w["output.weight"] @ rms_norm_ref(y[-1], w["norm.weight"], 1e-5)
            for y in (meta_block(x, w, n) for n in ("layers.2", "extra_heads.0", "extra_heads.1"))
        )
        # The first drafts come before the model's own first choice.
        assert known in PROMPTS or known[-1] == int(own.argmax())
        for draft, row, expected in zip(drafts, logits, ahead, strict=True):
            agree(draft, row, expected)
    assert len(plain.token_ids) == 20
    with pytest.raises(UserError, match="at most 2, the number of heads, got 3"):
        LLM(tmp_path / "model", num_speculative_tokens=3)


def test_metas_models_without_their_sizes_are_refused(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta")
    (tmp_path / "meta" / "params.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="are not a model of Meta's: 'n_heads'"):
        convert(tmp_path / "meta", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("ngram", [False, True])
def test_layers_draft_as_their_definition(ngram: bool, tmp_path: Path) -> None:
    """Also when committed rows waited because the n-gram's copy was used in between."""
    trunk = write_layers(tmp_path / "trunk")
    llm = LLM(trunk, ngram=ngram, num_speculative_tokens=3, max_length=300)
    recorder = watch(llm)
    # The tiny model soon repeats itself, and then the n-gram's copy is used.
    prompts = [torch.randint(V, (9,)).tolist() for _ in range(8)]
    for some in (PROMPTS, prompts):
        llm.generate(some, SamplingParams(max_tokens=12, ignore_eos=True))
    w = load_tensors(trunk)
    named = dict(w)
    named["model.norm.weight"] = named.pop("model.mtp_norms.0.weight")
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(named, plain / "model.safetensors")
    config = json.loads((trunk / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (plain / "config.json").write_text(json.dumps(config))
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    assert len(recorder.drafted) > 10
    for known, drafts, logits in recorder.seen[::4]:
        below = trunk_states(plain, known[:-1])[L - 2]
        for i, draft in enumerate(drafts):
            prefix = f"model.mtp_heads.{i}."
            own = {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)}
            last = slow_layer(below, own, HQ, HK, D, THETA)[-1]
            last = rms_norm_ref(last, w[f"model.mtp_norms.{i + 1}.weight"], 1e-5)
            agree(draft, logits[i], head @ last)


# Hydra (Ankner et al. 2024), in hydra_lm_head.pt


@pytest.mark.parametrize("prefix", [False, True])
def test_hydra_heads_see_the_drafts_before_their_own(prefix: bool, tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_hydra(tmp_path / "heads", prefix=prefix)
    llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=3, max_length=300)
    w, embedding = published_hydra(prefix=prefix), load_tensors(trunk)["model.embed_tokens.weight"]
    layer = {
        n.removeprefix("prefix_embeding_layer.layers.0."): t
        for n, t in w.items()
        if n.startswith("prefix_embeding_layer.layers.0.")
    }
    for known, drafts, logits in recorded(llm, PROMPTS):
        hidden = trunk_states(trunk, known[:-1])[-1]
        if prefix:
            hidden = slow_layer(hidden, layer, HQ, HK, D, THETA)
            hidden = rms_norm_ref(hidden, w["prefix_embeding_layer.norm.weight"], 1e-5)
        tokens = [known[-1]]
        for h, draft in enumerate(drafts):
            z = torch.cat([hidden[-1], *(embedding[token] for token in tokens)])
            first, second = ("1", "3") if prefix else ("0", "1")
            linear, passed, deeper = (
                lambda x, n=f"hydra_mlp.{h}.{name}": w[f"{n}.weight"] @ x + w[f"{n}.bias"]
                for name in (f"{first}.linear", f"{first}.res_connection", f"{second}.linear")
            )
            x = passed(z) + F.silu(linear(z))
            x = x + F.silu(deeper(x))
            own = f"hydra_lm_head.{h}.1" if prefix else f"hydra_lm_head.{h}"
            agree(draft, logits[h], w[f"{own}.weight"] @ x + w[f"{own}.bias"])
            tokens.append(draft)


def test_hydra_heads_of_another_kind_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    good = published_hydra(prefix=False)
    torch.save(good, source / "hydra_lm_head.pt")
    for config in ({"grounded_heads": False}, {"grounded_heads": True, "hidden_state_offset": 1}):
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelLoadError, match="must be grounded, on the final hidden state"):
            convert(source, tmp_path / "heads")
    (source / "config.json").write_text(json.dumps({"grounded_heads": True}))
    torch.save(good | {"surprise": torch.ones(2)}, source / "hydra_lm_head.pt")
    with pytest.raises(ModelLoadError, match="surprise has no place in Hydra heads"):
        convert(source, tmp_path / "heads")


# EAGLE-3 (Li et al. 2025) and Medusa (Cai et al. 2024), in the spellings that are published


def spell_eagle3(heads: Path, spelling: str) -> None:
    """Rewrite a head, published in its authors' layout, in another of the same meaning."""
    config = json.loads((heads / "config.json").read_text())
    tensors = {name: tensor.clone() for name, tensor in load_tensors(heads).items()}
    layer = "midlayer."
    if spelling in ("LlamaForCausalLM", "Eagle3LlamaForCausalLM", "Eagle3DraftModel"):
        config["architectures"] = [spelling]
    elif spelling == "the trunk's number of layers":
        config |= {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 40}
    elif spelling == "layers.0":
        layer = "layers.0."
    elif spelling == "model.layers.0":
        layer = "layers.0."
        tensors = {n if n in ("d2t", "t2d") else f"model.{n}": t for n, t in tensors.items()}
        config["model_type"] = "qwen2"
    elif spelling == "t2d alone":
        del tensors["d2t"]
    elif spelling == "buffers":
        tensors["midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["verifier_norm.weight"] = torch.ones(E)
    elif spelling == "ids from 0":
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}
    else:
        layer = "layers.0."
        outer = {"draft_vocab_size": config.pop("draft_vocab_size")}
        outer |= {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3"}
        outer |= {"norm_before_residual": False, "norm_before_fc": False}
        if spelling == "speculators with ids":
            outer["eagle_aux_hidden_state_layer_ids"] = [2, 4, 5]
        del config["architectures"]
        config = outer | {"transformer_layer_config": config}
    tensors = {name.replace("midlayer.", layer): tensor for name, tensor in tensors.items()}
    save_file(tensors, heads / "model.safetensors")
    (heads / "config.json").write_text(json.dumps(config))


SPELLINGS = [
    "LlamaForCausalLM",
    "Eagle3LlamaForCausalLM",
    "Eagle3DraftModel",
    "the trunk's number of layers",
    "layers.0",
    "model.layers.0",
    "t2d alone",
    "buffers",
    "ids from 0",
    "speculators",
    "speculators with ids",
]


@pytest.mark.slow
def test_an_eagle3_head_drafts_the_same_in_each_spelling(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)

    def drafts(heads: Path) -> Any:
        llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=3, max_length=300)
        recorder = watch(llm)
        llm.generate(PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True))
        return recorder.drafted

    want = drafts(write_eagle3(tmp_path / "heads"))
    for number, spelling in enumerate(SPELLINGS):
        heads = write_eagle3(tmp_path / f"heads{number}")
        spell_eagle3(heads, spelling)
        assert drafts(heads) == want, spelling


def test_speculators_heads_tap_the_layers_that_they_name(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)
    heads = write_eagle3(tmp_path / "heads")
    spell_eagle3(heads, "speculators")
    config = json.loads((heads / "config.json").read_text())
    for ids, taps in (
        ([1, 3, 6], (1, 3, 6)),
        (None, (2, 4, 5)),
        ([2, 4, 8], None),
        ([3, 1, 6], None),
    ):
        config["eagle_aux_hidden_state_layer_ids"] = ids
        (heads / "config.json").write_text(json.dumps(config))
        if taps is None:
            with pytest.raises(ModelLoadError, match="layer_ids|taps layers"):
                LLM(trunk, heads=heads)
        else:
            assert LLM(trunk, heads=heads, ngram=False).drafter.taps == taps


def test_sizes_that_speculators_leaves_out_are_llamas(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)
    heads = write_eagle3(tmp_path / "heads")
    spell_eagle3(heads, "speculators")
    config = json.loads((heads / "config.json").read_text())
    del config["transformer_layer_config"]["intermediate_size"]
    (heads / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"gate_proj.weight must be \[11008, 48\]"):
        LLM(trunk, heads=heads)


def test_a_head_without_a_vocabulary_drafts_through_the_trunks(tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=8)
    heads = write_eagle3(tmp_path / "heads", reduced=False)
    tensors = {name: tensor.clone() for name, tensor in load_tensors(heads).items()}
    del tensors["lm_head.weight"]
    save_file(tensors, heads / "model.safetensors")
    head = load_tensors(trunk)["model.embed_tokens.weight"]
    llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=2, max_length=300)
    with_it = tensors | {"lm_head.weight": head.clone()}
    seen = recorded(llm, PROMPTS)
    save_file(with_it, heads / "model.safetensors")
    same = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=2, max_length=300)
    assert [s[:2] for s in seen] == [s[:2] for s in recorded(same, PROMPTS)]


MEDUSA_SPELLINGS = {
    "medusa_lm_head.safetensors": lambda name: name,
    "within a whole model": lambda name: f"medusa_head.{name}",
    "of vLLM": lambda name: (
        f"blocks.{name[0]}.layers.{name[2]}.{name.rpartition('.')[2]}"
        if "linear" in name
        else f"lm_heads.{name[0]}.weight"
    ),
    "one block for all": lambda name: None if name[2:].startswith("1.linear") else name,
}


@pytest.mark.parametrize("spelling", MEDUSA_SPELLINGS)
def test_medusa_heads_draft_the_same_in_each_spelling(spelling: str, tmp_path: Path) -> None:
    trunk = tiny_checkpoint(tmp_path / "trunk")
    tensors = published_medusa()
    for name in [name for name in tensors if ".1.linear" in name]:
        tensors[name] = tensors[name.replace(".1.linear", ".0.linear")].clone()
    source = tmp_path / "published"
    source.mkdir()
    torch.save(tensors, source / "medusa_lm_head.pt")
    convert(source, tmp_path / "converted")
    heads = tmp_path / "heads"
    heads.mkdir()
    renamed = {MEDUSA_SPELLINGS[spelling](name): tensor for name, tensor in tensors.items()}
    renamed.pop(None, None)
    file = heads / ("model.safetensors" if spelling == "of vLLM" else "medusa_lm_head.safetensors")
    save_file({name: tensor.clone() for name, tensor in renamed.items()}, file)
    if spelling != "one block for all":  # does without a config.json
        config = {"model_type": "medusa", "medusa_num_heads": 2, "medusa_num_layers": 1}
        (heads / "config.json").write_text(json.dumps(config))
    convert(file, tmp_path / "again")
    drafted = []
    for directory in (tmp_path / "converted", heads, tmp_path / "again"):
        llm = LLM(trunk, heads=directory, ngram=False, num_speculative_tokens=3, max_length=300)
        recorder = watch(llm)
        llm.generate(PROMPTS, SamplingParams(max_tokens=10, ignore_eos=True))
        drafted.append(recorder.drafted)
    assert drafted[0] == drafted[1] == drafted[2] and len(drafted[0]) > 10


def test_medusa_blocks_without_biases_have_none(tmp_path: Path) -> None:
    tensors = {f"blocks.{h}.layers.0.weight": torch.randn(E, E) for h in range(2)}
    save_file(tensors | {"lm_heads.0.weight": torch.ones(V, E)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelLoadError, match="2 Medusa heads of 1 block are not all there"):
        convert(tmp_path / "x.safetensors", tmp_path / "heads")
    save_file(tensors, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "heads")
    assert not load_tensors(tmp_path / "heads")["1.0.linear.bias"].any()
    assert LLM(tiny_checkpoint(tmp_path / "trunk"), heads=tmp_path / "heads").k == 2


# A checkpoint whose heads a fine-tuning dropped


@pytest.mark.parametrize("kind", ["mimo", "mtp_llama"])
def test_heads_that_fine_tuning_dropped_are_missed_once_and_no_more(
    kind: str, tmp_path: Path, caplog: Any
) -> None:
    write_layout("mimo", tmp_path) if kind == "mimo" else write_layers(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_tensors(tmp_path).items()}
    dropped = {n: t for n, t in tensors.items() if not n.startswith(("model.mtp_l", "model.mtp_h"))}
    whole = LLM(tmp_path, max_length=96).generate([PROMPT], SamplingParams(9, ignore_eos=True))
    assert not caplog.records
    save_file(dropped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    llm = LLM(tmp_path, max_length=96)
    assert isinstance(llm.drafter, NgramDrafter)
    (record,) = caplog.records
    assert "it runs without heads of its own" in record.getMessage()
    (answer,) = llm.generate([PROMPT], SamplingParams(9, ignore_eos=True))
    assert answer.token_ids == whole[0].token_ids
    LLM(tmp_path, max_length=96, heads="none")
    assert len(caplog.records) == 1
    with pytest.raises(ModelLoadError, match="mtp_layers: heads none|is missing"):
        LLM(tmp_path, max_length=96, heads=tmp_path)


# speculators' MTP


def test_a_speculators_head_drafts_what_our_own_of_the_same_weights_does(tmp_path: Path) -> None:
    trunk, ours = tiny_checkpoint(tmp_path / "trunk"), tmp_path / "ours"
    write_mtp(ours, taps=(3,), reduced=False)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    tensors = load_file(ours / "model.safetensors")
    save_file({f"mtp_layers.0.{n}": t for n, t in tensors.items()}, theirs / "model.safetensors")
    settings = json.loads((ours / "config.json").read_text())
    settings.pop("model_type")
    # The rotation is the trunk's there.
    (ours / "config.json").write_text(
        json.dumps(settings | {"model_type": "mtpkern_mtp", "rope_theta": THETA})
    )
    config = {"speculators_model_type": "mtp", "transformer_layer_config": settings}
    (theirs / "config.json").write_text(json.dumps(config))
    drafted = []
    for heads in (ours, theirs):
        llm = LLM(trunk, heads=heads, ngram=False, num_speculative_tokens=3, max_length=300)
        drafted.append(recorded(llm, PROMPTS))
    for (known, drafts, logits), same in zip(*drafted, strict=True):
        assert (known, drafts) == same[:2] and torch.equal(logits, same[2])
    config["num_nextn_predict_layers"] = 2
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="num_nextn_predict_layers must be 1"):
        LLM(trunk, heads=theirs)


# MiMo with a module for each depth (DeepSeek-V3, section 2.2)


@pytest.mark.parametrize("ngram", [False, True])
@pytest.mark.parametrize("modules", [2, 3])
def test_modules_of_their_own_draft_as_their_definition(
    modules: int, ngram: bool, tmp_path: Path
) -> None:
    """Prompts of one token, of few and of several chunks; drafts taken and drafts refused."""
    model = write_layout("mimo", tmp_path, modules=modules)
    llm = LLM(tmp_path, ngram=ngram, num_speculative_tokens=modules, max_length=400)
    recorder = watch(llm)
    prompts = [[9], [5, 6], [5, 6, 7, 8, 9] * 3, torch.randint(131, (270,)).tolist()]
    llm.generate(prompts, SamplingParams(max_tokens=20))
    tensors = load_tensors(tmp_path)
    embedding, head = (t.weight for t in (model.get_input_embeddings(), model.lm_head))
    assert len(recorder.drafted) > 10
    for known, drafts, logits in recorder.seen[::3]:
        with torch.inference_mode():
            hidden = model.model(torch.tensor([known[:-1]])).last_hidden_state[0]
            tokens = list(known[1:])
            for d, draft in enumerate(drafts):
                prefix = f"model.mtp_layers.{d}."
                w = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                hidden = slow_mimo_layer(hidden, embedding[tokens[d:]], w)
                hidden = rms_norm_ref(hidden, w["final_layernorm.weight"], 1e-5)
                agree(draft, logits[d], hidden[-1] @ head.T)
                tokens.append(draft)
    with pytest.raises(UserError, match=f"at most {modules}, the number of heads"):
        LLM(tmp_path, num_speculative_tokens=4)
    assert LLM(tmp_path).k == modules


# For all of them


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["layers", "hydra", "hydra with a layer", "mimo", "modules"])
@pytest.mark.parametrize("ngram", [False, True])
def test_heads_never_change_a_token(
    kind: str, ngram: bool, temperature: float, tmp_path: Path
) -> None:
    options: dict[str, Any] = {}
    if kind == "layers":
        trunk = write_layers(tmp_path / "trunk")
    elif kind in ("mimo", "modules"):
        write_layout("mimo", trunk := tmp_path / "trunk", modules=3 if kind == "modules" else 1)
    else:
        trunk = tiny_checkpoint(tmp_path / "trunk", dtype=torch.bfloat16)
        options["heads"] = write_hydra(tmp_path / "heads", prefix="layer" in kind)
    params = SamplingParams(40, temperature, seed=3, logprobs=True, ignore_eos=True)
    llm = LLM(
        trunk,
        ngram=ngram,
        num_speculative_tokens=3,
        max_length=256,
        dtype="bfloat16",
        **options,
    )
    prompts = [PROMPT, [30, 31], list(range(40, 90))]
    for drafted, prompt in zip(llm.generate(prompts, params), prompts, strict=True):
        plain = llm.generate(prompt, params, speculate=False)[0]
        assert (drafted.token_ids, drafted.logprobs) == (plain.token_ids, plain.logprobs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["mtp", "eagle3", "layers", "hydra", "hydra with a layer", "mimo", "modules"]
)
def test_heads_that_rested_draft_what_heads_that_never_rested_do(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps go by without a guess, no more than are kept in mind; then the drafts are the same."""
    heads: Path | str = "auto"
    if kind == "layers":
        trunk = write_layers(tmp_path / "trunk")
    elif kind in ("mimo", "modules"):
        write_layout("mimo", trunk := tmp_path / "trunk", modules=3 if kind == "modules" else 1)
    else:
        layers = 8 if kind == "eagle3" else L
        trunk = tiny_checkpoint(tmp_path / "trunk", num_hidden_layers=layers)
        if kind.startswith("hydra"):
            heads = write_hydra(tmp_path / "heads", prefix="layer" in kind)
        else:
            heads = {"mtp": write_mtp, "eagle3": write_eagle3}[kind](tmp_path / "heads")
    options: dict[str, Any] = {"heads": heads, "ngram": False, "max_length": 400, "max_batch": 3}
    llm = LLM(trunk, num_speculative_tokens=3, **options)
    drafted = []
    for rested in (0, 25):
        asked = []

        def use_heads(self: Any, rested: int = rested, asked: list[int] = asked) -> bool:
            asked.append(1)
            return len(asked) > rested

        monkeypatch.setattr(FixedDraftLength, "use_heads", use_heads)
        # One token per step, so that both runs draft after the same tokens.
        monkeypatch.setattr(FixedDraftLength, "choose", lambda self, windows: 0)
        recorder = watch(llm)
        llm.generate(PROMPTS, SamplingParams(max_tokens=200, ignore_eos=True))
        drafted.append({tuple(known): proposed for known, proposed in recorder.drafted})
        llm.drafter.drafter = recorder.inner
    always, late = drafted
    both = always.keys() & late.keys()
    assert len(both) > 60 and len(late) < len(always)
    for known in both:  # how many are drafted follows from the batch
        mine, theirs = late[known], always[known]
        assert mine[: len(theirs)] == theirs[: len(mine)]


@pytest.mark.parametrize("kind", ["mimo", "mtp_llama"])
def test_a_model_that_includes_heads_runs_on_made_up_weights(kind: str, tmp_path: Path) -> None:
    """Of its config.json alone, and then without the heads."""
    write_layout("mimo", tmp_path) if kind == "mimo" else write_layers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    llm = LLM(tmp_path, load_format="dummy", max_length=64)
    assert isinstance(llm.drafter, NgramDrafter)
    (answer,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=16, ignore_eos=True))
    assert len(set(answer.token_ids)) > 1


def test_the_oracle_answers_as_an_mtp_llama_does(tmp_path: Path) -> None:
    trunk = write_layers(tmp_path)
    config, tensors = load_config(trunk), load_tensors(trunk)
    (answer,) = LLM(trunk, max_length=96).generate([PROMPT], SamplingParams(24, ignore_eos=True))
    assert answer.token_ids == reference.generate(config, tensors, PROMPT, 24)


def test_a_model_that_predicts_one_token_includes_no_heads(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", ahead=1)
    convert(tmp_path / "meta", tmp_path / "model")
    llm = LLM(tmp_path / "model", max_length=300)
    assert isinstance(llm.drafter, NgramDrafter)
    with pytest.raises(ModelLoadError, match="config.json names 0 heads"):
        LLM(tmp_path / "model", heads=tmp_path / "model", max_length=300)


def test_what_ships_for_a_model_of_this_name_is_left_out_for_other_weights(tmp_path: Path) -> None:
    (name,) = (path.parent.name for path in PRETRAINED.glob("*/config.json"))
    other = tiny_checkpoint(tmp_path / name)
    assert find_heads("auto", name) == PRETRAINED / name
    assert find_heads("auto", name, other) is None
    assert isinstance(LLM(other, max_length=300).drafter, NgramDrafter)


def test_shipped_heads_stay_small() -> None:
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("*.*")) < 12e6


def test_heads_of_other_weights_are_refused(tmp_path: Path) -> None:
    """Same shapes, other weights: a fine-tuned model, recognised by one value in sixteen."""
    trunk = tiny_checkpoint(tmp_path / "trunk")
    heads = write_mtp(tmp_path / "heads")
    path = heads / "config.json"
    config = json.loads(path.read_text()) | {"base_model_fingerprint": fingerprint(trunk)}
    path.write_text(json.dumps(config))
    LLM(trunk, heads=heads)
    # The same weights in other files are the same weights.
    LLM(tiny_checkpoint(tmp_path / "sharded", shards=3), heads=heads)
    other = tiny_checkpoint(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tuned = tensors["model.layers.1.mlp.down_proj.weight"]
    tuned += 0.01 * torch.randn_like(tuned)
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"heads was trained on other weights than those of"):
        LLM(other, heads=heads)
