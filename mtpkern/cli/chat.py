"""mtpkern chat: a conversation, on a terminal or one turn per line of standard input."""

import argparse
import logging
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from mtpkern.arguments import UsageError
from mtpkern.cli.display import print_cut, print_stream, summary, with_progress
from mtpkern.cli.options import add_answer_options, open_model, sampling_params
from mtpkern.errors import UserError, counted
from mtpkern.status import Status, wrapped

if TYPE_CHECKING:
    from mtpkern import LLM, Event, SamplingParams, Stats

_log = logging.getLogger(__name__)

_HISTORY_LINES = 1000
_HELP = """\
/reset        start over; keep the system message
/system TEXT  set the system message; without TEXT, show it
/stats        show the last answer's statistics and the context in use
/help         show this list
/exit         leave, like Ctrl-D
Ctrl-C stops an answer and keeps what was printed."""


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "chat",
        usage="mtpkern chat [OPTION ...]",
        help="have a conversation",
        description="Have a conversation. On a terminal there is line editing with a history, "
        "Ctrl-C stops an answer, Ctrl-D leaves, and /help lists the commands. Otherwise each line "
        "of standard input is a turn or a command, and the answers go to standard output.",
        epilog="examples:\n"
        '  mtpkern chat --system "Answer in one sentence."\n'
        "  mtpkern chat --temperature 0.7 < turns.txt",
    )
    command.set_defaults(run=_chat)
    command.add_argument(
        "--system", metavar="TEXT", help="the system message (default: the chat template's own)"
    )
    add_answer_options(command)


def _chat(args: argparse.Namespace) -> int:
    if sys.stdin is None:
        raise UsageError("standard input is closed")
    with args.status.phase("starting"):  # importing torch takes a second or two
        from mtpkern.device import resolve_device

    params = sampling_params(args)
    _, ops = resolve_device(args.device)
    # On a CPU the cache is kept, so that a turn only runs what is new in it.
    llm = open_model(args, prefix_caching=ops.host_may_read, before_loading=_check_template)
    with _CtrlC().handled() as ctrl_c:
        _converse(Conversation(llm, params, args.system, ctrl_c), args.status)
    return 0


