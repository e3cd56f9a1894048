"""Fixtures and markers of all tests, and `tiny_checkpoint`: a small random Llama with a tokenizer.

The checkpoint is a directory in Hugging Face's layout that mtpkern and transformers can load.
Nothing is downloaded.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# One thread per worker of pytest-xdist and per process it starts: more would compete for cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mtpkern import status
from mtpkern.errors import UserError

# A shell's background process ignores SIGINT, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 307,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def refusing(begun: list[str], what: str) -> Callable[..., Any]:
    """A function that may not be called: it adds `what` to `begun` and raises UserError."""

    def begin(*_: Any, **__: Any) -> NoReturn:
        begun.append(what)
        raise UserError(what)

    return begin


def tiny_tensors(config: dict[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights for a config.json, under the names of Hugging Face's Llama."""
    E, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or E // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"model.embed_tokens.weight": normal(V, E), "model.norm.weight": 1 + normal(E) / 10}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(V, E) / E**0.5
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = 1 + normal(E) / 10
        for block, bias, sizes in (
            ("self_attn", "attention_bias", {"q": (q, E), "k": (kv, E), "v": (kv, E), "o": (E, q)}),
            ("mlp", "mlp_bias", {"gate": (F, E), "up": (F, E), "down": (E, F)}),
        ):
            for name, (rows, columns) in sizes.items():
                linear = f"{layer}{block}.{name}_proj"
                tensors[f"{linear}.weight"] = normal(rows, columns) / columns**0.5
                if config.get(bias):
                    tensors[f"{linear}.bias"] = normal(rows) / 10
    return tensors


def write_sharded(directory: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Spread tensors over `shards` files with an index, or write the single file."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tiny_tokenizer(directory: Path) -> None:
    """A byte-level BPE of about 300 ids, the first three special, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun " * 3
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"})
    )


def tiny_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a small random model and its tokenizer into `directory`, and return it.

    `overrides` are keys of config.json, in Hugging Face's spelling.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = TINY_CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")} | overrides
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: t.to(dtype) for name, t in tiny_tensors(config, seed=seed).items()}
    write_sharded(directory, tensors, shards)
    write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(autouse=True)
def no_status_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress on stderr, which would depend on how long a command takes."""
    monkeypatch.setattr(status, "SHOWN_AFTER", 3600.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that kernels run on: a CUDA device, or the CPU that ttsem presents as one."""
    if not torch.cuda.is_available():
        pytest.skip("kernels need a GPU, or `python -m ttsem.sanitize pytest -m kernel`")
    if torch.version.cuda is None:  # ttsem does not say how much memory its device has
        monkeypatch.setattr("mtpkern.memory.device_memory", lambda: None)
    return "cuda"


@pytest.fixture
def cuda() -> str:
    """A real GPU, for what ttsem does not emulate: graphs, streams, synchronisation."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"


@pytest.fixture
def plain_devices(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ttsem makes torch say that there is a GPU, let it tell the truth: its compiler asks.

    The launchers then take the CPU's tensors, which ttsem reads.
    """
    if torch.version.cuda is None:
        monkeypatch.setattr("mtpkern.kernels._launch._is_reachable", lambda tensor: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for name in {"device", "is_cuda"} & vars(torch.Tensor).keys():
            monkeypatch.delattr(torch.Tensor, name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, marker in (("gpu", "kernel"), ("cuda", "cuda")):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
