"""Training on a device that is not the CPU: our loop, which Accelerate places there, and a loop of one's own."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from check_conversion import check_place, made
from check_waiting import no_waiting
from helpers import make_batches, make_images, make_model
from training_runs import TINY, Images

import stratavit
from stratavit import SuperNet
from stratavit.tasks.own_loop import PrefixTraining
from stratavit.training.trainer import Trainer

RECIPES = {
    "default": TINY,
    "distilled": dataclasses.replace(TINY, distil=0.5, sampling="sandwich", clip=1.0),
    "compensated": dataclasses.replace(TINY, compensation="full", list_source="given", sampling="budget"),
}


@pytest.fixture
def net(device):
    return copy.deepcopy(made("plain", device))


@pytest.fixture
def trained(device, monkeypatch):
    """Accelerate goes to the device, and no step reads from it; numbers of the steps."""
    steps, update = [], Trainer.update

    def watched(self, batches):
        with no_waiting(device, uploads_too=False):  # what comes from pinned memory on CUDA is a blocking upload here
            update(self, batches)
        steps.append(self.step)

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(device))
    monkeypatch.setattr(Trainer, "update", watched)
    yield steps
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", RECIPES)
def test_piad(name, net, device, trained, tmp_path):
    recipe = dataclasses.replace(RECIPES[name], log_steps=100)
    found = stratavit.train_piad(net, Images(), make_batches(), recipe, tmp_path / "out", proxy=make_batches())
    assert trained
    check_place(found, device)
    check_place(found.extract(macs=0.6, verbose=False), device)


@pytest.mark.parametrize("small", [False, True])
def test_recovery(small, net, device, trained):
    model = net.extract(macs=0.6, verbose=False) if small else net
    teacher = make_model("plain").to(device) if small else None
    config = {"batch_size": 4, "log_steps": 100}
    found = stratavit.recover(model, [make_images(40)], teacher, config=config, steps=20)
    assert len(trained) == 20
    check_place(found, device)


def test_fine_tuning(net, device, trained, tmp_path):
    small = net.extract(macs=0.6, verbose=False)
    recipe = {"epochs": 2, "batch_size": 8, "log_steps": 100}
    stratavit.finetune(small, Images(), make_batches(), recipe, tmp_path / "out")
    assert trained
    check_place(small, device)


@pytest.mark.parametrize("config", [{}, {"list_source": "progressive"}, {"compensation": "full"}])
def test_training(config, net, device, tmp_path):
    """A loop of one's own with the draw of PIAD: all stays on the device, the loss falls."""
    net.train()
    training = PrefixTraining(make_batches(), tmp_path / "out", config, 2, 2, False, (__name__,))
    training.begin(net, 8, 0, True, [], None)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for step in range(8):
        training.begin_batch(step, step)
        loss = sum(F.cross_entropy(net(x.to(device)), y.to(device)) for x, y in make_batches())
        training.end_batch()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    training.finish(8)
    check_place(net, device)
    assert SuperNet.load(tmp_path / "out", device).spec(macs=0.6)
    assert min(losses[4:]) < losses[0]
