"""bench_peers: engines in processes of their own, taking turns; the other engines are made up."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# The script of a minimal engine.
ENGINE = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from peer_process import Answer, serve

class Echo:
    version = "echo 1"
    def __init__(self, job):
        print("a library's greeting")
        os.write(1, b"and one from below Python\\n")
    def decode(self, prompt, max_tokens):
        {decode}
        return Answer(prompt[:max_tokens], max_tokens, 0.5, 3, 2)
    def prefill(self, prompt):
        return float(len(prompt))

serve(lambda job: Echo(job))
"""
# The part of xllamacpp that peer_llama uses; it records its requests.
XLLAMACPP = """
import json, os, types
__version__ = "0"

class Anything(types.SimpleNamespace):
    def __getattr__(self, name):
        setattr(self, name, Anything())
        return getattr(self, name)

CommonParams = Anything
llama_flash_attn_type = types.SimpleNamespace(
    LLAMA_FLASH_ATTN_TYPE_ENABLED="on", LLAMA_FLASH_ATTN_TYPE_DISABLED="off"
)
names = ["SIMPLE", "MAP_K", "MAP_K4V", "MOD", "CACHE"]
common_speculative_type = types.SimpleNamespace(
    **{f"COMMON_SPECULATIVE_TYPE_NGRAM_{name}": name for name in names}
)

def get_system_info():
    return "a CPU "

class Server:
    def __init__(self, params):
        self.params = params
    def handle_completions(self, asked):
        p, spec = self.params, self.params.speculative
        note = {"flash": p.flash_attn_type, "threads": p.cpuparams.n_threads, "warm": p.warmup}
        note |= {"types": list(spec.types) if isinstance(spec.types, list) else []}
        note |= {"size_n": getattr(spec.ngram_simple, "size_n"), "context": p.n_ctx}
        note["size_n"] = note["size_n"] if isinstance(note["size_n"], int) else None
        with open(os.environ["LLAMA_NOTES"], "a") as file:
            file.write(json.dumps(note | asked) + "\\n")
        n = asked["max_tokens"]
        timings = {"prompt_ms": 50.0, "predicted_n": n, "predicted_ms": 100.0 * (n - 1) or 0.001}
        if note["types"]:
            timings |= {"draft_n": 8, "draft_n_accepted": 4}
        return {"choices": [], "__verbose": {"tokens": [7] * n, "timings": timings}}
"""


@pytest.fixture
def peer_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_process

    return peer_process


@pytest.fixture
def bench_peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_peers

    return bench_peers


@pytest.fixture
def echo(tmp_path: Path) -> Callable[[str], list[str]]:
    """The command of an engine that does something in `decode`."""

    def write(decode: str = "pass") -> list[str]:
        file = tmp_path / "echo.py"
        file.write_text(ENGINE.format(benchmarks=str(BENCHMARKS), decode=decode))
        return [sys.executable, str(file)]

    return write


def job(**other: Any) -> dict[str, Any]:
    usual = {"prompts": [[1, 2, 3], [4, 5]], "prefill": [1, 2], "max_tokens": 2, "threads": 1}
    return usual | {"warm_up": True, "seconds": 100.0, "settings": {}} | other


def test_a_visit_returns_answers_and_facts_about_the_process(
    peer_process: Any, echo: Callable[..., list[str]]
) -> None:
    found = peer_process.visit(echo(), job())
    assert found.answers == [
        peer_process.Answer([1, 2], 2, 0.5, 3, 2),
        peer_process.Answer([4, 5], 2, 0.5, 3, 2),
    ]
    assert (found.prefill_seconds, found.version) == (2.0, "echo 1")
    assert 0 < found.first_answer_seconds < 60
    assert peer_process.visit(echo(), job(prefill=[])).prefill_seconds == 0


def test_no_prompt_is_started_after_the_time_limit(
    peer_process: Any, echo: Callable[..., list[str]]
) -> None:
    slow = echo("time.sleep(0.05)")
    assert len(peer_process.visit(slow, job(seconds=0.01)).answers) == 1
    assert len(peer_process.visit(slow, job()).answers) == 2


