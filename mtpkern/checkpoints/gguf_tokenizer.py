"""A GGUF's tokenizer -> tokenizer.json or tokenizer.model, and the settings beside it.

A byte-level BPE (tokenizer.ggml.model "gpt2") becomes a tokenizer.json; what cuts a text into words
has only a name there (tokenizer.ggml.pre). SentencePiece's BPE ("llama") becomes a tokenizer.model.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mtpkern.checkpoints.tokenizer_files import QWEN_WORDS
from mtpkern.errors import ModelLoadError, printable

# GGUF's token types, which are SentencePiece's.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
# Values of tokenizer.ggml.model -> transformers' classes.
_CLASSES = {"gpt2": "PreTrainedTokenizerFast", "llama": "LlamaTokenizer"}
_END = "<|endoftext|>"


class _Kind(NamedTuple):
    """What a name in tokenizer.ggml.pre stands for."""

    words: str | None = None  # how a text is cut; None: as the byte-level step does by itself
    digits: bool = False  # each digit stands alone
    nfc: bool = False
    whole_words: bool = False  # a word that is a token is not put together of merges
    bos: bool = False  # a text begins with the beginning-of-text token where nothing says


# Llama 3 takes digits by threes.
_LLAMA_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_KINDS = {
    "smollm": _Kind(digits=True),
    "gpt-2": _Kind(),
    "llama-bpe": _Kind(_LLAMA_WORDS, whole_words=True, bos=True),
    "qwen2": _Kind(QWEN_WORDS, nfc=True),
}
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def write_tokenizer(directory: Path, metadata: dict[str, Any], config: dict[str, Any]) -> None:
    """Write the tokenizer's files, with generation_config.json, into an existing directory.

    `config` is what becomes config.json. KeyError for metadata that is missing, ModelLoadError for
    what is not supported.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    model = metadata["tokenizer.ggml.model"]
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ModelLoadError(f"tokenizer.ggml.token_type has {len(types)} of {len(tokens)} tokens")
    edges = {
        name: bool(metadata.get(f"tokenizer.ggml.add_{name}_token", _begins(metadata, name)))
        for name in ("bos", "eos")
    }
    if model == "gpt2":
        _write_byte_level(directory / "tokenizer.json", metadata, types, edges)
    elif model == "llama":
        _write_pieces(directory / "tokenizer.model", metadata, types)
    else:
        raise _unsupported("tokenizer.ggml.model", model, "gpt2, llama")
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    template = metadata.get("tokenizer.chat_template")
    named = {
        name.removeprefix("tokenizer.chat_template."): text
        for name, text in metadata.items()
        if name.startswith("tokenizer.chat_template.")
    }
    if named:
        all_templates = ({"default": template} if template else {}) | named
        template = [{"name": name, "template": text} for name, text in all_templates.items()]
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": _CLASSES[model],
            "bos_token": None if bos is None else tokens[bos],
            "eos_token": None if eos is None else tokens[eos],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": template,
            **({f"add_{name}_token": edges[name] for name in edges} if model == "llama" else {}),
        },
    )
    # A chat turn ends with the template's token, a document with <|endoftext|>.
    others = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    ends = [eos, *others, tokens.index(_END) if _END in tokens else None]
    sampling = {ours: metadata[theirs] for theirs, ours in _SAMPLING.items() if theirs in metadata}
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": bos,
            "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)),
            **sampling,
        },
    )


def _begins(metadata: dict[str, Any], name: str) -> bool:
    """Whether a text has a token at its edge where the file does not say, as in llama.cpp."""
    if name == "eos":
        return False
    kind = _KINDS.get(metadata.get("tokenizer.ggml.pre", ""))
    return metadata["tokenizer.ggml.model"] == "llama" or (kind is not None and kind.bos)


def _unsupported(name: str, value: Any, supported: str) -> ModelLoadError:
    return ModelLoadError(f"{name}={printable(value)} is not supported; supported: {supported}")


def _write_byte_level(
    file: Path, metadata: dict[str, Any], types: Sequence[int], edges: dict[str, bool]
) -> None:
    tokens, pre = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.pre"]
    if pre not in _KINDS:
        raise _unsupported("tokenizer.ggml.pre", pre, ", ".join(_KINDS))
    kind = _KINDS[pre]
    for name in ("add_space_prefix", "remove_extra_whitespaces"):
        if metadata.get(f"tokenizer.ggml.{name}"):
            raise _unsupported(f"tokenizer.ggml.{name}", True, "False")
    merges: list[tuple[str, str]] = []
    for line in metadata["tokenizer.ggml.merges"]:
        left, right = line.split(" ")
        merges.append((left, right))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind.whole_words)
    tokenizer = Tokenizer(bpe)
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if kind.digits else []
    if kind.words is not None:
        cuts.append(pre_tokenizers.Split(Regex(kind.words), behavior="isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.words is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    whole = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in whole])
    put = {
        name: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for name in edges if edges[name]
    }
    if put:
        before, behind = ([put[name]] if name in put else [] for name in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            special_tokens=[(token, vocabulary[token]) for token in set(put.values())],
        )
    tokenizer.save(str(file))


def _write_pieces(file: Path, metadata: dict[str, Any], types: Sequence[int]) -> None:
    """A SentencePiece model: its message ModelProto, as sentencepiece_model.proto numbers it."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    content = b""
    for token, score, kind in zip(tokens, scores, types, strict=True):
        piece = _field(1, token.encode()) + _field(2, float(score)) + _field(3, kind)
        content += _field(1, piece)
    ids = {
        name: metadata.get(f"tokenizer.ggml.{theirs}_token_id", -1)
        for name, theirs in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"))
    }
    if ids["unk"] == -1:
        ids["unk"] = types.index(_UNKNOWN) if _UNKNOWN in types else 0
    trainer = _field(3, 2) + _field(35, _BYTE in types)
    trainer += b"".join(_field(40 + i, ids[name]) for i, name in enumerate(("unk", "bos", "eos")))
    flags = (
        metadata.get("tokenizer.ggml.add_space_prefix", True),
        metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
        True,  # spaces are written as U+2581
    )
    normalizer = _field(1, b"identity")
    normalizer += b"".join(_field(3 + i, flag) for i, flag in enumerate(flags))
    file.write_bytes(content + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, value: bytes | float | int) -> bytes:
    """A field of a message in Protocol Buffers' encoding."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value % 2**64)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
