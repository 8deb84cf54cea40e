"""What can happen to a training run from outside: the last good state stays, and the error is one sentence."""

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
from test_train import TINY, CrashError, Images, crash, fresh, run, trainer  # noqa: F401

import stratavit
from stratavit import ArtifactError, StrataViTError, checkpoint, lock
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


@pytest.mark.parametrize("junk", [None, 5, "x", [], {}, torch.zeros(3)])
@pytest.mark.parametrize("key", ["recipe", "kind", "given", "strata", "weights", "means", "optimiser", "step", "loss"])
def test_a_state_with_something_else_in_it(folder, key, junk):
    before = sorted(path.name for path in folder.iterdir())
    rewrite(folder, lambda state: state.update({key: junk}))
    if key == "recipe" and junk in ([], {}):
        return  # a recipe of defaults
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
