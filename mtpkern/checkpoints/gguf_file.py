"""What a GGUF says of itself: its metadata, and where its tensors lie.

gguf's own reader takes three seconds for a vocabulary of 49,152, since every token and every merge
becomes several objects; this one takes a tenth of a second, or a hundredth where lists are stepped
over. Layout of a file (ggml, docs/gguf.md), all little-endian:

    "GGUF", version u32, tensors u64, values u64
    each value: key, type u32, value; a string is its length u64 and UTF-8, a list its items' type
    u32, their number u64 and they
    each tensor: name, dimensions u32, each of them u64, type u32, offset u64 from the data's start
    the data, from the next multiple of general.alignment
"""

import functools
import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

from mtpkern.checkpoints.tensor_files import TensorEntry
from mtpkern.config import read_json_object
from mtpkern.errors import ModelLoadError, printable, reason

# GGUF's architectures that have the Llama layout -> whether their Q and K are in Meta's order.
# Mistral's models are "llama" there.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}

# A directory's GGUF, or in its place a file that says where it is.
GGUF_FILE, POINTER_FILE = "model.gguf", "model.gguf.json"

# Types of metadata by number: those that `struct` reads, by its letter, and two more.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _LIST = 8, 9
_MAX_DIMENSIONS = 4
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def read_gguf(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of a GGUF under the names of Hugging Face's Llama, or its own where it has none.

    ModelLoadError for a file that is no whole GGUF, one part of several, or of an architecture
    without the Llama layout.
    """
    values, tensors = _read_header(file, lists=False)
    where = printable(file)
    if values.get("split.count", 0) > 1:
        raise ModelLoadError(
            f"{where} is one part of {values['split.count']} (split.count): join them with "
            "`llama-gguf-split --merge`"
        )
    name = values.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelLoadError(
            f"{where}: general.architecture={printable(name)} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    heads: dict[str, int] = {}
    if ARCHITECTURES[name]:
        q = values.get(f"{name}.attention.head_count")
        k = values.get(f"{name}.attention.head_count_kv", q)
        heads = {"attn_q": q, "attn_k": k}  # type: ignore[dict-item]
    entries: dict[str, TensorEntry] = {}
    for entry in tensors:
        parts = entry.name.split(".")
        if len(parts) == 4 and parts[2] in heads:
            count = heads[parts[2]]
            if not isinstance(count, int) or count < 1 or entry.shape[0] % (2 * count):
                raise ModelLoadError(
                    f"{entry} has {entry.shape[0]} rows, which are not those of "
                    f"{printable(count)} heads ({name}.attention.head_count)"
                )
            entry = TensorEntry(**vars(entry) | {"heads": count})
        own = own_name(entry.name)
        if own in entries:
            raise ModelLoadError(f"{entry} and {printable(entries[own].name)} are both {own}")
        entries[own] = entry
    return entries


def read_metadata(file: Path) -> dict[str, Any]:
    """Every value of a GGUF but its tensors. ModelLoadError for a file that is no whole GGUF."""
    return _read_header(file, lists=True)[0]


def point_to(file: Path, pointer: Path) -> None:
    """Write where a GGUF lies that belongs to the directory of `pointer`."""
    facts = file.stat()
    content = {"file": str(file), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    pointer.write_text(json.dumps(content) + "\n", encoding="utf-8")


def pointed_to(pointer: Path) -> Path:
    """The GGUF that `point_to` was given; ModelLoadError if it has moved or changed since."""
    content = read_json_object(pointer)
    file = Path(str(content.get("file")))
    try:
        facts = file.stat()
    except OSError as error:
        raise ModelLoadError(
            f"{printable(file)}, whose tokenizer and settings are in {printable(pointer.parent)}, "
            f"is gone ({reason(error, file)})"
        ) from None
    if (facts.st_size, facts.st_mtime_ns) != (content.get("size"), content.get("mtime_ns")):
        raise ModelLoadError(
            f"{printable(file)} has changed since its tokenizer and settings were written to "
            f"{printable(pointer.parent)}: give the file itself as the model"
        )
    return file


def own_name(name: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight; others stay as they are."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _OUTER_NAMES:
        return f"{_OUTER_NAMES[parts[0]]}.{parts[1]}"
    return name


def _read_header(file: Path, *, lists: bool) -> tuple[dict[str, Any], list[TensorEntry]]:
    try:
        if lists:
            return _parse_header(file, lists=True)
        facts = file.stat()
        return _brief_header(file, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    except (struct.error, OverflowError):  # a place beyond the end
        raise ModelLoadError(f"{printable(file)} is not a whole GGUF (it ends early)") from None
    except (OSError, ValueError) as error:
        says = reason(error, file)
        raise ModelLoadError(f"{printable(file)} is not a whole GGUF ({says})") from None


@functools.lru_cache(maxsize=4)
def _brief_header(file: Path, *version: int) -> tuple[dict[str, Any], list[TensorEntry]]:
    """The header without lists, read once per version of a file (inode, size, mtime): loading a
    model asks for it several times."""
    return _parse_header(file, lists=False)


def _parse_header(file: Path, *, lists: bool) -> tuple[dict[str, Any], list[TensorEntry]]:
    with open(file, "rb") as stream:
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Header(file, content, lists).read()


class _Header:
    """A place in a GGUF's header, which moves on with everything that is read."""

    def __init__(self, file: Path, content: mmap.mmap, lists: bool):
        self.file, self.content, self.at, self.lists = file, content, 0, lists

    def read(self) -> tuple[dict[str, Any], list[TensorEntry]]:
        magic, version, tensors, values = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}; supported: 2 and 3")
        found = {}
        for _ in range(values):
            key, (kind,) = self.string(), self.numbers("I")
            found[key] = self.value(kind)
        infos = [self.tensor() for _ in range(tensors)]
        alignment = found.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ValueError(f"general.alignment {alignment!r} is not a multiple of 8")
        start = -(-self.at // alignment) * alignment
        entries = [self.entry(*info, start) for info in infos]
        if len({entry.name for entry in entries}) < len(entries):
            raise ValueError("two tensors have one name")
        return found, entries

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + form, self.content, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def string(self) -> str:
        (length,) = self.numbers("Q")
        begin, self.at = self.at, self.at + length
        if self.at > len(self.content):
            raise ValueError("it ends early")
        return self.content[begin : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value; of a list that is stepped over, None."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _LIST:
            raise ValueError(f"a value of type {kind}")
        item, count = self.numbers("IQ")
        if item in _SCALARS:
            form = f"{count}{_SCALARS[item]}"
            if self.lists:
                return list(self.numbers(form))
            self.at += struct.calcsize("<" + form)
        elif item != _STRING:
            raise ValueError("a list of lists")
        elif self.lists:
            return [self.string() for _ in range(count)]
        else:
            content, at, length = self.content, self.at, struct.Struct("<Q")
            for _ in range(count):
                at += 8 + length.unpack_from(content, at)[0]
            self.at = at
        return None

    def tensor(self) -> tuple[str, tuple[int, ...], str, int, int, int]:
        """Name, shape, type, and of that numbers and bytes in a block, and the offset."""
        # Models in other files do without this package.
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, (dimensions,) = self.string(), self.numbers("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        # GGUF lists the fastest dimension first.
        shape = self.numbers(f"{dimensions}Q")[::-1]
        kind, offset = self.numbers("IQ")
        known = GGMLQuantizationType(kind)
        return name, shape, known.name, *GGML_QUANT_SIZES[known], offset

    def entry(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: str,
        block: int,
        size: int,
        offset: int,
        start: int,
    ) -> TensorEntry:
        count = math.prod(shape)
        if shape[-1] % block:
            raise ValueError(f"tensor {name} has rows of {shape[-1]}, no multiple of {block}")
        entry = TensorEntry(self.file, name, kind, shape, start + offset, count // block * size)
        if entry.offset + entry.size > len(self.content) or entry.offset % 8:
            raise ValueError(f"tensor {name} lies outside it")
        return entry
