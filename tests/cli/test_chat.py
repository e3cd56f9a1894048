"""mtpkern chat: turns through the model's template, a cache that is kept, answers that stop."""

import codecs
import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_checkpoint

import mtpkern
from mtpkern import LLM, SamplingParams
from mtpkern.cli import main
from mtpkern.kernels.cpu._compile import default_cache

# The tiny model repeats itself unless its tokens are drawn.
SAMPLED = ("--max-tokens", "12", "--temperature", "1.5", "--seed", "0")
DRAWN = SamplingParams(max_tokens=12, temperature=1.5, seed=0)
ROOT = str(Path(mtpkern.__file__).parent.parent)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), eos_token_id=None)


@pytest.fixture
def chat(model, capsys, monkeypatch):
    """Run `chat` on lines of standard input -> (exit code, stdout, stderr)."""

    def run(text: str, *options: str) -> tuple[int, str, str]:
        stdin = io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape")))
        monkeypatch.setattr(sys, "stdin", stdin)
        code = main(["chat", "--model", str(model), *SAMPLED, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def answers(model: Path, *turns: str, system: str | None = None) -> str:
    """What a conversation prints, each turn from a fresh model and a whole prompt."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    out = ""
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        llm = LLM(model, max_batch=1)
        (answer,) = llm.generate(messages, DRAWN)
        messages.append({"role": "assistant", "content": answer.text})
        out += answer.text + "\n"
    return out


def test_each_line_is_a_turn_after_those_before(chat, model):
    code, out, err = chat("the fox\n\nthe dog\r\nand then\n")
    assert (code, out) == (0, answers(model, "the fox", "the dog", "and then"))
    assert err.splitlines() == ["[cut after 12 tokens]"] * 3


def test_only_what_is_new_in_a_turn_is_run(chat):
    _, _, err = chat("the fox\n/stats\nthe dog\n/stats\nthe sun\n/stats\n")
    lines = [line for line in err.splitlines() if "prompt of" in line]
    prompts = [int(re.search(r"prompt of (\d+) tokens", line).group(1)) for line in lines]
    cached = [int((re.search(r"(\d+) of them cached", line) or [0, 0])[1]) for line in lines]
    assert cached[0] == 0 and prompts[0] < cached[1] < prompts[1] < cached[2] < prompts[2]
    assert "3 turns, " in err and " of 512 tokens" in err


def test_commands(chat, model):
    code, out, err = chat("the fox\n/reset\n/system be a dog\n/system\nthe dog\n/exit\nthe sun\n")
    assert code == 0
    assert out == answers(model, "the fox") + answers(model, "the dog", system="be a dog")
    assert err.count("system message: be a dog\n") == 2 and "starting over" in err
    _, out, err = chat("/help\n/stats\n/system\n")
    assert out == "" and "/reset" in err and "nothing was answered yet" in err
    assert "system message: none" in err
    _, out, _ = chat("the dog\n", "--system", "be a dog")
    assert out == answers(model, "the dog", system="be a dog")


@pytest.mark.parametrize("line", ["/exit", "/exit now", "  /exit  "])
def test_exit_leaves_whatever_follows_it(chat, line):
    assert chat(f"{line}\nthe fox\n") == (0, "", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/no-such-command x\n", "no such command: /no-such-command (/help lists them)"),
        ("the dog\n" + "the fox " * 400 + "\n", "the context holds 512"),
        ("\udcff\n", "standard input is not UTF-8 text"),
    ],
)
def test_a_mistake_in_a_file_of_turns_is_one_line(chat, text, words):
    code, _, err = chat(text)
    blame = err.splitlines()[-1]
    assert code == 2 and blame.startswith("mtpkern: error: ") and words in blame


def test_a_model_without_a_template_is_refused(chat, tmp_path):
    directory = tiny_checkpoint(tmp_path)
    (directory / "tokenizer_config.json").unlink()
    code, _, err = chat("the fox\n", "--model", str(directory))
    assert code == 2 and "no chat template: mtpkern generate --raw" in err


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_the_answer_only_and_keeps_what_was_printed(chat, model, monkeypatch, times):
    """Pressed while the fifth token comes; pressed again, that is not waited for."""
    stream = LLM.stream

    def interrupted(self, *args, **options):
        for number, event in enumerate(stream(self, *args, **options), start=1):
            if number == 5:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
            yield event

    messages, expected, count = [], "", 6 - times
    for turn in ("the fox", "the dog"):
        messages.append({"role": "user", "content": turn})
        events = list(LLM(model, max_batch=1).stream(messages, DRAWN))
        said = "".join(event.text for event in events[:count])
        assert said and len(events) > 5
        messages.append({"role": "assistant", "content": said})
        expected += said + "\n"
    monkeypatch.setattr(LLM, "stream", interrupted)
    code, out, err = chat("the fox\nthe dog\n/stats\n")
    assert (code, out) == (0, expected)
    assert err.splitlines()[:-1] == ["[stopped]"] * 2 + ["the last answer was stopped"]
    assert err.splitlines()[-1].startswith("2 turns, ")


def test_ctrl_c_before_the_first_token_forgets_the_message(chat, model, monkeypatch):
    stream, calls = LLM.stream, []

    def interrupted_once(self, *args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from stream(self, *args, **options)

    monkeypatch.setattr(LLM, "stream", interrupted_once)
    code, out, err = chat("the fox\nthe dog\n")
    assert (code, out) == (0, answers(model, "the dog"))
    assert "[stopped before it began]" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class PressesCtrlC(io.StringIO):
    """A terminal's stderr, on which Ctrl-C is pressed whenever more than a prompt is printed."""

    def write(self, text: str) -> int:
        if text not in ("", "> "):
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_a_ctrl_c_that_comes_late_does_not_end_the_conversation(
    model, tmp_path, monkeypatch, capsys
):
    """Whatever it was meant for: a line, an answer, a command."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    typed = iter([KeyboardInterrupt, "/bad", "the fox", "/stats", KeyboardInterrupt, "the dog"])

    def read(prompt: str = "") -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        if line is KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", PressesCtrlC())
    code = main(["chat", "--model", str(model), *SAMPLED, "--quiet"])
    assert (code, capsys.readouterr().out) == (0, answers(model, "the fox", "the dog"))
    shown = sys.stderr.getvalue()
    for words in ("(Ctrl-D or /exit leaves)", "no such command: /bad", "1 turn, "):
        assert words in shown
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _take_terminal() -> None:
    """Make standard input the process's own terminal, whose Ctrl-C interrupts it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # A shell starts its background jobs, and so perhaps these tests, with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Session:
    """A command on a pseudo-terminal, killed when the block ends if it still runs."""

    def __init__(self, *argv: str, **environment: str):
        self.terminal, theirs = os.openpty()
        self.seen, self.at = "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mtpkern", *argv],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env=os.environ | {"PYTHONPATH": ROOT, "TERM": "xterm"} | environment,
        )
        os.close(theirs)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Read until `text` appears, after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.seen[self.at :]:
            ready, _, _ = select.select([self.terminal], [], [], 0.2)
            if ready:
                self.seen += self.decoder.decode(os.read(self.terminal, 4096))
            assert time.monotonic() < end, f"no {text!r} in {self.seen[self.at :]!r}"
        self.at = self.seen.index(text, self.at) + len(text)

    def interrupt_until(self, text: str) -> None:
        """Press Ctrl-C until `text` appears: readline does not see one between its prompt and its
        wait for input until the next key."""
        for _ in range(60):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(text, 2)
        raise AssertionError(f"no {text!r} in {self.seen[self.at :]!r}")

    def leave(self) -> int:
        """Press Ctrl-D until the command ends, since a Ctrl-C that is still on its way discards
        what was typed after it -> the exit code."""
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):  # it may end before the key arrives
                self.type("\x04")
            self._read(1)
        self._read(1)
        return self.process.wait(1)

    def _read(self, seconds: float) -> None:
        """Read what comes within some seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([self.terminal], [], [], left)
            try:
                piece = os.read(self.terminal, 4096) if ready else b""
            except OSError:  # the other end is closed
                return
            self.seen += self.decoder.decode(piece)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal(tmp_path):
    pytest.importorskip("readline")
    # An answer that still runs when Ctrl-C arrives, however late that is on a busy machine.
    endless = tiny_checkpoint(
        tmp_path / "model", eos_token_id=None, max_position_embeddings=1 << 17
    )
    # A history of its own, but kernels that an earlier test has compiled.
    (tmp_path / "mtpkern").mkdir()
    default_cache().mkdir(parents=True, exist_ok=True)
    (tmp_path / "mtpkern" / "kernels").symlink_to(default_cache())
    options = ("chat", "--model", str(endless), "--max-length", "100000", "--max-tokens", "90000")
    with Session(*options, XDG_CACHE_HOME=str(tmp_path)) as session:
        session.wait_for("> ")
        assert "/help lists the commands" in session.seen
        session.type("the fox\n")
        session.wait_for("\r\n\r\n\r\n")  # the tiny model's answer
        session.type("\x03")
        session.wait_for("[stopped]")
        session.wait_for("> ")
        session.type("/bad\n")
        session.wait_for("no such command: /bad (/help lists them)\r\n")
        session.wait_for("> ")
        session.interrupt_until("Ctrl-D or /exit leaves")
        assert session.leave() == 0
    assert "Traceback" not in session.seen and "\x1b[?25l" not in session.seen
    history = (tmp_path / "mtpkern" / "chat_history").read_text().split("\n")
    assert [line for line in history if line and not line.startswith("_")] == ["the fox", "/bad"]
