"""Chat templates, compared with transformers on the same messages.

The templates are small ones of our own, in the ways of the published families: what each reads and
writes, and the corners of Jinja that it needs.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import tiny_checkpoint, write_tiny_tokenizer

from mtpkern import cli
from mtpkern.chat_template import ChatTemplates
from mtpkern.engine import LLM
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.tokenizer import Tokenizer

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted(Path(__file__).with_name("chat_templates").glob("*.jinja"))
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place \u2014 \u00e0 l'heure",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


# Messages, and the other arguments of the template.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([user("hello \u00e9 <b> & 'x'")], {}),
    "with a system message": (
        [{"role": "system", "content": " Be brief. "}, user("hi"), assistant("ho"), user("so?")],
        {"add_generation_prompt": False, "date_string": "1 May 2025"},
    ),
    "with tools": ([user("the weather in Rome?")], {"tools": [WEATHER, CLOCK]}),
    "a tool's answer": (
        [
            user("the weather in Rome?"),
            assistant(None, tool_calls=[call("weather", {"place": "Rome", "days": 2})]),
            {"role": "tool", "name": "weather", "content": '{"sky": "clear"}', "tool_call_id": "a"},
            assistant("clear", name=None),
            user("thanks"),
        ],
        {"tools": [WEATHER], "tools_in_user_message": False, "custom": {"a": [1, None]}},
    ),
    "thoughts": (
        [
            user("2 + 2?"),
            assistant("<think>\nadd\n</think>\n\n4"),
            user("and 3 + 3?"),
            assistant("6", reasoning="add again"),
            user("sure?"),
        ],
        {"enable_thinking": False, "documents": [{"title": "b", "text": "x"}]},
    ),
    "no tools at all": ([user("hi")], {"tools": [], "documents": [], "enable_thinking": True}),
    "parts": (
        [user([{"type": "text", "text": "look:"}, {"type": "text", "text": "what is this?"}])],
        {"style": "fancy", "documents": [{"title": "b", "text": "2"}, {"title": "a", "text": "1"}]},
    ),
    "roles out of order": ([user("a"), user("b"), assistant("c")], {}),
}


def both(directory: Path, template: Any) -> tuple[Tokenizer, Any]:
    """Our tokenizer and transformers', for the same directory with this template."""
    write_tiny_tokenizer(directory)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return Tokenizer.from_directory(directory), theirs


READS_PARTS = re.compile(r"\.text\b|\['text'\]")


