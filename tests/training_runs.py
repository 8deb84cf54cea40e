"""Short training runs on random images that several test modules share."""

import copy
import dataclasses
import os
import random
import signal
from functools import cache

import numpy as np
import pytest
import torch
from helpers import CLASSES, PLAN, make_batches, make_images, make_model, make_net
from PIL import Image
from torch.utils.data import Dataset

import stratavit
from stratavit.tasks.piad import train_piad
from stratavit.tasks.piad_task import PiadTask
from stratavit.training import distributed, order, run_files
from stratavit.training.distributed import StopRequest
from stratavit.training.recipe import Recipe
from stratavit.training.trainer import Trainer

TINY = Recipe(
    epochs=3,
    list_epochs=2,
    batch_size=4,
    accumulate=2,
    lr=0.05,
    drop_path=0.2,
    repeats=1,
    ema_horizon=0.5,
    workers=0,
    log_steps=3,
    eval_every=2,
    tracker="none",
)
CALM = {"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0}
ONE = dataclasses.replace(TINY, epochs=1, list_epochs=1, eval_every=1)


class Images(Dataset):
    """24 random images, shifted at random as augmentation does; something may happen at the nth read."""

    def __init__(self, at=None, happens=None):
        self.images = make_images(24, seed=5)
        self.labels = torch.randint(0, CLASSES, (24,), generator=torch.Generator().manual_seed(6))
        self.reads, self.at, self.happens = 0, at, happens

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == self.at:
            self.happens()
        noise = random.random() + np.random.rand() + torch.rand(())
        return self.images[index] + 0.1 * noise, int(self.labels[index])


class CrashError(Exception):
    pass


def crash():
    raise CrashError


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fresh(method="default", stratified=False):
    return copy.deepcopy(make_net("plain", method, stratified))


@cache
def merging():
    """A network with a list over widths and tokens."""
    return fresh().stratify(make_batches(), plan=PLAN, axes=("width", "tokens"))


def run(out, method="default", data=None, recipe=TINY, resume=False, evaluation=None):
    held_out = evaluation or make_batches()
    both = recipe.axes == "both"
    net = copy.deepcopy(merging()) if both else fresh(method, stratified=recipe.list_source == "given")
    return train_piad(net, data or Images(), held_out, recipe, out, proxy=make_batches(), resume=resume, cpu=True)


def interrupted(train, at=38, happens=terminate):
    """A run, `train(data, resume)`, that is stopped at the nth read of an image, and resumed."""
    with pytest.raises((KeyboardInterrupt, CrashError)) as stop:
        train(Images(at, happens), False)
    return train(Images(), True), str(stop.value)


def trainer(tmp_path, recipe=TINY, method="default", data=None, net=None):
    accelerator = distributed.accelerator(recipe, tmp_path, cpu=True)
    data = data or Images()
    places = order.make_order(data, recipe, 1)
    task = PiadTask(net or fresh(method), make_batches(), recipe, places.steps * recipe.epochs, accelerator)
    return Trainer(task, data, places, recipe, tmp_path, None, accelerator, StopRequest())


def rows(folder):
    """The log without times."""
    found = run_files.Journal(folder / "log.jsonl").rows()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def outcome(folder):
    """All that a run leaves, without times."""
    return (
        run_files.read_state(folder),
        rows(folder),
        *[path.read_bytes() for path in sorted(folder.glob("*.safetensors"))],
    )


def names(folder):
    return {path.name for path in folder.iterdir()}


def assert_same(found, expected):
    """Bit for bit, through all nesting."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_same(found[key], expected[key])
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def write_images(folder, classes=CLASSES, each=4):
    """A folder of images, a folder per class."""
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (40, 36), (30 * label, 60 * number, 200)).save(folder / str(label) / f"{number}.png")
    return folder


def alike(out):
    """A run that processes share without a trace: 4 images per batch, prefixes that depend on the batch alone."""
    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))

    def draw(self, number):
        return [self.task.prefixes[(7 * self.step + (50, 0)[number]) % len(self.task.prefixes)]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "draw", draw)
        return run(out, recipe=dataclasses.replace(TINY, **CALM, batch_size=batch))


# ---- commands -----------------------------------------------------------------------------------


def make_work(folder):
    """Images of seven classes, a super-network, a small and a dense model."""
    write_images(folder / "data")
    net = fresh(stratified=True)
    net.save(folder / "run")
    stratavit.save(net.extract(macs=0.5, verbose=False), folder / "small")
    stratavit.save(make_model("plain"), folder / "dense")
    return folder


def argv(work, command, out):
    """The command line of ``convert``, ``train`` or ``finetune`` on what `make_work` made."""
    data = ["--data", str(work / "data"), "--out", str(out)]
    if command == "convert":
        return ["convert", str(work / "dense"), *data, "--workers", "0", "--overwrite"]
    options = {"epochs": 2, "batch-size": 8, "lr": 0.02, "repeats": 1, "workers": 0, "tracker": "none"}
    options |= {"list-epochs": 1} if command == "train" else {}
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [command, str(work / {"train": "run", "finetune": "small"}[command]), *data, "--device", "cpu", *flags]
