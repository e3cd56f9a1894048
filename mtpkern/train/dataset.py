"""What a head learns from, as flat files: one row a position, appended a sequence at a time.

    tokens.bin       int32 [N]      prompt and answer, the stop token included
    features.bin     bf16 [N, n*E]  hidden states after n tapped layers; the last one's are normed
    top_ids.bin      int32 [N, M]   the model's M likeliest next tokens after this position
    top_logits.bin   fp16 [N, M]    and their logits; both are zero inside the prompt
    sequences.jsonl  an object a sequence: its first row, its prompt's length, its length, category
    layout.json      the hidden size E, the tapped layers, counted from 1, and whose answers to what
                     they are: the model's fingerprint, the prompts, how they were answered

M is 64. The index is written last: files cut short are longer than it says, never shorter.
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
    """Field -> element type and width of a row, for features of `width` (bf16 travels as int16)."""
    return {
        "tokens": (np.int32, 1),
        "features": (np.int16, width),
        "top_ids": (np.int32, TOP),
        "top_logits": (np.float16, TOP),
    }


def claim(file: Path, facts: Mapping[str, Any], *, replaced: Collection[str] | None = None) -> None:
    """Note in a file what its directory is of, which is made first; facts are as JSON has them.

    Where other facts stand there, the directory's contents are removed, if all of them match
    `replaced`, and are a UserError without it.
    """
    if file.exists() and (other := differences(read_json_object(file), facts)):
        if replaced is None:
            raise UserError(
                f"cannot go on: {printable(file.parent)} is of another run ({other}): the same "
                "options go on with it, another --out begins anew, and so does --force, in its "
                "place"
            )
        clear(file.parent, replaced)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file):
            file.write_text(json.dumps(facts) + "\n")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of `now` was not so before, in words; nothing where all of it was."""
    pairs = [(key, before.get(key, "unknown"), value) for key, value in now.items()]
    return ", ".join(f"{key} {printable(a)}, now {printable(b)}" for key, a, b in pairs if a != b)


class DatasetWriter:
    """Appends sequences to a directory; opening it again goes on after the last whole one.

    `origin` is what else must be the same for that. A directory with other answers is a UserError,
    and stays as it is; or they are replaced, with `force`.
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
        """One sequence, `prompt` of its n tokens given: features [n, n*E], tops [n, M]; `number`
        is its prompt's, by which the sequences are put in order again."""
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
    """The sequences of several directories, mapped and read in place, with the features of `taps`.

    Raises UserError for answers that were recorded without one of those layers, or whose
    layout.json says something else than `origin`; older ones say less.
    """

    def __init__(self, directories: Sequence[Path], taps: Sequence[int], **origin: Any):
        self.taps = tuple(taps)
        self.columns: list[tuple[int, list[int]]] = []  # of a directory: E, and where the taps lie
        self.files: list[dict[str, np.ndarray]] = []
        self.sequences: list[tuple[int, dict[str, Any]]] = []
        for i, directory in enumerate(directories):
            layout = read_json_object(directory / "layout.json")
            if other := differences(origin | layout, origin):
                raise UserError(f"{printable(directory)} holds answers of another model: {other}")
            # A pair takes two known tokens; one token that was chosen is what it is to predict.
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
        """The same data without the other sequences."""
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
        """Batches of about `rows` answer rows, sequences of like lengths together, shuffled."""
        order, out = rng.permutation(len(self)).tolist(), []
        for at in range(0, len(order), 384):
            batch: list[int] = []
            size = 0
            # Like lengths keep the padding small; windows keep the order random.
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
        """Pad sequences into a batch of chains; one starts at each row that drafts of an answer.

        tokens [B, S + K + 2], features [B, S, n*E], starts [B, Q]; for step k of the chain from j,
        which predicts token j + 2 + k: live [K, B, Q], top_ids and top_logits [K, B, Q, M].
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
                # What the model makes of token j + 2 + k stands in row j + 1 + k.
                out["live"][k, b, : chains - k] = True
                out["top_ids"][k, b, : chains - k] = ids[p - 1 + k : n - 1]
                out["top_logits"][k, b, : chains - k] = logits[p - 1 + k : n - 1]
        return out
