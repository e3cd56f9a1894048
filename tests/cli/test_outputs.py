"""Outputs: what a command writes is new, its own or --force's; nothing else is ever touched."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mtpkern
from mtpkern.errors import UserError
from mtpkern.outputs import output_directory, output_file, reserve, run_directory, writing

ROOT = str(Path(mtpkern.__file__).parent.parent)
OWNED = ("config.json", "model.safetensors", "tokenizer*")
RUN = (".train/run.json", "training.json")


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text() if path.is_file() else ""
        for path in sorted(directory.rglob("*"))
        if path.name != ".mtpkern-result"
    }


def write_file(target: Path, text: str = "new", **options: object) -> None:
    with output_file(target, **options) as file, writing(target):  # type: ignore[arg-type]
        file.write_text(text)


def write_directory(target: Path, *names: str, **options: object) -> None:
    with output_directory(target, OWNED, **options) as work:  # type: ignore[arg-type]
        for name in names or OWNED[:2]:
            (work / name).write_text("new")


def write_run(target: Path, **options: object) -> None:
    with run_directory(target, RUN, work=".train", **options):  # type: ignore[arg-type]
        (target / "config.json").write_text("new")


WRITERS = [write_file, write_directory, write_run]
Writer = Callable[..., None]


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_written_is_there_alone_and_its_parents_are_made(
    write: Writer, tmp_path: Path
) -> None:
    write(tmp_path / "a" / "b" / "c")
    names = {path.name for path in (tmp_path / "a").rglob("*")}
    assert names - {"config.json", "model.safetensors", ".mtpkern-result"} == {"b", "c"}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/x", "cannot write .*x: Not a directory"),
        ("file/x/y", "cannot write .*y: Not a directory"),
        ("n" * 300, "cannot write .*: File name too long"),
        ("new/" + "n" * 300, "cannot write .*: File name too long"),
        ("loop", "cannot write .*loop: Too many levels of symbolic links"),
        ("/proc/nowhere/x", "cannot write /proc/nowhere/x: "),
    ],
)
def test_what_cannot_be_written_is_found_before_the_work(
    write: Writer, name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    before = os.listdir(tmp_path)
    with pytest.raises(UserError, match=message):
        write(tmp_path / name)
    assert os.listdir(tmp_path) == before


def test_a_directory_that_may_not_be_written_to_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A superuser may write everywhere, so the question is answered in its place."""
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != tmp_path and allowed(path, mode)
    )
    for write in WRITERS:
        with pytest.raises(UserError, match="cannot write .*x: Permission denied"):
            write(tmp_path / "x")
    with pytest.raises(UserError, match="cannot write .*: Permission denied"):
        write_run(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left")])
def test_a_failure_leaves_what_was_there_and_nothing_else(
    error: BaseException, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    write_directory(tmp_path / "heads")
    before = contents(tmp_path)
    for target in ("file", "new", "a/b/c"):
        with pytest.raises(type(error) if isinstance(error, OSError) else error):  # type: ignore[arg-type]
            with output_file(tmp_path / target, force=True) as file:
                file.write_text("half")
                raise error
    for target in ("heads", "new", "a/b/c"):
        with pytest.raises(type(error) if isinstance(error, OSError) else error):  # type: ignore[arg-type]
            with output_directory(tmp_path / target, OWNED, force=True) as work:
                (work / "config.json").write_text("half")
                raise error
    for target in ("new", "a/b/c"):
        with pytest.raises(type(error) if isinstance(error, OSError) else error):  # type: ignore[arg-type]
            with run_directory(tmp_path / target, RUN, work=".train"):
                (tmp_path / target / ".train" / "held-out").mkdir(parents=True)
                (tmp_path / target / ".train" / "run.json").write_text("{}")
                (tmp_path / target / ".train" / "held-out" / "tokens.bin").touch()
                raise error
    assert contents(tmp_path) == before


def test_an_error_without_a_name_gets_the_targets(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, writing(tmp_path / "f"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "f")
    with output_directory(tmp_path / "d", OWNED) as work:
        with pytest.raises(OSError, match="No such file") as caught, writing(tmp_path / "d"):
            open(work / "a" / "b", "w")
    assert caught.value.filename == str(tmp_path / "d")
    with pytest.raises(OSError, match="No such file") as caught, writing(tmp_path / "f"):
        open(tmp_path / "other")
    assert caught.value.filename == str(tmp_path / "other")


def test_a_librarys_report_of_a_full_disk_becomes_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught, writing(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: whatever (os error 28)")
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(RuntimeError, match="a bug"), writing(tmp_path):
        raise RuntimeError("a bug")


def test_an_existing_file_is_replaced_by_force_alone(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("mine")
    with pytest.raises(UserError, match="report.json: it exists already.*--force"):
        write_file(target)
    with pytest.raises(UserError, match="report.json: it is what this command reads"):
        write_file(target, force=True, sources=[target])
    assert target.read_text() == "mine"
    write_file(target, force=True)
    assert contents(tmp_path) == {"report.json": "new"}
    with pytest.raises(UserError, match="it is a directory; give the name of a file"):
        write_file(tmp_path, force=True)


def test_a_link_is_followed_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("mine")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(UserError, match="exists already"):
        write_file(tmp_path / "link")
    write_file(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_device_is_written_as_it_is() -> None:
    write_file(Path(os.devnull))
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_device_is_named() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(Path("/dev/full"))
    assert caught.value.filename == "/dev/full"


def write_run_forced(target: Path, *, force: bool = False, **options: object) -> None:
    """`claim` decides what --force replaces of a run."""
    write_run(target, **options)


@pytest.mark.parametrize("write", [write_directory, write_run_forced])
def test_a_directory_with_contents_is_refused(write: Writer, tmp_path: Path) -> None:
    """With --force, too: another's model has files of the same names."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match="project: it holds config.json, which this command"):
            write(project, force=force)
    (project / "README.md").write_text("mine")
    (project / "src").mkdir()
    before = contents(tmp_path)
    for force in (False, True):
        with pytest.raises(
            UserError, match="project: it holds README.md, config.json and 1 more, "
        ):
            write(project, force=force)
        with pytest.raises(UserError, match="tmp.*what this command reads"):
            write(tmp_path, force=force, sources=[project / "config.json"])
        with pytest.raises(UserError, match="project: it is what this command reads"):
            write(project, force=force, sources=[project])
    with pytest.raises(UserError, match="it is a file; give the name of a directory"):
        write(project / "README.md", force=True)
    assert contents(tmp_path) == before


def test_an_earlier_result_is_replaced_whole(tmp_path: Path) -> None:
    """What the new one has no file for is removed; config.json comes last."""
    write_directory(tmp_path, "config.json", "model.safetensors", "tokenizer.json")
    with pytest.raises(UserError, match="it holds config.json, .* and 1 more already.*--force"):
        write_directory(tmp_path)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="it holds notes, which this command did not write"):
        write_directory(tmp_path, force=True)
    (tmp_path / "notes").unlink()
    with pytest.raises(UserError, match="it holds config.json, .* which this command did not"):
        with output_directory(tmp_path, ["*"], force=True):  # another command
            pass
    moved, replace = [], Path.replace

    def noted(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", noted)
        write_directory(tmp_path, force=True)
    assert moved == [".mtpkern-result", "model.safetensors", "config.json"]
    assert contents(tmp_path) == {"config.json": "new", "model.safetensors": "new"}


def test_a_new_directory_appears_in_one_rename(tmp_path: Path) -> None:
    with output_directory(tmp_path / "heads", OWNED) as work:
        (work / "config.json").write_text("new")
        assert not (tmp_path / "heads").exists() and work.parent == tmp_path
    assert contents(tmp_path / "heads") == {"config.json": "new"}


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from mtpkern.outputs import *\n"
        "d, f = map(Path, sys.argv[1:])\n"
        "with output_directory(d, ['*']) as a, output_file(f) as b:\n"
        "    (a / 'half').touch(); b.touch(); os._exit(9)"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "d", tmp_path / "f"])
    assert run.returncode == 9 and len(os.listdir(tmp_path)) == 4  # two locks, two halves
    write_directory(tmp_path / "d")
    write_file(tmp_path / "f")
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


WAITING = """
import sys, time
from pathlib import Path
from mtpkern.arguments import Parser, run
from mtpkern.outputs import output_directory, output_file

def work(args):
    with output_directory(Path("new/d"), ["*"]) as directory, output_file(Path("new/f")) as file:
        (directory / "half").touch()
        file.touch()
        print("working", flush=True)
        time.sleep(60)

parser = Parser()
parser.set_defaults(run=work)
sys.exit(run(parser, []))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without a signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)
    command = [sys.executable, "-c", WAITING]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == b"working\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no nohup")
def test_a_command_that_ignores_a_hang_up_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    work = WAITING.replace("time.sleep(60)", "import os; os.kill(os.getpid(), signal.SIGHUP)")
    result = subprocess.run([sys.executable, "-c", ignoring + work], cwd=tmp_path)
    assert result.returncode == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"d", "f"}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_second_run_into_the_same_place_is_refused(
    write: Writer, exists: bool, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    if exists and write is not write_file:
        target.mkdir()
    with pytest.raises(UserError, match="out: another run is writing it"):
        if write is write_file:
            with output_file(target):
                write(target)
        elif write is write_directory:
            with output_directory(target, OWNED):
                write(target)
        else:
            with run_directory(target, RUN):
                write(target)
    write(target)


def test_a_run_goes_on_where_its_settings_are(tmp_path: Path) -> None:
    """The directory of an unfinished run, with or without more, is not refused."""
    work = tmp_path / "heads" / ".train"
    work.mkdir(parents=True)
    (work / "run.json").write_text("{}")
    write_run(tmp_path / "heads")
    with pytest.raises(KeyboardInterrupt):
        with run_directory(tmp_path / "heads", RUN, work=".train"):
            raise KeyboardInterrupt
    assert (work / "run.json").exists()


def test_a_run_with_results_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with run_directory(tmp_path / "a" / "heads", RUN, work=".train"):
            (tmp_path / "a" / "heads" / ".train").mkdir()
            (tmp_path / "a" / "heads" / ".train" / "checkpoint.pt").write_text("weights")
            raise KeyboardInterrupt
    assert (tmp_path / "a" / "heads" / ".train" / "checkpoint.pt").exists()


def test_what_another_program_will_write_is_reserved(tmp_path: Path) -> None:
    with reserve(tmp_path / "report.nsys-rep") as place:
        place.write_text("new")
    with pytest.raises(UserError, match="exists already"), reserve(tmp_path / "report.nsys-rep"):
        pass


def test_no_torch_is_imported() -> None:
    code = "import sys, mtpkern.outputs, mtpkern.arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
