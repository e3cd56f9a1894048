"""Text <-> token ids: tokenizer.json through tokenizers, tokenizer.model through sentencepiece.

Decoding is one path for both, and for streams: a token is some bytes, and an incremental UTF-8
decoder turns bytes into characters as they become whole. `decode` is a stream read at once, so a
streamed text and a decoded one cannot differ.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from mtpkern.chat_template import load_chat_templates
from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.checkpoints.tokenizer_files import (
    added_tokens,
    has_tokenizer,
    load_library_tokenizer,
    read_settings,
    special_tokens,
)
from mtpkern.config import ModelConfig
from mtpkern.errors import ModelLoadError, UserError, printable, reason

_SPACE = "\u2581"  # what sentencepiece writes for a space
# Classes of transformers that write spaces their own way, and models that they are not used for.
_LLAMA_CLASSES, _AS_WRITTEN = ("LlamaTokenizer", "LlamaTokenizerFast"), ("mistral", "qwen2")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Vocabulary(Protocol):
    """What the two kinds of tokenizer file have in common."""

    size: int
    own_size: int
    strips_first_space: bool

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def token_id(self, token: str) -> int | None: ...
    def special_tokens(self) -> dict[str, int]: ...


class Tokenizer:
    """A checkpoint's tokenizer and chat template; make one with `from_directory`."""

    def __init__(self, vocabulary: _Vocabulary, directory: Path, settings: Mapping[str, Any]):
        self._vocabulary = vocabulary
        self._bytes: dict[int, bytes] = {}
        specials = special_tokens(settings)
        self.vocab_size = vocabulary.size
        self.bos_token_id = vocabulary.token_id(specials.get("bos_token", ""))
        self.eos_token_id = vocabulary.token_id(specials.get("eos_token", ""))
        self._templates = load_chat_templates(directory, settings, specials)

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Read tokenizer.json, vocab.json with merges.txt, or tokenizer.model, the first there is.

        checkpoints/tokenizer_files.py reads the files beside it. Raises ModelLoadError when there
        is none, or when it cannot be read.
        """
        path = Path(path)
        if not has_tokenizer(path):
            raise ModelLoadError(
                f"{printable(path)} has neither tokenizer.json nor vocab.json with merges.txt nor "
                "tokenizer.model"
            )
        settings = read_settings(path)
        if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
            vocabulary: _Vocabulary = _PieceVocabulary(path / "tokenizer.model", settings)
        else:
            library = load_library_tokenizer(path, settings)
            vocabulary = _JsonVocabulary(library, path, settings)
        return cls(vocabulary, path, settings)

    @property
    def has_chat_template(self) -> bool:
        return self._templates is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the beginning-of-text token where the model wants one."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("prompt must be valid Unicode, got a lone surrogate") from None
        return self._vocabulary.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens leave nothing, broken UTF-8 leaves U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def stream(self, before: Iterable[int] = ()) -> "Detokenizer":
        """An incremental decoder for one sequence, or for what follows the tokens `before`."""
        return Detokenizer(self, before)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for: none for special tokens and ids without a token."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._vocabulary.token_bytes(int(token_id))
        return self._bytes[token_id]

    def special_tokens_in(self, text: str) -> dict[str, int]:
        """The special tokens spelled out in a text, which decoding would leave out: their ids."""
        found = self._vocabulary.special_tokens()
        return {token: i for token, i in found.items() if token in text}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool | None = None,
        **chat: Any,
    ) -> list[int]:
        """Token ids of chat messages (`role`, `content`), ready for the assistant's answer.

        `chat` are the other arguments of transformers' method of this name: tools, documents,
        chat_template, continue_final_message, and what the template itself reads. Without
        add_generation_prompt the answer begins, unless the last message is to be continued.
        """
        return self.encode(self.chat_text(messages, add_generation_prompt, **chat), False)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool | None = None,
        **chat: Any,
    ) -> str:
        """The text whose token ids `apply_chat_template` gives."""
        if self._templates is None:
            raise UserError("this model has no chat template; give it plain text")
        if add_generation_prompt is None:
            add_generation_prompt = not chat.get("continue_final_message")
        return self._templates.render(messages, add_generation_prompt=add_generation_prompt, **chat)

    def check_against(self, config: ModelConfig) -> None:
        """ModelLoadError when this tokenizer makes ids that the model has no embedding for.

        Added tokens may be beyond the model's vocabulary, as a padding token often is: a prompt
        that has one is refused.
        """
        if self._vocabulary.own_size > config.vocab_size:
            raise ModelLoadError(
                f"wrong tokenizer: it has {self._vocabulary.own_size} tokens, the model's "
                f"vocabulary V={config.vocab_size}"
            )
        beyond = [i for i in self.encode("") if i >= config.vocab_size]
        if beyond:
            raise ModelLoadError(
                f"wrong tokenizer: it puts token {beyond[0]} into every prompt, the model's "
                f"vocabulary is V={config.vocab_size}"
            )

    @property
    def strips_first_space(self) -> bool:
        return self._vocabulary.strips_first_space


class Detokenizer:
    """Token ids in, whole and final characters out, as soon as they are: O(1) a token."""

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_first_space and not any(
            tokenizer.token_bytes(token_id) for token_id in before
        )

    def push(self, token_id: int) -> str:
        """The characters that this token completes, possibly none."""
        piece = self._tokenizer.token_bytes(token_id)
        if self._at_start and piece:
            # The space that encoding put before the text is not part of it.
            self._at_start = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What an unfinished character at the end leaves behind: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


class _JsonVocabulary:
    """tokenizer.json: byte-level BPE (Llama 3, SmolLM2) or sentencepiece's spelling (Llama 2)."""

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
                "supported: byte-level and sentencepiece-like decoders"
            )
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        config = directory / "config.json"
        model_type = read_json_object(config).get("model_type") if config.is_file() else None
        is_llama = settings.get("tokenizer_class") in _LLAMA_CLASSES
        if is_llama and model_type not in _AS_WRITTEN and not self._byte_level:
            self._split_as_llama(settings)
        self.strips_first_space = any(
            step["type"] == "Strip"
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        added = self._tokenizer.get_added_tokens_decoder()
        # The library passes over what any of the files calls special.
        self._special = {
            i: t.content for i, t in added.items() if t.special or not tokenizer.decode([i])
        }
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        own = self._tokenizer.get_vocab(with_added_tokens=False).values()
        self.own_size = max((i for i in own if i not in added), default=-1) + 1

    def _split_as_llama(self, settings: Mapping[str, Any]) -> None:
        """Write spaces as transformers' LlamaTokenizer does, whatever tokenizer.json says: one is
        put before the text, and before what follows a special token where `legacy` says so."""
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
    """tokenizer.model; special tokens spelled out in a text, as templates do, are recognised."""

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
        # Llama's class has a beginning-of-text token put first unless the files say otherwise.
        self._bos = self._edge("bos_token", settings, usual=True)
        self._eos = self._edge("eos_token", settings, usual=False)
        self._legacy = settings.get("legacy") is not False
        self.strips_first_space = pieces.EncodeAsPieces("a")[0].startswith(_SPACE)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._pieces.Encode(part) if self._legacy or not ids else self._inner(part)
        return self._bos + ids + self._eos if add_special_tokens else ids

    def _edge(self, name: str, settings: Mapping[str, Any], usual: bool) -> list[int]:
        """The id of bos_token or eos_token, if texts are to begin or end with it."""
        token = special_tokens(settings).get(name)
        found = self.token_id(token) if token and settings.get(f"add_{name}", usual) else None
        return [] if found is None else [found]

    def _inner(self, text: str) -> list[int]:
        """Ids of a text without the space that is put before one: what follows the unknown token's
        spelling, as in transformers."""
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
    """Byte-level BPE writes bytes as printable characters: these stand for themselves, and the
    others, in order, for U+0100 and up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_OF = _byte_alphabet()