def joined(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of text parts."""
    parts = message.get("content")
    if not isinstance(parts, list) or any("text" not in part for part in parts):
        return message
    return message | {"content": "\n".join(part["text"] for part in parts)}


def agree(ours: Tokenizer, theirs: Any, messages: Any, **arguments: Any) -> str | None:
    """The text and ids that both produce, None if both refuse the messages."""
    given = copy.deepcopy((messages, arguments))
    with_start = arguments.setdefault(
        "add_generation_prompt", not arguments.get("continue_final_message")
    )
    read = messages
    if not READS_PARTS.search(str(theirs.chat_template)):
        # Such a template would write a list as Python does, or fail.
        read = [joined(message) for message in messages]
    try:
        want = theirs.apply_chat_template(read, tokenize=False, **arguments)
    except Exception:
        with pytest.raises(UserError) as refusal:
            ours.chat_text(messages, **arguments)
        assert "\n" not in str(refusal.value)
        return None
    assert ours.chat_text(messages, **arguments) == want
    ids = theirs.apply_chat_template(read, return_dict=False, **arguments)
    assert ours.apply_chat_template(messages, **arguments) == ids
    if with_start:
        assert ours.chat_text(given[0], **given[1]) == want
    assert messages == given[0], "messages of the caller's stay as they are"
    return want


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompts_are_what_transformers_makes_of_them(family: str, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, TEMPLATES[family])
    texts = {
        name: agree(ours, theirs, messages, **arguments)
        for name, (messages, arguments) in CONVERSATIONS.items()
    }
    # At least five conversations have a prompt, and they are not all alike.
    assert len({text for text in texts.values() if text}) >= 5


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize(
    "last",
    [
        assistant("The answer is"),
        assistant("The answer is  \n "),
        assistant("  \n4"),
        assistant(""),
        assistant(None),
        assistant([{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]),
        assistant([{"type": "image"}]),
        assistant("so", reasoning_content="add the two "),
        user("a question that goes on"),
    ],
    ids=str,
)
def test_a_message_is_continued_where_transformers_continues_it(
    family: str, last: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = both(tmp_path, TEMPLATES[family])
    before = [user("2 + 2?")] if last["role"] == "assistant" else []
    agree(ours, theirs, [*before, last], continue_final_message=True)
    agree(ours, theirs, [*before, last], continue_final_message="reasoning_content")


def test_a_continued_message_ends_the_prompt(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, TEMPLATES["qwen3"])
    chat = [user("2 + 2?"), assistant("<think>\nadd\n</think>\n\nIt is")]
    assert ours.chat_text(chat, continue_final_message=True).endswith("</think>\n\nIt is")
    with pytest.raises(UserError, match="exclude each other"):
        ours.chat_text(chat, True, continue_final_message=True)
    with pytest.raises(UserError, match="has no content to continue"):
        ours.chat_text([assistant(None)], continue_final_message=True)
    dropped = ChatTemplates("{{ messages[0].role }}")
    with pytest.raises(UserError, match="does not show the content"):
        dropped.render(chat, add_generation_prompt=False, continue_final_message=True)


NAMED = [
    {"name": "default", "template": "plain {{ messages[0].content }}"},
    {"name": "tool_use", "template": "tools {{ tools | length }} {{ messages[0].content }}"},
    {"name": "rag", "template": "documents {{ documents | length }}"},
]


def test_of_several_templates_the_one_for_tools_is_chosen_where_there_are_any(
    tmp_path: Path,
) -> None:
    ours, theirs = both(tmp_path, NAMED)
    chat = [user("hi")]
    assert agree(ours, theirs, chat) == "plain hi"
    assert agree(ours, theirs, chat, tools=[WEATHER]) == "tools 1 hi"
    assert agree(ours, theirs, chat, tools=[]) == "tools 0 hi"
    assert agree(ours, theirs, chat, chat_template="rag", documents=[{}]) == "documents 1"
    assert agree(ours, theirs, chat, chat_template="{{ eos_token }}!") == "<|im_end|>!"


def test_without_a_default_template_the_names_are_listed(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, NAMED[1:])
    assert agree(ours, theirs, [user("hi")]) is None
    assert agree(ours, theirs, [user("hi")], tools=[WEATHER]) == "tools 1 hi"
    with pytest.raises(UserError, match="no default chat template; give .*, one of: rag, tool_use"):
        ours.apply_chat_template([user("hi")])


def test_files_of_templates_replace_those_of_the_config(tmp_path: Path) -> None:
    both(tmp_path, NAMED)
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    chat = [user("hi")]
    ours, theirs = Tokenizer.from_directory(tmp_path), transformers.AutoTokenizer
    assert agree(ours, theirs.from_pretrained(tmp_path), chat, tools=[WEATHER]) == "file hi"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("file for tools\n")
    (more / "notes.txt").write_text("{% no template")
    ours = Tokenizer.from_directory(tmp_path)
    assert agree(ours, theirs.from_pretrained(tmp_path), chat, tools=[WEATHER]) == "file for tools"
    assert agree(ours, theirs.from_pretrained(tmp_path), chat) == "file hi"
    (tmp_path / "chat_template.jinja").unlink()
    ours = Tokenizer.from_directory(tmp_path)
    assert agree(ours, theirs.from_pretrained(tmp_path), chat) is None


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}",
        "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}",
        "{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ messages | tojson(true) }}",
        "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ x is defined }}",
        "{{ strftime_now('%Y') }}{{ bos_token }}{{ unk_token is defined }}",
        "{{ messages[0] | items | list }}{{ messages | join(attribute='role') }}",
        "  {% if true %}\n  trimmed\n  {% endif %}\n",
        "{{ messages | tojson(nonsense=1) }}",
        "{{ x | tojson }}",
        "{{ int('x') }}",
        "{{ messages[0].content.nonsense() }}",
        "{{ messages.append(1) }}",
        "{{ {}['x']['y'] }}",
    ],
)
def test_helpers_and_tags_do_what_they_do_in_transformers(template: str, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, template)
    agree(ours, theirs, CONVERSATIONS["thoughts"][0])


def test_arguments_that_are_none_and_those_that_are_missing_differ(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, "{{ x is defined }}{{ x }}{{ bos_token }}")
    assert agree(ours, theirs, [user("hi")]) == "False<|endoftext|>"
    assert agree(ours, theirs, [user("hi")], x=None, bos_token="B") == "TrueNoneB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": "weather"}, "tools must be a list of objects"),
        ({"tools": [len]}, "tools must be JSON objects, got <built-in"),
        ({"documents": {"title": "x"}}, "documents must be a list of objects"),
        ({"x": {1, 2}}, "template arguments must be JSON values"),
        ({"tokenize": False}, "tokenize is not an argument of chat templates"),
        ({"messages": []}, "messages is not an argument of chat templates"),
        ({"chat_template": 3}, "chat_template must be a string"),
    ],
)
def test_arguments_that_no_template_can_take_are_one_clear_line(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    llm = LLM(tiny_checkpoint(tmp_path), max_length=96)
    with pytest.raises(UserError, match=message):
        llm.encode([user("hi")], chat_template_kwargs=arguments)
    (name,) = arguments
    if name in ("tools", "documents"):
        with pytest.raises(UserError, match=message):
            llm.generate([user("hi")], **arguments)


def test_generate_stream_and_the_command_take_what_the_template_reads(
    tmp_path: Path, capsys: Any
) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    template = (
        "{{ messages[0].content }}{{ enable_thinking }}{{ n | tojson }}{{ tools | tojson }}"
        "{% if messages | length > 1 %}{{ messages[1].content }}{% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    llm = LLM(model, max_length=200)
    given: dict[str, Any] = {"enable_thinking": False, "n": {"a": [1]}}
    ids = llm.encode([user("hi")], tools=[CLOCK], chat_template_kwargs=given)
    text = f'hiFalse{{"a": [1]}}{json.dumps([CLOCK])}'
    assert llm.tokenizer is not None and llm.tokenizer.decode(ids) == text
    chats = [[user("hi")], [user("ho")]]
    for answer, chat in zip(
        llm.generate(chats, tools=[CLOCK], chat_template_kwargs=given), chats, strict=True
    ):
        *_, last = llm.stream(chat, tools=[CLOCK], chat_template_kwargs=given)
        assert last.completion is not None and last.completion.token_ids == answer.token_ids
    half = [user("hi"), assistant("half")]
    open_ended = llm.encode(half, continue_final_message=True, chat_template_kwargs=given)
    assert llm.tokenizer.decode(open_ended).endswith("half")
    with pytest.raises(UserError, match="tools needs a prompt of chat messages"):
        llm.generate("hi", tools=[CLOCK])
    with pytest.raises(UserError, match="chat_template_kwargs must have names"):
        llm.generate(chats, chat_template_kwargs={1: 2})
    with pytest.raises(TypeError, match="nonsense"):
        llm.generate(chats, nonsense=1)

    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([CLOCK]))
    flags = ["--model", str(model), "--max-tokens", "2", "--json", "--tools", str(tools)]
    flags += ["--template-arg", "enable_thinking=false", "--template-arg", 'n={"a": [1]}']
    assert cli.main(["generate", "hi", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(ids)
    for bad, message in (
        (["--raw", "--tools", str(tools)], "--tools needs a chat template: --raw has none"),
        (["--raw", "--template-arg", "a=1"], "--template-arg needs a chat template"),
        (["--tools", str(tmp_path / "none.json")], "none.json: No such file"),
        (["--tools", str(model / "model.safetensors")], "is not valid JSON"),
        (["--template-arg", "a"], "must be NAME=VALUE"),
        (["--template-arg", "tokenize=true"], "tokenize is not an argument"),
    ):
        assert cli.main(["generate", "hi", "--model", str(model), *bad]) == 2
        assert message in capsys.readouterr().err


def test_templates_that_are_no_text_are_refused_at_load(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    for template in (3, [{"name": "default"}], [{"template": "x"}], ["x"], {"default": 3}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(ModelLoadError, match="chat_template must be a string, or a list"):
            Tokenizer.from_directory(tmp_path)
    for empty in (None, [], {}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": empty}))
        assert not Tokenizer.from_directory(tmp_path).has_chat_template
