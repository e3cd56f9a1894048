"""Decoding with drafts beside decoding without: whether the tokens agree, then how fast.

    python benchmarks/bench_decode.py --limit 12

1. Check: with K drafts, token ids and log-probabilities must equal those of K = 0 bit for bit, one
   prompt at a time, in ragged batches of 3, and on a CPU also at temperature 0.8 with a fixed seed.
   Any difference is red: exit code 1 and no speed.
2. Time: each prompt alone, with drafts and plain (the same step at K = 0), in alternating order,
   without log-probabilities.
3. Acceptance of each source of drafts alone; with --peers, the same weights in transformers.

Rates come from summed tokens and summed seconds. The last line is one JSON object.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from acceptance_stats import acceptance_length, by_position, loop_free, percents
from common import (
    Finish,
    add_prompts,
    averages,
    encode,
    environment,
    first_line,
    gpu_environment,
    gpu_first_line,
    load,
    read_prompts,
    run,
)

from mtpkern import LLM, SamplingParams, Stats, UserError
from mtpkern.arguments import Parser, at_least
from mtpkern.status import Phase

RAGGED_BATCH = 3
SEED = 7
PEER_PROMPTS = 4
WARM_UP_TOKENS = 8


@dataclass
class PromptRun:
    """One prompt, and what was measured with it."""

    category: str
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)  # per token: accepted as a draft
    stats: Stats | None = None  # of decoding with drafts
    identical: dict[str, bool] = field(default_factory=dict)  # check -> whether it passed
    timed: dict[str, tuple[int, float]] = field(default_factory=dict)  # variant -> tokens, seconds
    alone: dict[str, Stats] = field(default_factory=dict)  # source of drafts -> its statistics


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    torch.set_num_threads(args.threads)
    open_model = partial(
        LLM,
        args.model,
        dtype=args.dtype,
        device=args.device,
        max_batch=RAGGED_BATCH,
        status=args.status,
    )
    llm = open_model(heads=args.heads, num_speculative_tokens=args.k)
    on_gpu = llm.device.type == "cuda"
    facts = gpu_environment() if on_gpu else environment()
    print(gpu_first_line(facts) if on_gpu else first_line(facts))
    cases = [
        PromptRun(row["category"], encode(llm, row["turns"][0]))
        for row in read_prompts(args.prompts, args.limit)
    ]
    if not cases:
        raise UserError(f"{args.prompts} holds no prompts")

    batches = -(-len(cases) // RAGGED_BATCH)
    with args.status.phase("checking", len(cases) + batches) as phase:
        check(llm, cases, args.max_tokens, phase)
    report: dict[str, Any] = {
        "schema": 1,
        "environment": facts
        | {"model": llm.name, "dtype": str(llm.dtype).removeprefix("torch.")}
        | {"heads": args.heads, "prompts": args.prompts.name, "max_tokens": args.max_tokens},
        "checks": {name: sum(c.identical[name] for c in cases) for name in cases[0].identical},
    }
    checks = ", ".join(f"{name} {same}/{len(cases)}" for name, same in report["checks"].items())
    print(f"prompts bit for bit as at K = 0: {checks}")
    if not all(all(case.identical.values()) for case in cases):
        print("RED: with drafts the output differs from K = 0; no speed is reported")
        return finish(report | {"rows": [], "overall": None}, 1)

    with args.status.phase("timing", len(cases), "prompts") as phase:
        time_variants(llm, cases, args.max_tokens, phase)
    if args.peers:
        with args.status.phase("timing transformers"):
            report["peers"] = time_peers(args.model, llm, cases[:PEER_PROMPTS], args.max_tokens)
    llm.close()
    if args.sources:
        with args.status.phase("counting drafts", 2 * len(cases), "prompts") as phase:
            measure_sources(open_model, args, cases, phase)

    categories = dict.fromkeys(case.category for case in cases)
    members = {c: [case for case in cases if case.category == c] for c in categories}
    rows = [row(category, chosen, args.k) for category, chosen in members.items()]
    report |= {"rows": rows, "overall": row("overall", cases, args.k)}
    if not on_gpu:
        report["environment"]["load_after"] = load()
    print_report(report)
    return finish(report, 0)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", help="a directory, a hub id or a name (default: SmolLM2-135M-Instruct)")
    add("--heads", default="auto", help="auto, none, a name or a directory")
    add_prompts(parser)
    add("-K", dest="k", type=at_least(0), default=4, metavar="K", help="drafts per step")
    add("--threads", type=at_least(1), default=2, metavar="N", help="CPU threads")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--peers", action="store_true", help="also time transformers on the same weights")
    add(
        "--no-sources",
        dest="sources",
        action="store_false",
        help="skip heads and n-gram alone",
    )
    return parser


CHECKS = ("single", f"batches of {RAGGED_BATCH}", "temperature 0.8")


def check(llm: LLM, cases: list[PromptRun], max_tokens: int, phase: Phase) -> None:
    """Compare with K = 0 in three ways; keep the tokens and statistics of the first."""
    greedy = SamplingParams(max_tokens=max_tokens, logprobs=True)
    sampled = SamplingParams(max_tokens=max_tokens, logprobs=True, temperature=0.8, seed=SEED)
    single, ragged, warm = CHECKS
    plain = []
    for case in cases:
        (expected,) = llm.generate([case.prompt], greedy, speculate=False)
        plain.append((expected.token_ids, expected.logprobs))
        (completion,) = llm.generate([case.prompt], greedy)
        case.tokens, case.drafted = completion.token_ids, completion.drafted
        case.stats = completion.stats
        case.identical[single] = (completion.token_ids, completion.logprobs) == plain[-1]

        if llm.device.type == "cpu":
            (expected,) = llm.generate([case.prompt], sampled, speculate=False)
            (completion,) = llm.generate([case.prompt], sampled)
            same = (completion.token_ids, completion.logprobs)
            case.identical[warm] = same == (expected.token_ids, expected.logprobs)
        phase.advance(note="one at a time")
    for begin in range(0, len(cases), RAGGED_BATCH):
        batch = cases[begin : begin + RAGGED_BATCH]
        together = llm.generate([case.prompt for case in batch], greedy)
        for i, (case, completion) in enumerate(zip(batch, together, strict=True), begin):
            case.identical[ragged] = (completion.token_ids, completion.logprobs) == plain[i]
        phase.advance(note="in batches")


def time_variants(llm: LLM, cases: list[PromptRun], max_tokens: int, phase: Phase) -> None:
    """Time each prompt plain and with drafts, in reverse order for every other prompt."""
    variants: list[tuple[str, Callable[..., Any]]] = [
        ("plain", partial(llm.generate, speculate=False)),
        ("drafts", llm.generate),
    ]
    for _, generate in variants:  # warm up
        generate([cases[0].prompt], SamplingParams(max_tokens=WARM_UP_TOKENS))
    params = SamplingParams(max_tokens=max_tokens)
    for i, case in enumerate(cases):
        for name, generate in variants[:: -1 if i % 2 else 1]:
            (completion,) = generate([case.prompt], params)
            stats = completion.stats
            case.timed[name] = stats.new_tokens, stats.decode_seconds
        phase.advance()


def measure_sources(
    open_model: Callable[..., LLM], args: argparse.Namespace, cases: list[PromptRun], phase: Phase
) -> None:
    """Run each source of drafts alone, for its acceptance; nothing is timed."""
    settings: dict[str, dict[str, Any]] = {
        "heads alone": {"heads": args.heads, "ngram": False},
        "n-gram alone": {"heads": "none", "ngram": True},
    }
    params = SamplingParams(max_tokens=args.max_tokens)
    for name, setting in settings.items():
        try:
            llm = open_model(num_speculative_tokens=args.k, **setting)
        except UserError:  # no heads for this model: nothing to draft with
            continue
        for case in cases:
            case.alone[name] = llm.generate([case.prompt], params)[0].stats
            phase.advance(note=name)


def time_peers(
    model: str | None, plain: LLM, cases: list[PromptRun], max_tokens: int
) -> dict[str, float] | None:
    """Plain decoding here and in transformers, prompt by prompt -> tokens per second of both."""
    try:
        from peer_transformers import Peer
    except ImportError:
        print("transformers is not installed: no comparison with it")
        return None
    peer = Peer(model, plain.dtype, plain.device)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    # Compiling pays on a GPU only, where launches dominate.
    ways = {"transformers": False} | (
        {"transformers_compiled": True} if plain.device.type == "cuda" else {}
    )
    timed: dict[str, list[tuple[int, float]]] = {name: [] for name in ("plain", *ways)}
    for compiled in ways.values():
        for _ in range(2):
            peer.decode(cases[0].prompt, WARM_UP_TOKENS, compiled=compiled)
    for case in cases:
        (completion,) = plain.generate([case.prompt], params, speculate=False)
        timed["plain"].append((completion.stats.new_tokens, completion.stats.decode_seconds))
        for name, compiled in ways.items():
            timed[name].append(peer.decode(case.prompt, max_tokens, compiled=compiled))
    rates = {name: rate(pairs) for name, pairs in timed.items()}
    found = {f"{name}_tokens_per_second": value for name, value in rates.items()}
    return found | {"ratio": rates["plain"] / max(rates[name] for name in ways)}


def row(category: str, cases: list[PromptRun], k: int) -> dict[str, Any]:
    """One row of the report, from sums over its prompts."""
    together = [case.stats for case in cases if case.stats is not None]
    rates = {name: rate(case.timed[name] for case in cases) for name in cases[0].timed}
    kept = [loop_free(case.tokens, case.drafted) for case in cases]
    alone = {name: [case.alone[name] for case in cases] for name in cases[0].alone}
    return {
        "category": category,
        "prompts": len(cases),
        "num_speculative_tokens": k,
        "mean_acceptance_length": acceptance_length(together),
        "mean_acceptance_length_loop_free": sum(t for t, _ in kept)
        / max(1, sum(s for _, s in kept)),
        "acceptance_by_position": by_position(together, k),
        "tokens_per_second": rates["drafts"],
        "plain_tokens_per_second": rates["plain"],
        "speedup": rates["drafts"] / rates["plain"],
        "identical_prompts": sum(all(case.identical.values()) for case in cases),
        "sources": sources(together),
        "alone": {
            name: {
                "mean_acceptance_length": acceptance_length(stats),
                "acceptance_by_position": by_position(stats, k),
            }
            for name, stats in alone.items()
        },
    }


def rate(timed: Iterable[tuple[int, float]]) -> float:
    """Tokens per second, from (tokens, seconds)."""
    pairs = list(timed)
    return sum(tokens for tokens, _ in pairs) / sum(seconds for _, seconds in pairs)


def sources(stats: list[Stats]) -> dict[str, Any]:
    """Per source of drafts: its steps, their tokens per step, and acceptance by position."""
    found = {}
    for name in dict.fromkeys(name for s in stats for name in s.source_steps):
        steps = sum(s.source_steps.get(name, 0) for s in stats)
        tokens = sum(s.source_tokens.get(name, 0) for s in stats)
        k = stats[0].num_speculative_tokens
        found[name] = {
            "steps": steps,
            "mean_acceptance_length": tokens / steps,
            "acceptance_by_position": by_position(stats, k, name) if name != "none" else [],
        }
    return found


def print_report(report: dict[str, Any]) -> None:
    overall = report["overall"]
    head = (
        "category",
        "prompts",
        "tok/step",
        "loop-free",
        "plain tok/s",
        "tok/s",
        "speedup",
        "equal",
    )
    print("{:<16}{:>8}{:>9}{:>11}{:>13}{:>8}{:>9}{:>6}  accepted by position".format(*head))
    for r in [*report["rows"], overall]:
        print(
            f"{r['category']:<16}{r['prompts']:>8}{r['mean_acceptance_length']:>9.2f}"
            f"{r['mean_acceptance_length_loop_free']:>11.2f}{r['plain_tokens_per_second']:>13.1f}"
            f"{r['tokens_per_second']:>8.1f}{r['speedup']:>9.2f}{r['identical_prompts']:>6}"
            f"  {percents(r['acceptance_by_position'])}"
        )
    for name, source in (overall["sources"] | overall["alone"]).items():
        label = f"{name}, in {source['steps']} steps" if "steps" in source else name
        line = f"{label}: {source['mean_acceptance_length']:.2f} tokens per step"
        if rates := percents(source["acceptance_by_position"]):
            line += f", accepted by position {rates}"
        print(line)
    if peers := report.get("peers"):
        rates = {
            name.removesuffix("_tokens_per_second").replace("_", " "): value
            for name, value in peers.items()
            if name.startswith("transformers")
        }
        theirs = ", ".join(f"{name} {value:.1f} tok/s" for name, value in rates.items())
        print(
            f"{theirs}; plain decoding here {peers['plain_tokens_per_second']:.1f}: "
            f"{peers['ratio']:.2f} times as fast"
        )
    facts = report["environment"]
    if "load" in facts:  # of the CPU
        print(f"load before {averages(facts['load'])}, after {averages(facts['load_after'])}")


if __name__ == "__main__":
    sys.exit(main())
