"""mtpkern beside llama.cpp and transformers on a CPU: the same model, prompts and threads.

    python benchmarks/bench_peers.py --llama-python PEERS/bin/python --threads 1 --threads 2 --busy

llama.cpp comes from the wheel xllamacpp (2026.10 or later), best installed in an environment of
its own; `--llama-python` is that environment's interpreter. Every engine decodes greedily, from the
same token ids.

1. Check: mtpkern's tokens must be the same with drafts, without, and with any number of threads.
   Red: exit code 1 and no speed. How many of llama.cpp's answers are equal is reported only.
2. Settings: llama.cpp is tried with and without flash attention and with each kind of its n-gram
   drafts, transformers in bfloat16 and float32. The fastest is kept, for each number of threads.
3. Time: engines take turns, in reverse order every other time. Each turn is a process of its own,
   since engines' threads spin while they wait: it loads the model, warms up, answers all prompts
   (transformers: 4) and ends. The decode time is each engine's own and excludes the prompt.
   llama.cpp computes its first token with the prompt, so its rate excludes that token. Last comes
   the prefill time of 1,000 tokens, the shorter of 2.
4. First token: from the start of a process to the first token of a short answer. For mtpkern the
   process is the command `mtpkern generate`, with all caches filled.
5. --busy: few prompts and few tokens, alone and then beside one other busy process, in turn.

Figures are medians over the turns; a ratio is the median over the turns' ratios, with the least and
the largest. Rows are printed as they are measured. The last line is one JSON object.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from checkout import ROOT
from common import (
    Finish,
    add_counts,
    add_prompts,
    averages,
    environment,
    first_line,
    load,
    read_prompts,
    run,
)
from peer_process import Failed, Visit, visit
from peer_report import (
    DRAFTS,
    LLAMA,
    LLAMA_DRAFTS,
    PLAIN,
    TRANSFORMERS,
    EngineCommand,
    Turns,
    differing,
    equal_answers,
    line,
    rate,
    ratios,
    row,
    table,
    titled,
    tokens,
)

from mtpkern.arguments import Parser, at_least
from mtpkern.checkpoints.llama import load_config
from mtpkern.checkpoints.resolve import resolve_model
from mtpkern.errors import UserError, counted, printable
from mtpkern.status import Phase
from mtpkern.threads import physical_cores
from mtpkern.tokenizer import Tokenizer

HERE = Path(__file__).parent
CONTEXT, PREFILL_TOKENS = 2048, 1000
FEW_PROMPTS = 4  # for choosing settings, for slow engines, and beside a busy process
BUSY_TOKENS, BUSY_SECONDS = 32, 60.0
FLASH: list[dict[str, Any]] = [{"flash_attention": True}, {"flash_attention": False}]
# llama.cpp's n-gram drafts: default sizes, and shorter copies after shorter matches.
_SHORT = {"size_n": 3, "size_m": 8}
NGRAMS: list[dict[str, Any]] = [
    {"drafts": "ngram_simple"},
    {"drafts": "ngram_simple", "sizes": _SHORT},
    {"drafts": "ngram_map_k"},
    {"drafts": "ngram_map_k", "sizes": _SHORT},
    {"drafts": "ngram_map_k4v"},
    {"drafts": "ngram_mod"},
    {"drafts": "ngram_cache"},
]
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**6))"


@dataclass
class Work:
    """The prompts and limits that every engine gets."""

    texts: list[str]
    prompts: list[list[int]]  # token ids, through the chat template if there is one
    prefill: list[int]
    max_tokens: int
    context: int

    def job(self, engine: EngineCommand, threads: int, **other: Any) -> dict[str, Any]:
        return {
            "model": engine.model,
            "settings": engine.settings,
            "threads": threads,
            "context": self.context,
            "prompts": self.few if engine.few else self.prompts,
            "max_tokens": self.max_tokens,
            "prefill": [],
            "warm_up": True,
            "seconds": 1e9,
        } | other

    @property
    def few(self) -> list[list[int]]:
        """FEW_PROMPTS of the prompts, spread over them."""
        count = min(FEW_PROMPTS, len(self.prompts))
        return [self.prompts[i * len(self.prompts) // count] for i in range(count)]


def main(argv: list[str] | None = None) -> int:
    return run(parser(), measure, argv)


def measure(args: argparse.Namespace, finish: Finish) -> int:
    threads = args.threads or sorted({1, physical_cores()})
    directory = resolve_model(args.model, status=args.status)
    gguf = args.gguf or gguf_of(args.model, directory)
    work = read_work(args, directory)
    facts = environment() | {"model": args.model or directory.name, "gguf": gguf.name}
    facts |= {"gguf_bytes": gguf.stat().st_size, "prompts": len(work.prompts)}
    facts |= {"max_tokens": args.max_tokens, "context": work.context}
    print(first_line(facts | {"threads": " and ".join(map(str, threads))}))
    facts["threads"] = threads
    report: dict[str, Any] = {"schema": 1, "environment": facts}

    def stage(text: str, total: int) -> AbstractContextManager[Phase]:
        return args.status.phase(text, total, "processes")

    plain, drafts = ours(args.model, directory)
    command = [args.llama_python, str(HERE / "peer_llama.py")]
    llama = EngineCommand(LLAMA, command, str(gguf), FLASH[0])
    with stage("checking", 3) as phase:
        start(work, llama, threads[0], phase, prompts=work.few[:1])  # whether it runs at all
        expected = tokens(start(work, plain, threads[0], phase))
        red = differing(expected, start(work, drafts, threads[-1], phase))
    if red:
        return refuse(report, red, DRAFTS, finish)
    print(f"check: with drafts, {len(expected)}/{len(expected)} answers as without")

    turns: list[Turns] = []
    tries = len(FLASH) + len(NGRAMS) + (2 if args.transformers else 0)
    for count in threads:
        with stage(f"choosing settings, {counted(count, 'thread')}", tries) as phase:
            peers = choose_settings(args, work, llama, count, phase)
        turns += [Turns(count, engine) for engine in (plain, drafts, *peers)]
    with stage("timing", args.repeat * len(turns)) as phase:
        for repeat in range(args.repeat):
            for turn in in_order(turns, repeat):
                one = start(work, turn.engine, turn.threads, phase, prefill=work.prefill)
                if turn.engine.name in (PLAIN, DRAFTS) and (red := differing(expected, one)):
                    return refuse(report, red, turn.engine.name, finish)
                turn.visits.append(one)
                print(line(turn, f"turn {repeat + 1}", one, len(work.prefill)))
    report |= {
        "rows": [row(turn, len(work.prefill)) for turn in turns],
        "ratios": [ratio for count in threads for ratio in ratios(turns, count)],
        "equal_answers": equal_answers(turns, expected),
    }
    print(table(report))
    with stage("timing first tokens", args.repeat * 2 * len(threads)) as phase:
        report["first_token"] = time_first_tokens(args, work, turns, phase)
    if args.busy:
        with stage("timing beside a busy process", 2 * args.repeat * len(turns)) as phase:
            report["busy"] = time_beside_busy(args, work, turns, phase)
    facts["load_after"] = load()
    print(f"load before {averages(facts['load'])}, after {averages(facts['load_after'])}")
    return finish(report, 0)


def parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", help="a name, a directory or a FILE.gguf (default: SmolLM2-135M-Instruct)")
    add("--gguf", type=Path, metavar="FILE", help="llama.cpp's model (default: mtpkern's own GGUF)")
    add(
        "--llama-python",
        default=sys.executable,
        metavar="PATH",
        help="an interpreter that can import xllamacpp (default: this one)",
    )
    add("--transformers", action="store_true", help="also time transformers")
    add("--busy", action="store_true", help="also time beside another busy process")
    # llama.cpp's decode time excludes the first token.
    add_prompts(parser, limit=20, least_tokens=2)
    add_counts(parser, "--threads", "N", "CPU threads; repeatable (default: 1 and all cores)")
    add("--repeat", type=at_least(1), default=5, metavar="N", help="turns per engine")
    return parser


def gguf_of(model: str | None, directory: Path) -> Path:
    """The GGUF that mtpkern itself reads; UserError if its model is not a GGUF."""
    named = Path(model) if model is not None else None
    if named is not None and named.suffix == ".gguf":
        return named
    file = directory / "model.gguf"
    if not file.is_file():
        raise UserError(f"{printable(directory)} holds no model.gguf: give llama.cpp's with --gguf")
    return file


def read_work(args: argparse.Namespace, directory: Path) -> Work:
    """The prompts, and a long one made of their tokens. UserError if they exceed the context."""
    tokenizer = Tokenizer.from_directory(directory)
    texts = [prompt["turns"][0] for prompt in read_prompts(args.prompts, args.limit)]
    if not texts:
        raise UserError(f"{printable(args.prompts)} holds no prompts")
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}])
        if tokenizer.has_chat_template
        else tokenizer.encode(text)
        for text in texts
    ]
    context = min(CONTEXT, load_config(directory).max_position_embeddings)
    room = context - args.max_tokens
    if room < max(map(len, prompts)):
        raise UserError(
            f"max_tokens is {args.max_tokens}, and the longest prompt has "
            f"{max(map(len, prompts))} tokens: together they must be at most {context}"
        )
    endless = itertools.cycle(itertools.chain.from_iterable(prompts))
    prefill = list(itertools.islice(endless, min(PREFILL_TOKENS, context - 1)))
    return Work(texts, prompts, prefill, args.max_tokens, context)


def ours(model: str | None, directory: Path) -> list[EngineCommand]:
    command = [sys.executable, str(HERE / "peer_mtpkern.py")]
    return [
        EngineCommand(name, command, str(model or directory), {"drafts": name == DRAFTS})
        for name in (PLAIN, DRAFTS)
    ]


def start(work: Work, engine: EngineCommand, threads: int, phase: Phase, **other: Any) -> Visit:
    """Run an engine's process; UserError, with its last message, if it fails."""
    phase.advance(0, note=titled(threads, engine.name))
    try:
        found = visit(engine.command, work.job(engine, threads, **other))
    except Failed as failed:
        hint = ""
        if "xllamacpp" in str(failed):
            hint = "; install xllamacpp, and name its interpreter with --llama-python"
        raise UserError(f"{engine.name} failed: {printable(failed)}{hint}") from None
    phase.advance()
    return found


