"""An engine in a process of its own: the loop that it runs, and how bench_peers starts it.

The job arrives as one JSON object on standard input. Each answer goes back as one JSON line on
standard output as soon as it is complete, and the last line describes the process itself. Only the
standard library is used: this file also runs in another engine's environment.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

WARM_UP_TOKENS = 8
PREFILLS = 2


class Failed(Exception):
    """An engine's process ended early; the message is the last line of its stderr."""


class Answer(NamedTuple):
    """A greedy answer to one prompt, and what its decoding took."""

    tokens: list[int]  # [] if the engine does not report them
    timed: int  # tokens that `seconds` were spent on
    seconds: float
    drafted: int = 0
    accepted: int = 0
    # The most likely first tokens and their log-probabilities, where the job asks for them.
    likeliest: list[tuple[int, float]] = []


class Engine(Protocol):
    """A loaded model."""

    version: str

    def decode(self, prompt: list[int], max_tokens: int) -> Answer: ...

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""


class Visit(NamedTuple):
    """One process of an engine, from its start to its end."""

    answers: list[Answer]  # fewer than the prompts if the time was up
    first_answer_seconds: float  # since the process was started
    prefill_seconds: float  # the shortest; 0 if the job has no prefill
    peak_bytes: int | None  # resident memory; None if the system does not report it
    version: str


def serve(open_engine: Callable[[dict[str, Any]], Engine]) -> None:
    """Do the job on standard input: answer its prompts one after the other, then prefill.

    A job holds what `open_engine` reads, `prompts` and `prefill` (token ids), `max_tokens`,
    `warm_up`, and `seconds`, after which no further prompt is begun.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # what libraries print goes to stderr

        def reply(facts: dict[str, Any]) -> None:
            replies.write(json.dumps(facts) + "\n")
            replies.flush()

        job = json.load(sys.stdin)
        engine = open_engine(job)
        if job["warm_up"]:
            engine.decode(job["prompts"][0], WARM_UP_TOKENS)
        end = time.perf_counter() + job["seconds"]
        for prompt in job["prompts"]:
            reply(engine.decode(prompt, job["max_tokens"])._asdict())
            if time.perf_counter() > end:
                break
        prefills = [
            engine.prefill(job["prefill"]) for _ in range(PREFILLS if job["prefill"] else 0)
        ]
        reply(
            {
                "prefill_seconds": min(prefills, default=0.0),
                "peak_bytes": peak_bytes(),
                "version": engine.version,
            }
        )


def visit(command: list[str], job: dict[str, Any]) -> Visit:
    """Start an engine's process, have it do a job, and wait for its end."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    begin = time.perf_counter()
    first = 0.0
    lines: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=environment,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            try:
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended already; stderr has the reason
            for line in process.stdout:
                first = first or time.perf_counter() - begin
                lines.append(json.loads(line))
        except BaseException:
            process.kill()
            raise
        if process.wait() or not lines or "peak_bytes" not in lines[-1]:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise Failed(said[-1])
    *answers, last = lines
    return Visit([Answer(**answer) for answer in answers], first, **last)


def peak_bytes() -> int | None:
    """Peak resident memory of this process, pages of mapped files included."""
    try:
        # ru_maxrss would include the memory of the parent at the fork.
        with open("/proc/self/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmHWM"].split()[0]) * 1024
    except OSError:
        pass
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
