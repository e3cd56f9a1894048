"""Rows of (name, value), as inspect and doctor print them."""

from collections.abc import Iterator


def print_table(rows: Iterator[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:<16} {value}", flush=True)
