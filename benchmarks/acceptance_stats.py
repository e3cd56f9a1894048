"""Statistics of drafts: tokens per step, acceptance by position, and texts cut at loops."""

import checkout  # noqa: F401

from mtpkern import Stats

REPEAT = 8  # a text is cut where it first repeats this many tokens


def acceptance_length(stats: list[Stats]) -> float:
    """Tokens emitted per step; 1.0 is plain decoding."""
    return sum(s.new_tokens for s in stats) / sum(s.steps for s in stats)


def by_position(stats: list[Stats], k: int, source: str | None = None) -> list[float]:
    """Accepted over drafted at each of K positions, for one source or for all."""

    def total(counts: list[dict[str, list[int]]], i: int) -> int:
        return sum(c[i] for per in counts for s, c in per.items() if source in (None, s))

    drafted = [total([s.drafted for s in stats], i) for i in range(k)]
    accepted = [total([s.accepted for s in stats], i) for i in range(k)]
    return [a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)]


def loop_free(tokens: list[int], drafted: list[bool]) -> tuple[int, int]:
    """The tokens and steps before a text first repeats `REPEAT` tokens, in whole steps.

    A step is a run of accepted drafts and the token after them.
    """
    seen: set[tuple[int, ...]] = set()
    end = len(tokens)
    for i in range(len(tokens) - REPEAT + 1):
        gram = tuple(tokens[i : i + REPEAT])
        if gram in seen:
            end = i
            break
        seen.add(gram)
    ends = [i + 1 for i, guess in enumerate(drafted) if not guess or i + 1 == len(drafted)]
    whole = [at for at in ends if at <= end]
    return (whole[-1], len(whole)) if whole else (0, 0)


def percents(rates: list[float]) -> str:
    return " ".join(f"{rate:.0%}" for rate in rates)
