"""A GGUF given as the model: its header, and its directory in the cache."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import TOKENS, write_gguf

import mtpkern
from mtpkern.checkpoints import gguf_cache
from mtpkern.checkpoints.directory import read_entries
from mtpkern.checkpoints.gguf import convert_gguf
from mtpkern.checkpoints.gguf_file import hf_name, read_metadata
from mtpkern.checkpoints.llama import check_checkpoint, fingerprint, load_config
from mtpkern.checkpoints.model_cache import list_cached, remove_cached
from mtpkern.checkpoints.model_weights import load_model
from mtpkern.checkpoints.resolve import model_name, resolve_model
from mtpkern.cli import main
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.tokenizer import Tokenizer

Change = Callable[[gguf.GGUFWriter], None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mtpkern"


def test_a_file_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    before = read_entries(file)
    assert read_entries(file) == before
    changed = write_gguf(tmp_path / "other.gguf", change=lambda w: w.add_string("a.b", 99 * "c"))
    os.replace(changed, file)
    assert read_entries(file) != before


def test_the_header_is_that_of_ggufs_own_reader(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_array("some.floats", [1.5, -2.0])
        writer.add_bool("some.flag", True)
        writer.add_uint64("some.large", 2**63)
        writer.add_int8("some.small", -3)
        writer.add_string("some.text", "h\u00e9")
        writer.add_custom_alignment(64)

    file = write_gguf(tmp_path / "model.gguf", change=change)
    reader = gguf.GGUFReader(file)
    theirs = {name: field.contents() for name, field in reader.fields.items()}
    assert read_metadata(file) == {n: v for n, v in theirs.items() if not n.startswith("GGUF.")}
    ours = {entry.name: entry for entry in read_entries(file).values()}
    assert len(ours) == len(reader.tensors)
    for tensor in reader.tensors:
        entry = ours[tensor.name]
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert (entry.dtype, entry.offset, entry.size) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )


def test_a_file_cut_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    content = file.read_bytes()
    start = min(entry.offset for entry in read_entries(file).values())
    for length in [*range(0, start, 97), start, len(content) - 33]:
        file.write_bytes(content[:length])
        with pytest.raises(ModelLoadError, match="model.gguf is not a whole GGUF") as refusal:
            read_entries(file)
        assert str(refusal.value).isprintable()


def test_no_damaged_header_ends_in_a_traceback(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    content = file.read_bytes()
    start = min(entry.offset for entry in read_entries(file).values())
    refused = 0
    for at in range(0, start, 61):
        file.write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])
        try:
            read_entries(file)
        except ModelLoadError as error:
            refused += str(error).isprintable()
    assert refused > start / 61 / 10


def header(*tensors: tuple[str, tuple[int, ...], int, int], version: int = 3) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    content = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), 1)
    content += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for name, shape, kind, offset in tensors:
        content += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return content + b"\0" * 4096


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(version=4), "version 4; supported: 2 and 3"),
        (header(version=1 << 24), "version 16777216"),
        (b"GGML" + header()[4:], "magic"),
        (header(("a", (2, 2, 2, 2, 2), 0, 0)), "a has 5 dimensions"),
        (header(("a", (33, 2), 2, 0)), "rows of 33, not a multiple of 32"),
        (header(("a", (32, 2), 0, 0), ("a", (32, 2), 0, 256)), "two tensors have one name"),
        (header(("a", (32, 2), 0, 1 << 62)), "a is outside it"),
        (header(("a", (32, 2), 0, 4)), "a is outside it"),
        (header(("a", (32, 2), 99, 0)), "99 is not a valid"),
        (header(("output.weight", (8,), 0, 0), ("lm_head.weight", (8,), 0, 64)), "are both lm_h"),
        (header(("blk.0.attn_q.weight", (32, 6), 0, 0)), "6 rows, which are not those of None he"),
    ],
)
def test_malformed_headers_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match=f"a.gguf.*{message}") as refusal:
        read_entries(tmp_path / "a.gguf")
    assert str(refusal.value).isprintable()


def test_names_are_hugging_faces() -> None:
    assert hf_name("blk.11.attn_k_norm.weight") == "model.layers.11.self_attn.k_norm.weight"
    assert hf_name("output.weight") == "lm_head.weight"
    assert hf_name("blk.0.ffn_gate_inp.weight") == "blk.0.ffn_gate_inp.weight"


def metadata(key: str, value: Any) -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)

    return change


def stranger(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.ffn_gate_inp.weight", torch.ones(4, 64).numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata("split.count", 3), "part of 3 .split.count.: join"),
        (metadata("general.architecture", "gemma"), "architecture=gemma is not supported; .*qwen3"),
        (metadata("llama.attention.head_count", 5), "64 rows, which are not those of 5 heads"),
        (metadata("llama.block_count", 4), "layers.3.input_layernorm.weight is missing"),
        (metadata("llama.expert_count", 4), "llama.expert_count=4 is not supported"),
        (stranger, "tensor blk.0.ffn_gate_inp.weight has no place in the model"),
    ],
)
def test_a_model_that_would_not_run_leaves_nothing(
    change: Change, message: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "m.gguf", change=change)
    with pytest.raises(ModelLoadError, match=f"m.gguf.*{message}"):
        resolve_model(file)
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert main(["inspect", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said


def test_a_gguf_is_a_model_like_any_other(cache: Path, tmp_path: Path) -> None:
    """Generation from the file is generation from its conversion."""
    file = write_gguf(tmp_path / "My Model.Q4_1.gguf")
    (tmp_path / "converted").mkdir()
    convert_gguf(file, tmp_path / "converted")
    found = []
    for model in (file, tmp_path / "converted"):
        llm = mtpkern.LLM(model, device="cpu", dtype="bfloat16", max_length=64)
        params = mtpkern.SamplingParams(max_tokens=20, ignore_eos=True, logprobs=True)
        (completion,) = llm.generate("the thin", params)
        found.append((completion.token_ids, completion.logprobs))
    assert found[0] == found[1] and len(found[0][0]) == 20
    directory = resolve_model(file)
    assert model_name(directory) == "My Model.Q4_1" and cache in directory.parents
    assert max(path.stat().st_size for path in directory.iterdir()) < 100_000
    assert Tokenizer.from_directory(directory).encode("the") == [TOKENS.index("the")]


def test_a_gguf_is_read_once_and_again_when_it_has_changed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    directory = resolve_model(str(file))
    before = fingerprint(directory)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_cache, "_write_directory", None)
        monkeypatch.chdir(tmp_path)
        assert resolve_model("m.gguf") == resolve_model(file) == directory
    changed = lambda writer: writer.add_uint32("tokenizer.ggml.eot_token_id", 1)  # noqa: E731
    write_gguf(file, change=changed)
    with pytest.raises(ModelLoadError, match="m.gguf has changed since its tokenizer"):
        load_model(directory, dtype=torch.float32)
    assert resolve_model(file) == directory
    assert load_config(directory).eos_token_ids == (2, 1, 0) and fingerprint(directory) == before
    file.rename(tmp_path / "n.gguf")
    with pytest.raises(ModelLoadError, match=r"m.gguf.* is gone \(No such file"):
        check_checkpoint(directory)
    with pytest.raises(UserError, match="m.gguf: no such directory"):
        resolve_model(str(file))
    other = resolve_model(tmp_path / "n.gguf")
    assert other != directory and fingerprint(other) == before
    states = [cached.state for cached in list_cached()]
    wanted = ["settings of m.gguf, which has moved or changed", "settings of n.gguf"]
    assert sorted(states) == wanted
    for cached in list_cached():
        remove_cached(cached.name)
    assert list_cached() == [] and (tmp_path / "n.gguf").is_file()


def test_a_link_is_followed_and_keeps_its_name(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").symlink_to(write_gguf(tmp_path / "m.gguf"))
    (tmp_path / "link.gguf").symlink_to(tmp_path / "blob")
    directory = resolve_model(tmp_path / "link.gguf")
    assert directory.name == "link" and check_checkpoint(directory)
    assert len(load_model(directory, dtype=torch.float32)[1].layers) == 3


def test_a_directory_with_one_gguf_loads_as_that_gguf(cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    file = write_gguf(place / "m.gguf")
    with pytest.raises(ModelLoadError, match="GGUF without a config.json: give the file .*m.gguf"):
        load_config(place)
    assert resolve_model(place) == resolve_model(file)
    shutil.copy(file, place / "k.gguf")
    with pytest.raises(UserError, match="holds 2 GGUFs: give one of them, .*k.gguf"):
        resolve_model(place)
    (place / "config.json").write_text("{}")
    assert resolve_model(place) == place


def test_a_cache_that_cannot_be_written_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in the way")
    with pytest.raises(UserError, match="cannot write to .*gguf"):
        resolve_model(write_gguf(tmp_path / "m.gguf"))


def test_an_interrupted_write_is_repeated(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "m.gguf")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_cache, "os", SimpleNamespace(**vars(os) | {"rename": killed}))
        with pytest.raises(KeyboardInterrupt):
            resolve_model(file)
    directory = resolve_model(file)
    assert check_checkpoint(directory)
    assert sorted(p.name for p in directory.parent.iterdir()) == [
        f".{directory.name}.lock",
        directory.name,
    ]


def test_types_that_cannot_be_expanded_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        name = "blk.0.ffn_down.weight"
        info = writer.tensors[0][name]
        size = gguf.GGML_QUANT_SIZES[Kind.Q8_1][1]
        data = torch.zeros(64, 3 * size, dtype=torch.uint8).numpy()
        writer.tensors[0][name] = gguf.gguf_writer.TensorInfo(
            info.shape, Kind.Q8_1, data.nbytes, data
        )

    file = write_gguf(tmp_path / "model.gguf", change=change)
    with pytest.raises(
        ModelLoadError, match="ffn_down.weight has dtype Q8_1; supported: F32, BF16"
    ):
        convert_gguf(file, tmp_path)
