"""What commands print: tokens as they come, statistics, tables."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtpkern.errors import counted
from mtpkern.status import Status, coloured, wrapped

if TYPE_CHECKING:
    from mtpkern import Completion, Event, Stats

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_NAME_WIDTH = 17


def print_stream(events: "Iterator[Event]", *, as_ids: bool = False) -> "Event | None":
    """Print tokens as they come, as text or as ids -> the last event, or None if there was none.

    On a terminal, accepted drafts are green.
    """
    terminal, colours = sys.stdout.isatty(), coloured(sys.stdout)
    current, last = _PLAIN, None
    try:
        for event in events:
            last = event
            text = f"{event.token_id} " if as_ids else event.text
            colour = _GREEN if event.drafted else _PLAIN
            if colours and text and colour != current:
                sys.stdout.write(colour)
                current = colour
            # A model's output must not control the terminal; a file gets it unchanged.
            sys.stdout.write(_without_controls(text) if terminal else text)
            sys.stdout.flush()
    finally:
        if last is not None:
            sys.stdout.write("\n" if current == _PLAIN else _PLAIN + "\n")
            sys.stdout.flush()
    return last


def print_cut(completion: "Completion") -> None:
    """Say on stderr that an answer ended at its greatest length, if it did."""
    if completion.finish_reason == "length":
        print(f"[cut after {counted(completion.stats.new_tokens, 'token')}]", file=sys.stderr)


def with_progress(events: "Iterator[Event]", status: Status, max_tokens: int) -> "Iterator[Event]":
    """The same events, counted on `status` where standard output is not a terminal: nobody sees the
    text as it comes."""
    if sys.stdout.isatty():
        yield from events
        return
    with status.phase("answering", max_tokens, "tokens") as phase:
        for event in events:
            phase.advance()
            yield event


def summary(stats: "Stats", load_seconds: float | None = None) -> str:
    """Two lines: decoding (speed, steps, acceptance, K), and what came before the first token.

    They are for stderr, and are wrapped if that is a terminal.
    """
    decoding = (
        f"{stats.tokens_per_second:.1f} tok/s: {counted(stats.new_tokens, 'token')} in "
        f"{counted(stats.steps, 'step')}, {stats.mean_acceptance_length:.2f} per step"
    )
    by_position = zip(stats.acceptance_by_position, stats.drafted_by_position, strict=True)
    if rates := [f"{rate:.2f}" for rate, drafted in by_position if drafted]:
        decoding += f"; accepted by position: {' '.join(rates)}"
    if len(stats.steps_by_k) > 1:
        (k, n), *others = sorted(stats.steps_by_k.items())
        chosen = [f"{k} in {counted(n, 'step')}", *(f"{k} in {n}" for k, n in others)]
        decoding += f"; K chosen: {', '.join(chosen)}"
    elif stats.num_speculative_tokens:
        decoding += f"; K = {next(iter(stats.steps_by_k), 0)}"
    before = (
        f"first token after {stats.time_to_first_token_seconds:.2f} s, prompt of "
        f"{counted(stats.prompt_tokens, 'token')}"
    )
    if stats.cached_tokens:
        before += f", {stats.cached_tokens} of them cached"
    before += f", at {stats.prefill_tokens_per_second:.0f} tok/s"
    if load_seconds is not None:
        before += f"; loaded in {load_seconds:.1f} s"
    return "\n".join(wrapped(line, sys.stderr, indent=2) for line in (decoding, before))


def print_table(rows: Iterator[tuple[str, str]]) -> None:
    """Print rows of (name, value) as they come, wrapped if standard output is a terminal."""
    for name, value in rows:
        line = f"{name:<{_NAME_WIDTH - 1}} {value}"
        print(wrapped(line, sys.stdout, indent=_NAME_WIDTH), flush=True)


def _without_controls(text: str) -> str:
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or ord(c) >= 0xA0)
