"""What can happen to a training run from outside: the last good state stays, and the error is one sentence."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from children import content, done
from helpers import make_model
from safetensors.torch import save_file
from training_runs import TINY, CrashError, Images, assert_same, crash, fresh, names, outcome, run, write_images

import stratavit
from stratavit import ArtifactError, StrataViTError
from stratavit.data.image_folder import ImageFolder, image_loader
from stratavit.evaluation.latency import Setting, time_model
from stratavit.files import folders, lock
from stratavit.files.lock import Lock
from stratavit.training import run_files
from stratavit.training.augmentation import TrainingFolder, training_transform
from stratavit.utils.progress import track

WORKER = dataclasses.replace(TINY, workers=1)
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="files and memory are limited by Linux's means")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run that crashed."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(CrashError):
        run(folder, data=Images(40, crash))
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def refused(*args, **kwargs):
    with pytest.raises(StrataViTError) as caught:
        run(*args, **kwargs)
    assert str(caught.value).isprintable()
    return str(caught.value)


# ---- states of other releases ----------------------------------------------------------------------------------


def rewrite(folder, edit):
    state = dict(run_files.read_state(folder))
    edit(state)
    torch.save(state, folder / "state.pt")


@pytest.mark.parametrize(("key", "release"), [("given", "0.0.9"), ("step", None)])
def test_a_state_of_a_release_that_did_not_know_a_key(folder, key, release):
    def edit(state):
        del state[key], state["release"]
        if release is not None:
            state["release"] = release

    rewrite(folder, edit)
    message = refused(folder, resume=True)
    assert f"'{key}'" in message
    assert (release or "before states named theirs") in message


JUNK = {"recipe": None, "given": "x", "weights": [], "means": {}, "loss": None, "optimiser": torch.zeros(3)}


@pytest.mark.parametrize("key", JUNK)
def test_a_state_with_something_else_in_it(folder, key):
    before = names(folder)
    rewrite(folder, lambda state: state.update({key: JUNK[key]}))
    refused(folder, resume=True)
    assert names(folder) == before


# ---- two processes in one folder -------------------------------------------------------------------------------


def lies(**changes):
    """What a file of another container may say: numbers of processes and names of hosts are no guide."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "begun": "now"} | changes).encode()


def test_a_folder_that_is_in_use(folder, monkeypatch):
    """Neither resumed nor emptied."""
    monkeypatch.setattr(lock, "PAUSE", 0)
    mine = Lock(folder)
    mine.take()
    before = content(folder)
    for resume in (True, False):
        with pytest.raises(ArtifactError, match=rf"process {os.getpid()} on {socket.gethostname()}, begun"):
            stratavit.train_piad(fresh(), Images(), None, TINY, folder, resume=resume, overwrite=not resume, cpu=True)
    assert content(folder) == before
    mine.release()


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (lies(host="elsewhere"), r"process \d+ on elsewhere, begun now"),
        *[(said, "another process") for said in (b"", b"[]", b"{}", lies(host="a\nb"), lies(host="a" * 1000))],
    ],
    ids=range(6),
)
def test_a_holder_is_named_as_its_file_says(tmp_path, monkeypatch, said, named):
    monkeypatch.setattr(lock, "PAUSE", 0)
    mine = Lock(tmp_path)
    mine.take()
    mine.path.write_bytes(said)
    with pytest.raises(ArtifactError, match=named):
        Lock(tmp_path).take()
    mine.release()


PLACES = {"folder": Path.mkdir, "pipe": os.mkfifo, "link": lambda path: path.symlink_to("elsewhere")}


@pytest.mark.parametrize("place", PLACES)
def test_something_else_under_the_name_of_the_lock(folder, place):
    (folder / "elsewhere").write_bytes(b"kept")
    PLACES[place](folder / lock.FILE)
    assert lock.FILE in refused(folder, resume=True)
    assert (folder / "elsewhere").read_bytes() == b"kept"


def test_a_lock_is_given_back_only_by_its_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PAUSE", 0)
    one, other = Lock(tmp_path), Lock(tmp_path)
    one.take()
    with pytest.raises(ArtifactError):
        other.take()
    other.release()
    assert one.path.exists()
    one.path.unlink()  # as somebody may; then another run begins
    other.take()
    one.release()
    assert other.path.exists()
    other.release()
    other.release()
    assert names(tmp_path) == set()


def test_a_file_that_its_holder_removes_is_opened_again(tmp_path, monkeypatch):
    """Locked the moment after: the file that was opened is in no folder any more."""
    path, take, opened = tmp_path / lock.FILE, lock._lock, []
    path.touch()

    def late(handle):
        if not opened:
            path.unlink()
        opened.append(handle)
        take(handle)

    monkeypatch.setattr(lock, "_lock", late)
    mine = Lock(tmp_path)
    mine.take()
    assert len(opened) == 2
    assert os.path.samestat(path.stat(), os.fstat(mine.handle))
    mine.release()


def test_a_disk_that_cannot_lock(folder, monkeypatch):
    def unable(handle):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock, "_lock", unable)
    assert f"{folder / lock.FILE}: {os.strerror(errno.ENOLCK)}" in refused(folder, resume=True)


