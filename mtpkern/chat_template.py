"""A model's own chat template, rendered in a sandbox with bounds on what goes in and comes out."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtpkern.arguments import shown
from mtpkern.config import ModelLoadError, UserError, printable, read_json_object

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_RENDERED_CHARACTERS = 1 << 22


class _Generation(Extension):
    """{% generation %} marks what a trainer learns from; to a prompt it is nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Chat messages -> the text that the model was trained to see."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ModelLoadError(
                f"chat template must be at most {MAX_TEMPLATE_CHARACTERS} characters, "
                f"got {len(source)}"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = _tojson
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelLoadError(f"chat template is not valid: {printable(error)}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The prompt's text; UserError when the template refuses the messages or overflows."""
        messages = [_plain_message(message) for message in messages]
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_RENDERED_CHARACTERS:
                    raise UserError(
                        f"chat template wrote more than {MAX_RENDERED_CHARACTERS} characters"
                    )
        except UserError:
            raise
        except Exception as error:  # whatever an operation of the template's raises
            raise UserError(f"chat template refused the messages: {printable(error)}") from None
        return "".join(pieces)


def load_chat_template(
    directory: Path, settings: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """A directory's template: chat_template.jinja or .json, or the one in tokenizer_config.json."""
    text: Any = settings.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        try:
            text = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{printable(directory)}: chat_template.jinja: {error}") from None
    elif text is None and (directory / "chat_template.json").is_file():
        text = read_json_object(directory / "chat_template.json").get("chat_template")
    if isinstance(text, list):
        # Several templates under names: the default one is for chat.
        named = [item for item in text if isinstance(item, dict) and item.get("name") == "default"]
        text = named[0].get("template") if named else None
    if text is None:
        return None
    if not isinstance(text, str):
        raise ModelLoadError(f"{printable(directory)}: chat_template must be a string")
    return ChatTemplate(text, special_tokens)


def _plain_message(message: Any) -> dict[str, Any]:
    """A message with its content as text: parts of type text are joined by newlines."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"messages must be objects with a role and a content, got {shown(message)}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, list | tuple):
        raise UserError(f"a message's content must be text, got {shown(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"content of type {shown(kind)} is not supported; supported: "
                '{"type": "text", "text": ...}'
            )
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    # Unlike jinja2's own filter, which escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
