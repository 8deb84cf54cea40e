"""Moving into place: interrupted after any step, on limited file systems, next to others that do the same."""

import errno
import importlib
import os
import stat
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
SYNC = atomic._sync  # which other tests do without


def written(path, text, overwrite=True):
    folders.write_folder(path, lambda folder: (folder / "file").write_text(text), overwrite)


def held(path):
    return {child.name: (child / "file").read_text() for child in path.iterdir()}


def failing(number):
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_permissions_are_those_of_the_umask_which_is_left_alone(umask, tmp_path, monkeypatch):
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", None)  # which would change it for all threads
            folders.write_folder(tmp_path / "folder", lambda path: (path / "file").touch(0o600))  # as safetensors does
            folders.write_file(tmp_path / "other", b"x")
    finally:
        assert os.umask(before) == umask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"folder": 0o777 & ~umask, "file": 0o666 & ~umask, "other": 0o666 & ~umask}


# ---- two renames, where folders cannot change places in one ------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_interrupted_after_either_of_two_renames(tmp_path, monkeypatch, number):
    """Ctrl-C comes when the system has done its part: the old folder is not lost, and nothing lies next to it."""
    written(tmp_path / "out", "old")
    monkeypatch.setattr(atomic, "_exchanged", lambda *args: False)
    stopped_after_rename(monkeypatch, number, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "out", "new")
    assert held(tmp_path) == {"out": ["old", "new"][number - 1]}


def test_an_old_folder_that_cannot_be_put_back_is_kept_and_named(tmp_path, monkeypatch):
    written(tmp_path / "out", "old")
    rename, done = Path.rename, []

    def once(self, to):
        done.append(to)
        (rename if len(done) == 1 else failing(errno.ESTALE))(self, to)

    monkeypatch.setattr(atomic, "_exchanged", lambda *args: False)
    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(ArtifactError, match=r"\.out\..*/old, move it back") as caught:
        written(tmp_path / "out", "new")
    kept = Path(str(caught.value).split("what was there is ")[1].removesuffix(", move it back"))
    assert (kept / "file").read_text() == "old"
    monkeypatch.undo()
    written(tmp_path / "another", "x")  # leaves it alone
    with atomic.temporary_sibling(tmp_path / "out"):  # the next that writes there puts it back
        assert (tmp_path / "out" / "file").read_text() == "old"
    assert held(tmp_path) == {"out": "old", "another": "x"}


@pytest.mark.parametrize("fault", [None, errno.EINVAL, errno.EIO])
def test_folders_that_cannot_change_places_in_one_step(tmp_path, monkeypatch, fault):
    library = type("Library", (), {"renameat2": lambda *args: -1} if fault else {})
    written(tmp_path / "out", "old")
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **options: library)
    monkeypatch.setattr("ctypes.get_errno", lambda: fault)
    if fault == errno.EIO:
        with pytest.raises(ArtifactError, match="Input/output error; nothing was changed"):
            written(tmp_path / "out", "new")
    else:
        written(tmp_path / "out", "new")
    assert held(tmp_path) == {"out": "old" if fault == errno.EIO else "new"}


# ---- others in the same place ------------------------------------------------------------------------------------


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
    """It was locked, or removed, before its maker could lock it."""
    mkdtemp, made, locks = tempfile.mkdtemp, [], []

    def overtaken(**options):
        made.append(Path(mkdtemp(**options)))
        if len(made) == 1:
            made[0].rmdir()
        if len(made) == 2:
            locks.append(atomic._hold(made[1]))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", overtaken)
    with atomic.temporary_sibling(tmp_path / "out") as place:
        assert place.parent == made[2]
    os.close(locks[0])
    written(tmp_path / "out", "x")
    assert held(tmp_path) == {"out": "x"}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_does_not_replace_another(tmp_path, monkeypatch, links):
    """On file systems with links and without."""
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    folders.write_file(tmp_path / "file", b"x")
    with atomic.temporary_sibling(tmp_path / "file") as new:
        new.write_bytes(b"y")
        with pytest.raises(ArtifactError, match="another process"):
            atomic.move_into_place(new, tmp_path / "file", overwrite=False)
    assert (tmp_path / "file").read_bytes() == b"x"


