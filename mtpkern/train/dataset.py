"""What a head learns from, as flat files: one row per position, appended sequence by sequence.

    tokens.bin       int32 [N]      prompt and answer, the stop token included
    features.bin     bf16 [N, n*E]  hidden states after n tapped layers; the last one's are normed
    top_ids.bin      int32 [N, M]   the model's M likeliest next tokens after this position
    top_logits.bin   fp16 [N, M]    and their logits; both are zero inside the prompt
    sequences.jsonl  an object per sequence: first row, prompt's length, length, category, number
    layout.json      the hidden size E, the tapped layers, counted from 1, and the answers' origin:
                     the model's fingerprint, the prompts, the sampling settings

M is 64. The index is written last, so that after an interruption files are longer than it says,
never shorter.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtpkern.checkpoints.json_files import read_json_object
from mtpkern.errors import UserError, printable
from mtpkern.outputs import clear, writing

TOP = 64
ANSWER_FILES = ("layout.json", "sequences.jsonl", "*.bin")


def fields(width: int) -> dict[str, tuple[type, int]]:
    """Field -> element type and row width, for features of `width` (bf16 is stored as int16)."""
    return {
        "tokens": (np.int32, 1),
        "features": (np.int16, width),
        "top_ids": (np.int32, TOP),
        "top_logits": (np.float16, TOP),
    }


def claim(file: Path, facts: Mapping[str, Any], *, replaced: Collection[str] | None = None) -> None:
    """Write into a file which run its directory belongs to, and make the directory if need be;
    `facts` are JSON values.

    If the file holds other facts, the directory's contents are removed where all of them match
    `replaced`. Raises UserError without `replaced`.
    """
    if file.exists() and (other := differences(read_json_object(file), facts)):
        if replaced is None:
            raise UserError(
                f"cannot continue: {printable(file.parent)} is of another run ({other}): the same "
                "options continue it, another --out starts again, and --force replaces it"
            )
        clear(file.parent, replaced)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file):
            file.write_text(json.dumps(facts) + "\n")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which values of `now` differ from those before; empty if none does."""
    pairs = [(key, before.get(key, "unknown"), value) for key, value in now.items()]
    return ", ".join(f"{key} {printable(a)}, now {printable(b)}" for key, a, b in pairs if a != b)


class DatasetWriter:
    """Appends sequences to a directory; opened again, it continues after the last whole one.

    `origin` is what else must be equal for that. Raises UserError for a directory with answers of
    another origin, unless `force` replaces them.
    """

    def __init__(
        self, directory: Path, E: int, taps: Sequence[int], *, force: bool = False, **origin: Any
    ):
        layout = {"hidden_size": E, "taps": list(taps), **origin}
        claim(directory / "layout.json", layout, replaced=ANSWER_FILES if force else None)
        self.index = directory / "sequences.jsonl"
        written = read_index(directory)
        self.sequences = len(written)
        self.numbers = {row["number"] for row in written if "number" in row}
        self.rows = written[-1]["offset"] + written[-1]["length"] if written else 0
        self.fields, self.files = fields(len(taps) * E), {}
        for name, (dtype, width) in self.fields.items():
            self.files[name] = (directory / f"{name}.bin").open("ab")
            self.files[name].truncate(self.rows * width * np.dtype(dtype).itemsize)

    def add(
        self,
        tokens: Sequence[int],
        prompt: int,
        category: str,
        features: Tensor,
        top_ids: Tensor,
        top_logits: Tensor,
        number: int = 0,
    ) -> None:
        """Append a sequence of n tokens, the first `prompt` of them its prompt's: features
        [n, n_taps*E], top_ids and top_logits [n, M]. Readers order sequences by `number`, that of
        the prompt."""
        rows = {
            "tokens": np.array(tokens),
            "features": features.view(torch.int16).numpy(),
            "top_ids": top_ids.numpy(),
            "top_logits": top_logits.numpy(),
        }
        for name, array in rows.items():
            with writing(Path(self.files[name].name)):
                self.files[name].write(array.astype(self.fields[name][0], copy=False).tobytes())
                self.files[name].flush()
        n = len(tokens)
        row = {"offset": self.rows, "prompt": prompt, "length": n, "category": category}
        row["number"] = number
        with writing(self.index), self.index.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows += n
        self.sequences += 1


def read_index(directory: Path) -> list[dict[str, Any]]:
    """The sequences of a directory, in the order in which they were written."""
    if not (directory / "sequences.jsonl").exists():
        return []
    return [json.loads(line) for line in (directory / "sequences.jsonl").read_text().splitlines()]


