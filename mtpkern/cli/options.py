"""Options that generate and chat share, and the model and the sampling that they describe."""

import argparse
from typing import TYPE_CHECKING, Any

from mtpkern.arguments import at_least

if TYPE_CHECKING:
    from mtpkern import LLM, SamplingParams


def add_answer_options(command: argparse.ArgumentParser) -> None:
    """The options of every command that answers: which model, and how."""
    _add_model_options(command)
    _add_draft_options(command)
    _add_sampling_options(command)
    _add_length_options(command)


def _add_model_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("model").add_argument
    add(
        "--model",
        metavar="MODEL",
        help="a directory, a .gguf file, a hub id or a name (default: the model of mtpkern fetch)",
    )
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="context in tokens, prompt and answer (default: the model's own, at most 8192)",
    )
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu or cuda")
    add("--dtype", default="auto", metavar="DTYPE", help="auto, bfloat16, float16 or float32")
    add(
        "--weights",
        default="auto",
        metavar="FORMAT",
        help="auto keeps the file's format (on a GPU, a GGUF is expanded); q4_0, q4_1, q8_0, q8, "
        "bf16, fp16 or fp32 rounds the weights to it, on a CPU",
    )
    add(
        "--threads",
        type=at_least(1),
        metavar="N",
        help="CPU threads (default: one per physical core)",
    )


def _add_draft_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("drafts").add_argument
    add(
        "--heads",
        default="auto",
        metavar="HEADS",
        help="prediction heads: a directory, a name, none, or auto for those that the checkpoint "
        "includes or that ship for the model",
    )
    add("--no-ngram", action="store_true", help="do not draft by copying from the text so far")
    add(
        "-K",
        "--num-speculative-tokens",
        type=int,
        metavar="K",
        help="drafts per step, 0 to 16 (default: chosen while running, up to 4)",
    )


def _add_sampling_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("sampling").add_argument
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 is greedy",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens whose probabilities sum to P",
    )
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="N",
        help="sample from the N likeliest tokens; 0 means all",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="leave out tokens less than P times as likely as the likeliest one",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="the same seed gives the same tokens (default: a fresh one)",
    )


def _add_length_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("where an answer ends").add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="longest answer in tokens")
    add("--min-tokens", type=int, default=0, metavar="N", help="shortest answer in tokens")
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
        help="end at this token, which the text leaves out; may be repeated",
    )
    add("--ignore-eos", action="store_true", help="do not end at the end-of-text token")
    add(
        "--include-stop-str-in-output",
        action="store_true",
        help="show the stop text or token that ended the answer",
    )


def open_model(args: argparse.Namespace, **settings: Any) -> "LLM":
    """The model that `add_answer_options` describes, for one sequence at a time."""
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
