"""llama.cpp as an engine of bench_peers, from the wheel xllamacpp.

    PYTHON_WITH_XLLAMACPP peer_llama.py < job.json

llama.cpp's decode time begins after the first token, which the prompt's own pass computes, so that
token is not counted.
"""

import sys
from typing import Any

import xllamacpp
from peer_process import Answer, serve


class Llama:
    """A GGUF in llama.cpp's server, called in this process; one request at a time."""

    def __init__(self, job: dict[str, Any]):
        self.version = f"xllamacpp {xllamacpp.__version__} ({xllamacpp.get_system_info().strip()})"
        params = xllamacpp.CommonParams()
        params.model.path = job["model"]
        params.n_ctx, params.n_parallel, params.n_gpu_layers = job["context"], 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
        params.warmup, params.verbosity = job["warm_up"], -1
        settings = job["settings"]
        self.likeliest = settings.get("likeliest", 0)
        # A repeated prompt is computed again, except for positions of one text (bench_quality).
        params.cache_prompt, params.cache_ram_mib = bool(self.likeliest), 0
        params.flash_attn_type = getattr(
            xllamacpp.llama_flash_attn_type,
            f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if settings['flash_attention'] else 'DISABLED'}",
        )
        if kind := settings.get("drafts"):
            types = xllamacpp.common_speculative_type
            params.speculative.types = [getattr(types, f"COMMON_SPECULATIVE_TYPE_{kind.upper()}")]
            for name, value in settings.get("sizes", {}).items():
                setattr(getattr(params.speculative, kind), name, value)
        self.server = xllamacpp.Server(params)

    def decode(self, prompt: list[int], max_tokens: int) -> Answer:
        found = self._complete(prompt, max_tokens)
        timings = found["timings"]
        return Answer(
            found["tokens"],
            timings["predicted_n"] - 1,
            timings["predicted_ms"] / 1e3,
            timings.get("draft_n", 0),
            timings.get("draft_n_accepted", 0),
            [
                (one["id"], one["logprob"])
                for one in found.get("completion_probabilities", [{}])[0].get("top_logprobs", [])
            ],
        )

    def prefill(self, prompt: list[int]) -> float:
        seconds: float = self._complete(prompt, 1)["timings"]["prompt_ms"] / 1e3
        return seconds

    def _complete(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "samplers": ["top_k"],
                "top_k": 1,
                "cache_prompt": bool(self.likeliest),  # positions of one text follow one another
                "n_probs": self.likeliest,
                "return_tokens": True,
                "verbose": True,  # includes the token ids
            }
        )
        if "__verbose" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        found: dict[str, Any] = answer["__verbose"]
        return found


if __name__ == "__main__":
    sys.exit(serve(Llama))
