"""The files that define a tokenizer -> one tokenizer, identical to the one transformers makes.

    tokenizer.json           a tokenizer of the tokenizers library, with its added tokens
    vocab.json, merges.txt   vocabulary and merges only; tokenizer_config.json has the rest
    tokenizer.model          a SentencePiece model
    tokenizer_config.json    flags, names of special tokens, and added tokens (added_tokens_decoder)
    special_tokens_map.json  special tokens, in the format before added_tokens_decoder
    added_tokens.json        added tokens, in the format before added_tokens_decoder

Precedence: if tokenizer_config.json has an added_tokens_decoder, special_tokens_map.json and
added_tokens.json are ignored. Otherwise special_tokens_map.json takes precedence over it, and
tokenizer.json over added_tokens.json. The flags of an added token are the table's and its id is
tokenizer.json's; a table with another id is refused. add_bos_token and add_eos_token are read only
if there is no tokenizer.json, which states both itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.errors import ModelLoadError, printable, reason

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Qwen's words: contractions, letters with up to one other character before them, single digits,
# punctuation, line breaks, spaces.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Class(NamedTuple):
    """A tokenizer class of transformers: its default special tokens and its words."""

    defaults: dict[str, str]
    words: str | None = None  # regular expression of words; None: the byte-level step's own


_END = "<|endoftext|>"
_CLASSES = {
    "Qwen2Tokenizer": _Class(
        dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END), QWEN_WORDS
    ),
    "GPT2Tokenizer": _Class(dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END)),
    "LlamaTokenizer": _Class({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}),
}
_CLASS_BY_MODEL_TYPE = {
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "mimo": "Qwen2Tokenizer",
}


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has a tokenizer."""
    pair = all((directory / name).is_file() for name in ("vocab.json", "merges.txt"))
    return pair or any(
        (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    )


def read_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, merged with special_tokens_map.json and its class's defaults."""
    settings = _read(directory, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        older = _read(directory, "special_tokens_map.json")
        if {"additional_special_tokens", "extra_special_tokens"} & settings.keys():
            older.pop("additional_special_tokens", None)
        settings |= older
    name = _class_name(directory, settings)
    defaults = _CLASSES[name].defaults if name in _CLASSES else {}
    return defaults | settings


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The text of each `*_token` setting, which is a string or an object with a content."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def added_tokens(directory: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Id -> added token, from tokenizer_config.json's table or else from added_tokens.json."""
    table = settings.get("added_tokens_decoder")
    named = special_tokens(settings)
    special = {named[name] for name in _NAMED if name in named}
    special |= {_special(value).content for value in _extra_tokens(settings)}
    found: dict[int, AddedToken] = {}
    if isinstance(table, dict):
        where = "tokenizer_config.json"
        pairs = [
            (token_id, token.get("content"), {f: bool(token[f]) for f in _FLAGS if f in token})
            if isinstance(token, dict)
            else (token_id, None, {})
            for token_id, token in table.items()
        ]
    else:
        where = "added_tokens.json"
        pairs = [
            (token_id, token, {"special": token in special, "normalized": token not in special})
            for token, token_id in _read(directory, where).items()
        ]
    for token_id, content, flags in pairs:
        if not isinstance(content, str) or not content or not str(token_id).isdecimal():
            raise ModelLoadError(
                f"{printable(directory / where)}: added token {printable(json.dumps(content))} "
                "is malformed"
            )
        found[int(token_id)] = AddedToken(content, **flags)
    return dict(sorted(found.items()))


def load_library_tokenizer(directory: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json, or of vocab.json and merges.txt, with all added tokens."""
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises a bare Exception for a file it cannot read
            raise ModelLoadError(
                f"{printable(file)} cannot be read: {reason(error, file)}"
            ) from None
    else:
        tokenizer = _from_vocabulary(directory, settings)
    _add_tokens(tokenizer, directory, settings)
    if not file.is_file():
        named = special_tokens(settings)
        add_bos_and_eos(
            tokenizer,
            {
                name: named[f"{name}_token"]
                for name in ("bos", "eos")
                if settings.get(f"add_{name}_token") and f"{name}_token" in named
            },
        )
    # Settings left over from training, which would silently truncate or pad a prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def add_bos_and_eos(tokenizer: tokenizers.Tokenizer, tokens: Mapping[str, str]) -> None:
    """Make the tokenizer begin texts with `tokens["bos"]` and end them with `tokens["eos"]`, if
    given."""
    if not tokens:
        return
    bos, eos = ([tokens[name]] if name in tokens else [] for name in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in set(tokens.values())],
    )


def _read(directory: Path, name: str) -> dict[str, Any]:
    return read_json_object(directory / name) if (directory / name).is_file() else {}


def _class_name(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The tokenizer class named by the files, or else the one for the model's type."""
    name = settings.get("tokenizer_class")
    if name is None:
        config = _read(directory, "config.json")
        name = config.get("tokenizer_class") or _CLASS_BY_MODEL_TYPE.get(
            str(config.get("model_type"))
        )
    if name is None and not (directory / "tokenizer.json").is_file():
        # transformers' default for SentencePiece models.
        name = "LlamaTokenizer" if (directory / "tokenizer.model").is_file() else None
    return None if name is None else str(name).removesuffix("Fast")


def _extra_tokens(settings: Mapping[str, Any]) -> list[Any] | dict[str, Any]:
    """Special tokens besides `_NAMED`: a list, or an object of named ones."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise ModelLoadError("tokenizer_config.json: extra_special_tokens must be a list of tokens")
    return extra


def _from_vocabulary(directory: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The byte-level BPE of vocab.json and merges.txt, if its class is supported."""
    name = _class_name(directory, settings)
    supported = ("Qwen2Tokenizer", "GPT2Tokenizer")
    if name not in supported:
        raise ModelLoadError(
            f"{printable(directory)} has vocab.json and merges.txt of tokenizer_class "
            f"{printable(name)}, which is not supported; supported: {', '.join(supported)}, or a "
            "tokenizer.json"
        )
    files = str(directory / "vocab.json"), str(directory / "merges.txt")
    try:
        vocabulary, merges = models.BPE.read_file(*files)
        # Added tokens keep their ids only if they are part of the vocabulary.
        used_ids = set(vocabulary.values())
        for token_id, token in added_tokens(directory, settings).items():
            if token_id not in used_ids:
                vocabulary.setdefault(token.content, token_id)
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except ModelLoadError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a file it cannot read
        raise ModelLoadError(
            f"{printable(directory)}: vocab.json and merges.txt cannot be read: "
            f"{reason(error, directory)}"
        ) from None
    prefix_space, words = bool(settings.get("add_prefix_space")), _CLASSES[name].words
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=words is None)
    tokenizer.pre_tokenizer = byte_level
    if words is not None:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(words), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(
    tokenizer: tokenizers.Tokenizer, directory: Path, settings: Mapping[str, Any]
) -> None:
    """Add the tokens of the tables, and special tokens that are in no table."""
    own = tokenizer.get_added_tokens_decoder()
    table = added_tokens(directory, settings)
    if "added_tokens_decoder" not in settings:
        # tokenizer.json takes precedence over added_tokens.json.
        table |= own
    named = {name: settings[name] for name in special_tokens(settings)}
    extra = _extra_tokens(settings)
    if isinstance(extra, dict):
        named, extra = named | extra, []
    order = [*(n for n in _NAMED if n in named), *(n for n in named if n not in _NAMED)]
    special = {_special(named[name]).content for name in order}
    for token in table.values():
        token.special = token.special or token.content in special
    listed = {token.content for token in (*table.values(), *own.values())}
    # If a token is listed twice, the later flags apply.
    values: list[Any] = []
    for value in (*(named[name] for name in order), *extra):
        if value not in values:
            values.append(value)
    all_special = [_special(value) for value in values]
    unlisted = [token for token in all_special if token.content not in listed]
    tokenizer.add_tokens([*table.values(), *unlisted])
    if _class_name(directory, settings) == "Qwen2Tokenizer":
        # This class gives all special tokens the same flags.
        tokenizer.add_tokens([AddedToken(token.content, special=True) for token in all_special])
    for token_id, token in table.items():
        found = tokenizer.token_to_id(token.content)
        if found != token_id:
            where = "tokenizer.json" if (directory / "tokenizer.json").is_file() else "vocab.json"
            listing = (
                "tokenizer_config.json"
                if "added_tokens_decoder" in settings
                else "added_tokens.json"
            )
            raise ModelLoadError(
                f"{printable(directory)}: {listing} gives {printable(token.content)} the id "
                f"{token_id}, and {where} the id {found}"
            )


def _special(value: Any) -> AddedToken:
    """A special token, with the flags of its setting if that is an object."""
    flags = value if isinstance(value, dict) else {"content": value}
    if not isinstance(flags.get("content"), str):
        raise ModelLoadError(
            f"tokenizer_config.json: special token {printable(json.dumps(value))} is malformed"
        )
    kept = {flag: bool(flags[flag]) for flag in _FLAGS if flag in flags}
    return AddedToken(flags["content"], **(kept | {"special": True}))
