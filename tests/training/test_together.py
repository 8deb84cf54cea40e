"""Processes that want the same place at the same moment, and one that dies while others count on it."""

import json
import os
import signal
import socket
import time
from contextlib import ExitStack
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from children import started
from helpers import make_images, relative_error
from training_runs import alike, argv, make_work, names, rows, run

import stratavit
from stratavit import SuperNet
from stratavit.cli.parser import main
from stratavit.files import lock
from stratavit.training import launch, run_files
from stratavit.training.trainer import Trainer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


def ended(processes):
    """Exit codes of processes, and what they said."""
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes], [process.said() for process in processes]


def both(*args):
    """Two processes that do the same; their numbers, exit codes and what they said."""
    barrier = get_context("forkserver").Barrier(2)
    with ExitStack() as stack:
        pair = [stack.enter_context(started(*args, barrier)) for _ in range(2)]
        return [process.pid for process in pair], *ended(pair)


def racing(work, out, overwrite, barrier):
    """One of two trainings that begin together; the one that runs does not end before the other has."""
    train, make = Trainer.run, launch.make_folder

    def last(self):
        barrier.wait(300)
        train(self)

    def together(*args):
        barrier.wait(300)
        make(*args)

    Trainer.run, launch.make_folder = last, together
    flags = ["--epochs", "1", "--list-epochs", "1", *(["--overwrite"] if overwrite else [])]
    code = main([*argv(work, "train", out), *flags])
    if code == 2:
        barrier.wait(300)
    return code


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_trainings_in_one_folder(work, tmp_path, overwrite):
    """Begun at the same moment: one trains, the other says by whom the folder is held."""
    out = tmp_path / "out"
    if overwrite:
        stratavit.save(stratavit.load(work / "small"), out)
    numbers, codes, said = both(racing, work, out, overwrite)
    assert sorted(codes) == [0, 2], said
    lost = codes.index(2)
    told = [line for line in said[lost].splitlines() if line.startswith("stratavit train: ")]
    assert len(told) == 1, said
    assert f"process {numbers[1 - lost]} on {socket.gethostname()}" in told[0]
    assert "Traceback" not in "".join(said)
    SuperNet.load(out)
    assert lock.FILE not in names(out)


def converting(work, out, overwrite, barrier):
    """One of two conversions that come to their end together."""
    move_into_place = stratavit.files.folders.move_into_place

    def together(*args):
        barrier.wait(300)
        move_into_place(*args)

    stratavit.files.folders.move_into_place = together
    arguments = argv(work, "convert", out)
    return main(arguments if overwrite else arguments[:-1])


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_conversions_to_one_folder(work, tmp_path, overwrite):
    """Without --overwrite the second is refused, with it the last one stays; either way the folder is complete."""
    _, codes, said = both(converting, work, tmp_path / "out", overwrite)
    assert sorted(codes) == ([0, 0] if overwrite else [0, 2]), said
    told = [line for text in said for line in text.splitlines() if line.startswith("stratavit convert:")]
    assert [f"another process wrote {tmp_path / 'out'} meanwhile" in line for line in told] == [True] * (not overwrite)
    assert names(tmp_path) == {"out"}
    SuperNet.load(tmp_path / "out")


# ---- launched together ------------------------------------------------------------------------------------------

NEEDS_GLOO = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo"
)


def rank(number, port, work, *args):
    """One of two processes that train together on CPUs, as a launcher starts them."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        work(number, *args)
    except stratavit.StrataViTError as error:
        print("refused:", error)
        return 2
    return 0


def pair(stack, work, *args):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [stack.enter_context(started(rank, number, port, work, *args)) for number in (0, 1)]


def trained_and_watched(number, out):
    drawn, draw, finish = [], Trainer.draw, Trainer.finish

    def watched(self, batch):
        found = draw(self, batch)
        drawn.append([one.position for one in found])
        return found

    def seen(self):
        sums = [p.double().abs().sum().item() for p in self.net.parameters()]
        (out / f"rank{self.rank}.json").write_text(json.dumps({"sums": sums, "drawn": drawn}))
        finish(self)

    Trainer.draw, Trainer.finish = watched, seen
    run(out / "run")
    alike(out / "alike")


@NEEDS_GLOO
def test_two_processes(tmp_path):
    """Finite losses, equal weights on both, their own draws; and what one process with the same batches learns."""
    with ExitStack() as stack:
        codes, said = ended(pair(stack, trained_and_watched, tmp_path))
    assert codes == [0, 0], said
    ranks = [json.loads((tmp_path / f"rank{number}.json").read_text()) for number in (0, 1)]
    assert ranks[0]["sums"] == ranks[1]["sums"]
    assert ranks[0]["drawn"] != ranks[1]["drawn"]
    log = rows(tmp_path / "run")
    assert all(np.isfinite(row["loss"]) for row in log if row["kind"] == "epoch")
    assert len(log[-1]["points"]) == len({point["asked"] for point in log[-1]["points"]}) > 1
    assert SuperNet.load(tmp_path / "run").provenance["train"]["processes"] == 2
    one, two = alike(tmp_path / "one"), SuperNet.load(tmp_path / "alike")
    assert two.strata.entries == one.strata.entries
    images = make_images(8, seed=9)
    for position in (0, len(one.strata) // 2, len(one.strata)):
        spec = one.strata.spec(position)  # logits: Adam blows up rounding where the gradient is 0 (the bias of k)
        with torch.no_grad():
            assert relative_error(two(images, spec), one(images, spec)) < 1e-3


def waiting(number, out, dies):
    """Stops for good at the third step, where it is to die."""
    update = Trainer.update

    def watched(self, batches):
        if self.step == 2 and number == dies:
            (out.parent / "waiting").touch()
            time.sleep(300)
        update(self, batches)

    Trainer.update = watched
    run(out)


def resuming(number, out):
    run(out, resume=(out / "state.pt").exists())


@NEEDS_GLOO
@pytest.mark.parametrize("dies", [0, 1])
def test_one_of_two_processes_is_killed(tmp_path, dies):
    """The other ends by itself with a sentence, and the state is sound; meanwhile a second pair is refused."""
    out = tmp_path / "run"
    with ExitStack() as stack:
        first = pair(stack, waiting, out, dies)
        deadline = time.monotonic() + 300
        while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if dies == 0:
            codes, said = ended(pair(stack, resuming, out))
            assert codes == [2, 2], said
            assert all(f"process {first[0].pid}" in text and text.count("refused:") == 1 for text in said), said
        os.kill(first[dies].pid, signal.SIGKILL)
        (code,), (said,) = ended([first[1 - dies]])
        assert code == 2, said
        assert "another process of this training has gone" in said
    assert run_files.read_state(out)["step"] == 2
    with ExitStack() as stack:
        codes, said = ended(pair(stack, resuming, out))
        assert codes == [0, 0], said
    assert SuperNet.load(out).provenance["train"]["processes"] == 2
