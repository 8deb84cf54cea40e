"""Killed, terminated or interrupted at any moment: the old or the new is there, and a run goes on as if nothing was."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
from functools import partial
from importlib import import_module

import pytest
import torch
from children import child, content, done
from helpers import make_model, make_net
from training_runs import ONE, TINY, argv, assert_same, fresh, make_work, names, outcome, run

import stratavit
from stratavit.artifacts import sub_network
from stratavit.cli.parser import main
from stratavit.data import image_folder
from stratavit.files import atomic
from stratavit.reports import plots
from stratavit.training import augmentation, run_files
from stratavit.training.trainer import Trainer
from stratavit.utils import signals

CALLS = ("rename", "replace", "link", "fsync", "mkdir", "rmdir", "unlink", "ftruncate", "chmod")
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL


@contextlib.contextmanager
def struck(number, kill=KILL):
    """Sends this process a signal before the nth call that changes something on the disk."""
    calls, before = [], {name: getattr(os, name) for name in CALLS}

    def called(name, *args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), kill)
        return None if name == "fsync" else before[name](*args, **kwargs)  # no power fails here

    places = [os, *filter(None, [getattr(pathlib, "_normal_accessor", None)])]  # Python 3.10 keeps some of its own
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            for place in places:
                if hasattr(place, name):
                    patch.setattr(place, name, partial(called, name))
        yield calls


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


def exports():
    """Files that a library writes, without torch's exporter, which is slow."""
    module, models = import_module("stratavit.interop.export"), [make_model("plain", seed) for seed in (0, 1)]
    module._to_program = lambda model, example, path: torch.save(model.state_dict(), path)

    def write(out, model):
        module._run_program = lambda path: model
        stratavit.export(model, out, "torch", images=torch.zeros(1, 3, 32, 32), overwrite=True)

    return [partial(write, model=model) for model in models]


WRITERS = {"super-network": super_networks, "small model": small_models, "export": exports}


def tree(path):
    return content(path) if path.is_dir() else path.read_bytes() if path.exists() else None


def struck_everywhere(tmp_path, what, kill, swaps, stride):
    """Moment after moment, until the writing ends before its signal comes."""
    write_old, write_new = WRITERS[what]()
    write_old(tmp_path / "old")
    write_new(tmp_path / "new")
    old, new, out = tree(tmp_path / "old"), tree(tmp_path / "new"), tmp_path / "below" / "out"
    out.parent.mkdir()
    if not swaps:
        atomic._exchanged = lambda *args: False
    os.fsync, seen, number, code = lambda handle: None, [], 1, None
    while code != 0:
        if tree(out) != old:
            write_old(out)
        code = forked(partial(write_new, out), number, kill)
        assert code in {0, -kill, 2}, code
        left = names(out.parent) - {"out"}
        assert len(left) <= 1, left
        seen.append(tree(out))
        assert seen[-1] in (old, new, None)
        if seen[-1] is None:
            assert not swaps
            assert tree(out.parent / left.pop() / "old") == old
            left = {"old"}
        if left:
            write_new(out)
            assert tree(out) == new
            assert names(out.parent) == {"out"}, (number, names(out.parent))
        number += stride
    assert old in seen
    assert new in seen
    assert (None in seen) == (not swaps and kill == KILL and (tmp_path / "old").is_dir())


@pytest.mark.parametrize(
    ("what", "kill", "swaps", "stride"),
    [
        ("super-network", KILL, True, 6),
        ("small model", KILL, False, 1),
        ("export", KILL, True, 1),
        ("small model", INT, False, 3),
        ("export", TERM, True, 2),
    ],
)
def test_struck_while_something_is_written(tmp_path, what, kill, swaps, stride):
    """The next write removes what was left, and puts back what was moved where folders cannot change places."""
    done(struck_everywhere, tmp_path, what, kill, swaps, stride)


def struck_where_nothing_was(tmp_path):
    _, write = small_models()
    write(tmp_path / "new")
    out, number, code = tmp_path / "below" / "out", 0, None
    while code != 0:
        number += 1
        shutil.rmtree(out.parent, ignore_errors=True)
        code = forked(partial(write, out), number, KILL)
        assert tree(out) in (None, tree(tmp_path / "new"))
    assert tree(out) is not None


def test_killed_while_something_new_is_written(tmp_path):
    """There is nothing, or all of it."""
    done(struck_where_nothing_was, tmp_path)


# ---- training ---------------------------------------------------------------------------------------------------


def killed_while_training(tmp_path):
    """At the first of every kind of call, and at some of the last part."""
    plots.plot = plots.plot_history = lambda points, path, title: path.write_bytes(b"drawn")  # drawing is slow
    with struck(0) as calls:
        run(tmp_path / "uncut", recipe=ONE)
    expected, total = outcome(tmp_path / "uncut"), len(calls)
    chosen = {calls.index(name) + 1 for name in calls} | set(range(total - 12, total, 4))
    resumed = 0
    for number in sorted(chosen):
        out = tmp_path / str(number)
        assert forked(lambda: run(out, recipe=ONE), number, KILL) == -KILL  # noqa: B023
        resume = (out / "state.pt").exists()
        resumed += resume
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        run(out, recipe=ONE, resume=resume)
        assert_same(outcome(out), expected)
        assert names(out) == names(tmp_path / "uncut")
    assert resumed > 4


def test_killed_while_training_touches_the_disk(tmp_path):
    done(killed_while_training, tmp_path)


def signalled_with_its_workers(out):
    os.setpgrp()
    update = Trainer.update

    def signalled(self, batches):
        if self.step == 3:
            os.killpg(0, TERM)
        update(self, batches)

    Trainer.update = signalled
    run(out, recipe=dataclasses.replace(TINY, workers=2, accumulate=1))


def test_terminated_with_all_its_workers(tmp_path):
    """A scheduler signals the whole group: the workers must not die before the state is saved."""
    assert "stopped after step 4 of 18" in child(signalled_with_its_workers, tmp_path / "run").said
    assert run_files.read_state(tmp_path / "run")["step"] == 4


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def uncut(work):
    """Command -> folder of an uninterrupted run."""
    found = {command: work / f"uncut-{command}" for command in ("train", "finetune")}
    for command, out in found.items():
        assert main(argv(work, command, out)) == 0
    return found


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


@pytest.mark.parametrize(
    ("command", "kills"), [("train", (INT, INT)), ("finetune", (INT,)), ("finetune", (TERM, TERM))]
)
def test_a_training_that_is_stopped(work, uncut, tmp_path, command, kills):
    out = tmp_path / "run"
    ended = child(stopped, work, command, out, kills, 30)
    assert ended.code == 128 + kills[0], ended.said
    at_once = f"interrupted at once; the last state in {out} is sound, resume it to go on"
    words = at_once if kills == (INT, INT) else f"stopped after step 4 of 6; resume {out} to go on"
    said = [line for line in ended.lines if line.startswith(f"stratavit {command}: ")]
    assert said == [f"stratavit {command}: {words}"], ended.said
    assert "Traceback" not in ended.said
    assert names(out) == {"state.pt", "log.jsonl"}
    assert main([*argv(work, command, out), "--resume"]) == 0
    assert names(out) == names(uncut[command])
    assert (out / "model.safetensors").read_bytes() == (uncut[command] / "model.safetensors").read_bytes()


# ---- conversion -------------------------------------------------------------------------------------------------

SAID = {TERM: "terminated", INT: "interrupted"}


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
    assert ended.lines == [f"stratavit convert: {SAID[kill]}; nothing half-written was left"]
    assert names(tmp_path) == set()
