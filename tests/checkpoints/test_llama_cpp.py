"""llama.cpp reads the same GGUFs: its tokens, log-probabilities and token ids are ours.

xllamacpp runs llama.cpp's server in this process. The models are random and small.
"""

import json
import re
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import WIDE_CONFIG, Change, add_sizes, add_weights, head_dim, model_tensors, write
from gguf_tokenizers import TEXTS, byte_level_bpe, byte_level_metadata, sentencepiece_bpe

import mtpkern
from mtpkern.checkpoints.gguf_file import ARCHITECTURES
from mtpkern.checkpoints.resolve import resolve_model
from mtpkern.rope import RopeConfig
from mtpkern.tokenizer import Tokenizer

xllamacpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow

STEPS = 16
# ASCII only, since llama.cpp leaves out the log-probabilities of incomplete characters.
WORDS = ["t", "1", *(f"t{i}" for i in range(1, 259))]
WORDS_METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.merges": ["t 1"],
    "tokenizer.ggml.eos_token_id": len(WORDS) - 1,
}
PROMPT = np.random.default_rng(3).integers(0, len(WORDS) - 1, 120).tolist()

# The largest difference of log-probabilities. In float32 both engines round alike except for the
# order of sums. For the other types activations are rounded before each matmul, by llama.cpp to the
# weights' type or to 8 bits per 32 or 256 inputs, by mtpkern to 8 bits per 32 inputs of a quantised
# matrix. A rounding error of root mean square u, relative to the activations, changes the results
# by as much; nine matmuls in a row, logits of standard deviation 2, and the largest of 16 steps at
# 4 standard deviations make sqrt(9) * 2 * 4 * u = 24 u.
FP16, BF16 = 24 * 0.41 * 2**-11, 24 * 0.41 * 2**-8
# 32 inputs reach 2.1 standard deviations, 256 reach 2.8; uniform errors of steps of that / 127.
Q8 = 24 * float(np.hypot(2.1, 2.8)) / 127 / 12**0.5
BUDGET = {Kind.F32: 1e-4, Kind.F16: FP16, Kind.BF16: BF16}


class Greedy(NamedTuple):
    """The most likely continuation, with log-probabilities per step."""

    tokens: list[int]
    logprobs: list[Mapping[int, float]]  # of every token in llama.cpp, of the chosen one in ours


class LlamaCpp:
    """llama.cpp on one thread, with K and V in float32."""

    def __init__(self, file: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.verbosity = False, -1
        self.server = xllamacpp.Server(params)

    def greedy(self, prompt: str | Sequence[int]) -> Greedy:
        request = {
            "prompt": prompt,
            "max_tokens": STEPS,
            "temperature": 0,
            "n_probs": 1000,
            "return_tokens": True,
            "verbose": True,
        }
        answer = self.server.handle_completions(request)["__verbose"]
        steps = []
        for token, step in zip(answer["tokens"], answer["completion_probabilities"], strict=False):
            if step["id"] != token:
                break  # `token` does not end a character: its entry is left out
            steps.append({other["id"]: other["logprob"] for other in step["top_logprobs"]})
        return Greedy(answer["tokens"], steps)

    def tokenize(self, text: str) -> list[int]:
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": True, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["tokens"]


def ours(file: Path, prompt: str | Sequence[int], dtype: str) -> Greedy:
    llm = mtpkern.LLM(file, device="cpu", dtype=dtype, heads="none", ngram=False, max_length=200)
    params = mtpkern.SamplingParams(max_tokens=STEPS, logprobs=True)
    (found,) = llm.generate([prompt], params)
    assert found.logprobs is not None
    steps = [{t: p} for t, p in zip(found.token_ids, found.logprobs, strict=True)]
    return Greedy(found.token_ids, steps)


def assert_agree(a: Greedy, b: Greedy, budget: float) -> None:
    """llama.cpp's `a` and our `b` are the same up to a near-tie, after which they may differ."""
    assert a.tokens[0] == b.tokens[0] and a.logprobs
    for x, y, p, q in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=False):
        assert p[y] == pytest.approx(q[y], abs=budget)
        if x != y:
            assert p[x] - p[y] <= 2 * budget
            break


def compare(
    file: Path,
    kind: Kind = Kind.F32,
    *,
    prompt: str | Sequence[int] = PROMPT,
    other: Path | None = None,
) -> None:
    """Compare llama.cpp's continuation with ours, which may read another file."""
    found = ours(other or file, prompt, "float32" if kind == Kind.F32 else "auto")
    assert_agree(LlamaCpp(file).greedy(prompt), found, BUDGET.get(kind, Q8))


def write_file(
    file: Path,
    kind: Kind | Callable[[str], Kind] = Kind.F32,
    arch: str = "llama",
    *,
    metadata: Mapping[str, Any] = WORDS_METADATA,
    change: Change = lambda writer: None,
    **sizes: Any,
) -> Path:
    """A GGUF with random weights and this tokenizer."""
    config = WIDE_CONFIG | {"vocab_size": len(metadata["tokenizer.ggml.tokens"])} | sizes
    tensors = model_tensors(arch, config)
    # With tied matrices, embeddings of unit variance would predict their own token with certainty.
    tensors["model.embed_tokens.weight"] /= 8
    writer = gguf.GGUFWriter(file, arch)
    add_sizes(writer, config)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    add_metadata(writer, metadata)
    add_weights(writer, tensors, kind, config)
    change(writer)
    write(writer)
    return file


