"""mtpkern generate: stream an answer, or compare it with the one without drafts."""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpkern.arguments import UsageError, at_least
from mtpkern.errors import counted, printable
from mtpkern.status import Status, coloured

if TYPE_CHECKING:
    from mtpkern.config import SamplingParams
    from mtpkern.engine import LLM, Completion, Event, Stats

_DRAFTED, _PLAIN = "\x1b[32m", "\x1b[0m"
_WARM_UP_TOKENS = 8


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "generate",
        help="stream an answer",
        description="Stream an answer. On a terminal, tokens that were drafted and accepted are "
        "green, and those that the model had to compute itself are plain.",
        epilog="examples:\n"
        '  mtpkern generate "Why is the sky blue?" --compare\n'
        "  mtpkern generate --raw --max-tokens 64 - < story.txt",
    )
    command.set_defaults(run=_generate)
    add = command.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the prompt, quoted; - or nothing reads stdin")
    add_answer_options(command)
    add(
        "--token-ids",
        action="store_true",
        help="the prompt is token ids, apart by spaces or commas, and so is the answer",
    )
    add("--tools", metavar="FILE", help="a JSON list of tools for the chat template")
    add(
        "--template-arg",
        action="append",
        default=[],
        type=_template_argument,
        metavar="NAME=VALUE",
        help="an argument of the chat template; the value is read as JSON where it is that",
    )
    add("--raw", action="store_true", help="continue the prompt as text, without chat template")
    add("--load-format", default="auto", help="dummy: made-up weights, for measuring")
    add(
        "--synthetic-acceptance",
        type=_rates,
        metavar="R1,R2,...",
        help="accept drafts at these rates by position, whatever they are, for measuring",
    )
    add("--no-graph", action="store_true", help="launch a GPU's kernels one by one")
    add("--cuda-profile", action="store_true", help="let a profiler see the answer alone")
    add("--compare", action="store_true", help="run again without drafts, and compare")
    add("--json", action="store_true", help="print one JSON object and nothing else")


def add_answer_options(command: argparse.ArgumentParser) -> None:
    """The options of every command that answers: which model, and how."""
    add = command.add_argument
    add("--model", help="a directory, a hub id or a name (default: the model of `mtpkern fetch`)")
    add("--heads", default="auto", help="heads: auto, none, a name or a directory")
    add("--no-ngram", action="store_true", help="do not draft from the text itself")
    add(
        "-K",
        "--num-speculative-tokens",
        type=int,
        metavar="K",
        help="drafts per step, 0 to 16 (default: chosen while running, up to 4)",
    )
    add("--max-tokens", type=int, default=256, metavar="N", help="longest answer in tokens")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from this much probability")
    add("--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest; 0: all")
    add("--min-p", type=float, default=0.0, metavar="P", help="of the likeliest one's probability")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="the same seed gives the same tokens (default: a fresh one)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be repeated",
    )
    add(
        "--stop-token-id",
        dest="stop_token_ids",
        action="append",
        default=[],
        type=int,
        metavar="ID",
        help="end after this token, which the text does not show; may be repeated",
    )
    add("--min-tokens", type=int, default=0, metavar="N", help="do not end before so many")
    add("--ignore-eos", action="store_true", help="do not end at the end-of-text token")
    add("--include-stop-str-in-output", action="store_true", help="show what ended the text")
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="the context: prompt and answer (default: the model's, at most 8192)",
    )
    add("--system", metavar="TEXT", help="the system message (default: the chat template's own)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add(
        "--weights",
        default="auto",
        metavar="FORMAT",
        help="auto: as they are, a GGUF's in its own bits on a CPU; or round them there to q4_0, "
        "q4_1, q8_0, q8, bf16, fp16 or fp32",
    )
    add("--threads", type=at_least(1), metavar="N", help="CPU threads (default: physical cores)")


def open_model(args: argparse.Namespace, **settings: Any) -> "LLM":
    """The model that `add_answer_options` describes, for one sequence at a time."""
    with args.status.phase("starting"):  # torch takes a second or two to import
        from mtpkern.engine import LLM

    return LLM(
        args.model,
        heads=args.heads,
        ngram=not args.no_ngram,
        num_speculative_tokens=args.num_speculative_tokens,
        device=args.device,
        dtype=args.dtype,
        weights=args.weights,
        threads=args.threads,
        max_batch=1,
        max_length=args.max_length,
        status=args.status,
        **settings,
    )


def sampling_params(args: argparse.Namespace, *, logprobs: bool = False) -> "SamplingParams":
    from mtpkern.config import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_token_ids),
        min_tokens=args.min_tokens,
        ignore_eos=args.ignore_eos,
        include_stop_str_in_output=args.include_stop_str_in_output,
        logprobs=logprobs,
    )


