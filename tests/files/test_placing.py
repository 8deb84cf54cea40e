"""Moving into place: struck after any step, without means of the file system, beside others that do the same."""

import errno
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import make_model, stopped_after_rename

import stratavit
from stratavit import ArtifactError
from stratavit.cli import commands, measure, parser
from stratavit.data.batches import OUT_OF_MEMORY_HINT
from stratavit.files import atomic, folders

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and links of POSIX")


def written(path, text, overwrite=True):
    folders.write_folder(path, lambda folder: (folder / "file").write_text(text), overwrite)


def held(path):
    return {child.name: (child / "file").read_text() for child in path.iterdir()}


SYNC = atomic._sync  # which other tests do without


def stale(*args):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.mark.parametrize("number", [1, 2])
def test_interrupted_after_either_of_two_renames(tmp_path, monkeypatch, number):
    """Ctrl-C comes when the system has done its part: the old folder is not lost, and nothing lies beside."""
    written(tmp_path / "out", "old")
    monkeypatch.setattr(atomic, "_exchanged", lambda *args: False)
    stopped_after_rename(monkeypatch, number, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "out", "new")
    assert held(tmp_path) == {"out": ["old", "new"][number - 1]}


def test_an_old_folder_that_cannot_be_put_back_is_kept_and_named(tmp_path, monkeypatch):
    written(tmp_path / "out", "old")
    rename, done = Path.rename, []

    def failing(self, to):
        done.append(to)
        (rename if len(done) == 1 else stale)(self, to)

    monkeypatch.setattr(atomic, "_exchanged", lambda *args: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtifactError, match=r"what was there is .*\.out\..*/old, move it back") as told:
        written(tmp_path / "out", "new")
    kept = Path(str(told.value).split("what was there is ")[1].removesuffix(", move it back"))
    assert (kept / "file").read_text() == "old"
    monkeypatch.undo()
    written(tmp_path / "another", "x")  # leaves it alone
    with atomic.temporary_sibling(tmp_path / "out"):  # the next that writes there puts it back
        assert (tmp_path / "out" / "file").read_text() == "old"
    assert held(tmp_path) == {"out": "old", "another": "x"}


def test_two_that_overwrite_where_nothing_was(tmp_path, monkeypatch):
    """Both saw an empty place; the last one stays."""
    put_folder = atomic._put_folder

    def slower(new, path):
        monkeypatch.setattr(atomic, "_put_folder", put_folder)
        written(path, "first")
        put_folder(new, path)

    monkeypatch.setattr(atomic, "_put_folder", slower)
    written(tmp_path / "out", "second")
    assert held(tmp_path) == {"out": "second"}


def test_a_folder_that_another_process_sweeps_away_is_not_used(tmp_path, monkeypatch):
    """It was locked before its maker could."""
    mkdtemp, made = tempfile.mkdtemp, []

    def overtaken(**options):
        made.append(mkdtemp(**options))
        if len(made) == 1:
            made.append(atomic._hold(Path(made[0])))
        return made[0] if len(made) == 2 else made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", overtaken)
    with atomic.temporary_sibling(tmp_path / "out") as place:
        assert place.parent != Path(made[0])
    os.close(made[1])
    written(tmp_path / "out", "x")
    assert held(tmp_path) == {"out": "x"}


