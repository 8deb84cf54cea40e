"""Processes that want the same place at the same moment, and one that dies while others count on it."""

import os
import re
import signal
import socket
import time
from contextlib import ExitStack
from multiprocessing import get_context

import pytest
import torch
from children import started
from test_signals import argv, work  # noqa: F401
from training_runs import run

import stratavit
from stratavit import SuperNet
from stratavit.cli.parser import main
from stratavit.files import lock
from stratavit.training import launch, trainer

ROUNDS = 2


def racing(work, out, barrier, overwrite):  # noqa: F811
    """One of two trainings that begin together; who runs does not end before the other has."""
    train = trainer.Trainer.run

    def last(self):
        barrier.wait(300)
        train(self)

    trainer.Trainer.run = last
    make = launch.make_folder

    def together(*args):
        barrier.wait(300)
        make(*args)

    launch.make_folder = together
    codes = []
    for number in range(ROUNDS):
        flags = ["--overwrite"] if overwrite else []
        codes.append(main([*argv(work, "train", out / str(number)), "--epochs", "1", "--list-epochs", "1", *flags]))
        if codes[-1] == 2:
            barrier.wait(300)
    print("codes", *codes)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_trainings_in_one_folder(work, tmp_path, overwrite):  # noqa: F811
    """Begun at the same moment: one trains, the other is told by whom the folder is held."""
    if overwrite:
        for number in range(ROUNDS):
            stratavit.save(SuperNet.load(work / "run").extract(macs=0.5, verbose=False), tmp_path / str(number))
    barrier = get_context("forkserver").Barrier(2)
    with ExitStack() as stack:
        both = [stack.enter_context(started(racing, work, tmp_path, barrier, overwrite)) for _ in range(2)]
        for one in both:
            one.join(300)
        said = [one.said() for one in both]
    codes = [[int(code) for code in re.search(r"^codes (.*)$", text, re.MULTILINE)[1].split()] for text in said]
    assert [sorted(pair) for pair in zip(*codes, strict=True)] == [[0, 2]] * ROUNDS, said
    for text, other in zip(said, reversed(both), strict=True):
        told = [line for line in text.splitlines() if line.startswith("stratavit train: ")]
        assert all(f"is written to by process {other.pid} on {socket.gethostname()}" in line for line in told), said
        assert "Traceback" not in text
    for number in range(ROUNDS):
        SuperNet.load(tmp_path / str(number))
        assert not (tmp_path / str(number) / lock.FILE).exists()


def converting(work, out, barrier, overwrite):  # noqa: F811
    """One of two conversions that come to their end together."""
    move_into_place = stratavit.files.folders.move_into_place

    def together(*args):
        barrier.wait(300)
        move_into_place(*args)

    stratavit.files.folders.move_into_place = together
    arguments = argv(work, "convert", out)
    return main(arguments if overwrite else arguments[:-1])


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_conversions_to_one_folder(work, tmp_path, overwrite):  # noqa: F811
    """Without --overwrite the second is refused, with it the last one stays; either way the folder is whole."""
    barrier = get_context("forkserver").Barrier(2)
    with ExitStack() as stack:
        both = [stack.enter_context(started(converting, work, tmp_path / "out", barrier, overwrite)) for _ in range(2)]
        for one in both:
            one.join(300)
        said = [one.said() for one in both]
        assert sorted(one.exitcode for one in both) == ([0, 0] if overwrite else [0, 2]), said
    told = [line for text in said for line in text.splitlines() if line.startswith("stratavit convert:")]
    words = f"stratavit convert: another process wrote {tmp_path / 'out'} meanwhile; give another name or ask to"
    assert [line.startswith(words) for line in told] == [] if overwrite else [True], said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    SuperNet.load(tmp_path / "out")


# ---- launched together ------------------------------------------------------------------------------------------


def rank(number, port, out, waits, resume):
    """One of two processes that train together on CPUs, as a launcher starts them."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if waits:
        update = trainer.Trainer.update

        def watched(self, batches):
            if self.step == 2:
                (out.parent / f"waiting{number}").touch()
                if number == waits - 1:
                    time.sleep(300)
            update(self, batches)

        trainer.Trainer.update = watched
    try:
        run(out, resume=resume)
    except stratavit.StrataViTError as error:
        print("refused:", error)
        return 2
    return 0


def pair(stack, out, waits=0, resume=False):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [stack.enter_context(started(rank, number, port, out, waits, resume)) for number in (0, 1)]


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
@pytest.mark.parametrize("dies", [0, 1])
def test_one_of_two_processes_is_killed(tmp_path, dies):
    """The other ends by itself with a sentence, and the state is sound; meanwhile a second pair is refused."""
    out = tmp_path / "run"
    with ExitStack() as stack:
        first = pair(stack, out, waits=dies + 1)
        wait_for(tmp_path / f"waiting{dies}")
        second = pair(stack, out)
        for one in second:
            one.join(300)
            told = [line for line in one.said().splitlines() if line.startswith("refused:")]
            assert len(told) == 1, one.said()
            assert "resume" not in told[0]
            assert f"is written to by process {first[0].pid}" in told[0]
            assert one.exitcode == 2
        os.kill(first[dies].pid, signal.SIGKILL)
        other = first[1 - dies]
        other.join(300)
        assert other.exitcode == 2, other.said()
        assert "refused: train: another process of this training has gone" in other.said()
    assert stratavit.training.run_files.read_state(out)["step"] == 2
    with ExitStack() as stack:
        for one in pair(stack, out, resume=True):
            one.join(300)
            assert one.exitcode == 0, one.said() + other.said()
    assert SuperNet.load(out).provenance["train"]["processes"] == 2
