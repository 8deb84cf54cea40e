"""What can happen to a training run from outside: the last good state stays, and the error is one sentence."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import CLASSES
from PIL import Image
from test_train import TINY, CrashError, Images, crash, fresh, run

import stratavit
from stratavit import ArtifactError, StrataViTError, checkpoint, lock
from stratavit.augment import TrainingFolder, training_transform
from stratavit.data import ImageFolder, image_loader
from stratavit.lock import Lock

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
paths = [str(Path(stratavit.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


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
    state = dict(checkpoint.read_state(folder))
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


def holder(folder, **changes):
    content = {"pid": os.getpid(), "host": socket.gethostname(), "begun": "now", "ticks": lock._ticks(os.getpid())}
    (folder / lock.FILE).write_text(json.dumps(content | changes))


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_a_folder_that_is_in_use(folder, host, resume):
    holder(folder, **({"host": host} if host else {}))
    state = (folder / "state.pt").read_bytes()
    with pytest.raises(ArtifactError, match=r"is written to by process \d+ on .*wait for it.*remove .*training\.lock"):
        stratavit.train_piad(fresh(), Images(), None, TINY, folder, resume=resume, overwrite=not resume, cpu=True)
    assert (folder / "state.pt").read_bytes() == state
    assert (folder / lock.FILE).exists()


@pytest.mark.parametrize("gone", ["no such process", "another process of that number"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(folder, gone, capsys):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder(folder, **({"pid": ended.pid} if gone == "no such process" else {"ticks": 1}))
    run(folder, resume=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "took over" in line]
    assert len(lines) == 1
    assert "which is gone" in lines[0]
    assert not (folder / lock.FILE).exists()


@pytest.mark.parametrize("content", [b"", b"x", b"[]", b'{"pid": -1, "host": "a", "begun": "b"}', b"\xff"])
def test_something_else_under_the_name_of_the_lock(folder, content):
    (folder / lock.FILE).write_bytes(content)
    assert "is no lock of StrataViT; remove it" in refused(folder, resume=True)


def test_a_lock_is_given_back_and_only_by_its_holder(tmp_path):
    one, other = Lock(tmp_path), Lock(tmp_path)
    one.take()
    with pytest.raises(ArtifactError, match="is written to by process"):
        other.take()
    other.release()
    assert one.path.exists()
    one.release()
    assert not one.path.exists()
    one.release()


def test_a_stale_lock_is_not_taken_from_one_who_was_faster(tmp_path):
    holder(tmp_path, ticks=1)
    slow = Lock(tmp_path)
    stale = slow.check()
    Lock(tmp_path).take()
    with pytest.raises(FileExistsError):
        slow._put_aside(stale)
    assert json.loads(slow.path.read_text())["pid"] == os.getpid()


def test_killed_outright_and_resumed(tmp_path, capsys):
    """While it runs a second process is refused; after SIGKILL it goes on."""
    script = (
        "import time, test_train as t, pathlib, sys\n"
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
    assert f"from process {running.pid}, which is gone" in capsys.readouterr().err


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
        "import resource, signal, sys, test_train as t\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "half = (Path(sys.argv[1]) / 'state.pt').stat().st_size // 2\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))\n"
        "try:\n"
        "    t.run(Path(sys.argv[1]), resume=True)\n"
        "except t.StrataViTError as error:\n"
        "    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=ENVIRONMENT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert len(lines) == 1, done.stdout + done.stderr
    assert "state.pt" in lines[0]
    assert "the last state is left" in lines[0]
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
    return TrainingFolder(ImageFolder(path, config), training_transform(config, TINY))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_in_the_midst_of_an_epoch(tmp_path, workers, capfd):
    """A few are passed over; if there are many in a row, it is told, and the last state is sound."""
    recipe = dataclasses.replace(TINY, workers=workers, epochs=2)
    net = run(tmp_path / "run", data=image_set(tmp_path / "few", {3, 4}), recipe=recipe)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert "is unreadable; the next image takes its place" in capfd.readouterr().err
    message = refused(tmp_path / "all", data=image_set(tmp_path / "none", set(range(24))), recipe=recipe)
    assert "images in a row are unreadable" in message
    assert checkpoint.read_state(tmp_path / "all")["step"] == 0
    assert not (tmp_path / "all" / lock.FILE).exists()


def test_a_worker_of_an_evaluation_that_is_killed(tmp_path, monkeypatch):
    image_set(tmp_path, set())
    loader = image_loader(tmp_path, fresh().data_config, "val", None, workers=1)
    monkeypatch.setattr(ImageFolder, "__getitem__", lambda self, index: kill())
    with pytest.raises(StrataViTError, match="images: a process that reads images was ended from outside"):
        list(loader)
