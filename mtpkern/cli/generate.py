"""mtpkern generate: stream an answer, or compare it with plain decoding."""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpkern.arguments import UsageError, number
from mtpkern.cli.display import print_cut, print_stream, summary, with_progress
from mtpkern.cli.options import add_answer_options, open_model, sampling_params
from mtpkern.errors import printable
from mtpkern.status import wrapped

if TYPE_CHECKING:
    from mtpkern import LLM, Completion

_WARM_UP_TOKENS = 8
_MADE_UP = "weights or acceptance are made up: the speed is meaningful, the text is not"


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "generate",
        usage="mtpkern generate [OPTION ...] [PROMPT]",
        help="answer one prompt",
        description="Answer one prompt. On a terminal, green tokens were drafted and accepted, the "
        "others are the model's own.",
        epilog="examples:\n"
        '  mtpkern generate "Why is the sky blue?" --compare\n'
        "  mtpkern generate --raw --max-tokens 64 - < story.txt",
    )
    command.set_defaults(run=_generate)
    command.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="in quotes; - or nothing reads standard input"
    )
    _add_prompt_options(command)
    add_answer_options(command)
    add = command.add_argument_group("comparing and measuring").add_argument
    add("--compare", action="store_true", help="answer again without drafts, and compare")
    add(
        "--load-format",
        default="auto",
        metavar="FORMAT",
        help="auto, or dummy: random weights for a config.json, for measuring",
    )
    add(
        "--synthetic-acceptance",
        type=_rates,
        metavar="R1,R2,...",
        help="accept drafts at these rates by position, whatever they are, for measuring",
    )
    add("--no-graph", action="store_true", help="launch a GPU's kernels without CUDA graphs")
    add("--cuda-profile", action="store_true", help="let a profiler record the answer alone")


def _add_prompt_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("prompt and output").add_argument
    add("--system", metavar="TEXT", help="the system message (default: the chat template's own)")
    add("--raw", action="store_true", help="continue the prompt as text, without a chat template")
    add(
        "--token-ids",
        action="store_true",
        help="the prompt is token ids, separated by spaces or commas, and so is the answer",
    )
    add("--tools", metavar="FILE", help="a JSON list of tools for the chat template")
    add(
        "--template-arg",
        action="append",
        default=[],
        type=_template_argument,
        metavar="NAME=VALUE",
        help="an argument of the chat template, its value JSON or else text; may be repeated",
    )
    add("--json", action="store_true", help="print one JSON object and nothing else")


def _generate(args: argparse.Namespace) -> int:
    text = _read_prompt(args.prompt)
    if not text.strip():
        raise UsageError("the prompt is empty")
    with args.status.phase("starting"):  # importing torch takes a second or two
        import mtpkern.engine

    params = sampling_params(args, logprobs=args.json)
    given = _Prompt(text, args)
    llm = open_model(
        args,
        load_format=args.load_format,
        synthetic_acceptance=args.synthetic_acceptance,
        graph=not args.no_graph,
        before_loading=given.check,
    )
    prompt, chat = given.prompt, given.chat
    if args.compare or args.cuda_profile:
        # The first steps of a process include setup, which neither side should be charged for.
        brief = mtpkern.SamplingParams(max_tokens=_WARM_UP_TOKENS)
        with args.status.phase("warming up"):
            for speculate in (True, False):
                llm.generate(prompt, brief, speculate=speculate, **chat)
    with _profiled() if args.cuda_profile else nullcontext():
        if args.json:
            completion = llm.generate(prompt, params, **chat)[0]
        else:
            events = llm.stream(prompt, params, **chat)
            shown = with_progress(events, args.status, params.max_tokens)
            last = print_stream(shown, as_ids=args.token_ids)
            assert last and last.completion, "the last event of a stream carries the completion"
            completion = last.completion
            print_cut(completion)
            print(summary(completion.stats, llm.load_seconds), file=sys.stderr)
    if not args.json and (args.synthetic_acceptance or args.load_format == "dummy"):
        print(wrapped(_MADE_UP, sys.stderr, indent=2), file=sys.stderr)
    plain = None
    if args.compare:
        # A seed drawn for the first answer serves both.
        params = replace(params, seed=completion.seed)
        plain = llm.generate(prompt, params, speculate=False, **chat)[0]
    if args.json:
        print(json.dumps(_as_json(llm, args.model, completion, plain), allow_nan=False))
    elif plain is not None:
        print(wrapped(_comparison(completion, plain), sys.stderr, indent=2), file=sys.stderr)
    return 0 if plain is None or _identical(completion, plain) else 1


