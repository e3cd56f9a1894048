"""A model's chat templates, rendered in a sandbox with bounds on the size of input and output.

The text equals that of transformers' `apply_chat_template`: the same variables, filters and tags,
the same choice among several templates, the same end for a message to be continued.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.errors import ModelLoadError, UserError, printable
from mtpkern.validation import shown

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_RENDERED_CHARACTERS = 1 << 22

# Appended to a message that is to be continued, to find its end in the rendered text. The trailing
# space is missing there if the template strips the message.
_END_MARK = "END_OF_UNFINISHED_MESSAGE "
# Keys for a message's reasoning. Each template reads one of them.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Arguments of transformers' apply_chat_template that are not variables of templates.
_NOT_VARIABLES = {
    "messages",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
    "tokenizer_kwargs",
}


class _Generation(Extension):
    """{% generation %} marks the text that training uses. In a prompt it is a block with its own
    scope."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplates:
    """Chat messages -> the prompt's text, by one template or a choice of several."""

    def __init__(
        self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ):
        """`sources` is a template, or templates by name. ModelLoadError if one is not valid."""
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        self._environment.filters["tojson"] = _tojson
        self._special_tokens = dict(special_tokens or {})
        named = {"default": sources} if isinstance(sources, str) else sources
        self._templates = {name: self._compile(source) for name, source in named.items()}

    def _compile(self, source: str) -> tuple[Template, bool]:
        """A template, and whether it handles a content that is a list of parts."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ModelLoadError(
                f"chat template must be at most {MAX_TEMPLATE_CHARACTERS} characters, "
                f"got {len(source)}"
            )
        try:
            tree = self._environment.parse(source)
            read = {node.attr for node in tree.find_all(nodes.Getattr)}
            read |= {
                node.arg.value
                for node in tree.find_all(nodes.Getitem)
                if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
            }
            return self._environment.from_string(tree), "text" in read
        except (TemplateError, RecursionError) as error:
            raise ModelLoadError(f"chat template is not valid: {printable(error)}") from None

    def _choose(self, wanted: str | None, tools: bool) -> tuple[Template, bool]:
        """A template by name or by its source; by default "tool_use" with tools, else "default"."""
        if wanted is not None:
            if not isinstance(wanted, str):
                raise UserError(f"chat_template must be a string, got {shown(wanted)}")
            return self._templates.get(wanted) or self._compile(wanted)
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        names = ", ".join(printable(name) for name in sorted(self._templates))
        raise UserError(
            f"this model has no default chat template; give chat_template, one of: {names}"
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        **arguments: Any,
    ) -> str:
        """The prompt's text.

        `tools` are JSON schemas, `documents` objects with a title and a text, and `arguments` other
        variables of the template. `chat_template` is the name of one of the model's templates, or a
        template. With `continue_final_message` the text ends with the last message, unclosed; a
        string names the field to continue, "content" by default. Raises UserError if the template
        refuses the messages or writes more than MAX_RENDERED_CHARACTERS.
        """
        if add_generation_prompt and continue_final_message:
            raise UserError("add_generation_prompt and continue_final_message exclude each other")
        if unknown := sorted(_NOT_VARIABLES & arguments.keys()):
            raise UserError(f"{unknown[0]} is not an argument of chat templates")
        template, keep_parts = self._choose(chat_template, tools is not None)
        chat = [_message(message, keep_parts) for message in messages]
        variables = {
            **self._special_tokens,
            **_plain("template arguments", arguments),
            "tools": _objects("tools", tools),
            "documents": _objects("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        if not continue_final_message:
            return self._write(template, variables, chat)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        unfinished = _mark_end(chat, field)
        text = self._write(template, variables, chat)
        end = text.rfind(_END_MARK.strip())
        if end < 0 or unfinished.strip() not in text:
            raise UserError(f"the chat template does not show the {field} that is to be continued")
        stripped = not text.startswith(_END_MARK, end)
        return text[:end].rstrip() if stripped else text[:end]

    def _write(
        self, template: Template, variables: Mapping[str, Any], chat: list[dict[str, Any]]
    ) -> str:
        pieces, length = [], 0
        try:
            for piece in template.generate(variables, messages=chat):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_RENDERED_CHARACTERS:
                    break
        except Exception as error:  # a template's expressions can raise almost anything
            raise UserError(f"chat template refused the messages: {printable(error)}") from None
        if length > MAX_RENDERED_CHARACTERS:
            raise UserError(f"chat template wrote more than {MAX_RENDERED_CHARACTERS} characters")
        return "".join(pieces)


def load_chat_templates(
    directory: Path, settings: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplates | None:
    """A directory's templates, None if it has none.

    Template files (chat_template.jinja, and additional_chat_templates/NAME.jinja) take precedence
    over tokenizer_config.json, which has a template or a list of named ones. chat_template.json is
    read if there is neither.
    """
    files = {
        path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))
    }
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    given: Any = {name: _read_text(path) for name, path in files.items()}
    given = given or settings.get("chat_template")
    if given is None and (directory / "chat_template.json").is_file():
        given = read_json_object(directory / "chat_template.json").get("chat_template")
    if isinstance(given, list) and all(isinstance(item, Mapping) for item in given):
        given = {item.get("name"): item.get("template") for item in given}
    if given is None or given == {}:
        return None
    named = given if isinstance(given, dict) else {"default": given}
    if not all(isinstance(text, str) for item in named.items() for text in item):
        raise ModelLoadError(
            f"{printable(directory)}: chat_template must be a string, or a list of objects with a "
            "name and a template"
        )
    return ChatTemplates(named, special_tokens)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{printable(path)}: {printable(error)}") from None


def _plain(what: str, value: Any) -> Any:
    """A copy made of JSON types alone, through which a template can reach no other objects."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} must be JSON values: {printable(error)}") from None


def _objects(what: str, values: Any) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise UserError(f"{what} must be a list of objects, got {shown(values)}")
    for value in values:
        if not isinstance(value, Mapping):
            raise UserError(f"{what} must be JSON objects, got {shown(value)}")
    return [_plain(what, dict(value)) for value in values]


def _message(message: Any, keep_parts: bool) -> dict[str, Any]:
    """A message without its null keys, and with its reasoning under each key for it.

    A content that is a list of text parts is joined by newlines, unless `keep_parts`.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"messages must be objects with a role and a content, got {shown(message)}")
    plain = _plain("messages", {k: v for k, v in message.items() if v is not None})
    content = plain.get("content", "")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(part.get("text"), str):
                raise UserError(
                    f"content of type {shown(kind)} is not supported; supported: "
                    '{"type": "text", "text": ...}'
                )
        if not keep_parts:
            plain["content"] = "\n".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise UserError(f"a message's content must be text, got {shown(content)}")
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _mark_end(chat: list[dict[str, Any]], field: str) -> str:
    """Append the mark to a field of the last message, in place. Returns the field's text."""
    holder: dict[str, Any] = chat[-1] if chat else {}
    names: tuple[str, ...] = _REASONING if field in _REASONING else (field,)
    text = holder.get(field)
    if isinstance(text, list):
        blocks = [block for block in text if isinstance(block, dict) and "text" in block]
        holder, names = (blocks or [{}])[-1], ("text",)
        text = holder.get("text")
    if not isinstance(text, str):
        raise UserError(f"the last message has no {printable(field)} to continue")
    for name in names:
        if holder.get(name) == text:
            holder[name] = text + _END_MARK
    return text


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja2's own filter, this one does not escape HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
