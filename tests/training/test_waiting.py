"""A training step never waits for the device: nothing in it reads a number or a shape that tensors decide."""

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import CLASSES, make_images
from torch._subclasses.fake_tensor import FakeTensorMode
from training_runs import TINY, fresh, run
from waits import BlockingCopies, Waits, on_fake_cuda

import stratavit
from stratavit.elastic import base
from stratavit.training import optimizer
from stratavit.training.augmentation import Target
from stratavit.training.device_augmentation import DeviceAugmentation
from stratavit.training.imitation import Changes
from stratavit.training.recipe import Recipe
from stratavit.training.trainer import Trainer
from stratavit.utils.devices import memberships, to_device

CASES = {
    "default": TINY,
    "everything": dataclasses.replace(TINY, precision="bf16", distil=0.5, sampling="sandwich", clip=1.0),
    "tokens": dataclasses.replace(TINY, list_source="given", axes="both", sampling="sandwich", distil_blocks=1.0),
    "full": dataclasses.replace(TINY, compensation="full", list_source="given", sampling="budget"),
    "labels alone": dataclasses.replace(TINY, mixup=0.0, cutmix=0.0, distil=0.5, sampling="sandwich"),
}
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def waits(monkeypatch):
    """What steps of the trainer wait for, with the optimiser that runs on CUDA; and the number of steps."""
    found, steps, update = [], [], Trainer.update

    def watched(self, batches):
        with Waits() as mode:
            update(self, batches)
        found.extend(mode.found)
        steps.append(self.step)

    monkeypatch.setattr(optimizer, "on_cuda", lambda model: True)
    monkeypatch.setattr(base, "can_be_kept", lambda weight: False)  # products are kept, and compared, on a CPU alone
    monkeypatch.setattr(Trainer, "update", watched)
    yield found, steps
    AcceleratorState._reset_state(reset_partial_state=True)


def test_waits_are_noticed():
    with Waits() as mode:
        float(torch.ones(3).sum())
        torch.ones(3)[torch.ones(3) > 0]
        torch.nn.functional.one_hot(torch.ones(3).long(), 2)
    assert len(mode.found) >= 3


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_piad_waits_for_nothing(tmp_path, waits, case):
    run(tmp_path / "run", recipe=dataclasses.replace(CASES[case], log_steps=100))
    found, steps = waits
    assert steps == list(range(1, 10))
    assert found == []


def test_a_step_of_recovery_waits_for_nothing(waits):
    net = fresh(stratified=True)
    assert net.final_mean is not None
    stratavit.recover(net, [make_images(40)], config={"batch_size": 4, "log_steps": 100}, steps=20, cpu=True)
    found, steps = waits
    assert len(steps) == 20
    assert found == []


def test_memberships_are_one_hot():
    index = torch.randint(0, 5, (3, 7))
    assert torch.equal(memberships(index, 5), torch.nn.functional.one_hot(index, 5).float())
    assert to_device(index, index.device) is index


def test_on_cuda_copies_are_queued(monkeypatch):
    """On tensors without data, which refuse whatever reads one: images changed, mixed, augmented, run at a size."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # needs CUDA
    net = fresh(stratified=True).train()
    spec, net.final_mean = net.spec(macs=0.5), None
    changes = Changes(CONFIG, Recipe())
    target = Target(Recipe(), CLASSES)
    with FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies() as copies:
        images = torch.empty(4, 3, 32, 32, device="cuda")
        labels = torch.empty(4, dtype=torch.long, device="cuda")
        augment = DeviceAugmentation(CONFIG, Recipe(augment_on="device", randaugment=""), images.device)
        copies.found.clear()
        changes(images)
        assert copies.found == [(1, 3, 1, 1)] * 3  # constants, once
        copies.found.clear()
        mixed, soft = target.mix(changes(images), labels)
        augment((torch.empty(4, 3, 40, 40, dtype=torch.uint8), labels))
        loss = target.loss(on_fake_cuda(net)(mixed, spec), target.taught(soft, mixed.new_empty(4, CLASSES), 0.5))
    assert loss.device.type == "cuda"
    assert copies.found == []
