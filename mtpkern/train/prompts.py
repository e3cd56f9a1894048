"""Prompts for self-distillation from texts already installed on a Python or Debian machine.

    python -m mtpkern.train.prompts --out texts.jsonl

Prose (package documentation, manual pages) becomes summaries, passages with a question, extraction;
documented Python functions become code to complete; gettext catalogs become translation. Other
kinds of question are written by the model itself, from OPENINGS: see `invent`.
"""

import argparse
import ast
import gettext
import gzip
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from mtpkern.arguments import Parser, run
from mtpkern.errors import UserError, printable
from mtpkern.outputs import FORCE, output_file, writing
from mtpkern.status import Phase

Item = TypeVar("Item")
COUNTS = {"complete": 1500, "translation": 1500, "summarization": 1000, "extraction": 500}
COUNTS |= {"rag": 900}
COMPLETE = (
    "Write the body of the function below in Python.\n\n{}",
    "Complete the following Python code.\n\n```python\n{}\n```",
    "Finish this function:\n\n{}",
    "{}",
    "Write the body of this Python function.\n\n{}",
)
SUMMARIZE = (
    *("Summarize: {}",) * 3,
    "Summarize the following text.\n\n{}",
    "{}\n\nTL;DR",
)
EXTRACT = (
    "Extract the most important terms from this text as a list.\n\n{}",
    "Rewrite this text in simpler words.\n\n{}",
    "List the key points of the following text.\n\n{}",
    "What is the following text about? Answer in one sentence.\n\n{}",
)
PASSAGES = (
    "{}\n\nAnswer the question based on the passages above.\nQuestion: {}",
    "Answer the question using the passages.\n\n{}\n\nQuestion: {}",
    "{}\n\n{}",
    "Use the following context to answer.\n\nContext: {}\n\nQuestion: {} Answer:",
)
QUESTIONS = (
    "What is {}?",
    "What does the text say about {}?",
    "How is {} used?",
    "Why {}?",
    "when is {}",
)
# Category -> how the user's turn may begin; the model writes the rest.
OPENINGS: dict[str, tuple[str, ...]] = {
    "qa": (
        *("who", "when did", "what is the", "where is", "how many", "who wrote", "when was"),
        *("what is the name of", "which country", "who sang", "what does", "where did the"),
        *("when is the", "how long", "who plays", "what year did"),
    ),
    "writing": (
        *("Write a", "Compose an", "Draft a professional email", "Write a persuasive"),
        *("Write a short story", "Describe a vivid"),
    ),
    "roleplay": (
        *("Pretend you are", "Imagine you are", "You are a", "Act as a"),
        *("Please assume the role of", "Picture yourself as"),
    ),
    "reasoning": (
        *("Which word does not belong with the others?", "If", "A is", "One morning"),
        *("Imagine you are participating in", "Read the statements below and"),
    ),
    "math": (
        *("What is the area of", "The", "Given that f(x) =", "A company"),
        *("Suppose you have", "Solve"),
    ),
    "coding": (
        *("Write a function to", "Write a Python function", "Implement a", "Write a program"),
        *("Write a C++ program", "Write an HTML"),
    ),
    "extraction": (
        *("Extract the following information from the text:", "Given the following data,"),
        *("Identify the", "Analyze the following customer reviews", "Evaluate the following"),
    ),
    "stem": (
        *("Explain the process of", "What is the role of", "Describe the", "How does"),
        *("What are the main characteristics of", "What is the relationship between"),
    ),
    "humanities": (
        *("Explain the significance of", "Discuss the", "What was the impact of"),
        *("Provide insights into", "Create a lesson plan", "Compare the"),
    ),
    "translation": tuple(
        f"Translate German to English:{w}" for w in ("", " Die", " Der", " Es", " Das")
    ),
    "summarization": tuple(f"Summarize:{w}" for w in ("", " The", " A man", " Police")),
    "free": (*("",) * 5, "I", "Can you", "Please", "How do I"),
}
_TEXT_FILE = re.compile(r"(readme|news|\.txt|\.md|\.rst|\.pod|\.pm|\.py|\.html?)(\.gz)?$")
_MANUAL_PAGE = re.compile(r"\.[1-8](\.gz)?$")