def choose_settings(
    args: argparse.Namespace, work: Work, llama: EngineCommand, threads: int, phase: Phase
) -> list[EngineCommand]:
    """The other engines, each with the settings that decode a few prompts fastest."""

    def fastest(engines: list[EngineCommand]) -> EngineCommand:
        rates = []
        for engine in engines:
            rates.append(rate(start(work, engine, threads, phase, prompts=work.few)))
            print(f"{titled(threads, engine.name)} {engine.settings}: {rates[-1]:.1f} tok/s")
        return engines[rates.index(max(rates))]

    plain = fastest([replace(llama, settings=flash) for flash in FLASH])
    ngrams = [replace(plain, name=LLAMA_DRAFTS, settings=plain.settings | kind) for kind in NGRAMS]
    found = [plain, fastest(ngrams)]
    if args.transformers:
        command = [sys.executable, str(HERE / "peer_transformers_process.py")]
        directory = str(resolve_model(args.model))
        found.append(
            fastest(
                [
                    EngineCommand(TRANSFORMERS, command, directory, {"dtype": dtype}, few=True)
                    for dtype in ("bfloat16", "float32")
                ]
            )
        )
    return found


def in_order(turns: list[Turns], repeat: int) -> list[Turns]:
    return turns[:: -1 if repeat % 2 else 1]