def add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    types = gguf.GGUFValueType
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            kinds = {str: types.STRING, bool: types.BOOL, int: types.UINT32, float: types.FLOAT32}
            writer.add_key_value(name, value, kinds[type(value)])


@pytest.mark.parametrize(
    ("arch", "head_dim"),
    [
        ("llama", None),
        ("llama", 32),
        ("llama", 128),
        ("qwen2", None),
        ("qwen3", None),
        ("qwen3", 128),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_architectures(arch: str, head_dim: int | None, tied: bool, tmp_path: Path) -> None:
    sizes = {"head_dim": head_dim, "tie_word_embeddings": tied}
    compare(write_file(tmp_path / "m.gguf", arch=arch, **sizes))


TYPES = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q6_K, Kind.Q4_K]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_types(arch: str, kind: Kind, tmp_path: Path) -> None:
    compare(write_file(tmp_path / "m.gguf", kind, arch), kind)


def q4_k_m(name: str) -> Kind:
    return Kind.Q6_K if re.search("v_proj|down_proj|embed", name) else Kind.Q4_K


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_mixed_types(arch: str, tmp_path: Path) -> None:
    """As in the files called Q4_K_M."""
    compare(write_file(tmp_path / "m.gguf", q4_k_m, arch), Kind.Q4_K)


YARN = {"scaling.type": "yarn", "scaling.factor": 4.0}
ROPE: list[dict[str, Any]] = [
    {"freq_base": 5e5},
    {"scaling.type": "linear", "scaling.factor": 4.0},
    {"scaling.factor": 4.0},
    {"scale_linear": 4.0},
    {"scaling.type": "none", "scaling.factor": 4.0},
    YARN,
    YARN | {"scaling.original_context_length": 64, "freq_base": 5e5},
]


def rope(arch: str, settings: Mapping[str, Any]) -> Change:
    metadata = {f"{arch}.rope.{name}": value for name, value in settings.items()}
    return lambda writer: add_metadata(writer, metadata)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("settings", ROPE)
def test_rope(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    compare(write_file(tmp_path / "m.gguf", arch=arch, change=rope(arch, settings)))


def llama3(writer: gguf.GGUFWriter) -> None:
    scaled, _ = RopeConfig("llama3", 5e5, 32.0).inverse_frequencies(64)
    plain, _ = RopeConfig(theta=5e5).inverse_frequencies(64)
    writer.add_rope_freq_base(5e5)
    writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy().astype(np.float32))


def test_llama_3s_factors(tmp_path: Path) -> None:
    compare(write_file(tmp_path / "m.gguf", change=llama3))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (llama3, rope("llama", {"freq_base": 5e5})),
        (rope("llama", {"freq_base": 5e5}), rope("llama", {"freq_base": 4.9e5})),
        (rope("llama", YARN), rope("llama", {"scaling.factor": 4.0})),
        (rope("llama", YARN), rope("llama", YARN | {"scaling.original_context_length": 128})),
    ],
    ids=["rope_freqs", "theta", "yarn", "original context"],
)
def test_a_wrong_setting_is_seen(change: Change, wrong: Change, tmp_path: Path) -> None:
    file = write_file(tmp_path / "m.gguf", change=change)
    with pytest.raises(AssertionError):
        compare(file, other=write_file(tmp_path / "wrong.gguf", change=wrong))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_0, Kind.Q6_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_wrong_order_of_rows_is_seen(
    arch: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_file(tmp_path / "m.gguf", kind, arch)
    monkeypatch.setitem(ARCHITECTURES, arch, not ARCHITECTURES[arch])
    with pytest.raises(AssertionError):
        compare(file, kind)


def check_tokenizer(file: Path, metadata: Mapping[str, Any], texts: Sequence[str]) -> None:
    write_file(file, metadata=metadata)
    tokenizer, theirs = Tokenizer.from_directory(resolve_model(file)), LlamaCpp(file)
    for text in texts:
        assert tokenizer.encode(text) == theirs.tokenize(text), text
    prompt = texts[0]
    found = theirs.greedy(prompt)
    assert_agree(found, ours(file, prompt, "float32"), BUDGET[Kind.F32])


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_byte_level_tokenizers(pre: str, bos: bool | None, tmp_path: Path) -> None:
    more = {"eos_token_id": 2} | ({} if bos is None else {"add_bos_token": bos})
    metadata = byte_level_metadata(byte_level_bpe(), pre, **more)
    # llama.cpp leaves out Qwen2's normalisation.
    texts = [normalize("NFC", text) for text in TEXTS] if pre == "qwen2" else TEXTS
    check_tokenizer(tmp_path / "m.gguf", metadata, texts)


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}])
def test_sentencepiece(options: dict[str, bool], tmp_path: Path) -> None:
    _, metadata = sentencepiece_bpe(tmp_path, **options)
    # llama.cpp puts its space prefix after a user-defined token too, SentencePiece does not.
    texts = [*TEXTS, " x", "\u2603", *(["a <tool> b"] if options else [])]
    check_tokenizer(tmp_path / "m.gguf", metadata, texts)