def read_turns(file: Path) -> list[tuple[str, str]]:
    """(category, first turn) of every line of a JSONL file with `turns` and optional `category`.

    Raises UserError for a file that cannot be read, and for a line without `turns`.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read prompts {printable(file)}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read prompts {printable(file)}: {printable(error)}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, category = row["turns"][0], str(row.get("category", "all"))
            if not isinstance(row["turns"], list) or not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{printable(file)}, line {number}: must be a JSON object with `turns`, a list of "
                "texts"
            ) from None
        found.append((category, text))
    return found


def python_files(root: Path) -> list[Path]:
    """The Python files under root, sorted, without installed packages."""
    installed = {"site-packages", "dist-packages"}
    files = root.rglob("*.py")
    return sorted(f for f in files if installed.isdisjoint(f.relative_to(root).parts))


def functions(root: Path) -> Iterator[str]:
    """Signature and docstring of the documented functions under root."""
    for path in python_files(root):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            begin, docstring_end = node.lineno - 1, node.body[0].end_lineno or node.lineno
            whole = (node.end_lineno or docstring_end) - begin
            stub = "\n".join(line[node.col_offset :] for line in lines[begin:docstring_end])
            long = whole > 40 or docstring_end - begin > 16
            if len(node.body) > 1 and not long and 60 < len(stub) < 700:
                yield stub


def without_roff(text: str) -> str:
    """A manual page's prose: requests removed, font changes and escapes resolved."""
    text = re.sub(r"(?m)^\.(PP|TP|IP|SH|SS|LP|P|sp|br).*$", "\n", text)
    text = re.sub(r"(?m)^\.(B|I|BR|IR|RB|BI|Nm|Fl|Xr|Ar)\s+", "", text)
    text = re.sub(r"(?m)^[.'].*$", "", text)
    return re.sub(r"\\f.|\\&|\\\((co|aq|lq|rq|em|en|bu)|\\c", "", text).replace("\\-", "-")


def prose(roots: Sequence[Path]) -> Iterator[str]:
    """Paragraphs of 200 to 1500 characters that read like English, at most 40 per file."""
    for path in sorted(p for root in roots for p in root.rglob("*") if p.is_file()):
        manual = _MANUAL_PAGE.search(path.name.lower())
        if not manual and not _TEXT_FILE.search(path.name.lower()):
            continue
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                text = file.read(400_000).decode("utf-8", "ignore")
        except OSError:
            continue
        # Tags are removed; Perl's markup is replaced by its content.
        text = re.sub(
            r"<[^>\n]{1,80}>|[A-Z]<([^<>]*)>", r"\1", without_roff(text) if manual else text
        )
        paragraphs = re.split(r"\n\s*\n", text)
        yield from [p for p in map(" ".join, map(str.split, paragraphs)) if is_english(p)][:40]


def is_english(text: str) -> bool:
    """Whether a paragraph is mostly letters and has the most frequent English words."""
    if not 200 <= len(text) <= 1500 or not text[0].isalpha() or "\\" in text:
        return False
    letters = sum(c.isalpha() or c in " ,." for c in text) / len(text)
    small = sum(w in text for w in (" the ", " a ", " is ", " to ", " of ", " and "))
    return letters > 0.93 and small >= 4


def german(root: Path) -> Iterator[str]:
    """Messages of a sentence's length from the German gettext catalogs under root."""
    for path in sorted(root.glob("de/LC_MESSAGES/*.mo")):
        if path.name.startswith("iso_"):
            continue
        try:
            with path.open("rb") as file:
                messages = vars(gettext.GNUTranslations(file))["_catalog"].values()
        except (OSError, UnicodeDecodeError):
            continue
        for message in messages:
            text = " ".join(str(message).replace("_", "").split())
            letters = sum(c.isalpha() or c in " ,.!?" for c in text)
            if 40 <= len(text) <= 260 and letters / len(text) > 0.95:
                yield text


