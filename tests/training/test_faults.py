"""What can happen to a training run from outside: the last good state stays, and the error is one sentence."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from children import ENVIRONMENT, child, content, done
from helpers import CLASSES, make_model
from PIL import Image
from safetensors.torch import save_file
from training_runs import TINY, CrashError, Images, assert_same, crash, fresh, outcome, run

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet
from stratavit.cli.parser import main
from stratavit.data.image_folder import ImageFolder, image_loader
from stratavit.evaluation.latency import Setting, time_model
from stratavit.files import folders, lock
from stratavit.files.lock import Lock
from stratavit.training import run_files
from stratavit.training.augmentation import TrainingFolder, training_transform
from stratavit.utils.progress import track


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


@pytest.mark.parametrize(
    "key", ["given", "strata", "weights", "ema", "means", "moments", "optimiser", "scaler", "step"]
)
def test_a_state_of_a_release_that_did_not_know_a_key(folder, key):
    rewrite(folder, lambda state: [state.pop(key), state.update(release="0.0.9")])
    message = refused(folder, resume=True)
    assert f"lacks '{key}'" in message
    assert "written by StrataViT 0.0.9; resume with that release" in message


def test_a_state_that_does_not_name_its_release(folder):
    rewrite(folder, lambda state: [state.pop("given"), state.pop("release")])
    assert "written by an older StrataViT, before states named theirs" in refused(folder, resume=True)


SOUND = {("recipe", "[]"), ("recipe", "{}"), ("given", "[]"), ("strata", "[]"), ("step", "5")}


@pytest.mark.parametrize("junk", [None, 5, "x", [], {}, torch.zeros(3)])
@pytest.mark.parametrize("key", ["recipe", "kind", "given", "strata", "weights", "means", "optimiser", "step", "loss"])
def test_a_state_with_something_else_in_it(folder, key, junk):
    before = sorted(path.name for path in folder.iterdir())
    rewrite(folder, lambda state: state.update({key: junk}))
    if (key, str(junk)) in SOUND:
        return
    refused(folder, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == before


# ---- two processes in one folder -------------------------------------------------------------------------------


@contextmanager
def held(folder, content=None):
    """The folder is held by this process; `content`: what the file says in the place of that."""
    mine = Lock(folder)
    mine.take()
    if content is not None:
        mine.path.write_bytes(content)
    try:
        yield
    finally:
        mine.release()


def lies(**changes):
    """What a file of another container may say: numbers of processes and names of hosts are no guide."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "begun": "now"} | changes).encode()


HOLDERS = {
    "this process": (None, rf"process {os.getpid()} on "),
    "a process that is not here": (lies(pid=2**22 + 1), r"process 4194305 on "),
    "another host": (lies(host="elsewhere"), r"process \d+ on elsewhere, begun now"),
    "nothing said": (b"", "another process"),
    "nonsense": (b"\xff", "another process"),
    "a list": (b"[]", "another process"),
    "no name": (lies(pid="x"), "another process"),
    "a name that breaks the line": (lies(host="a\nb"), "another process"),
    "a name that fills the line": (lies(host="a" * 1000), "another process"),
}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("who", HOLDERS)
def test_a_folder_that_is_in_use(folder, who, resume):
    said, named = HOLDERS[who]
    state = (folder / "state.pt").read_bytes()
    with held(folder, said):
        content = (folder / lock.FILE).read_bytes()
        with pytest.raises(ArtifactError, match=rf"is written to by {named}.*wait for it, or give another folder"):
            stratavit.train_piad(fresh(), Images(), None, TINY, folder, resume=resume, overwrite=not resume, cpu=True)
        assert (folder / lock.FILE).read_bytes() == content
    assert (folder / "state.pt").read_bytes() == state


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"[]", b"\xff", lies(), lies(host="elsewhere"), lies(pid=1)],
    ids=["empty", "text", "list", "bytes", "this process", "elsewhere", "the first process"],
)
def test_a_file_that_nobody_holds_is_no_lock(folder, content):
    """Of a run that was killed, here or in another container, even if its number is that of a process that runs."""
    (folder / lock.FILE).write_bytes(content)
    Lock(folder).check()
    run(folder, resume=True)
    assert not (folder / lock.FILE).exists()


PLACES = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link": lambda path: path.symlink_to("elsewhere"),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("place", PLACES)
def test_something_else_under_the_name_of_the_lock(folder, place):
    (folder / "elsewhere").write_bytes(b"kept")
    PLACES[place](folder / lock.FILE)
    assert lock.FILE in refused(folder, resume=True)
    assert (folder / "elsewhere").read_bytes() == b"kept"