# ---- file systems that cannot do something, or fail --------------------------------------------------------------


def test_a_file_system_that_brings_files_to_the_disk_and_no_folders(tmp_path, monkeypatch):
    fsync, asked = os.fsync, []
    monkeypatch.setattr(atomic, "_sync", SYNC)

    def files_only(handle):
        asked.append(handle)
        (failing(errno.EINVAL) if os.path.isdir(f"/proc/self/fd/{handle}") else fsync)(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    written(tmp_path / "out", "x")
    assert len(asked) >= 2
    monkeypatch.setattr(os, "fsync", failing(errno.ESTALE))
    with pytest.raises(ArtifactError, match=r"Stale file handle"):
        written(tmp_path / "out", "y")
    assert held(tmp_path) == {"out": "x"}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """What others left stays there: nobody can tell whether they live."""
    (tmp_path / ".out.abcdefgh.part").mkdir()
    monkeypatch.setattr("fcntl.flock", failing(errno.ENOLCK))
    written(tmp_path / "out", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.abcdefgh.part", "out"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_other_faults_of_the_last_step(tmp_path, monkeypatch, overwrite):
    monkeypatch.setattr(atomic, "_put_folder", failing(errno.ESTALE))
    with pytest.raises(ArtifactError, match=r"Stale file handle; nothing was changed"):
        written(tmp_path / "out", "x", overwrite)
    assert not any(tmp_path.iterdir())


# ---- links -------------------------------------------------------------------------------------------------------


def test_a_link_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for write in (lambda path: written(path, "x"), lambda path: folders.write_file(path, b"x", overwrite=True)):
        with pytest.raises(ArtifactError, match="loop: Too many levels"):
            write(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("there", [True, False])
def test_folders_files_and_exports_go_where_a_link_leads(tmp_path, monkeypatch, there):
    module, model = importlib.import_module("stratavit.interop.export"), make_model("plain")
    monkeypatch.setattr(module, "_to_program", lambda model, example, path: path.write_bytes(b"new"))
    monkeypatch.setattr(module, "_run_program", lambda path: model)
    options = {"images": torch.zeros(1, 3, 32, 32), "overwrite": there}
    writers = {
        "folder": lambda path: written(path, "new"),
        "file": lambda path: folders.write_file(path, b"new", overwrite=there),
        "small.pt2": lambda path: stratavit.export(model, path, "torch", **options),
    }
    (tmp_path / "disk").mkdir()
    for name, write in writers.items():
        target, link = tmp_path / "disk" / name, tmp_path / name
        link.symlink_to(target)
        if there:
            written(target, "old") if name == "folder" else target.write_bytes(b"old")
        write(link)
        assert link.is_symlink()
        assert (target / "file" if name == "folder" else target).read_bytes() == b"new"


# ---- what the command line says ----------------------------------------------------------------------------------


def test_a_closed_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python sets it where the shell closed it
    assert parser.main(["models", "vit_tiny_patch16_224"]) == 0
    assert parser.main(["models", "vit_tiny_patch16_224", "--json"]) == 0


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["info", "x"], "free some memory, or take a smaller model"),
        (["evaluate", "x", "--data", "y"], OUT_OF_MEMORY_HINT),
    ],
)
def test_advice_when_memory_runs_out_can_be_followed(monkeypatch, capsys, arguments, advice):
    def without_memory(args):
        raise MemoryError

    monkeypatch.setattr(commands, "info", without_memory)
    monkeypatch.setattr(measure, "evaluate", without_memory)
    assert parser.main(arguments) == 2
    assert capsys.readouterr().err.strip().endswith(advice)
