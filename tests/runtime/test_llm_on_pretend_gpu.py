"""What LLM does on a GPU besides computing, shown without a GPU (pretend_gpu.py)."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_checkpoint
from head_files import write_medusa, write_mtp
from llama_layouts import write_layout

triton = pytest.importorskip("triton")

from pretend_gpu import pretend_gpu  # noqa: E402

from mtpkern import device  # noqa: E402
from mtpkern.config import SamplingParams  # noqa: E402
from mtpkern.engine import LLM  # noqa: E402
from mtpkern.graph import GraphPool  # noqa: E402
from mtpkern.kernels._launch import TIERS  # noqa: E402
from mtpkern.kernels.rms_norm import rms_norm  # noqa: E402
from mtpkern.kernels.verify_attention import split_count  # noqa: E402
from mtpkern.ops import prefill  # noqa: E402
from mtpkern.ops.definitions import DEFINITIONS, Definitions  # noqa: E402
from mtpkern.ops.gpu import TRITON  # noqa: E402
from mtpkern.runner import Runner  # noqa: E402
from mtpkern.status import Phase  # noqa: E402
from mtpkern.warmup import noting_kernels  # noqa: E402

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

HEADS = {"mtp": write_mtp, "medusa": write_medusa, "modules": None}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "trunk", dtype=torch.bfloat16, max_position_embeddings=1280)


class WithoutTheHost(Definitions):
    """The definitions, without reads by the host within a step."""

    host_may_read = False


def load(directory: Path, **options: Any) -> LLM:
    return LLM(directory, device="cuda", **{"heads": "none", "max_batch": 4} | options)


def test_graphs_share_one_pool_and_only_their_memory_is_counted(directory: Path) -> None:
    with pretend_gpu() as gpu:
        gpu.cached = 1 << 30  # what loading left
        llm = load(directory, num_speculative_tokens=3)
        assert len(gpu.graphs) == len(llm.runner.graphs) == 6
        assert len(set(gpu.graphs)) > 1
        assert llm.graph_bytes == max(gpu.graphs), "the largest, not the sum"
        assert gpu.cached == 0


def test_loading_says_which_kernel_is_compiled_and_how_much_remains(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    advance = Phase.advance

    def record(phase: Phase, *args: Any) -> None:
        advance(phase, *args)
        if phase.what.startswith("compiling"):
            lines.append(phase.line(""))

    monkeypatch.setattr(Phase, "advance", record)
    with pretend_gpu() as gpu:
        llm = load(directory, num_speculative_tokens=3)
        binaries = len(gpu.binaries)
    whole = len(TIERS) + len(llm.runner.graphs)
    start = "compiling kernels and capturing graphs: "
    # A prompt's first drafts are the first to need kernels.
    assert lines[0].startswith(f"{start}0/{whole} shapes, kernel 1: ")
    assert lines[-1].startswith(f"{start}{whole}/{whole} shapes, kernel {binaries}: ")
    assert any("verify_attention" in line for line in lines)


def test_a_compilation_is_noted_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import check_codegen

    phase = Phase("compiling", None, "")
    monkeypatch.setattr(triton.runtime.driver, "_active", check_codegen.Device(90))
    x, w = torch.empty(3, 64, device="meta"), torch.empty(64, device="meta")
    with check_codegen.launches_compiled() as launched, noting_kernels(phase):
        rms_norm(x, w, 1e-5)
        rms_norm(x[:2], w, 1e-5)
    assert [name for name, *_ in launched] == ["rms_norm"] * 2
    assert phase.note == "kernel 1: rms_norm"
    assert triton.knobs.runtime.jit_cache_hook is None


def test_a_context_is_timed_with_a_page_table_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_steps

    def grids(*contexts: int) -> set[tuple[int, ...]]:
        given = [word for context in contexts for word in ("--context", str(context))]
        with pretend_gpu() as gpu:
            assert bench_steps.main(["--model", "tiny", "--repeat", "2", *given]) == 0
        capsys.readouterr()
        return gpu.grids["_verify_attention_kernel"]

    short, long = grids(64), grids(4000)
    assert short != long
    assert grids(64, 4000) == short | long


# Tokens of prompts: around each tier of the rows that a drafter prefills, which are all but two,
# and around each chunk.
MIXED = sorted(
    {1, 2, 3, 257, 258, 400, 513, 514, 515, 700, 1000}
    | {rows + 2 for tier in TIERS for rows in (tier - 1, tier, tier + 1)}
)


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
def test_nothing_is_compiled_after_load(directory: Path, tmp_path: Path, heads: str) -> None:
    """Over prompts of 1 to 1,000 tokens, sequences that join and leave, every slot and every K."""
    options: dict[str, Any] = {"heads": "auto", "dtype": "bfloat16"}
    if write := HEADS[heads]:
        options["heads"] = write(tmp_path / "heads")
    else:  # included in the checkpoint
        write_layout(
            "mimo", directory := tmp_path / "mimo", modules=3, max_position_embeddings=2048
        )
    with pretend_gpu() as gpu:
        llm = load(directory, max_length=1210, **options)
        loaded = set(gpu.binaries)
        ladder = sorted({k for _, k in llm.runner.graph_seconds})
        assert ladder == sorted({0, 1, 2, llm.k}) and llm.k > 2
        params = [SamplingParams(max_tokens=2 + i % 7, ignore_eos=True) for i in range(len(MIXED))]
        prompts = [[7 + j % 100 for j in range(n)] for n in MIXED]
        for best in ladder:
            for shape in llm.runner.graph_seconds:
                llm.runner.graph_seconds[shape] = 1.0 if shape[1] == best else 9.0
            for count in (1, 2, 3):
                llm.generate(prompts[best : best + count], params[:count])
        llm.generate(prompts, params)
        llm.generate(prompts[-3:], params[-3:], speculate=False)
        later = Counter(name for name, _ in set(gpu.binaries) - loaded)
        assert later == Counter(), later


@pytest.mark.slow
def test_nothing_is_compiled_after_load_where_sequences_are_short(
    directory: Path, tmp_path: Path
) -> None:
    """Down to contexts that end within the first tier, and to those without room for a prompt."""
    heads = write_mtp(tmp_path / "heads")
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    for max_length in range(2, 71):
        sizes = sorted({n for n in MIXED if n < max_length} | {max_length - 1})
        options = {"heads": heads, "max_batch": 2, "num_speculative_tokens": 2}
        with pretend_gpu() as gpu:
            llm = load(directory, max_length=max_length, **options)
            loaded = set(gpu.binaries)
            llm.generate([[7 + j for j in range(n)] for n in sizes], params)
            later = {name for name, _ in set(gpu.binaries) - loaded}
        assert not later, (max_length, later)


def test_a_graph_reads_no_more_of_a_long_page_table_than_it_must(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "GPU", replace(device.GPU, graph_contexts=(128, 448)))
    with pretend_gpu():
        llm = load(directory, num_speculative_tokens=3, max_length=900)
        used = Counter()

        def checked(shape: tuple[int, int, int], replay: Any) -> Any:
            batch, k, pages = shape

            def run() -> None:
                needed = int(llm.runner.cache.lengths[:batch].max()) + k + 1
                assert needed <= 64 * pages
                used[pages, min(most for most in buckets if needed <= 64 * most)] += 1
                replay()

            return run

        buckets = sorted({pages for _, _, pages in llm.runner.graphs})
        assert buckets[:2] == [2, 7] and len(buckets) == 3
        llm.runner.graphs.update({s: checked(s, replay) for s, replay in llm.runner.graphs.items()})
        monkeypatch.setattr(Runner, "launch", None)
        params = SamplingParams(max_tokens=440, ignore_eos=True)
        for speculate in (True, False):
            llm.generate([[5] * 9, [7] * 200, [8] * 460], params, speculate=speculate)
            llm.generate([[5] * 9], params, speculate=speculate)
        assert {pages for pages, _ in used} == set(buckets)
        late = sum(count for (pages, least), count in used.items() if pages > least)
        assert late < 0.1 * sum(used.values()), "not much earlier than they must"


def test_a_graph_s_drafter_spans_the_columns_that_its_model_spans(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No attention of a graph has a larger grid than its page bucket needs."""
    monkeypatch.setattr(device, "GPU", replace(device.GPU, graph_contexts=(128,)))
    grids: list[set[tuple[int, ...]]] = []
    capture = GraphPool.capture
    with pretend_gpu() as gpu:

        def recorded(pool: GraphPool, step: Any) -> Any:
            gpu.grids.clear()
            replay = capture(pool, step)
            grids.append(gpu.grids["_verify_attention_kernel"])
            return replay

        monkeypatch.setattr(GraphPool, "capture", recorded)
        heads = write_mtp(tmp_path / "heads")
        llm = load(directory, heads=heads, num_speculative_tokens=3, max_length=900)
    Hq, Hk, D = llm.config.num_heads, llm.config.num_kv_heads, llm.config.head_dim
    buckets = set()
    for (batch, k, pages), found in zip(llm.runner.graphs, grids, strict=True):
        buckets.add(pages)
        # The model's and the drafter's first pass have k + 1 rows, its others one.
        windows = {k + 1, 1} if k else {1}
        most = {split_count(batch, T, Hq, Hk, D, 64 * pages) for T in windows}
        assert found == {(splits, Hk, batch) for splits in most}, (batch, k, pages)
    assert buckets == {2, 16}