def refuse(report: dict[str, Any], red: int, name: str, finish: Finish) -> int:
    print(f"RED: {name}: {red} answers are not those of plain decoding; no speed is reported")
    return finish(report | {"rows": [], "red": red}, 1)


def time_first_tokens(
    args: argparse.Namespace, work: Work, turns: list[Turns], phase: Phase
) -> list[dict[str, Any]]:
    """Seconds from the start of a process to the first token of a short prompt's answer."""
    prompt = min(work.prompts, key=len)
    text = work.texts[work.prompts.index(prompt)]
    once = {"prompts": [prompt], "max_tokens": 1, "warm_up": False}
    found = []
    for turn in turns:
        if turn.engine.name != LLAMA:
            continue
        generate = [sys.executable, "-m", "mtpkern", "generate", text, "--max-tokens", "1"]
        generate += ["--threads", str(turn.threads)]
        generate += [] if args.model is None else ["--model", args.model]
        seconds: dict[str, list[float]] = {"mtpkern generate": [], LLAMA: []}
        for _ in range(args.repeat):
            seconds["mtpkern generate"].append(seconds_to_output(generate))
            phase.advance(note="mtpkern generate")
            one = start(work, turn.engine, turn.threads, phase, **once)
            seconds[LLAMA].append(one.first_answer_seconds)
        for name, values in seconds.items():
            print(
                f"{titled(turn.threads, name)}: first token after {median(values):.2f} s "
                f"({min(values):.2f} to {max(values):.2f})"
            )
            found.append(
                {"threads": turn.threads, "engine": name, "seconds": median(values)}
                | {"all": values}
            )
    return found


def seconds_to_output(command: list[str]) -> float:
    """Seconds from a process's start to its first byte of output; UserError if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    begin = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - begin
        _, errors = process.communicate()
    if process.returncode:
        raise UserError(f"mtpkern generate failed: {printable(errors.decode(errors='replace'))}")
    return seconds


def time_beside_busy(
    args: argparse.Namespace, work: Work, turns: list[Turns], phase: Phase
) -> list[dict[str, Any]]:
    """The share of its quiet rate that each engine keeps beside one other busy process."""
    shares: list[list[float]] = [[] for _ in turns]
    rates: list[list[float]] = [[] for _ in turns]
    few = {"prompts": work.few, "max_tokens": min(BUSY_TOKENS, args.max_tokens)}
    for repeat in range(args.repeat):
        for i in range(len(turns))[:: -1 if repeat % 2 else 1]:
            turn = turns[i]
            quiet = start(work, turn.engine, turn.threads, phase, **few)
            with busy_process():
                busy = start(work, turn.engine, turn.threads, phase, seconds=BUSY_SECONDS, **few)
            rates[i].append(rate(busy))
            shares[i].append(rates[i][-1] / rate(quiet, len(busy.answers)))
            print(
                f"{titled(turn.threads, turn.engine.name)}, busy, turn {repeat + 1}: "
                f"{rates[i][-1]:.1f} tok/s, {shares[i][-1]:.2f} of its quiet rate"
            )
    return [
        {"threads": turn.threads, "engine": turn.engine.name}
        | {"tokens_per_second": median(some), "share": median(share), "shares": share}
        for turn, some, share in zip(turns, rates, shares, strict=True)
    ]


@contextmanager
def busy_process() -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that computes on one thread, for as long as the context lasts."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