def _rates(text: str) -> list[float]:
    """The numbers of R1,R2,..."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must be one rate or more: R1,R2,...")
    return [number(rate) for rate in text.split(",")]


@contextmanager
def _profiled() -> "Iterator[None]":
    """The block between cudaProfilerStart and cudaProfilerStop, which a profiler waits for."""
    import torch

    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _read_prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    if sys.stdin is None:
        raise UsageError("no prompt: standard input is closed")
    if given is None and sys.stdin.isatty():
        raise UsageError(
            'no prompt: mtpkern generate "PROMPT", or - to read standard input; '
            "mtpkern chat for a conversation"
        )
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError("standard input is not UTF-8 text") from None
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot read standard input: {reason}") from None
    # The newline that ends a file's last line, or the output of echo, is not part of the prompt.
    return text.removesuffix("\n").removesuffix("\r")


class _Prompt:
    """The prompt and its chat settings: messages if the model has a template, unless --raw."""

    prompt: "str | list[int] | list[dict[str, str]]"

    def __init__(self, text: str, args: argparse.Namespace):
        """Raises UsageError for mistakes that do not depend on the model."""
        self.args, self.text = args, text
        chat_options = {
            "--system": args.system,
            "--tools": args.tools,
            "--template-arg": args.template_arg or None,
        }
        self.given = [flag for flag, value in chat_options.items() if value is not None]
        if self.given and args.token_ids:
            raise UsageError(f"{self.given[0]} needs a prompt that is text: leave out --token-ids")
        if self.given and args.raw:
            raise UsageError(f"{self.given[0]} needs a chat template: --raw has none")
        self.prompt = _token_ids(text) if args.token_ids else text
        self.chat: dict[str, Any] = {}
        self.tools = None if args.tools is None else _read_json(args.tools)

    def check(self, llm: "LLM") -> None:
        """Apply the model's template. Raises UsageError or UserError for what the model cannot
        answer."""
        args = self.args
        if args.cuda_profile and llm.device.type != "cuda":
            raise UsageError("--cuda-profile needs device cuda")
        if not args.token_ids:
            if llm.tokenizer is None:
                raise UsageError(f"{llm.name} has no tokenizer: give token ids, and --token-ids")
            if llm.tokenizer.has_chat_template and not args.raw:
                self._use_template()
            elif self.given:
                raise UsageError(f"{self.given[0]} needs a chat template: this model has none")
            elif not args.raw:
                args.status.say("this model has no chat template: it continues the prompt as text")
        llm.encode(self.prompt, **self.chat)

    def _use_template(self) -> None:
        system = self.args.system
        messages = [] if system is None else [{"role": "system", "content": system}]
        self.prompt = [*messages, {"role": "user", "content": self.text}]
        self.chat = {
            "tools": self.tools,
            "chat_template_kwargs": dict(self.args.template_arg),
        }


def _template_argument(text: str) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {printable(text)!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _read_json(file: str) -> Any:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from None


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in re.split(r"[,\s]+", text.strip("[], \t\r\n"))]
    except ValueError:
        raise UsageError(
            "--token-ids needs a prompt of integers, separated by spaces or commas, "
            f"got {printable(text)!r}"
        ) from None


def _comparison(completion: "Completion", plain: "Completion") -> str:
    rates = completion.stats.tokens_per_second, plain.stats.tokens_per_second
    verdict = "tokens identical"
    if not _identical(completion, plain):
        pairs = zip(completion.token_ids, plain.token_ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        verdict = "TOKENS DIFFER" + ("" if same is None else f" from token {same + 1} on")
    return (
        f"{rates[1]:.1f} tok/s without drafts; with them {_speedup(completion, plain):.2f} times "
        f"as fast; {verdict}"
    )


def _identical(completion: "Completion", plain: "Completion") -> bool:
    return completion.token_ids == plain.token_ids and completion.logprobs == plain.logprobs


def _speedup(completion: "Completion", plain: "Completion") -> float:
    base = plain.stats.tokens_per_second
    return completion.stats.tokens_per_second / base if base else 0.0


def _as_json(
    llm: "LLM", model: str | None, completion: "Completion", plain: "Completion | None"
) -> dict[str, Any]:
    compare = plain and {
        "identical": _identical(completion, plain),
        "plain": plain.stats.as_json(),
        "speedup": _speedup(completion, plain),
    }
    made_up = {"synthetic_acceptance": llm.synthetic_acceptance}
    return (made_up if llm.synthetic_acceptance else {}) | {
        "schema": 1,
        "model": model or llm.name,
        "device": llm.device.type,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "weights": llm.weights,
        "load_seconds": llm.load_seconds,
        "prompt_tokens": completion.stats.prompt_tokens,
        "seed": completion.seed,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "logprobs": completion.logprobs,
        "stats": completion.stats.as_json(),
        "compare": compare,
    }
