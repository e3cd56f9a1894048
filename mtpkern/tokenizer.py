"""Text <-> token ids, and a checkpoint's chat template.

Decoding is incremental: each token is a sequence of bytes (checkpoints/vocabulary.py), and a UTF-8
decoder emits characters as soon as they are complete. `decode` runs the same decoder over all
tokens, so that streamed and decoded texts are equal.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtpkern.chat_template import load_chat_templates
from mtpkern.checkpoints.tokenizer_files import has_tokenizer, read_settings, special_tokens
from mtpkern.checkpoints.vocabulary import Vocabulary, load_vocabulary
from mtpkern.config import ModelConfig
from mtpkern.errors import ModelLoadError, UserError, printable


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Use `from_directory` to create one."""

    def __init__(self, vocabulary: Vocabulary, directory: Path, settings: Mapping[str, Any]):
        self._vocabulary = vocabulary
        self._bytes: dict[int, bytes] = {}
        specials = special_tokens(settings)
        self.vocab_size = vocabulary.size
        self.bos_token_id = vocabulary.token_id(specials.get("bos_token", ""))
        self.eos_token_id = vocabulary.token_id(specials.get("eos_token", ""))
        self._templates = load_chat_templates(directory, settings, specials)

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer.model, or vocab.json with merges.txt, in this order.

        checkpoints/tokenizer_files.py describes the files read besides. Raises ModelLoadError if
        there is no tokenizer or it cannot be read.
        """
        path = Path(path)
        if not has_tokenizer(path):
            raise ModelLoadError(
                f"{printable(path)} has neither tokenizer.json nor vocab.json with merges.txt nor "
                "tokenizer.model"
            )
        settings = read_settings(path)
        return cls(load_vocabulary(path, settings), path, settings)

    @property
    def has_chat_template(self) -> bool:
        return self._templates is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the BOS token first if the model uses one."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("prompt must be valid Unicode, got a lone surrogate") from None
        return self._vocabulary.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Special tokens are omitted; invalid UTF-8 becomes U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def stream(self, before: Iterable[int] = ()) -> "Detokenizer":
        """An incremental decoder for one sequence, of which `before` was decoded already."""
        return Detokenizer(self, before)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, empty for special tokens and for ids without a token."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._vocabulary.token_bytes(int(token_id))
        return self._bytes[token_id]

    def special_tokens_in(self, text: str) -> dict[str, int]:
        """Special tokens spelled out in a text, which decoding would omit, with their ids."""
        found = self._vocabulary.special_tokens()
        return {token: i for token, i in found.items() if token in text}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool | None = None,
        **chat: Any,
    ) -> list[int]:
        """Token ids of chat messages (`role`, `content`), up to the start of the answer.

        `chat` takes the other arguments of transformers' method of this name: tools, documents,
        chat_template, continue_final_message, and variables of the template.
        add_generation_prompt defaults to True, unless the last message is to be continued.
        """
        return self.encode(self.chat_text(messages, add_generation_prompt, **chat), False)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool | None = None,
        **chat: Any,
    ) -> str:
        """The text that `apply_chat_template` encodes."""
        if self._templates is None:
            raise UserError("this model has no chat template; give it plain text")
        if add_generation_prompt is None:
            add_generation_prompt = not chat.get("continue_final_message")
        return self._templates.render(messages, add_generation_prompt=add_generation_prompt, **chat)

    def check_against(self, config: ModelConfig) -> None:
        """Raise ModelLoadError if this tokenizer produces ids beyond the model's vocabulary.

        Added tokens may be beyond it, as a padding token often is. A prompt with one is refused
        later.
        """
        if self._vocabulary.own_size > config.vocab_size:
            raise ModelLoadError(
                f"wrong tokenizer: it has {self._vocabulary.own_size} tokens, the model's "
                f"vocabulary V={config.vocab_size}"
            )
        beyond = [i for i in self.encode("") if i >= config.vocab_size]
        if beyond:
            raise ModelLoadError(
                f"wrong tokenizer: it adds token {beyond[0]} to every prompt, the model's "
                f"vocabulary is V={config.vocab_size}"
            )

    @property
    def strips_first_space(self) -> bool:
        return self._vocabulary.strips_first_space


class Detokenizer:
    """Incremental decoder: token ids in, complete characters out, in O(1) per token."""

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_first_space and not any(
            tokenizer.token_bytes(token_id) for token_id in before
        )

    def push(self, token_id: int) -> str:
        """The characters completed by this token, possibly none."""
        piece = self._tokenizer.token_bytes(token_id)
        if self._at_start and piece:
            # Encoding added this space in front of the text.
            self._at_start = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """U+FFFD if the tokens end within a character, else nothing."""
        return self._decoder.decode(b"", final=True)
