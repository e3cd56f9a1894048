"""The report of bench_peers: medians of each engine's turns, ratios within a turn, tables."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

import checkout  # noqa: F401
from peer_process import Visit

from mtpkern.errors import UserError, counted

PLAIN, DRAFTS = "mtpkern plain", "mtpkern drafts"
LLAMA, LLAMA_DRAFTS = "llama.cpp plain", "llama.cpp n-gram"
TRANSFORMERS = "transformers"
# Pairs of engines whose rates are divided.
RATIOS = (
    (PLAIN, LLAMA),
    (DRAFTS, LLAMA),
    (DRAFTS, PLAIN),
    (DRAFTS, LLAMA_DRAFTS),
    (LLAMA_DRAFTS, LLAMA),
    (PLAIN, TRANSFORMERS),
)


@dataclass
class EngineCommand:
    """How to start an engine, and its settings."""

    name: str
    command: list[str]
    model: str
    settings: dict[str, Any]
    few: bool = False  # answers only FEW_PROMPTS of the prompts


@dataclass
class Turns:
    """One engine on some number of threads, and its visits so far, one per turn."""

    threads: int
    engine: EngineCommand
    visits: list[Visit] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [rate(one) for one in self.visits]


def tokens(one: Visit) -> list[list[int]]:
    return [answer.tokens for answer in one.answers]


def differing(expected: list[list[int]], one: Visit) -> int:
    """The number of answers that differ from `expected`."""
    return sum(a != b for a, b in zip(expected, tokens(one), strict=True))


def rate(one: Visit, count: int | None = None) -> float:
    """Tokens per second over the first `count` answers, or all of them."""
    answers = one.answers[:count]
    timed = sum(answer.timed for answer in answers)
    if not timed:
        raise UserError("an engine gave no token after the first of any answer: no rate")
    return timed / sum(answer.seconds for answer in answers)


def row(turn: Turns, prefill_tokens: int) -> dict[str, Any]:
    """Medians over an engine's turns."""
    prefill = [prefill_tokens / one.prefill_seconds for one in turn.visits]
    last = turn.visits[-1]
    return {
        "threads": turn.threads,
        "engine": turn.engine.name,
        "version": last.version,
        "settings": turn.engine.settings,
        "prompts": len(last.answers),
        "tokens_per_second": median(turn.rates),
        "rates": turn.rates,
        "prefill_tokens_per_second": median(prefill),
        "prefill_rates": prefill,
        "peak_bytes": last.peak_bytes and max(one.peak_bytes or 0 for one in turn.visits),
        "drafted": sum(answer.drafted for answer in last.answers),
        "accepted": sum(answer.accepted for answer in last.answers),
    }


def ratios(turns: list[Turns], threads: int) -> list[dict[str, Any]]:
    """The ratio of two engines' rates in the same turn: median, least and largest."""
    named = {turn.engine.name: turn for turn in turns if turn.threads == threads}
    found = []
    for above, below in RATIOS:
        if above in named and below in named:
            pairs = zip(named[above].rates, named[below].rates, strict=True)
            values = [a / b for a, b in pairs]
            found.append(
                {"threads": threads, "of": above, "to": below}
                | {"ratio": median(values), "least": min(values), "largest": max(values)}
            )
    return found


def equal_answers(turns: list[Turns], expected: list[list[int]]) -> list[dict[str, Any]]:
    """How many of llama.cpp's answers equal mtpkern's, token for token."""
    return [
        {
            "threads": turn.threads,
            "engine": turn.engine.name,
            "equal": len(expected) - differing(expected, turn.visits[-1]),
            "of": len(expected),
        }
        for turn in turns
        if turn.engine.name in (LLAMA, LLAMA_DRAFTS)
    ]


def titled(threads: int, name: str) -> str:
    return f"{counted(threads, 'thread')}, {name}"


def line(turn: Turns, which: str, one: Visit, prefill_tokens: int) -> str:
    peak = "" if one.peak_bytes is None else f", peak {one.peak_bytes / 1e6:.0f} MB"
    return (
        f"{titled(turn.threads, turn.engine.name)}, {which}: {rate(one):.1f} tok/s, "
        f"prefill {prefill_tokens / one.prefill_seconds:.0f} tok/s{peak}"
    )


def table(report: dict[str, Any]) -> str:
    lines = ["threads  engine             tok/s   (least, largest)  prefill tok/s  peak MB"]
    for r in report["rows"]:
        spread = f"({min(r['rates']):.1f}, {max(r['rates']):.1f})"
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.0f}"
        lines.append(
            f"{r['threads']:>7}  {r['engine']:<17}{r['tokens_per_second']:>7.1f}  {spread:>17}"
            f"{r['prefill_tokens_per_second']:>15.0f}  {peak:>7}"
        )
    for r in report["ratios"]:
        lines.append(
            f"{titled(r['threads'], r['of'])} is {r['ratio']:.2f} times as fast as {r['to']} "
            f"({r['least']:.2f} to {r['largest']:.2f})"
        )
    for r in report["equal_answers"]:
        lines.append(
            f"{titled(r['threads'], r['engine'])}: {r['equal']} of {r['of']} answers equal "
            "mtpkern's, token for token"
        )
    return "\n".join(lines)
