"""Killed, terminated or interrupted at any moment: the old or the new is there, and a run goes on as if nothing was."""

import contextlib
import os
import pathlib
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
from children import ENVIRONMENT, child, content, done  # noqa: F401
from helpers import CLASSES, make_model, make_net
from PIL import Image
from training_runs import TINY, assert_same, fresh, outcome, run

import stratavit
from stratavit import SuperNet
from stratavit.artifacts import folder_format, sub_network
from stratavit.cli.parser import main
from stratavit.data import image_folder
from stratavit.files import atomic, folders
from stratavit.training import augmentation
from stratavit.utils import signals

CALLS = ("rename", "replace", "link", "fsync", "mkdir", "rmdir", "unlink", "ftruncate", "chmod")


@contextlib.contextmanager
def struck(number, kill=signal.SIGKILL):
    """Sends this process a signal before the nth call that changes something on the disk."""
    calls, before = [], {name: getattr(os, name) for name in CALLS}

    def called(name, *args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), kill)
        return None if name == "fsync" else before[name](*args, **kwargs)  # no power fails here

    places = [os, *filter(None, [getattr(pathlib, "_normal_accessor", None)])]  # Python 3.10 keeps some of its own
    for name in CALLS:
        for place in places:
            if hasattr(place, name):
                setattr(place, name, partial(called, name))
    try:
        yield calls
    finally:
        for name, function in before.items():
            for place in places:
                if hasattr(place, name):
                    setattr(place, name, function)


def forked(work, number, kill):
    """Does work in a copy of this process, struck at a moment; how that ended."""
    process = os.fork()
    if process == 0:
        code = 3
        try:
            with signals.raised(), struck(number, kill):
                work()
            code = 0
        except KeyboardInterrupt:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def super_networks():
    return [partial(fresh(method).save, overwrite=True) for method in ("paper", "default")]


def small_models():
    net = make_net("plain")
    sizes = [net.extract(spec={"blocks.0.attn": width, "blocks.1.mlp": 20}, verbose=False) for width in (4, 8)]
    return [partial(sub_network.save, model, overwrite=True) for model in sizes]


def files():
    return [lambda out, text=text: folders.write_file(out, text * 1000, overwrite=True) for text in (b"old", b"new")]


def exports():
    """Without torch's exporter, which takes its time."""
    module, models = sys.modules["stratavit.interop.export"], [make_model("plain", seed) for seed in (0, 1)]
    module._to_program = lambda model, example, path: torch.save(model.state_dict(), path)

    def write(out, model):
        module._run_program = lambda path: model
        stratavit.export(model, out, "torch", images=torch.zeros(1, 3, 32, 32), overwrite=True)

    return [partial(write, model=model) for model in models]


WRITERS = {"super-network": super_networks, "small model": small_models, "file": files, "export": exports}


def tree(path):
    return content(path) if path.is_dir() else path.read_bytes() if path.exists() else None


def listed(folder):
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def struck_everywhere(tmp_path, what, kill, swaps):
    """Moment after moment, until the writing ends before its signal comes."""
    write_old, write_new = WRITERS[what]()
    write_old(tmp_path / "old")
    write_new(tmp_path / "new")
    old, new, out = tree(tmp_path / "old"), tree(tmp_path / "new"), tmp_path / "below" / "out"
    if not swaps:
        atomic._exchanged = lambda *args: False
    os.fsync, seen, number, code = lambda handle: None, [], 0, None
    while code != 0:
        number += 1
        if tree(out) != old:
            write_old(out)
        code = forked(partial(write_new, out), number, kill)
        assert code in {0, -kill, 2}, code
        left = [name for name in listed(out.parent) if name != "out"]
        assert len(left) <= 1, left
        seen.append(tree(out))
        if seen[-1] is None:
            assert not swaps
            assert tree(out.parent / left[0] / "old") == old
        assert seen[-1] in (old, new, None)
        if left:
            write_new(out)
            assert tree(out) == new
            assert listed(out.parent) == ["out"], (number, listed(out.parent))
    assert old in seen
    assert new in seen
    assert (None in seen) == (not swaps and kill == signal.SIGKILL and (tmp_path / "old").is_dir())
    print(f"{what}: {number - 1} moments")


