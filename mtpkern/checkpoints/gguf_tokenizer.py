"""A GGUF's tokenizer -> tokenizer.json or tokenizer.model, tokenizer_config.json and
generation_config.json.

Byte-level BPE (tokenizer.ggml.model "gpt2") becomes a tokenizer.json. Its pre-tokenizer is only
named in the GGUF (tokenizer.ggml.pre). SentencePiece's BPE ("llama") becomes a tokenizer.model.
"""

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
)

from mtpkern.checkpoints.json_files import write_json
from mtpkern.checkpoints.tokenizer_files import QWEN_WORDS, add_bos_and_eos
from mtpkern.errors import ModelLoadError, printable

# GGUF's token types, which are SentencePiece's.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
# Values of tokenizer.ggml.model -> transformers' classes.
_CLASSES = {"gpt2": "PreTrainedTokenizerFast", "llama": "LlamaTokenizer"}
_END = "<|endoftext|>"


class _PreTokenizer(NamedTuple):
    """What a name in tokenizer.ggml.pre means."""

    words: str | None = None  # regular expression of words; None: the byte-level step's own
    digits: bool = False  # split numbers into single digits
    nfc: bool = False
    whole_words: bool = False  # a word in the vocabulary is one token, without merges
    bos: bool = False  # texts begin with the BOS token by default


# Llama 3 splits numbers into groups of up to three digits.
_LLAMA_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_PRE_TOKENIZERS = {
    "smollm": _PreTokenizer(digits=True),
    "gpt-2": _PreTokenizer(),
    "llama-bpe": _PreTokenizer(_LLAMA_WORDS, whole_words=True, bos=True),
    "qwen2": _PreTokenizer(QWEN_WORDS, nfc=True),
}
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def write_tokenizer(directory: Path, metadata: dict[str, Any], config: dict[str, Any]) -> None:
    """Write the tokenizer files and generation_config.json into an existing directory.

    `config` is the content of config.json. Raises KeyError for missing metadata, ModelLoadError
    for values that are not supported.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    model = metadata["tokenizer.ggml.model"]
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ModelLoadError(f"tokenizer.ggml.token_type has {len(types)} of {len(tokens)} tokens")
    added = {
        name: bool(metadata.get(f"tokenizer.ggml.add_{name}_token", _adds(metadata, name)))
        for name in ("bos", "eos")
    }
    if model == "gpt2":
        _write_byte_level(directory / "tokenizer.json", metadata, types, added)
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
            **({f"add_{name}_token": added[name] for name in added} if model == "llama" else {}),
        },
    )
    # Chat turns end with the template's own token, documents with <|endoftext|>.
    others = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    ends = [eos, *others, tokens.index(_END) if _END in tokens else None]
    sampling = {name: metadata[key] for key, name in _SAMPLING.items() if key in metadata}
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": bos,
            "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)),
            **sampling,
        },
    )


def _adds(metadata: dict[str, Any], name: str) -> bool:
    """Whether llama.cpp adds the BOS or EOS token to texts if the metadata does not say."""
    if name == "eos":
        return False
    pre_tokenizer = _PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre", ""))
    is_sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    return is_sentencepiece or (pre_tokenizer is not None and pre_tokenizer.bos)


def _unsupported(name: str, value: Any, supported: str) -> ModelLoadError:
    return ModelLoadError(f"{name}={printable(value)} is not supported; supported: {supported}")


def _write_byte_level(
    file: Path, metadata: dict[str, Any], types: Sequence[int], added: dict[str, bool]
) -> None:
    tokens, pre = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.pre"]
    if pre not in _PRE_TOKENIZERS:
        raise _unsupported("tokenizer.ggml.pre", pre, ", ".join(_PRE_TOKENIZERS))
    pre_tokenizer = _PRE_TOKENIZERS[pre]
    for name in ("add_space_prefix", "remove_extra_whitespaces"):
        if metadata.get(f"tokenizer.ggml.{name}"):
            raise _unsupported(f"tokenizer.ggml.{name}", True, "False")
    merges: list[tuple[str, str]] = []
    for line in metadata["tokenizer.ggml.merges"]:
        left, right = line.split(" ")
        merges.append((left, right))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    for merge in merges:
        for token in (*merge, "".join(merge)):
            if token not in vocabulary:
                raise ModelLoadError(
                    f"tokenizer.ggml.merges has {printable(token)}, which is not a token"
                )
    bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre_tokenizer.whole_words)
    tokenizer = Tokenizer(bpe)
    steps: list[Any] = []
    if pre_tokenizer.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre_tokenizer.words is not None:
        steps.append(pre_tokenizers.Split(Regex(pre_tokenizer.words), behavior="isolated"))
    use_regex = pre_tokenizer.words is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre_tokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    whole = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in whole])
    ids = {name: metadata[f"tokenizer.ggml.{name}_token_id"] for name in added if added[name]}
    add_bos_and_eos(tokenizer, {name: tokens[i] for name, i in ids.items()})
    tokenizer.save(str(file))


def _write_pieces(file: Path, metadata: dict[str, Any], types: Sequence[int]) -> None:
    """Write a SentencePiece model: a ModelProto, with sentencepiece_model.proto's field numbers."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    content = b""
    for token, score, kind in zip(tokens, scores, types, strict=True):
        piece = _field(1, token.encode()) + _field(2, float(score)) + _field(3, kind)
        content += _field(1, piece)
    ids = {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id", -1)
        for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"))
    }
    if ids["unk"] == -1:
        ids["unk"] = types.index(_UNKNOWN) if _UNKNOWN in types else 0
    trainer = _field(3, 2) + _field(35, _BYTE in types)
    trainer += b"".join(_field(40 + i, ids[name]) for i, name in enumerate(("unk", "bos", "eos")))
    flags = (
        metadata.get("tokenizer.ggml.add_space_prefix", True),
        metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
        True,  # escape_whitespaces: spaces become U+2581
    )
    normalizer = _field(1, b"identity")
    normalizer += b"".join(_field(3 + i, flag) for i, flag in enumerate(flags))
    file.write_bytes(content + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, value: bytes | float | int) -> bytes:
    """One field of a message in the Protocol Buffers encoding."""
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