def _generate(args: argparse.Namespace) -> int:
    from mtpkern.config import SamplingParams

    text = _read_prompt(args.prompt)
    if not text.strip():
        raise UsageError("the prompt is empty")
    params = sampling_params(args, logprobs=args.json)
    llm = open_model(
        args,
        load_format=args.load_format,
        synthetic_acceptance=args.synthetic_acceptance,
        graph=not args.no_graph,
    )
    prompt, chat = _prompt(llm, text, args)
    if args.compare or args.cuda_profile:
        # The first steps of a process set things up; neither side is to pay for them.
        brief = SamplingParams(max_tokens=_WARM_UP_TOKENS)
        with args.status.phase("warming up"):
            for speculate in (True, False):
                llm.generate(prompt, brief, speculate=speculate, **chat)
    with _profiled(llm) if args.cuda_profile else nullcontext():
        if args.json:
            completion = llm.generate(prompt, params, **chat)[0]
        else:
            events: Iterator[Event] = llm.stream(prompt, params, **chat)
            if not sys.stdout.isatty():
                events = shown(events, args.status, params)
            last = print_stream(events, as_ids=args.token_ids)
            assert last and last.completion, "the last event of a stream carries the completion"
            completion = last.completion
            print(summary(completion.stats, llm.load_seconds), file=sys.stderr)
    if not args.json and (args.synthetic_acceptance or args.load_format == "dummy"):
        print(_MADE_UP, file=sys.stderr)
    plain = None
    if args.compare:
        # A fresh seed serves both sides.
        params = replace(params, seed=completion.seed)
        plain = llm.generate(prompt, params, speculate=False, **chat)[0]
    if args.json:
        print(json.dumps(_as_json(llm, args.model, completion, plain), allow_nan=False))
    elif plain is not None:
        print(_comparison(completion, plain), file=sys.stderr)
    return 0 if plain is None or _identical(completion, plain) else 1


def shown(events: "Iterator[Event]", status: Status, params: "SamplingParams") -> "Iterator[Event]":
    """The same events, counted where nobody sees the text as it comes."""
    with status.phase("answering", params.max_tokens, "tokens") as phase:
        for event in events:
            phase.advance()
            yield event


_MADE_UP = "made-up weights or acceptance: the rates are meant, the text and its tokens are not"


def _rates(text: str) -> list[float]:
    """The numbers of R1,R2,..."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must be one rate or more: R1,R2,...")
    return [float(rate) for rate in text.split(",")]


@contextmanager
def _profiled(llm: "LLM") -> "Iterator[None]":
    """What a profiler that waits for cudaProfilerStart is to see."""
    import torch

    if llm.device.type != "cuda":
        raise UsageError("--cuda-profile needs device cuda")
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
    # The newline that ends the last line of a file, or of what echo writes, is not the prompt's.
    return text.removesuffix("\n").removesuffix("\r")


def _prompt(
    llm: "LLM", text: str, args: argparse.Namespace
) -> tuple["str | list[int] | list[dict[str, str]]", dict[str, Any]]:
    """The prompt, and what goes with it: a chat where the model has a template, unless --raw."""
    wanted = {
        "--system": args.system,
        "--tools": args.tools,
        "--template-arg": args.template_arg or None,
    }
    given = [flag for flag, value in wanted.items() if value is not None]
    if args.token_ids:
        if given:
            raise UsageError(f"{given[0]} needs a prompt that is text: --token-ids has none")
        return _token_ids(text), {}
    if llm.tokenizer is None:
        raise UsageError(f"{llm.name} has no tokenizer: give token ids, and --token-ids")
    chat = llm.tokenizer.has_chat_template and not args.raw
    if given and not chat:
        reason = "--raw has none" if args.raw else "this model has no chat template"
        raise UsageError(f"{given[0]} needs a chat template: {reason}")
    if not chat:
        return text, {}
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": text}], {
        "tools": None if args.tools is None else _read_json(args.tools),
        "chat_template_kwargs": dict(args.template_arg),
    }


def _template_argument(text: str) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
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
            "--token-ids needs a prompt of integers, apart by spaces or commas: "
            f"{printable(text)} is none"
        ) from None


def print_stream(events: "Iterator[Event]", *, as_ids: bool = False) -> "Event | None":
    """Print tokens as they come, their text or their ids -> the last event, if any came.

    On a terminal, accepted drafts are green.
    """
    terminal, colours = sys.stdout.isatty(), coloured(sys.stdout)
    painted, last = _PLAIN, None
    try:
        for event in events:
            last = event
            text = f"{event.token_id} " if as_ids else event.text
            colour = _DRAFTED if event.drafted else _PLAIN
            if colours and text and colour != painted:
                sys.stdout.write(colour)
                painted = colour
            # A model's words must not steer the terminal; a file gets them as they are.
            sys.stdout.write(_without_controls(text) if terminal else text)
            sys.stdout.flush()
    finally:
        if last is not None:
            sys.stdout.write("\n" if painted == _PLAIN else _PLAIN + "\n")
            sys.stdout.flush()
    return last


def _without_controls(text: str) -> str:
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or ord(c) >= 0xA0)


def summary(stats: "Stats", load_seconds: float | None = None) -> str:
    """Two lines: speed, steps, tokens per step, acceptance by position, K; what came before."""
    line = (
        f"{stats.tokens_per_second:.1f} tok/s: {counted(stats.new_tokens, 'token')} in "
        f"{counted(stats.steps, 'step')}, {stats.mean_acceptance_length:.2f} per step"
    )
    if any(map(any, stats.drafted.values())):
        rates = " ".join(f"{rate:.2f}" for rate in stats.acceptance_by_position)
        line += f"; accepted by position: {rates}"
    if len(stats.steps_by_k) > 1:
        chosen = ", ".join(f"{k} in {n} steps" for k, n in sorted(stats.steps_by_k.items()))
        line += f"; K chosen: {chosen}"
    elif stats.num_speculative_tokens:
        line += f"; K = {next(iter(stats.steps_by_k), 0)}"
    line += (
        f"\nfirst token after {stats.time_to_first_token_seconds:.2f} s, prompt of "
        f"{stats.prompt_tokens} tokens"
    )
    if stats.cached_tokens:
        line += f", {stats.cached_tokens} of them cached"
    line += f", at {stats.prefill_tokens_per_second:.0f} tok/s"
    return line if load_seconds is None else f"{line}; loaded in {load_seconds:.1f} s"


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