@pytest.mark.parametrize(
    ("what", "swaps"), [("super-network", True), ("small model", False), ("file", True), ("export", True)]
)
def test_killed_while_something_is_written(tmp_path, what, swaps):
    """The next write takes away what was left, and puts back what was moved where folders cannot change places."""
    done(struck_everywhere, tmp_path, what, signal.SIGKILL, swaps)


@pytest.mark.parametrize(
    ("what", "kill", "swaps"), [("small model", signal.SIGINT, False), ("file", signal.SIGTERM, True)]
)
def test_interrupted_while_something_is_written(tmp_path, what, kill, swaps):
    done(struck_everywhere, tmp_path, what, kill, swaps)


def struck_anew(tmp_path):
    """Where nothing was, there is nothing or all."""
    _, write = small_models()
    write(tmp_path / "new")
    out, number, code = tmp_path / "below" / "out", 0, None
    while code != 0:
        number += 1
        shutil.rmtree(out.parent, ignore_errors=True)
        code = forked(partial(write, out), number, signal.SIGKILL)
        assert tree(out) in (None, tree(tmp_path / "new"))
    assert tree(out) is not None


def test_killed_while_something_new_is_written(tmp_path):
    done(struck_anew, tmp_path)


# ---- training ---------------------------------------------------------------------------------------------------

ONE = {**TINY.to_dict(), "epochs": 1, "list_epochs": 1, "eval_every": 1}


def train(out, resume=False):
    run(out, recipe=stratavit.Recipe(**ONE), resume=resume)


def killed_while_training(tmp_path):
    """At the first of every kind of call, and at all of the last part."""
    with struck(0) as calls:
        train(tmp_path / "whole")
    expected, total = outcome(tmp_path / "whole"), len(calls)
    chosen = {calls.index(name) + 1 for name in calls} | set(range(total - 14, total, 2))
    resumed = 0
    for number in sorted(chosen):
        out = tmp_path / str(number)
        assert forked(lambda: train(out), number, signal.SIGKILL) == -signal.SIGKILL  # noqa: B023
        if (out / "state.pt").exists():
            resumed += 1
            train(out, resume=True)
        else:
            shutil.rmtree(out, ignore_errors=True)
            train(out)
        assert_same(outcome(out), expected)
        assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert resumed > 6
    print(f"{len(chosen)} of {total} moments")