def _converse(conversation: "Conversation", status: Status) -> None:
    """Take turns until the user leaves, or the input ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        greeting = f"{conversation.llm.name}: /help lists the commands, Ctrl-D leaves"
        print(wrapped(greeting, sys.stderr, indent=2), file=sys.stderr)
    read = _typed_lines if terminal else _piped_lines
    for line in read(conversation.ctrl_c):
        if line.partition(" ")[0] == "/exit":
            return
        try:
            if line.startswith("/"):
                print(conversation.run_command(line), file=sys.stderr)
            elif line:
                conversation.take_turn(line, status)
        except (UserError, UsageError) as error:
            if not terminal:
                raise
            # Only a turn, which may not fit the context, is a UserError.
            hint = " (/reset starts over)" if isinstance(error, UserError) else ""
            print(wrapped(f"error: {error}{hint}", sys.stderr, indent=2), file=sys.stderr)


def _check_template(llm: "LLM") -> None:
    if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
        raise UsageError(
            f"{llm.name} has no chat template: mtpkern generate --raw continues a text"
        )


class Conversation:
    """The messages so far, and a model that answers them."""

    def __init__(self, llm: "LLM", params: "SamplingParams", system: str | None, ctrl_c: "_CtrlC"):
        self.llm, self.params, self.system, self.ctrl_c = llm, params, system, ctrl_c
        self.messages: list[dict[str, str]] = []
        self.stats: Stats | None = None  # of the last answer, unless it was stopped

    def take_turn(self, text: str, status: Status) -> None:
        """Answer a message, and print the answer as it comes.

        An answer that was stopped is kept as far as it was printed. A message that was not answered
        at all is dropped.
        """
        message = {"role": "user", "content": text}
        answer: list[str] = []
        last = None
        try:
            # A second Ctrl-C does not wait for the current step.
            with closing(self._events(message)) as events, self.ctrl_c.raising_at(2):
                until_stopped = _until(self.ctrl_c, events, answer)
                last = print_stream(with_progress(until_stopped, status, self.params.max_tokens))
        except KeyboardInterrupt:
            pass
        if answer:
            self.messages += [message, {"role": "assistant", "content": "".join(answer)}]
        if last is None or last.completion is None:
            self.stats = None
            print("[stopped]" if answer else "[stopped before it began]", file=sys.stderr)
            return
        self.stats = last.completion.stats
        print_cut(last.completion)

    def run_command(self, line: str) -> str:
        """Run a line that begins with / -> what to tell the user."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.messages = []
            return "starting over"
        if name == "/system":
            self.system = rest.strip() or self.system
            return f"system message: {'none' if self.system is None else self.system}"
        if name == "/stats":
            return self._describe()
        if name == "/help":
            return _HELP
        raise UsageError(f"no such command: {name} (/help lists them)")

    def _events(self, message: dict[str, str]) -> "Generator[Event, None, None]":
        return self.llm.stream([*self._opening(), *self.messages, message], self.params)

    def _opening(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _describe(self) -> str:
        if self.stats is None and not self.messages:
            return "nothing was answered yet"
        used = len(self.llm.encode([*self._opening(), *self.messages])) if self.messages else 0
        context = (
            f"{counted(len(self.messages) // 2, 'turn')}, {used} of {self.llm.max_length} tokens; "
            f"loaded in {self.llm.load_seconds:.1f} s"
        )
        last = "the last answer was stopped" if self.stats is None else summary(self.stats)
        return f"{last}\n{wrapped(context, sys.stderr, indent=2)}"


class _CtrlC:
    """Counts how often Ctrl-C is pressed in a conversation. `raising_at` says where it also raises
    KeyboardInterrupt; elsewhere a press that comes late must not end the conversation."""

    def __init__(self) -> None:
        self.presses = self._raises_at = 0

    @contextmanager
    def handled(self) -> "Iterator[_CtrlC]":
        """Handle SIGINT while the block runs."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def raising_at(self, press: int) -> Iterator[None]:
        """Raise KeyboardInterrupt at this press within the block, counted from 1: once at most."""
        self.presses, self._raises_at = 0, press
        try:
            yield
        finally:
            self._raises_at = 0

    def _press(self, *_: Any) -> None:
        self.presses += 1
        if self.presses == self._raises_at:
            raise KeyboardInterrupt


def _until(ctrl_c: _CtrlC, events: "Iterator[Event]", texts: list[str]) -> "Iterator[Event]":
    """The same events until Ctrl-C is pressed; their texts are added to `texts`."""
    for event in events:
        texts.append(event.text)
        yield event
        if ctrl_c.presses:
            return


def _typed_lines(ctrl_c: _CtrlC) -> Iterator[str]:
    """Lines typed on a terminal, with editing and a history if Python has readline."""
    with _history():
        while True:
            try:
                with ctrl_c.raising_at(1):
                    line = _type_line()
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
            except UnicodeDecodeError:
                print("error: this line is not UTF-8 text", file=sys.stderr)
            else:
                yield line.strip()


def _type_line() -> str:
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _piped_lines(ctrl_c: _CtrlC) -> Iterator[str]:
    while True:
        with ctrl_c.raising_at(1):
            line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            yield line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise UsageError("standard input is not UTF-8 text") from None


@contextmanager
def _history() -> Iterator[None]:
    """The history of lines typed, read before the block and saved after it."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    from mtpkern.checkpoints.model_cache import cache_directory

    file = cache_directory() / "chat_history"
    try:
        readline.read_history_file(file)
    except OSError as error:
        _log.info("no history: %s", error)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
        except OSError as error:
            _log.warning("the history cannot be written: %s", error)
