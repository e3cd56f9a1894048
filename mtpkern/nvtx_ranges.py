"""Ranges on a profiler's timeline (NVTX, domain mtpkern).

They cost nothing without the package nvtx, and about 70 ns each without a profiler.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

try:
    import nvtx
except ImportError:
    nvtx = None


class _Range:
    """One named range, made once and entered many times, also within itself."""

    def __init__(self, name: str):
        self.domain = nvtx.get_domain("mtpkern")
        self.attributes = self.domain.get_event_attributes(message=name)

    def __enter__(self) -> None:
        self.domain.push_range(self.attributes)

    def __exit__(self, *failure: object) -> None:
        self.domain.pop_range()


def span(name: str) -> AbstractContextManager[Any]:
    """A range called `name`, for any number of `with` statements."""
    return nullcontext() if nvtx is None else _Range(name)
