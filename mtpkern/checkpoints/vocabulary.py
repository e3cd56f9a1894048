"""The tokens of a tokenizer file: text -> ids, and id -> bytes.

tokenizer.json, or vocab.json with merges.txt, is read by tokenizers, tokenizer.model by
sentencepiece. `Vocabulary` is what both have in common.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.checkpoints.tokenizer_files import (
    added_tokens,
    load_library_tokenizer,
    special_tokens,
)
from mtpkern.errors import ModelLoadError, printable, reason

_SPACE = "\u2581"  # SentencePiece's character for a space
# Classes of transformers with their own treatment of spaces, and model types that it does not use
# them for.
_LLAMA_CLASSES, _NOT_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast"), ("mistral", "qwen2")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary(Protocol):
    """The tokens of one tokenizer."""

    size: int  # highest id + 1
    own_size: int  # the same, without added tokens
    strips_first_space: bool  # whether decoding drops a leading space

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def token_id(self, token: str) -> int | None: ...
    def special_tokens(self) -> dict[str, int]: ...


def load_vocabulary(directory: Path, settings: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a directory. tokenizer.model is read only if there is no tokenizer.json."""
    pieces = directory / "tokenizer.model"
    if pieces.is_file() and not (directory / "tokenizer.json").is_file():
        return _PieceVocabulary(pieces, settings)
    return _JsonVocabulary(load_library_tokenizer(directory, settings), directory, settings)


class _JsonVocabulary:
    """tokenizer.json: byte-level BPE (Llama 3, SmolLM2), or SentencePiece's scheme (Llama 2)."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, directory: Path, settings: Mapping[str, Any]
    ):
        self._tokenizer = tokenizer
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None
        steps = list(_decoder_steps(decoder))
        kinds = {step.get("type") for step in steps}
        unknown = kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        if unknown or not kinds & {"ByteLevel", "Metaspace", "Replace"}:
            named = ", ".join(sorted(printable(kind) for kind in unknown)) or "none"
            raise ModelLoadError(
                f"{printable(directory / 'tokenizer.json')}: decoder {named} is not supported; "
                "supported: byte-level and SentencePiece-style decoders"
            )
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        config = directory / "config.json"
        model_type = read_json_object(config).get("model_type") if config.is_file() else None
        is_llama = settings.get("tokenizer_class") in _LLAMA_CLASSES
        if is_llama and model_type not in _NOT_LLAMA and not self._byte_level:
            self._use_llama_spaces(settings)
        self.strips_first_space = any(
            step["type"] == "Strip"
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        added = self._tokenizer.get_added_tokens_decoder()
        # Tokens that the library's decoder omits.
        self._special = {
            i: t.content for i, t in added.items() if t.special or not tokenizer.decode([i])
        }
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        own = self._tokenizer.get_vocab(with_added_tokens=False).values()
        self.own_size = max((i for i in own if i not in added), default=-1) + 1

    def _use_llama_spaces(self, settings: Mapping[str, Any]) -> None:
        """Handle spaces as transformers' LlamaTokenizer does, whatever tokenizer.json says.

        One is added before the text and, with `legacy`, after every special token.
        """
        scheme = "always" if settings.get("legacy") else "first"
        if settings.get("add_prefix_space") is False:
            scheme = "never"
        self._tokenizer.normalizer = None  # type: ignore[assignment]
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            _SPACE, prepend_scheme=scheme, split=False
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def special_tokens(self) -> dict[str, int]:
        return {token: i for i, token in self._special.items()}

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.size else None
        if token is None or token_id in self._special:
            return b""
        if self._byte_level:
            if all(character in BYTE_OF for character in token):
                return bytes(BYTE_OF[character] for character in token)
            return token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


class _PieceVocabulary:
    """tokenizer.model. Special tokens spelled out in a text, as templates do, are recognised."""

    def __init__(self, file: Path, settings: Mapping[str, Any]):
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.Load(str(file))
        except (RuntimeError, OSError) as error:
            raise ModelLoadError(
                f"{printable(file)} cannot be read: {reason(error, file)}"
            ) from None
        pieces = self._pieces
        ids = range(pieces.GetPieceSize())
        added = added_tokens(file.parent, settings)
        for i, token in added.items():
            if i in ids and pieces.IdToPiece(i) != token.content:
                raise ModelLoadError(
                    f"{printable(file)}: token {i} is {printable(pieces.IdToPiece(i))}, and "
                    f"{printable(token.content)} in the added tokens beside it"
                )
        control = {pieces.IdToPiece(i): i for i in ids if pieces.IsControl(i)}
        self._special = control | {token.content: i for i, token in added.items()}
        self._text_of = dict.fromkeys(control.values(), b"") | {
            i: b"" if token.special else token.content.encode() for i, token in added.items()
        }
        self.size = max([*ids, *self._text_of], default=-1) + 1
        self.own_size = len(ids)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first or ["\0"])) + ")")
        # LlamaTokenizer adds the BOS token by default, and not the EOS token.
        self._bos = self._added("bos_token", settings, default=True)
        self._eos = self._added("eos_token", settings, default=False)
        self._legacy = settings.get("legacy") is not False
        self.strips_first_space = pieces.EncodeAsPieces("a")[0].startswith(_SPACE)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += (
                    self._pieces.Encode(part)
                    if self._legacy or not ids
                    else self._encode_unprefixed(part)
                )
        return self._bos + ids + self._eos if add_special_tokens else ids

    def _added(self, name: str, settings: Mapping[str, Any], default: bool) -> list[int]:
        """The id of bos_token or eos_token, if it is added to texts."""
        token = special_tokens(settings).get(name)
        found = self.token_id(token) if token and settings.get(f"add_{name}", default) else None
        return [] if found is None else [found]

    def _encode_unprefixed(self, text: str) -> list[int]:
        """Ids of a text, without the space that SentencePiece adds in front.

        As in transformers, the text is encoded after the unknown token's spelling.
        """
        unknown = self._pieces.IdToPiece(self._pieces.unk_id())
        skipped = len(self._pieces.Encode(unknown))
        return self._pieces.Encode(unknown + text)[skipped:]

    def token_id(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        found = self._pieces.PieceToId(token)
        return found if self._pieces.IdToPiece(found) == token else None

    def special_tokens(self) -> dict[str, int]:
        return {token: i for token, i in self._special.items() if not self._text_of[i]}

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._text_of or not 0 <= token_id < self._pieces.GetPieceSize():
            return self._text_of.get(token_id, b"")
        if self._pieces.IsUnknown(token_id):
            return " \u2047 ".encode()
        piece = self._pieces.IdToPiece(token_id)
        if self._pieces.IsByte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()


def _decoder_steps(decoder: Any) -> Iterable[dict[str, Any]]:
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        for step in decoder.get("decoders", []):
            yield from _decoder_steps(step)
    elif isinstance(decoder, dict):
        yield decoder


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level BPE.

    Printable characters encode their own byte, those from U+0100 for the other bytes in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_OF = _byte_alphabet()