def test_a_failed_process_reports_its_reason(
    peer_process: Any, echo: Callable[..., list[str]]
) -> None:
    with pytest.raises(peer_process.Failed, match="no such tensor"):
        peer_process.visit(echo("raise ValueError('no such tensor')"), job())
    with pytest.raises(peer_process.Failed, match="exit code 3"):
        peer_process.visit([sys.executable, "-c", "raise SystemExit(3)"], job())
    nothing = [sys.executable, "-c", "raise SystemExit('not installed')"]
    with pytest.raises(peer_process.Failed, match="not installed"):
        peer_process.visit(nothing, job(prompts=[[1] * 100_000]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_process_s_own(
    peer_process: Any, echo: Callable[..., list[str]]
) -> None:
    ours = bytearray(2**28)  # in the parent, resident
    ours[:: 2**12] = b"x" * (2**28 // 2**12)
    small = peer_process.visit(echo(), job()).peak_bytes
    large = peer_process.visit(echo("b'x' * 2**27"), job()).peak_bytes
    assert small < 2**27 < large < len(ours)


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up xllamacpp on PYTHONPATH -> the file of its requests, one JSON object per line."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "xllamacpp.py").write_text(XLLAMACPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.setenv("LLAMA_NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


def test_llama_cpp_runs_with_the_given_settings(peer_process: Any, llama: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "peer_llama.py")]
    given = job(model="m.gguf", context=64, threads=2, max_tokens=5)
    flash = {"flash_attention": True}
    short = {"drafts": "ngram_simple", "sizes": {"size_n": 3, "size_m": 8}}
    plain = peer_process.visit(command, given | {"settings": flash})
    drafting = peer_process.visit(
        command, given | {"settings": {"flash_attention": False} | short, "warm_up": False}
    )
    # The prompt's pass computes the first token: 0.4 seconds were spent on 4 of 5.
    assert plain.answers[0] == peer_process.Answer([7] * 5, 4, 0.4, 0, 0)
    assert drafting.answers[0] == peer_process.Answer([7] * 5, 4, 0.4, 8, 4)
    assert plain.prefill_seconds == 0.05 and plain.version == "xllamacpp 0 (a CPU)"
    notes = [json.loads(line) for line in llama.read_text().splitlines()]
    seen = {(n["flash"], tuple(n["types"]), n["size_n"], n["warm"]) for n in notes}
    assert seen == {("on", (), None, True), ("off", ("SIMPLE",), 3, False)}
    assert all((n["threads"], n["context"], n["temperature"]) == (2, 64, 0) for n in notes)
    assert not any(n["cache_prompt"] for n in notes)


class Machine:
    """Made-up processes of engines: a rate per engine, and a record of what was started."""

    RATES = {"mtpkern plain": 30.0, "mtpkern drafts": 60.0, "transformers": 5.0}

    def __init__(self, module: Any):
        self.module = module
        self.started: list[tuple[str, int, dict[str, Any]]] = []
        self.busy = False
        self.drafts_differ_in_turn: int | None = None
        self.turn = 0

    def name(self, command: list[str], settings: dict[str, Any]) -> str:
        if command[-1].endswith("peer_mtpkern.py"):
            return "mtpkern drafts" if settings["drafts"] else "mtpkern plain"
        if command[-1].endswith("peer_llama.py"):
            return "llama.cpp n-gram" if "drafts" in settings else "llama.cpp plain"
        return "transformers"

    def visit(self, command: list[str], asked: dict[str, Any]) -> Any:
        settings = asked["settings"]
        name = self.name(command, settings)
        self.started.append((name, asked["threads"], asked))
        if asked["prefill"]:
            self.turn += 1
        rate = self.RATES.get(name, 20.0 if settings.get("flash_attention") else 25.0)
        if settings.get("drafts") == "ngram_map_k" and "sizes" in settings:
            rate *= 1.2
        # The machine is slower in each turn, for all engines, and far slower if it is busy.
        rate /= (1 + self.turn) * (4 if self.busy else 1)
        token = 9 if name.startswith("llama") else 8
        # The last prompt takes twice as long, and one engine does not reach it if busy.
        prompts, n = asked["prompts"], asked["max_tokens"]
        count = len(prompts) - (self.busy and name == "mtpkern plain")
        answers = [
            self.module.Answer([token] * i, n, n / rate * (2 if i + 1 == len(prompts) else 1))
            for i in range(count)
        ]
        if self.turn == self.drafts_differ_in_turn and name == "mtpkern drafts":
            answers[-1].tokens.append(0)
        return self.module.Visit(answers, 0.25, 2.0, 10**8, f"{name} 1")


@pytest.fixture
def machine(bench_peers: Any, peer_process: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(peer_process)

    class Neighbour:
        def __enter__(self) -> None:
            made.busy = True

        def __exit__(self, *_: object) -> None:
            made.busy = False

    monkeypatch.setattr(bench_peers, "visit", made.visit)
    monkeypatch.setattr(bench_peers, "busy_process", Neighbour)
    monkeypatch.setattr(bench_peers, "seconds_to_output", lambda command: 1.5)
    return made


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    directory = tiny_checkpoint(tmp_path / "trunk")
    (directory / "model.gguf").write_bytes(b"GGUF")
    return ["--model", str(directory), "--limit", "6", "--max-tokens", "16", "--repeat", "3"]


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    out = capsys.readouterr().out
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return out, report


def test_the_fastest_settings_are_kept_and_ratios_are_of_the_same_turn(
    bench_peers: Any, machine: Machine, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*model, "--threads", "1", "--threads", "2", "--transformers"]
    assert bench_peers.main(arguments) == 0
    out, report = last_line(capsys)
    names = ["mtpkern plain", "mtpkern drafts", "llama.cpp plain", "llama.cpp n-gram"]
    rows = report["rows"]
    assert [(r["threads"], r["engine"]) for r in rows] == [
        (count, name) for count in (1, 2) for name in [*names, "transformers"]
    ]
    assert rows[2]["settings"] == {"flash_attention": False}
    assert rows[3]["settings"] == {
        "flash_attention": False,
        "drafts": "ngram_map_k",
        "sizes": {"size_n": 3, "size_m": 8},
    }
    assert [r["prompts"] for r in rows[:5]] == [6, 6, 6, 6, 4]
    assert rows[0]["prefill_tokens_per_second"] == 511 / 2  # the tiny model's whole context
    timed = [(name, count) for name, count, asked in machine.started if asked["prefill"]]
    turn = [(r["engine"], r["threads"]) for r in rows]
    assert timed == turn + turn[::-1] + turn
    # The order of each turn is known, and so is the made-up machine's slowdown.
    place = {key: [i + 2, 10 + 10 - i + 1, 20 + i + 2] for i, key in enumerate(turn)}
    for row in rows:
        full = {"llama.cpp plain": 25.0, "llama.cpp n-gram": 30.0} | machine.RATES
        last_is_slow = row["prompts"] / (row["prompts"] + 1)
        rates = [
            full[row["engine"]] * last_is_slow / at for at in place[row["engine"], row["threads"]]
        ]
        assert row["rates"] == pytest.approx(rates)
        assert row["tokens_per_second"] == pytest.approx(sorted(rates)[1])
    ratio = next(r for r in report["ratios"] if r["of"] == names[1] and r["to"] == names[2])
    each = sorted(
        60 / a / (25 / b) for a, b in zip(place[names[1], 1], place[names[2], 1], strict=True)
    )
    assert [ratio[key] for key in ("least", "ratio", "largest")] == pytest.approx(each)
    assert [r["equal"] for r in report["equal_answers"]] == 4 * [1]  # the empty answer
    assert (
        report["first_token"][0]["seconds"] == 1.5 and report["first_token"][1]["all"] == [0.25] * 3
    )
    assert "1 thread, mtpkern drafts is " in out and "busy" not in report


def test_shares_beside_a_busy_process_are_of_the_same_prompts(
    bench_peers: Any, machine: Machine, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_peers.main([*model, "--threads", "1", "--busy"]) == 0
    _, report = last_line(capsys)
    assert [row["shares"] for row in report["busy"]] == 4 * [pytest.approx([0.25] * 3)]
    short = [asked for _, _, asked in machine.started if asked["seconds"] < 100]
    assert len(short) == 12 and {len(asked["prompts"]) for asked in short} == {4}


@pytest.mark.parametrize("turn", [0, 2])
def test_other_tokens_with_drafts_are_red_and_give_no_speed(
    turn: int,
    bench_peers: Any,
    machine: Machine,
    model: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine.drafts_differ_in_turn = turn
    assert bench_peers.main([*model, "--threads", "1"]) == 1
    out, report = last_line(capsys)
    assert "RED: mtpkern drafts: 1 answers are not" in out and " times as fast " not in out
    assert report["rows"] == [] and report["red"] == 1


def test_mistakes_are_one_line(
    bench_peers: Any,
    machine: Machine,
    model: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: str) -> str:
        assert bench_peers.main([*model, *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "together they must be at most 512" in fails("--max-tokens", "511")
    Path(model[1], "model.gguf").unlink()
    assert "--gguf" in fails()

    def missing(*_: Any) -> None:
        raise bench_peers.Failed("ModuleNotFoundError: No module named 'xllamacpp'")

    monkeypatch.setattr(bench_peers, "visit", missing)
    assert "--llama-python" in fails("--gguf", __file__)


def test_the_busy_process_ends_with_its_context(bench_peers: Any) -> None:
    with bench_peers.busy_process() as process, pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    assert process.poll() is not None


@pytest.mark.slow
def test_engines_run_in_processes_of_their_own(
    bench_peers: Any, llama: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--limit", "2", "--max-tokens", "4", "--repeat", "1", "--threads", "1"]
    assert bench_peers.main([*model[:2], *arguments]) == 0
    _, report = last_line(capsys)
    assert [row["rates"][0] > 0 for row in report["rows"]] == 4 * [True]
    assert [row["prefill_tokens_per_second"] > 0 for row in report["rows"]] == 4 * [True]
    assert report["rows"][0]["version"].startswith("mtpkern ")
    assert report["rows"][2]["rates"] == [pytest.approx(10.0)]
    assert report["first_token"][0]["seconds"] > 0
    prompts = {tuple(json.loads(line)["prompt"]) for line in llama.read_text().splitlines()}
    assert len(prompts) == 3  # two, and the long one
