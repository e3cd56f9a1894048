"""transformers as an engine of bench_peers: eager, in the dtype of the job."""

import sys
import time
from typing import Any

import checkout  # noqa: F401
import torch
import transformers
from peer_process import Answer, serve
from peer_transformers import Peer


class Transformers:
    """Answers have exactly max_tokens tokens: the loop does not look at end tokens."""

    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self, job: dict[str, Any]):
        torch.set_num_threads(job["threads"])
        dtype = getattr(torch, job["settings"]["dtype"])
        self.peer = Peer(job["model"], dtype, torch.device("cpu"))

    def decode(self, prompt: list[int], max_tokens: int) -> Answer:
        count, seconds = self.peer.decode(prompt, max_tokens)
        return Answer([], count, seconds)

    def prefill(self, prompt: list[int]) -> float:
        begin = time.perf_counter()
        self.peer.decode(prompt, 1)
        return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(serve(Transformers))
