"""Heads side by side: acceptance by position, category and temperature, and speed if asked.

    python benchmarks/bench_heads.py --heads auto --heads my-medusa --plot heads.png

Each heads directory answers the same prompts, alone and with n-grams, one prompt at a time by
default. Tokens do not depend on the batch, but drafting continues while any sequence of a batch is
confident enough, so --batch 8 is faster and accepts slightly more. All answers must equal those
without drafts; a difference is red and ends with exit code 1. --timed N measures speed: it decodes
the first N prompts again, greedily, one at a time and each right after plain decoding. The last
line is one JSON object; --plot draws it.
"""

import argparse
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from acceptance_stats import acceptance_length, by_position, loop_free, percents
from common import (
    Finish,
    add_prompts,
    encode,
    environment,
    first_line,
    gpu_environment,
    gpu_first_line,
    read_prompts,
    run,
)

from mtpkern import LLM, SamplingParams, UserError
from mtpkern.arguments import Parser, at_least
from mtpkern.checkpoints.resolve import model_name, resolve_model
from mtpkern.drafters.load import find_heads
from mtpkern.errors import printable
from mtpkern.outputs import output_file, writing

SEED = 7
BOTH = " + n-gram"


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    if args.plot is None:
        return compare(args, finish, None)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    check_format(args.plot)
    with output_file(args.plot, force=args.force) as plot:
        return compare(args, finish, plot)


def compare(args: argparse.Namespace, finish: Finish, plot: Path | None) -> int:
    """Decode with every heads directory; draw the result to the file `plot` unless it is None."""
    args.heads, args.temperature = args.heads or ["auto"], args.temperature or [0.0]
    if args.threads:
        torch.set_num_threads(args.threads)
    open_model = partial(LLM, args.model, dtype=args.dtype, device=args.device, status=args.status)
    plain = open_model(heads="none", ngram=False)
    on_gpu = plain.device.type == "cuda"
    facts = gpu_environment() if on_gpu else environment()
    print(gpu_first_line(facts) if on_gpu else first_line(facts))
    rows = read_prompts(args.prompts, args.limit)
    categories = [row["category"] for row in rows]
    prompts = [encode(plain, row["turns"][0]) for row in rows]
    ways = [("n-gram", "none", True)]
    names = [Path(heads).name for heads in args.heads]
    for heads, name in zip(args.heads, names, strict=True):
        name = name if names.count(name) == 1 else heads
        ways += [(name, heads, False), (f"{name}{BOTH}", heads, True)]
    with args.status.phase("decoding", len(args.temperature) * (len(ways) + 1)) as phase:
        expected: dict[float, list[list[int]]] = {}
        for temperature in args.temperature:
            params = SamplingParams(max_tokens=args.max_tokens, temperature=temperature, seed=SEED)
            expected[temperature] = [c.token_ids for c in plain.generate(prompts, params)]
            phase.advance(note="without drafts")
        model, dtype = plain.name, str(plain.dtype).removeprefix("torch.")

        report: dict[str, Any] = {"schema": 1, "environment": facts, "rows": []}
        report["environment"] |= {"prompts": args.prompts.name, "count": len(prompts)}
        report["environment"] |= {"max_tokens": args.max_tokens, "K": args.k, "batch": args.batch}
        report["environment"] |= {"model": model, "dtype": dtype}
        for name, heads, ngram in ways:
            llm = open_model(
                heads=heads, ngram=ngram, num_speculative_tokens=args.k, max_batch=args.batch
            )
            for temperature in args.temperature:
                params = SamplingParams(
                    max_tokens=args.max_tokens, temperature=temperature, seed=SEED
                )
                answers = llm.generate(prompts, params)
                if [c.token_ids for c in answers] != expected[temperature]:
                    with args.status.paused():
                        print(f"RED: with {name} at temperature {temperature} the tokens differ")
                    return 1
                row = summarise(answers, categories, args.k)
                row = {"heads": name, "temperature": temperature} | row
                report["rows"].append(row | {"megabytes": megabytes(args.model, heads)})
                phase.advance(note=name)
            if args.timed and 0 in args.temperature:
                speed = time_side_by_side(plain, llm, prompts[: args.timed], args.max_tokens)
                for row in report["rows"][-len(args.temperature) :]:
                    row |= speed if row["temperature"] == 0 else {}
    print_rows(report["rows"])
    if plot is not None:
        with writing(args.plot):
            draw(report, plot, args.plot.suffix[1:])
    return finish(report, 0)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", help="a directory, a hub id or a name (default: SmolLM2-135M-Instruct)")
    add(
        "--heads",
        action="append",
        metavar="NAME|DIR",
        help="heads to compare; repeatable (default: auto)",
    )
    add_prompts(parser)
    add("--temperature", type=float, action="append", metavar="T", help="repeatable (default: 0)")
    add("-K", dest="k", type=at_least(0), default=4, metavar="K", help="drafts per step")
    add("--batch", type=at_least(1), default=1, metavar="N", help="prompts at a time")
    add("--timed", type=at_least(0), default=0, metavar="N", help="prompts to time, one at a time")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's)")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--plot", type=Path, metavar="OUT.png", help="draw the report; needs matplotlib")
    return parser