def make(
    rng: random.Random, counts: dict[str, int], texts: list[str], asked: list[str]
) -> Iterator[tuple[str, str]]:
    """(category, prompt) of every kind in `counts`; `asked` are questions about passages."""
    code = list(functions(Path(sysconfig.get_paths()["stdlib"])))
    sentences = sorted(set(german(Path("/usr/share/locale"))))
    for items in (code, sentences, texts):
        rng.shuffle(items)
    for stub in code[: counts["complete"]]:
        yield "complete", rng.choice(COMPLETE).format(stub)
    for sentence in sentences[: counts["translation"]]:
        yield "translation", f"Translate German to English: {sentence}"

    def passage(shortest: int, longest: int) -> str:
        """Random paragraphs in a row, with a random least length in characters."""
        wanted, out = rng.randint(shortest, longest), rng.choice(texts)
        while len(out) < wanted:
            out += " " + rng.choice(texts)
        return out

    for _ in range(counts["summarization"]):
        yield "summarization", rng.choice(SUMMARIZE).format(passage(400, 2200))
    for _ in range(counts["extraction"]):
        yield "extraction", rng.choice(EXTRACT).format(passage(200, 1000))
    for _ in range(counts["rag"]):
        passages = [passage(200, 600) for _ in range(rng.randint(2, 4))]
        words = re.findall(r"\b[a-zA-Z]{4,}\b", rng.choice(passages)) or ["text"]
        question = rng.choice(QUESTIONS).format(rng.choice(words))
        if asked and rng.random() < 0.5:
            question = rng.choice(asked)[:120]
        yield "rag", rng.choice(PASSAGES).format("\n\n".join(passages), question)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit code, as `mtpkern.arguments.run` has it."""
    roots = [Path(f"/usr/share/{name}") for name in ("doc", "man/man1", "vim", "perl")]
    p = Parser(
        prog="python -m mtpkern.train.prompts",
        description="Make prompts from texts installed on this machine",
    )
    p.set_defaults(run=_make)
    add = p.add_argument
    add("--out", type=Path, required=True, help="JSONL with `turns` and `category`")
    add("--force", action="store_true", help=FORCE)
    add("--roots", type=Path, nargs="*", default=roots, help="where to look for prose")
    add("--questions", type=Path, help="JSONL; its category qa is asked over passages")
    add("--counts", type=_counts, default={}, help="JSON: category -> prompts")
    add("--seed", type=int, default=0)
    return run(p, argv)


def _counts(text: str) -> dict[str, int]:
    """The prompts per category of a JSON object."""
    try:
        counts = json.loads(text)
    except (ValueError, RecursionError):
        counts = None
    if not isinstance(counts, dict) or not counts.keys() <= COUNTS.keys():
        raise argparse.ArgumentTypeError(f"must be a JSON object of {', '.join(COUNTS)}")
    for category, count in counts.items():
        if type(count) is not int or count < 0:
            raise argparse.ArgumentTypeError(
                f"{category} must be an integer of at least 0, got {count!r}"
            )
    return counts


def _counted(items: Iterable[Item], phase: Phase) -> Iterator[Item]:
    for item in items:
        phase.advance()
        yield item


def _make(a: argparse.Namespace) -> int:
    sources = [] if a.questions is None else [a.questions]
    with output_file(a.out, force=a.force, sources=sources) as file:
        text = "".join(_lines(a))
        with writing(a.out):
            file.write_text(text, encoding="utf-8")
    return 0


def _lines(a: argparse.Namespace) -> Iterator[str]:
    rng = random.Random(a.seed)
    with a.status.phase("reading texts", unit="paragraphs") as phase:
        texts = sorted(set(_counted(prose(a.roots), phase)))
    if not texts:
        raise UserError(f"no English prose under {', '.join(printable(r) for r in a.roots)}")
    questions = read_turns(a.questions) if a.questions else []
    asked = [text for category, text in questions if category == "qa"]
    with a.status.phase("prompts", unit="written") as phase:
        prompts = make(rng, COUNTS | a.counts, rng.sample(texts, min(6000, len(texts))), asked)
        for i, (category, prompt) in enumerate(_counted(prompts, phase)):
            row = {"question_id": f"text-{i}", "category": category, "turns": [prompt]}
            yield json.dumps(row) + "\n"


if __name__ == "__main__":
    sys.exit(main())