def test_a_lock_is_given_back_and_only_by_its_holder(tmp_path):
    one, other = Lock(tmp_path), Lock(tmp_path)
    one.take()
    with pytest.raises(ArtifactError, match="is written to by process"):
        other.take()
    other.release()
    assert one.path.exists()
    with pytest.raises(ArtifactError, match="is written to by process"):
        other.check()
    one.release()
    assert not one.path.exists()
    one.release()
    other.check()
    other.take()
    other.release()
    assert not any(tmp_path.iterdir())


def test_a_lock_of_another_is_not_removed(tmp_path):
    """Somebody removed the file by hand, and another run began."""
    one, other = Lock(tmp_path), Lock(tmp_path)
    one.take()
    one.path.unlink()
    other.take()
    one.release()
    assert other.path.exists()
    other.release()


def test_a_file_that_its_holder_takes_away_is_opened_anew(tmp_path, monkeypatch):
    """Locked the moment after: the file that was opened is in no folder any more."""
    path, take = tmp_path / lock.FILE, lock._lock
    path.touch()
    opened = []

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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_that_cannot_lock(folder, monkeypatch, number):
    def unable(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock, "_lock", unable)
    message = refused(folder, resume=True)
    assert f"cannot lock {folder / lock.FILE}: {os.strerror(number)}; give a folder" in message


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


def test_killed_outright_and_resumed(tmp_path):
    """While it runs a second process is refused; after SIGKILL it goes on."""
    script = (
        "import time, training_runs as t, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "def wait():\n"
        "    (out / 'waiting').touch(); time.sleep(60)\n"
        "t.run(out, data=t.Images(40, wait))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert f"is written to by process {running.pid}" in refused(tmp_path / "run", resume=True)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    run(tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / lock.FILE).exists()


# ---- disks, images, workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/proc/none/run", "file/run"])
def test_a_folder_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").touch()
    message = refused(Path(place) if place.startswith("/") else tmp_path / place)
    assert "cannot write" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="file sizes are limited by Linux's means")
def test_a_disk_that_fills_while_the_state_is_written(folder):
    """RLIMIT_FSIZE stands for the disk: nothing larger than half a state can be written."""
    before = {name: (folder / name).read_bytes() for name in ("state.pt", "log.jsonl")}
    script = (
        "import resource, signal, sys, training_runs as t\n"
        "from stratavit import StrataViTError\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "half = (Path(sys.argv[1]) / 'state.pt').stat().st_size // 2\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))\n"
        "try:\n"
        "    t.run(Path(sys.argv[1]), resume=True)\n"
        "except StrataViTError as error:\n"
        "    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=ENVIRONMENT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert len(lines) == 1, done.stdout + done.stderr
    assert "state.pt" in lines[0]
    assert f"the last state in {folder} is sound, resume it to go on" in lines[0]
    assert (folder / "state.pt").read_bytes() == before["state.pt"]
    run(folder, resume=True)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_that_is_killed(folder):
    recipe = dataclasses.replace(TINY, workers=1)
    state = (folder / "state.pt").read_bytes()
    message = refused(folder, data=Images(3, kill), recipe=recipe, resume=True)
    assert "a process that reads images was ended from outside" in message
    assert f"the last state in {folder} is sound" in message
    assert (folder / "state.pt").read_bytes() == state
    assert not (folder / lock.FILE).exists()
    run(folder, recipe=recipe, resume=True)


def image_set(path, damaged):
    """24 images of 7 classes, of which some are no images."""
    for number in range(24):
        label = path / str(number % CLASSES)
        label.mkdir(parents=True, exist_ok=True)
        if number in damaged:
            (label / f"{number}.png").write_bytes(b"no image")
        else:
            Image.new("RGB", (40, 40), (9 * number, 90, 200)).save(label / f"{number}.png")
    config = fresh().data_config
    return TrainingFolder(image_loader(path, config, "train", None).dataset, training_transform(config, TINY))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_in_the_midst_of_an_epoch(tmp_path, workers, capfd):
    """A few are passed over; if there are many in a row, it is told, and the last state is sound."""
    recipe = dataclasses.replace(TINY, workers=workers, epochs=2)
    net = run(tmp_path / "run", data=image_set(tmp_path / "few", {3, 4}), recipe=recipe)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert "is unreadable; the next image takes its place" in capfd.readouterr().err
    message = refused(tmp_path / "all", data=image_set(tmp_path / "none", set(range(24))), recipe=recipe)
    assert "images in a row are unreadable" in message
    assert run_files.read_state(tmp_path / "all")["step"] == 0
    assert not (tmp_path / "all" / lock.FILE).exists()


# ---- memory -----------------------------------------------------------------------------------------------------


def exhaust():
    raise MemoryError


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_without_memory(folder):
    recipe = dataclasses.replace(TINY, workers=1)
    state = (folder / "state.pt").read_bytes()
    message = refused(folder, data=Images(3, exhaust), recipe=recipe, resume=True)
    assert message == (
        "train: memory ran out in a process that reads images; try again with fewer workers (--workers) or smaller "
        f"batches (--batch-size); the last state in {folder} is sound, resume it to go on"
    )
    assert (folder / "state.pt").read_bytes() == state
    run(folder, recipe=recipe, resume=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (kill, "images: a process that reads images was ended from outside"),
        (exhaust, "images: memory ran out in a process that reads images; try again with"),
    ],
)
def test_a_worker_of_an_evaluation_that_fails(tmp_path, monkeypatch, fault, message):
    image_set(tmp_path, set())
    loader = image_loader(tmp_path, fresh().data_config, "val", None, workers=1)
    monkeypatch.setattr(ImageFolder, "__getitem__", lambda self, index: fault())
    with pytest.raises(StrataViTError, match=message):
        list(loader)


