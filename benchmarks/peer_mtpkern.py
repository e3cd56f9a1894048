"""mtpkern as an engine of bench_peers: plain, or with its default drafts."""

import sys
from typing import Any

import checkout  # noqa: F401
from peer_process import Answer, serve

import mtpkern
from mtpkern import LLM, SamplingParams


class Mtpkern:
    """An LLM for one prompt at a time."""

    def __init__(self, job: dict[str, Any]):
        plain: dict[str, Any] = {"heads": "none", "ngram": False, "num_speculative_tokens": 0}
        self.llm = LLM(
            job["model"],
            device="cpu",
            threads=job["threads"],
            max_batch=1,
            max_length=job["context"],
            **({} if job["settings"]["drafts"] else plain),
        )
        self.version = f"mtpkern {mtpkern.__version__}, weights {self.llm.weights}"

    def decode(self, prompt: list[int], max_tokens: int) -> Answer:
        (completion,) = self.llm.generate([prompt], SamplingParams(max_tokens=max_tokens))
        stats = completion.stats
        return Answer(
            completion.token_ids,
            stats.new_tokens,
            stats.decode_seconds,
            sum(sum(counts) for counts in stats.drafted.values()),
            sum(sum(counts) for counts in stats.accepted.values()),
        )

    def prefill(self, prompt: list[int]) -> float:
        (completion,) = self.llm.generate([prompt], SamplingParams(max_tokens=1))
        return completion.stats.time_to_first_token_seconds


if __name__ == "__main__":
    sys.exit(serve(Mtpkern))
