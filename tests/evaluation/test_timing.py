"""Timing: what is timed is the model as asked, and what is reported adds up."""

import random
import shutil
import sys
import time
from typing import ClassVar

import pytest
import torch
from helpers import make_model
from torch import nn

from stratavit import Setting, StrataViTError, Timing, bench, time_model
from stratavit.evaluation import latency, turns
from stratavit.evaluation.turns import Ratio

SIZE = (3, 32, 32)
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")


class Sleeper(nn.Module):
    """Sleeps, every fifth time longer, and notes how it is called; copies note it in one place."""

    seen: ClassVar = []

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen.clear()

    def forward(self, images):
        state = (tuple(images.shape), images.dtype, self.norm.training, torch.is_grad_enabled())
        self.seen.append((*state, torch.get_num_threads()))
        self.norm(images)
        time.sleep(0.01 if len(self.seen) % 5 else 0.03)
        return images


def test_what_is_run_is_what_was_asked_and_every_pass_is_timed_by_itself():
    model, threads = Sleeper().train(), torch.get_num_threads()
    found = time_model(model, SIZE, Setting(batch_size=3, threads=1, seconds=0.2))
    assert {state[:4] for state in model.seen} == {((3, *SIZE), torch.float32, False, False)}
    assert model.seen[-1][4] == 1
    assert model.training
    assert model.norm.training
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.get_num_threads() == threads
    assert 10 <= found.median_ms < found.p90_ms - 10
    assert found.images_per_second == pytest.approx(3 / found.median_ms * 1000)
    assert found.runs == len(model.seen) - 2 >= 5  # two to warm up


def test_statistics_of_timings():
    found = Timing.of([0.1 * n for n in range(1, 12)], batch_size=6)
    expected = {"median_ms": 600, "p90_ms": 1000, "images_per_second": 10, "runs": 11}
    assert found.to_dict() == pytest.approx(expected)


@pytest.mark.parametrize("runtime", ["eager", "onnx", pytest.param("compiled", marks=COMPILER)])
def test_outputs_of_a_runtime_are_those_of_the_model(runtime):
    model = make_model("plain") if runtime == "onnx" else nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with torch.inference_mode():
        found = latency.runner(model, SIZE, Setting(batch_size=2, runtime=runtime)).run()
    found = torch.from_numpy(found[0]) if runtime == "onnx" else found
    with torch.no_grad():
        assert torch.allclose(found, model(latency.noise(2, SIZE)), atol=1e-4)


def test_another_type_leaves_the_model_alone():
    model = Sleeper().train()
    assert latency.runner(model, SIZE, Setting(dtype="bfloat16")).run().dtype is torch.bfloat16
    assert {state[2] for state in model.seen[:2]} == {False}  # a copy, warmed up in eval mode
    assert model.norm.weight.dtype is torch.float32
    assert model.norm.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: .*1, got 0"),
        ({"threads": -1}, "threads: .*0, got -1"),
        ({"runtime": "tensorrt"}, "runtime: .*eager, compiled, cudagraphs, onnx, got 'tensorrt'"),
        ({"dtype": "int8"}, "dtype: .*float32, float16, bfloat16, got 'int8'"),
        ({"runtime": "onnx", "dtype": "float16"}, "dtype: .*float32 only"),
        ({"seconds": 0.0}, r"seconds: .*got 0\.0"),
        ({"seconds": "1"}, "seconds: .*got '1'"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(StrataViTError, match=message):
        Setting(**changes)


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_a_model_that_cannot_be_run_is_reported_in_one_line(runtime):
    def missing(module, inputs):
        raise RuntimeError("no kernel\nfor this device")

    model = make_model("plain")
    model.blocks[0].register_forward_pre_hook(missing)
    with pytest.raises(StrataViTError, match=rf"{runtime} in torch.float32 here: [^\n]*$"):
        time_model(model, SIZE, Setting(runtime=runtime, seconds=0.01))


def test_a_runtime_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(StrataViTError, match="pip install"):
        time_model(make_model("plain"), SIZE, Setting(runtime="onnx", seconds=0.01))


def test_ratios_and_their_spread():
    times = [[2.0, 2.0, 2.2], [3.0, 3.0], [2.0, 9.0, 2.0]]
    exact = Ratio.of([[seconds / 2 for seconds in part] for part in times], times)
    assert (exact.value, exact.spread) == (0.5, 0)
    assert Ratio.of([[1.0], [2.0], [1.1]], [[2.0], [2.0], [2.0]]).spread > 0.01


@pytest.mark.parametrize(("shaky", "rounds"), [(False, 10), (True, 30)])
def test_models_take_turns_until_their_ratio_is_known(monkeypatch, shaky, rounds):
    monkeypatch.setattr(latency, "pass_times", lambda run, setting, at_least: [run()])
    chance, seen = random.Random(0), []

    def first():
        seen.append("first")
        return 0.1

    def second():
        seen.append("second")
        return 0.1 * (1 + shaky * chance.random())

    times = turns.take_turns([first, second], Setting(seconds=1.0), precision=1e-4)
    assert seen == ["first", "second"] * len(times[0])
    assert len(times[0]) == len(times[1]) == pytest.approx(rounds, abs=1)


def test_a_busy_machine_is_noticed():
    assert turns.noise_note(turns.unrest([[1.0] * 9 + [1.01]])) == ""
    assert "busy" in turns.noise_note(turns.unrest([[1.0, 1.0, 1.8, 2.0]]))


def test_cuda_graphs_are_recorded_on_cuda_and_refused_elsewhere(monkeypatch):
    """torch itself would quietly compile without them."""
    model, setting = make_model("plain"), Setting(runtime="cudagraphs")
    refused = "cudagraphs needs the model on a CUDA device, it is on cpu"
    with pytest.raises(StrataViTError, match=refused):
        time_model(model, SIZE, setting)
    timed = []
    monkeypatch.setattr(latency, "runner", lambda *args: timed.append(args))
    with pytest.raises(StrataViTError, match=refused):  # before anything else is timed
        bench({"one": model}, SIZE, [Setting(), setting])
    assert timed == []
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append(options) or model)
    monkeypatch.setattr(Setting, "check_device", lambda setting, model: None)
    for runtime in ("compiled", "cudagraphs"):
        latency.runner(model, SIZE, Setting(runtime=runtime))
    assert [one["mode"] for one in asked] == [None, "reduce-overhead"]