def limited(more=64 << 20):
    """From now on this process gets so many bytes more, and no others."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def greedy(what):
    limited()
    {"torch": torch.zeros, "python": bytearray, "numpy": np.zeros}[what](1 << 28)


def trained_without_memory(folder, what):
    state = (folder / "state.pt").read_bytes()
    message = refused(folder, data=Images(20, lambda: greedy(what)), resume=True)
    assert message == (
        "train: memory ran out on the device or here; try again with fewer workers (--workers) or smaller batches "
        f"(--batch-size); the last state in {folder} is sound, resume it to go on"
    ), message
    assert (folder / "state.pt").read_bytes() == state
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "state.pt"]


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")


@ON_LINUX
@pytest.mark.parametrize("what", ["torch", "python", "numpy"])
def test_training_without_memory(folder, what):
    done(trained_without_memory, folder, what)
    run(folder, resume=True)


def converted_without_memory(tmp_path, what):
    SuperNet.stratify = lambda *args, **kwargs: greedy(what)
    command = ["convert", str(tmp_path / "dense"), "--data", str(tmp_path / "images"), "--workers", "0"]
    return main([*command, "--out", str(tmp_path / "out"), "--overwrite"])


@ON_LINUX
@pytest.mark.parametrize("what", ["torch", "python"])
def test_a_conversion_without_memory(tmp_path, what):
    image_set(tmp_path / "images", set())
    stratavit.save(make_model("plain"), tmp_path / "dense")
    stratavit.save(make_model("plain"), tmp_path / "out")
    before = content(tmp_path)
    ended = child(converted_without_memory, tmp_path, what)
    advice = "try again with fewer workers (--workers) or smaller batches (--batch-size)"
    assert ended.code == 2
    assert ended.lines == [f"stratavit convert: memory ran out on the device or here; {advice}"]
    assert content(tmp_path) == before


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

DAY = 86400.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    run(folder := tmp_path_factory.mktemp("whole") / "run")
    return folder


def jumping(monkeypatch, step):
    """The clock on the wall jumps at every look at it."""
    real, jumps = {name: getattr(time, name) for name in ("time", "time_ns", "strftime")}, []

    def shifted():
        jumps.append(step)
        return real["time"]() + step * len(jumps)

    monkeypatch.setattr(time, "time", shifted)
    monkeypatch.setattr(time, "time_ns", lambda: int(shifted() * 1e9))
    monkeypatch.setattr(time, "strftime", lambda form, *at: real["strftime"](form, *(at or (time.gmtime(shifted()),))))
    return jumps


@pytest.mark.parametrize("step", [DAY, -DAY])
def test_a_clock_that_jumps(begun, whole, tmp_path, monkeypatch, step):
    """Runs, resumption, take-over of a lock, progress and timings go by the clock that only runs forward."""
    recipe, folder = dataclasses.replace(TINY, tracker="tensorboard"), tmp_path / "run"
    shutil.copytree(begun, folder)
    jumps = jumping(monkeypatch, step)
    (folder / lock.FILE).write_bytes(lies(begun=time.strftime("%Y-%m-%d %H:%M:%S")))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(folder, recipe=recipe, resume=True)
    assert len(jumps) > 5
    assert_same(outcome(folder)[1:], outcome(whole)[1:])
    seconds = [row["seconds"] for row in run_files.Journal(folder / "log.jsonl").rows() if row["kind"] == "epoch"]
    assert all(0 < second < 60 for second in seconds), seconds
    timing = time_model(make_model("plain"), (3, 32, 32), Setting(seconds=0.02))
    assert 0 < timing.median_ms <= timing.p90_ms < 10_000
    assert list(track(range(3), "three")) == [0, 1, 2]


def test_no_elapsed_time_is_read_off_the_wall():
    """`time.time` and what else goes by that clock is for people to read, never to subtract."""
    source = Path(stratavit.__file__).parent
    found = {
        f"{path.name}: {match}"
        for path in source.rglob("*.py")
        for match in re.findall(
            r"time\.(?:time|time_ns|ctime|localtime|gmtime|strftime)\b|datetime|st_[mc]time", path.read_text()
        )
    }
    assert found == {"lock.py: time.strftime"}
