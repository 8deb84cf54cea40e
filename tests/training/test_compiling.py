"""Compiled passes: the same loss and gradients as eager ones, few graphs, and an interruption changes nothing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from helpers import make_batches, make_images
from training_runs import TINY, Images, assert_same, fresh, interrupted, outcome, run

import stratavit
from stratavit.training import compiling
from stratavit.training.compiling import CompiledSizes
from stratavit.training.tracing import Followed

PIAD = dataclasses.replace(
    TINY, compile_sizes=2, compensation="full", list_source="given", sampling="sandwich", growths=2, keep="raw"
)


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    """Nothing is compiled twice, and quickly."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def learned(net, network, spec):
    """Loss and gradients of a batch; None where there is no gradient."""
    images, labels = make_batches()[0]
    net.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    outputs = network(images, spec)
    loss = F.cross_entropy(getattr(outputs, "outputs", outputs), labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in net.model.named_parameters()}


@pytest.mark.parametrize(
    ("followed", "compensation", "shares"),
    [(False, "full", (0.5, 1.0)), (False, "mean", (0.3,)), (True, "full", (0.5,))],
)
def test_a_compiled_pass_learns_as_an_eager_one(followed, compensation, shares):
    net = fresh(stratified=True).train()
    net.compensation = compensation
    eager = Followed(net) if followed else net
    compiled = CompiledSizes(eager)
    specs = [net.spec(macs=share) for share in shares]
    for spec in specs + specs:
        (loss, found), (expected, wanted) = learned(net, compiled, spec), learned(net, eager, spec)
        torch.testing.assert_close(loss, expected)
        for name, gradient in wanted.items():
            assert (found[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert len(compiled.graphs) == len(specs)


def test_a_mode_is_that_of_torch_compile(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda body, **options: asked.append(options["mode"]) or body)
    net = fresh(stratified=True)
    for mode in (None, "reduce-overhead"):
        CompiledSizes(net, mode)(make_batches()[0][0], net.spec(macs=0.5))
    assert asked == [None, "reduce-overhead"]


def test_a_compiled_run_stopped_and_resumed(tmp_path):
    """Means and moments are measured again several times; the graphs of two sizes see the new ones."""

    def train(data, resume, out="run"):
        return run(tmp_path / out, data=data, recipe=PIAD, resume=resume)

    train(Images(), False, "uncut")
    net, _ = interrupted(train)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "uncut"))
    assert all(type(module.moments.energy) is float for module in net.elastic.values())


def test_recovery_of_all_sizes(monkeypatch):
    made = []
    monkeypatch.setattr(CompiledSizes, "__init__", lambda self, net: (init(self, net), made.append(self))[0])
    config = {"batch_size": 4, "compile_sizes": 2, "lr": 1e-4, "lr_unit": "absolute"}
    stratavit.recover(fresh(stratified=True), [make_images(40)], config=config, steps=20, cpu=True)
    assert [len(one.graphs) for one in made] == [2]


init = CompiledSizes.__init__
