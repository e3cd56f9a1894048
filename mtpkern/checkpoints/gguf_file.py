"""The header of a GGUF: its metadata, and where its tensors are.

gguf's own reader takes three seconds for a vocabulary of 49,152, since it creates several objects
per token and per merge. This one takes a tenth of a second, or a hundredth if lists are skipped.
File layout (ggml, docs/gguf.md), all little-endian:

    "GGUF", version u32, number of tensors u64, number of metadata values u64
    per value: key, type u32, value; a string is its length u64 and UTF-8, a list its items' type
    u32, their number u64 and the items
    per tensor: name, number of dimensions u32, each of them u64, type u32, offset u64 in the data
    the data, from the next multiple of general.alignment
"""

import functools
import math
import mmap
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtpkern.checkpoints.tensor_entry import TensorEntry
from mtpkern.errors import ModelLoadError, printable, reason

# Architectures of GGUF with the Llama layout -> whether rows of Q and K are interleaved. Mistral's
# models have the architecture "llama".
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}

# The GGUF of a model directory.
GGUF_FILE = "model.gguf"

# Type numbers of metadata: scalars with their `struct` format, and the two others.
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
    """Every tensor of a GGUF, under Hugging Face's name if it has one, else under its own.

    Raises ModelLoadError if the file is truncated or malformed, is one part of several, or has an
    architecture without the Llama layout.
    """
    metadata, tensors = _read_header(file, lists=False)
    where = printable(file)
    if metadata.get("split.count", 0) > 1:
        raise ModelLoadError(
            f"{where} is one part of {metadata['split.count']} (split.count): join them with "
            "`llama-gguf-split --merge`"
        )
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"{where}: general.architecture={printable(architecture)} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    interleaved_heads: dict[str, Any] = {}
    if ARCHITECTURES[architecture]:
        query_heads = metadata.get(f"{architecture}.attention.head_count")
        kv_heads = metadata.get(f"{architecture}.attention.head_count_kv", query_heads)
        interleaved_heads = {"attn_q": query_heads, "attn_k": kv_heads}
    entries: dict[str, TensorEntry] = {}
    for entry in tensors:
        parts = entry.name.split(".")
        if len(parts) == 4 and parts[2] in interleaved_heads:
            heads = interleaved_heads[parts[2]]
            if not isinstance(heads, int) or heads < 1 or entry.shape[0] % (2 * heads):
                raise ModelLoadError(
                    f"{entry} has {entry.shape[0]} rows, which are not those of "
                    f"{printable(heads)} heads ({architecture}.attention.head_count)"
                )
            entry = replace(entry, interleaved_heads=heads)
        name = hf_name(entry.name)
        if name in entries:
            raise ModelLoadError(f"{entry} and {printable(entries[name].name)} are both {name}")
        entries[name] = entry
    return entries


def read_metadata(file: Path) -> dict[str, Any]:
    """All metadata of a GGUF. Raises ModelLoadError if the file is truncated or malformed."""
    return _read_header(file, lists=True)[0]


def hf_name(name: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight; other names are unchanged."""
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
    except (struct.error, OverflowError):  # an offset beyond the end
        raise ModelLoadError(f"{printable(file)} is not a whole GGUF (it ends early)") from None
    except OSError as error:
        raise ModelLoadError(f"cannot read {printable(file)}: {reason(error, file)}") from None
    except ValueError as error:
        raise ModelLoadError(
            f"{printable(file)} is not a whole GGUF ({reason(error, file)})"
        ) from None


@functools.lru_cache(maxsize=4)
def _brief_header(file: Path, *version: int) -> tuple[dict[str, Any], list[TensorEntry]]:
    """The header without lists, read once per version of a file (inode, size, mtime): loading a
    model asks for it several times."""
    return _parse_header(file, lists=False)


def _parse_header(file: Path, *, lists: bool) -> tuple[dict[str, Any], list[TensorEntry]]:
    with open(file, "rb") as stream:
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _HeaderReader(file, content, lists).read()


class _HeaderReader:
    """Reads a GGUF's header from `position` on. ValueError describes what is malformed."""

    def __init__(self, file: Path, content: mmap.mmap, lists: bool):
        self.file, self.content, self.position, self.lists = file, content, 0, lists

    def read(self) -> tuple[dict[str, Any], list[TensorEntry]]:
        magic, version, tensor_count, value_count = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}; supported: 2 and 3")
        metadata = {}
        for _ in range(value_count):
            key, (kind,) = self.string(), self.numbers("I")
            metadata[key] = self.value(kind)
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ValueError(f"general.alignment {alignment!r} is not a multiple of 8")
        start = -(-self.position // alignment) * alignment
        entries = [self.entry(*info, start) for info in infos]
        if len({entry.name for entry in entries}) < len(entries):
            raise ValueError("two tensors have one name")
        return metadata, entries

    def numbers(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self.content, self.position)
        self.position += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        (length,) = self.numbers("Q")
        begin, self.position = self.position, self.position + length
        if self.position > len(self.content):
            raise ValueError("it ends early")
        return self.content[begin : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value, or None for a list that is skipped."""
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
            self.position += struct.calcsize("<" + form)
        elif item != _STRING:
            raise ValueError("a list of lists")
        elif self.lists:
            return [self.string() for _ in range(count)]
        else:
            content, position, length = self.content, self.position, struct.Struct("<Q")
            for _ in range(count):
                position += 8 + length.unpack_from(content, position)[0]
            self.position = position
        return None

    def tensor_info(self) -> tuple[str, tuple[int, ...], str, int, int, int]:
        """Name, shape, type, the type's numbers and bytes per block, and offset in the data."""
        # Imported only where a GGUF is read.
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, (dimensions,) = self.string(), self.numbers("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        # GGUF lists the fastest-varying dimension first.
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
        block_bytes: int,
        offset: int,
        start: int,
    ) -> TensorEntry:
        if shape[-1] % block:
            raise ValueError(f"tensor {name} has rows of {shape[-1]}, not a multiple of {block}")
        size = math.prod(shape) // block * block_bytes
        entry = TensorEntry(self.file, name, kind, shape, start + offset, size)
        if entry.offset + entry.size > len(self.content) or entry.offset % 8:
            raise ValueError(f"tensor {name} is outside it")
        return entry