def prefill_launches(
    directory: Path, monkeypatch: pytest.MonkeyPatch, begin: int = 512
) -> tuple[Counter, int]:
    """What a chunk of 512 rows launches on a GPU, and how many layers the model has."""
    import predict_steps

    def attend(q: Any, *_: Any) -> Any:
        """One launch, whose output has the strides of q: [T, Hq, D]."""
        attended["attention"] += 1
        return torch.empty_like(q)

    attended: Counter = Counter()
    trunk, state = predict_steps.meta_state(directory, 1, 0)
    cache = replace(state.cache, page_table=torch.zeros(1, 16, dtype=torch.int32, device="meta"))
    monkeypatch.setattr(prefill, "attend", attend)
    window = torch.zeros(1, 512, dtype=torch.int64, device="meta")
    with predict_steps.traced() as trace:
        at = cache.at(torch.tensor([begin]))
        hidden, _ = TRITON.prefill(trunk, window, at)
    assert hidden.shape == (512, trunk.config.hidden_size)
    return trace.kernels + trace.others + attended, len(trunk.layers)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-8b"])
def test_a_chunk_of_a_prompt_launches_at_most_twelve_per_layer(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_steps

    counts = []
    for layers in (1, 2):
        shape = bench_steps.MODELS[model]._replace(L=layers)
        directory = bench_steps.write_config(shape, tmp_path / str(layers))
        found, L = prefill_launches(directory, monkeypatch)
        assert L == layers
        counts.append(found)
    per_layer = counts[1] - counts[0]
    assert per_layer.total() <= 12, per_layer
    assert (counts[0] - per_layer).total() <= 12, "once per chunk"


@pytest.mark.slow
@pytest.mark.parametrize("modules", [2, 3])
def test_modules_draft_without_the_host_what_they_draft_with_it(
    modules: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU writes as many pairs in each step as there may be, and no value of a tensor decides
    how many: the same drafts, after prompts of one token, of few and of several chunks."""
    write_layout("mimo", tmp_path, modules=modules)
    prompts = [[9], [5, 6], [5, 6, 7], [5, 6, 7, 8, 9] * 3, [(7 * i) % 131 for i in range(270)]]
    answers = []
    for ops in (DEFINITIONS, WithoutTheHost()):
        llm = LLM(
            tmp_path,
            device="cpu",
            dtype="float32",
            ngram=False,
            num_speculative_tokens=modules,
            max_batch=2,
            max_length=400,
            synthetic_acceptance=[0.7] * modules,  # the answers then are of drafts
            ops=ops,
        )
        done = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
        answers.append([(one.token_ids, one.stats.accepted, one.stats.drafted) for one in done])
    assert answers[0] == answers[1]
    assert sum(sum(map(sum, accepted.values())) for _, accepted, _ in answers[0]) > 20