def test_sweeping_that_fails_gives_back_what_it_held(tmp_path, monkeypatch):
    (tmp_path / ".out.abcdefgh.part" / "old").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    monkeypatch.setattr(Path, "rename", stale)
    atomic._sweep(tmp_path / "out")
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before
    monkeypatch.undo()
    atomic._sweep(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_that_brings_files_to_the_disk_and_no_folders(tmp_path, monkeypatch):
    fsync, asked = os.fsync, []
    monkeypatch.setattr(atomic, "_sync", SYNC)

    def files_only(handle):
        asked.append(handle)
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    written(tmp_path / "out", "x")
    assert held(tmp_path) == {"out": "x"}
    assert len(asked) >= 2
    monkeypatch.setattr(os, "fsync", stale)
    with pytest.raises(ArtifactError, match=r"Stale file handle"):
        written(tmp_path / "out", "y")
    assert held(tmp_path) == {"out": "x"}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """What others left stays there: nobody can tell whether they live."""

    def unable(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".out.abcdefgh.part").mkdir()
    monkeypatch.setattr("fcntl.flock", unable)
    written(tmp_path / "out", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.abcdefgh.part", "out"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_takes_no_place_that_is_taken(tmp_path, monkeypatch, links):
    """On file systems with links and without."""

    def unable(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", unable)
    folders.write_file(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"
    with atomic.temporary_sibling(tmp_path / "file") as new:
        new.write_bytes(b"y")
        with pytest.raises(ArtifactError, match="another process wrote"):
            atomic.move_into_place(new, tmp_path / "file", overwrite=False)
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("answer", ["without renameat2", "EINVAL", "EIO", "another system"])
def test_folders_that_change_places(tmp_path, monkeypatch, answer):
    class Library:
        def __init__(self, *args, **options):
            pass

        if answer != "without renameat2":

            @staticmethod
            def renameat2(*args):
                return -1

    written(tmp_path / "out", "old")
    monkeypatch.setattr("ctypes.CDLL", Library)
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EIO if answer == "EIO" else errno.EINVAL)
    if answer == "another system":
        monkeypatch.setattr(sys, "platform", "darwin")
    if answer == "EIO":
        with pytest.raises(ArtifactError, match="Input/output error; nothing was changed"):
            written(tmp_path / "out", "new")
    else:
        written(tmp_path / "out", "new")
    assert held(tmp_path) == {"out": "old" if answer == "EIO" else "new"}


@pytest.mark.parametrize("release", ["this Python", "3.13"])
def test_a_link_to_itself(tmp_path, monkeypatch, release):
    """Python 3.13 answers with the link where earlier ones raise an error."""
    if release == "3.13":
        monkeypatch.setattr(Path, "resolve", lambda self, strict=False: self)
    (tmp_path / "loop").symlink_to("loop")
    for write in (lambda path: written(path, "x"), lambda path: folders.write_file(path, b"x", overwrite=True)):
        with pytest.raises(ArtifactError, match=r"cannot write .*loop"):
            write(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("there", [True, False])
def test_an_export_goes_where_a_link_leads(tmp_path, monkeypatch, there):
    module = importlib.import_module("stratavit.interop.export")
    monkeypatch.setattr(module, "_to_program", lambda model, example, path: torch.save(model.state_dict(), path))
    model = make_model("plain")
    monkeypatch.setattr(module, "_run_program", lambda path: model)
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "small.pt2", tmp_path / "small.pt2"
    link.symlink_to(target)
    if there:
        target.write_bytes(b"old")
        with pytest.raises(ArtifactError, match="exists; give another file"):
            stratavit.export(model, link, "torch", images=torch.zeros(1, 3, 32, 32))
    stratavit.export(model, link, "torch", images=torch.zeros(1, 3, 32, 32), overwrite=there)
    assert link.is_symlink()
    assert torch.load(target, weights_only=True).keys() == model.state_dict().keys()


# ---- what the command line says --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_closed_standard_output(options):
    command = f"{sys.executable} -m stratavit models vit_tiny_patch16_224 {options} >&-"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["info", "x"], "free some memory, or take a smaller model"),
        (["evaluate", "x", "--data", "y"], OUT_OF_MEMORY_HINT),
    ],
)
def test_advice_for_want_of_memory_can_be_followed(monkeypatch, capsys, arguments, advice):
    def without_memory(args):
        raise MemoryError

    monkeypatch.setattr(commands, "info", without_memory)
    monkeypatch.setattr(measure, "evaluate", without_memory)
    assert parser.main(arguments) == 2
    assert capsys.readouterr().err.strip().endswith(f"memory ran out on the device or here; {advice}")


# ---- errors that are passed on ---------------------------------------------------------------------------------


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot write .*; nothing was changed there"):  # noqa: SIM117
        with atomic.temporary_sibling(tmp_path / "file" / "out"):
            raise AssertionError("there is no place")


@pytest.mark.parametrize("overwrite", [True, False])
def test_other_faults_of_the_last_step(tmp_path, monkeypatch, overwrite):
    monkeypatch.setattr(atomic, "_put_folder", stale)
    with pytest.raises(ArtifactError, match=r"Stale file handle; nothing was changed there"):
        written(tmp_path / "out", "x", overwrite)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_became_another_before_it_was_held(tmp_path, monkeypatch):
    samestat, asked = os.path.samestat, []

    def first_not(one, other):
        asked.append(one)
        return len(asked) > 1 and samestat(one, other)

    monkeypatch.setattr(os.path, "samestat", first_not)
    written(tmp_path / "out", "x")
    assert len(asked) >= 2
    written(tmp_path / "out", "y")
    assert held(tmp_path) == {"out": "y"}


def test_sentences_of_ours_are_passed_on_as_they_are(tmp_path):
    with pytest.raises(ArtifactError, match=r"^ours$"), atomic.readable_errors(tmp_path, "left"):
        raise ArtifactError("ours")


def test_a_folder_that_others_always_hold(tmp_path, monkeypatch):
    def held_by_others(folder):
        raise BlockingIOError

    monkeypatch.setattr(atomic, "_hold", held_by_others)
    with pytest.raises(ArtifactError, match=r"cannot write .*; nothing was changed there"):
        written(tmp_path / "out", "x")
    assert not any(tmp_path.iterdir())
