"""Persistent helper threads for steps.

No step depends on them: its first thread is the caller, and a phase ends when its chunks are done.
So helpers may be late, busy with another caller's step, or gone after a fork, and the step still
ends, with the same bits. Between steps they block in the kernel; they do not spin.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[int], object]

# If other processes take the cores, helpers slow a step down: its caller waits for chunks of
# suspended threads. If the caller waits more than PATIENCE thousandths of a step, averaged over
# AVERAGED steps, one helper fewer is called for PENALTY steps.
PATIENCE = 330
AVERAGED = 8
PENALTY = 64


class Helpers:
    """`threads` - 1 helper threads; thread 0 of every step is its caller."""

    def __init__(self, threads: int):
        if threads < 1:
            raise ValueError(f"threads must be 1 or more, got {threads}")
        self.threads = threads
        self.active = threads - 1
        self._waited, self._steps, self._penalty = 0, 0, 0
        self._queues: list[SimpleQueue[Job | None]] = []
        self._process = -1
        self._lock = threading.Lock()

    def call(self, job: Job) -> None:
        """Have the active helpers call job(thread), threads counted from 1, as soon as they can."""
        if self._process != os.getpid():
            self._start()
        for queue in self._queues[: self.active]:
            queue.put(job)

    def learn(self, waited: int) -> None:
        """Record the share of a step, in thousandths, that its caller waited."""
        if self.active < self.threads - 1:
            self._penalty -= 1
            if self._penalty <= 0:
                self.active = self.threads - 1
        if self.active == 0:
            return
        self._waited += waited
        self._steps += 1
        if self._steps == AVERAGED:
            if self._waited > PATIENCE * AVERAGED:
                self.active -= 1
                self._penalty = PENALTY
            self._waited, self._steps = 0, 0

    def close(self) -> None:
        for queue in self._queues:
            queue.put(None)
        self._queues, self._process = [], -1

    def _start(self) -> None:
        # After a fork the child has no threads, and the lock may have been held by one.
        if self._process != -1:
            self._lock = threading.Lock()
        with self._lock:
            if self._process == os.getpid():
                return
            self._queues = [SimpleQueue() for _ in range(self.threads - 1)]
            for thread, queue in enumerate(self._queues, 1):
                threading.Thread(
                    target=_help, args=(queue, thread), name=f"mtpkern-{thread}", daemon=True
                ).start()
            self._process = os.getpid()


def _help(queue: SimpleQueue[Job | None], thread: int) -> None:
    while (job := queue.get()) is not None:
        job(thread)
        del job