def summarise(answers: list[Any], categories: list[str], k: int) -> dict[str, Any]:
    """Acceptance over all answers and in each category."""
    stats = [answer.stats for answer in answers]
    found = {"prompts": len(answers), "mean_acceptance_length": acceptance_length(stats)}
    found["mean_acceptance_length_loop_free"] = loop_free_length(answers)
    found["acceptance_by_position"] = by_position(stats, k)
    found["categories"] = {
        category: {
            "mean_acceptance_length": acceptance_length(some),
            "acceptance_by_position": by_position(some, k),
        }
        for category in dict.fromkeys(categories)
        if (some := [s for s, c in zip(stats, categories, strict=True) if c == category])
    }
    return found


def loop_free_length(answers: list[Any]) -> float:
    """Tokens per step up to where each text first repeats itself."""
    kept = [loop_free(answer.token_ids, answer.drafted) for answer in answers]
    return sum(tokens for tokens, _ in kept) / max(1, sum(steps for _, steps in kept))


def time_side_by_side(
    plain: LLM, drafting: LLM, prompts: list[list[int]], max_tokens: int
) -> dict[str, float]:
    """Decode each prompt alone with both, one after the other, after a warm-up prompt."""
    params = SamplingParams(max_tokens=max_tokens)
    spent = [
        [llm.generate([prompt], params)[0].stats for llm in (plain, drafting)]
        for prompt in prompts[:1] + prompts
    ]
    slow, fast = (
        sum(s.new_tokens for s in stats) / sum(s.decode_seconds for s in stats)
        for stats in zip(*spent[1:], strict=True)
    )
    return {
        "tokens_per_second": fast,
        "plain_tokens_per_second": slow,
        "speedup": fast / slow,
    }


def megabytes(model: str | None, heads: str) -> float:
    """The size of a heads directory's weights on disk."""
    directory = resolve_model(model)
    place = find_heads(heads, model_name(directory), directory)
    files = [] if place is None or place == directory else place.glob("*.safetensors")
    return sum(file.stat().st_size for file in files) / 1e6


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'heads':<28}{'MB':>6}{'T':>5}{'tok/step':>9}{'loop-free':>11}{'speedup':>9}  by position"
    )
    for row in rows:
        speedup = f"{row['speedup']:.2f}" if "speedup" in row else "-"
        print(
            f"{row['heads']:<28}{row['megabytes']:>6.1f}{row['temperature']:>5.1f}"
            f"{row['mean_acceptance_length']:>8.2f}{row['mean_acceptance_length_loop_free']:>11.2f}"
            f"{speedup:>9}  {percents(row['acceptance_by_position'])}"
        )
    for row in rows:
        found = ((c, r["mean_acceptance_length"]) for c, r in row["categories"].items())
        print(f"{row['heads']}, T={row['temperature']}:", *(f"{c} {a:.2f}" for c, a in found))


def draw(report: dict[str, Any], file: Path, kind: str) -> None:
    """Acceptance by position, and tokens per step by category, of each heads directory."""
    from matplotlib.figure import Figure

    coldest = min(row["temperature"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["temperature"] == coldest]
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.7))
    categories = list(rows[0]["categories"])
    # A colour per directory; with n-grams the bars are pale and drawn first, the lines dashed.
    names = list(dict.fromkeys(row["heads"].removesuffix(BOTH) for row in rows))
    width = 0.8 / len(names)
    for row in sorted(rows, key=lambda row: not row["heads"].endswith(BOTH)):
        number, both = names.index(row["heads"].removesuffix(BOTH)), row["heads"].endswith(BOTH)
        look = {"color": f"C{number}", "alpha": 0.4 if both else 1.0}
        rates = row["acceptance_by_position"]
        label = f"{row['heads']}: {row['mean_acceptance_length']:.2f} tokens per step"
        positions, style = range(1, 1 + len(rates)), "--" if both else "-"
        left.plot(positions, rates, style, marker="o", label=label, **look)
        at = [i + (number - (len(names) - 1) / 2) * width for i in range(len(categories))]
        right.bar(
            at, [row["categories"][c]["mean_acceptance_length"] for c in categories], width, **look
        )
    left.set(xlabel="draft position", ylabel="share of drafts accepted", ylim=(0, 1))
    left.set_xticks(range(1, 1 + report["environment"]["K"]))
    left.grid(alpha=0.3)
    right.set_xticks(range(len(categories)), categories, rotation=40, ha="right")
    right.set(ylabel="tokens per step", ylim=(1, None))
    right.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    facts = report["environment"]
    figure.suptitle(
        f"{facts['count']} prompts, {facts['max_tokens']} tokens, K = {facts['K']}, "
        f"temperature {coldest:g}"
    )
    figure.savefig(file, dpi=120, format=kind)


def check_format(file: Path) -> None:
    """Raise UserError if matplotlib cannot draw files of this kind."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise UserError(f"--plot {printable(file)}: must end with one of {', '.join(kinds)}")


if __name__ == "__main__":
    sys.exit(main())