def test_children_do_not_hold_what_their_maker_held(tmp_path):
    """Processes that read images outlive a run that is killed by some seconds."""
    said, ends = os.pipe(), os.pipe()
    maker = os.fork()
    if maker == 0:
        mine = Lock(tmp_path)
        mine.take()
        if os.fork() == 0:
            os.close(ends[1])
            os.write(said[1], b"x")
            os.read(ends[0], 1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.read(said[0], 1)
    os.waitpid(maker, 0)
    mine = Lock(tmp_path)
    mine.take()
    mine.release()
    for handle in (*said, *ends):
        os.close(handle)


# ---- disks, images, workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/proc/none/run", "file/run"])
def test_a_folder_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").touch()
    assert f"cannot write {tmp_path / place}" in refused(tmp_path / place)  # an absolute place is itself
    assert names(tmp_path) == {"file"}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def exhaust():
    raise MemoryError


FAULTS = [(kill, "ended from outside"), (exhaust, "memory ran out in a process that reads images")]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_worker_that_is_killed_or_without_memory(folder, fault, said):
    before = content(folder)
    message = refused(folder, data=Images(3, fault), recipe=WORKER, resume=True)
    assert said in message
    assert "fewer workers (--workers)" in message
    assert f"the last state in {folder} is sound, resume it to go on" in message
    assert content(folder) == before
    run(folder, recipe=WORKER, resume=True)


def test_a_worker_of_an_evaluation_that_is_killed(tmp_path, monkeypatch):
    loader = image_loader(write_images(tmp_path / "data"), fresh().data_config, "val", None, workers=1)
    monkeypatch.setattr(ImageFolder, "__getitem__", lambda self, index: kill())
    with pytest.raises(StrataViTError, match="ended from outside"):
        list(loader)


def test_many_unreadable_images_in_a_row(tmp_path, monkeypatch):
    """An error, where a few are passed over; the last state is sound."""
    monkeypatch.setattr("stratavit.training.augmentation.TRIES", 3)
    for path in write_images(tmp_path / "data").rglob("[1-3].png"):
        path.write_bytes(b"not an image")
    config = fresh().data_config
    data = TrainingFolder(
        image_loader(tmp_path / "data", config, "train", None).dataset, training_transform(config, TINY)
    )
    assert "3 images in a row" in refused(tmp_path / "run", data=data)
    assert run_files.read_state(tmp_path / "run")["step"] == 0
    assert names(tmp_path / "run") == {"state.pt", "log.jsonl"}


# ---- memory -----------------------------------------------------------------------------------------------------


def limited(more=64 << 20):
    """From now on this process gets so many bytes more, and no others."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def greedy():
    limited()
    torch.zeros(1 << 28)


def trained_without_memory(folder):
    before = content(folder)
    message = refused(folder, data=Images(20, greedy), resume=True)
    assert "memory ran out on the device or here" in message
    assert f"the last state in {folder} is sound, resume it to go on" in message
    assert content(folder) == before


@ON_LINUX
def test_training_without_memory(folder):
    done(trained_without_memory, folder)
    run(folder, resume=True)


def read_without_memory(folder):
    """Sound files that do not fit are not called damaged."""
    big = torch.zeros(64 << 18)
    save_file({"a": big}, folder / "a.safetensors")
    run_files.write_state(folder, {"a": big})
    del big
    limited(16 << 20)
    for read in (lambda: folders.read_tensors(folder / "a.safetensors"), lambda: run_files.read_state(folder)):
        with pytest.raises(MemoryError):
            read()


@ON_LINUX
def test_files_larger_than_memory(tmp_path):
    done(read_without_memory, tmp_path)


# ---- clocks -----------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps(folder, tmp_path, monkeypatch):
    """A day back at every look: runs, trackers, locks that nobody holds, progress and timings go by the other clock."""
    run(tmp_path / "uncut")
    real, jumps = {name: getattr(time, name) for name in ("time", "strftime")}, []

    def shifted():
        jumps.append(-86400)
        return real["time"]() + sum(jumps)

    monkeypatch.setattr(time, "time", shifted)
    monkeypatch.setattr(time, "time_ns", lambda: int(shifted() * 1e9))
    monkeypatch.setattr(time, "strftime", lambda form, *at: real["strftime"](form, *(at or (time.gmtime(shifted()),))))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    (folder / lock.FILE).write_bytes(lies(begun=time.strftime("%Y-%m-%d %H:%M:%S")))
    run(folder, recipe=dataclasses.replace(TINY, tracker="tensorboard"), resume=True)
    assert list(folder.rglob("events.out.tfevents*"))
    seconds = [row["seconds"] for row in run_files.Journal(folder / "log.jsonl").rows() if row["kind"] == "epoch"]
    assert all(0 < second < 600 for second in seconds), seconds
    timing = time_model(make_model("plain"), (3, 32, 32), Setting(seconds=0.02))
    assert 0 < timing.median_ms <= timing.p90_ms < 10_000
    assert list(track(range(3), "three")) == [0, 1, 2]
    assert jumps
    assert lock.FILE not in names(folder)
    assert_same(outcome(folder)[1:], outcome(tmp_path / "uncut")[1:])