def test_killed_while_training_touches_the_disk(tmp_path):
    done(killed_while_training, tmp_path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images of seven classes, a super-network, a small and a dense model."""
    folder = tmp_path_factory.mktemp("work")
    for name in range(CLASSES):
        (folder / "data" / str(name)).mkdir(parents=True)
        for number in range(4):
            picture = Image.new("RGB", (40, 36), (30 * name, 60 * number, 200))
            picture.save(folder / "data" / str(name) / f"{number}.png")
    net = make_net("plain", stratified=True)
    net.save(folder / "run")
    stratavit.save(net.extract(macs=0.5, verbose=False), folder / "small")
    stratavit.save(make_model("plain"), folder / "dense")
    return folder


def argv(work, command, out):
    data = ["--data", str(work / "data"), "--out", str(out)]
    if command == "convert":
        return ["convert", str(work / "dense"), *data, "--workers", "0", "--overwrite"]
    options = {"epochs": 2, "batch-size": 8, "lr": 0.02, "repeats": 1, "workers": 0, "tracker": "none"}
    options |= {"list-epochs": 1} if command == "train" else {}
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [command, str(work / {"train": "run", "finetune": "small"}[command]), *data, "--device", "cpu", *flags]


def stopped(work, command, out, kills, at):
    """A command that gets signals while the nth image is read."""
    read, reads = augmentation.TrainingFolder.__getitem__, []

    def called(self, index):
        reads.append(index)
        if len(reads) == at:
            for kill in kills:
                os.kill(os.getpid(), kill)
        return read(self, index)

    augmentation.TrainingFolder.__getitem__ = called
    return main(argv(work, command, out))


def resumed(work, command, out):
    assert main([*argv(work, command, out), "--resume"]) == 0


@pytest.fixture(scope="module")
def wholes(work):
    """Command -> folder of an uninterrupted run."""
    found = {command: work / f"whole-{command}" for command in ("train", "finetune")}
    for command, out in found.items():
        assert main(argv(work, command, out)) == 0
    return found


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("command", "kills"),
    [("train", (TERM,)), ("train", (INT, INT)), ("finetune", (INT,)), ("finetune", (TERM, TERM)), ("train", (INT,))],
)
def test_a_training_that_is_stopped(work, wholes, tmp_path, command, kills):
    out = tmp_path / "run"
    ended = child(stopped, work, command, out, kills, 30)
    assert ended.code == 128 + kills[0], ended.said
    told = [line for line in ended.lines if line.startswith(f"stratavit {command}: ")]
    at_once = f"interrupted at once; the last state in {out} is sound, resume it to go on"
    words = at_once if kills == (INT, INT) else f"stopped after step 4 of 6; resume {out} to go on"
    assert told == [f"stratavit {command}: {words}"], ended.said
    assert "Traceback" not in ended.said
    assert {path.name for path in out.iterdir()} == {"state.pt", "log.jsonl"}
    done(resumed, work, command, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in wholes[command].iterdir()}
    assert (out / "model.safetensors").read_bytes() == (wholes[command] / "model.safetensors").read_bytes()


# ---- conversion -------------------------------------------------------------------------------------------------

PLACES = {
    "calibration": (SuperNet, "stratify"),
    "weights": (folder_format, "save_file"),
    "description": (folder_format, "write_json"),
    "exchange": (atomic, "_exchanged"),
}


def stopped_conversion(work, out, place, kill):
    owner, name = PLACES[place]
    function = getattr(owner, name)

    def called(*args, **kwargs):
        os.kill(os.getpid(), kill)
        return function(*args, **kwargs)

    setattr(owner, name, called)
    return main(argv(work, "convert", out))


@pytest.mark.parametrize("kill", [TERM, INT])
@pytest.mark.parametrize("place", PLACES)
def test_a_conversion_that_is_stopped(work, tmp_path, place, kill):
    shutil.copytree(work / "run", tmp_path / "out")
    before = content(tmp_path)
    ended = child(stopped_conversion, work, tmp_path / "out", place, kill)
    assert ended.code == 128 + kill
    said = {TERM: "terminated", INT: "interrupted"}[kill]
    assert ended.lines == [f"stratavit convert: {said}; nothing half-written was left"]
    assert content(tmp_path) == before
    assert SuperNet.load(tmp_path / "out")


def stopped_with_its_workers(work, out, kill):
    os.setpgrp()
    collate = image_folder._collate

    def called(samples):
        if torch.utils.data.get_worker_info() is not None:
            os.killpg(0, kill)
        return collate(samples)

    image_folder._collate = called
    return main([*argv(work, "convert", out), "--workers", "2"])


@pytest.mark.parametrize("kill", [TERM, INT])
def test_a_conversion_that_is_stopped_with_all_its_workers(work, tmp_path, kill):
    """As by a scheduler, or by Ctrl-C at a terminal."""
    ended = child(stopped_with_its_workers, work, tmp_path / "out", kill)
    assert ended.code == 128 + kill, ended.said
    said = {TERM: "terminated", INT: "interrupted"}[kill]
    assert ended.lines == [f"stratavit convert: {said}; nothing half-written was left"]
    assert list(tmp_path.iterdir()) == []
