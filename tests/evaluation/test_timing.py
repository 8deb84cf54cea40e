"""Timing: what is timed is the model as asked, and what is reported adds up."""

import time

import pytest
import torch
from helpers import make_batches, make_model, make_net
from torch import nn

from stratavit import BudgetError, Setting, StrataViTError, Timing, evaluate, time_model
from stratavit.evaluation import latency

QUICK = Setting(seconds=0.01)
SIZE = (3, 32, 32)


class Sleeper(nn.Module):
    """Takes its time, and notes how it is called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = set()

    def forward(self, images):
        state = (tuple(images.shape), images.dtype, self.training, torch.is_grad_enabled(), torch.get_num_threads())
        self.seen.add(state)
        time.sleep(0.01)
        return images


def test_what_is_run_is_what_was_asked():
    model = Sleeper().train()
    found = time_model(model, SIZE, Setting(batch_size=3, threads=1, seconds=0.05))
    assert model.seen >= {((3, *SIZE), torch.float32, False, False, 1)}
    assert model.training
    assert 10 <= found.median_ms <= found.p90_ms
    assert found.images_per_second == pytest.approx(3 / found.median_ms * 1000)
    assert found.runs >= 5


def test_statistics_of_timings():
    found = Timing.of([0.1 * n for n in range(1, 12)], batch_size=6)
    assert (found.median_ms, found.p90_ms, found.images_per_second, found.runs) == pytest.approx((600, 1000, 10, 11))


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_runtimes_answer_as_the_model_does(runtime):
    model = make_model("plain").eval()
    with torch.inference_mode():
        answer = latency.runner(model, SIZE, Setting(batch_size=2, runtime=runtime)).run()
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    found = answer if runtime == "eager" else torch.from_numpy(answer[0])
    with torch.no_grad():
        assert torch.allclose(found, model(images), atol=1e-5)


def test_another_type_leaves_the_model_alone():
    model = make_model("plain").eval()
    answer = latency.runner(model, SIZE, Setting(dtype="bfloat16")).run()
    assert answer.dtype is torch.bfloat16
    assert next(model.parameters()).dtype is torch.float32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"threads": -1}, "threads: expected a whole number of at least 0, got -1"),
        ({"runtime": "tensorrt"}, "runtime: expected one of eager, compiled, onnx, got 'tensorrt'"),
        ({"dtype": "int8"}, "dtype: expected one of float32, float16, bfloat16, got 'int8'"),
        ({"runtime": "onnx", "dtype": "float16"}, "dtype: ONNX Runtime is timed in float32 only"),
        ({"seconds": 0.0}, r"seconds: expected a number above 0, got 0\.0"),
        ({"seconds": "1"}, "seconds: expected a number above 0, got '1'"),
        ({"batch_size": 2.0}, r"batch_size: expected a whole number of at least 1, got 2\.0"),
    ],
)
def test_settings_that_make_no_sense(changes, sentence):
    with pytest.raises(StrataViTError, match=sentence):
        Setting(**changes)


def test_a_model_that_cannot_be_run_is_told_in_one_line():
    def missing(module, inputs):
        raise RuntimeError("no kernel\nfor this device")

    model = make_model("plain")
    model.blocks[0].register_forward_pre_hook(missing)
    for runtime in ("eager", "onnx"):
        with pytest.raises(StrataViTError, match=rf"the model cannot be run {runtime} in torch.float32 here: [^\n]*$"):
            time_model(model, SIZE, Setting(runtime=runtime, seconds=0.01))
    with pytest.raises(StrataViTError, match="20 x 20"):
        time_model(make_model("plain"), (3, 20, 20), Setting(runtime="onnx", seconds=0.01))


def test_every_pass_is_timed_by_itself():
    model, count = make_model("plain"), iter(range(10**6))
    pause = model.register_forward_pre_hook(lambda *_: time.sleep(0.02 if next(count) % 5 == 0 else 0.0))
    found = time_model(model, SIZE, Setting(seconds=0.3, threads=1))
    pause.remove()
    assert found.p90_ms > found.median_ms + 10
    assert torch.get_num_threads() != 1 or latency.Setting().used_threads == 1


def test_a_latency_budget_times_the_small_model(monkeypatch):
    """Under a clock that shows the MACs, the answer is that of a MACs budget."""
    net = make_net("plain", stratified=True)
    seen = []

    def clock(model, image_size, setting):
        seen.append((tuple(image_size), setting))
        params = sum(p.numel() for p in model.parameters())
        return Timing(params / 1000, 0, 0, 5)

    monkeypatch.setattr("stratavit.budgets.constraints.time_model", clock)
    setting = Setting(batch_size=7)
    for share in (0.9, 0.5, 0.4):
        met = net.budget(latency_ms=share * net.params() / 1000, setting=setting)
        assert met.spec == net.spec(params=share)
        assert met.got == net.params(met.spec) / 1000
    assert set(seen) == {(SIZE, setting)}
    assert len(seen) < 3 * (3 + len(net.strata).bit_length())
    met = net.budget(latency_ms="50%", params=0.4)
    assert met.spec == net.spec(params=0.4)


def test_a_latency_budget_on_the_real_clock():
    net = make_net("plain", stratified=True)
    met = net.budget(latency_ms=1e6, setting=QUICK)
    assert met.position == 0
    assert met.low > 0
    with pytest.raises(BudgetError, match="latency_ms: asked 1e-06 = 1e-06, but the reachable range is"):
        net.budget(latency_ms=1e-6, setting=QUICK)


def test_accuracy_budgets_are_measured_on_the_data():
    net, data = make_net("plain", stratified=True), make_batches()
    dense = evaluate(net, data).top1
    curve = [evaluate(net, data, net.strata.spec(position)).top1 for position in range(len(net.strata) + 1)]
    for wanted in sorted(set(curve)):
        if wanted > dense or wanted == 0:
            continue
        met = net.budget(top1=float(wanted) if wanted >= 1 else str(wanted), data=data)
        assert met.got == curve[met.position] >= wanted
        assert met.position == len(net.strata) or curve[met.position + 1] < wanted
        drop = net.budget(max_drop=dense - wanted, data=data)
        assert drop.got == pytest.approx(dense - curve[drop.position])
        assert drop.got <= dense - wanted + 1e-9
    with pytest.raises(BudgetError, match="top1: asked 100 = 100, but the reachable range is"):
        net.budget(top1=100, data=data)