class Dataset:
    """The sequences of several directories, memory-mapped, with the features of `taps`.

    Raises UserError for answers that were recorded without one of those layers, or whose
    layout.json contradicts `origin`; older files name fewer facts.
    """

    def __init__(self, directories: Sequence[Path], taps: Sequence[int], **origin: Any):
        self.taps = tuple(taps)
        self.columns: list[tuple[int, list[int]]] = []  # per directory: E, positions of the taps
        self.files: list[dict[str, np.ndarray]] = []
        self.sequences: list[tuple[int, dict[str, Any]]] = []
        for i, directory in enumerate(directories):
            layout = read_json_object(directory / "layout.json")
            if other := differences(origin | layout, origin):
                raise UserError(f"{printable(directory)} holds answers of another model: {other}")
            # A pair needs two known tokens, and a third, chosen one to predict.
            rows = [r for r in read_index(directory) if 2 <= r["prompt"] < r["length"]]
            if not rows:
                raise UserError(f"{printable(directory)} holds no answers yet")
            rows.sort(key=lambda row: row.get("number", 0))
            self.sequences += [(i, row) for row in rows]
            E, recorded = layout["hidden_size"], layout["taps"]
            if missing := [tap for tap in taps if tap not in recorded]:
                raise UserError(
                    f"{printable(directory)} holds the states after layers {recorded}, and these "
                    f"heads need {missing} too"
                )
            self.columns.append((E, [recorded.index(tap) for tap in taps]))
            self.files.append(
                {
                    name: np.memmap(directory / f"{name}.bin", dtype, "r").reshape(-1, width)
                    for name, (dtype, width) in fields(len(recorded) * E).items()
                }
            )

    def __len__(self) -> int:
        return len(self.sequences)

    def pick(self, indices: Iterable[int]) -> "Dataset":
        """The same data with these sequences only."""
        part = copy(self)
        part.sequences = [self.sequences[i] for i in indices]
        return part

    def read(self, index: int, name: str) -> Tensor:
        """One field of one sequence of n tokens: [n, width], tokens [n] int64."""
        directory, row = self.sequences[index]
        rows = slice(row["offset"], row["offset"] + row["length"])
        array = self.files[directory][name][rows]
        if name == "features":
            E, taps = self.columns[directory]
            array = array.reshape(len(array), -1, E)[:, taps].reshape(len(array), -1)
            return torch.from_numpy(array).view(torch.bfloat16)
        tensor = torch.from_numpy(np.array(array))
        return tensor[:, 0].long() if name == "tokens" else tensor

    def answer_length(self, index: int) -> int:
        row = self.sequences[index][1]
        return row["length"] - row["prompt"]

    def batches(self, rows: int, rng: np.random.Generator) -> list[list[int]]:
        """Shuffled batches of at least `rows` answer rows, similar lengths together."""
        order, out = rng.permutation(len(self)).tolist(), []
        for at in range(0, len(order), 384):
            batch: list[int] = []
            size = 0
            # Similar lengths keep the padding small; windows keep the order random.
            for i in sorted(order[at : at + 384], key=self._size):
                batch.append(i)
                size += self.answer_length(i)
                if size >= rows:
                    out.append(batch)
                    batch, size = [], 0
            if batch:
                out.append(batch)
        return [out[i] for i in rng.permutation(len(out))]

    def _size(self, index: int) -> tuple[int, int]:
        return self.answer_length(index) // 24, self.sequences[index][1]["prompt"]

    def collate(self, indices: Sequence[int], K: int) -> dict[str, Tensor]:
        """Pad sequences into a batch of chains, one from each row that drafts a part of an answer.

        tokens [B, S + K + 2], features [B, S, n*E], starts [B, Q]. For step k of the chain from row
        j, which predicts token j + 2 + k: live [K, B, Q] says whether there is such a token,
        top_ids and top_logits [K, B, Q, M] are the model's prediction of it.
        """
        lengths = [self.sequences[i][1]["length"] for i in indices]
        prompts = [self.sequences[i][1]["prompt"] for i in indices]
        B, S = len(indices), max(lengths) - 2
        width = len(self.taps) * self.columns[0][0]
        Q = max(n - p for n, p in zip(lengths, prompts, strict=True))
        out = {
            "tokens": torch.zeros(B, S + K + 2, dtype=torch.int64),
            "features": torch.zeros(B, S, width, dtype=torch.bfloat16),
            "starts": torch.zeros(B, Q, dtype=torch.int64),
            "live": torch.zeros(K, B, Q, dtype=torch.bool),
            "top_ids": torch.zeros(K, B, Q, TOP, dtype=torch.int64),
            "top_logits": torch.zeros(K, B, Q, TOP),
        }
        for b, (i, n, p) in enumerate(zip(indices, lengths, prompts, strict=True)):
            ids, logits = self.read(i, "top_ids"), self.read(i, "top_logits")
            chains = n - p
            out["tokens"][b, :n] = self.read(i, "tokens")
            out["features"][b, : n - 2] = self.read(i, "features")[: n - 2]
            out["starts"][b, :chains] = torch.arange(p - 2, n - 2)
            for k in range(min(K, chains)):
                # Row j + 1 + k holds the model's prediction of token j + 2 + k.
                out["live"][k, b, : chains - k] = True
                out["top_ids"][k, b, : chains - k] = ids[p - 1 + k : n - 1]
                out["top_logits"][k, b, : chains - k] = logits[p - 1 + k : n - 1]
        return out
