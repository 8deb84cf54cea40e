"""bench: rows for every model and setting, ratios against the first model, the dense one rebuilt from a small one."""

import json
import shutil

import pytest
import torch
from helpers import make_model, make_net

import stratavit
from stratavit import Setting, StrataViTError, bench
from stratavit.cli.bench import beside_dense
from stratavit.cli.parser import main
from stratavit.evaluation import latency

SIZE = (3, 32, 32)
SMALL = {"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 20}


@pytest.fixture
def clock(monkeypatch):
    """Every pass takes as many seconds as the model has weights; what is run is noted."""
    seen = []

    def runner(model, image_size, setting, session):
        return lambda: sum(p.numel() for p in model.parameters())

    def pass_times(run, setting, at_least):
        seen.append((run(), setting))
        return [float(run())] * at_least

    monkeypatch.setattr(latency, "runner", runner)
    monkeypatch.setattr(latency, "pass_times", pass_times)
    return seen


def test_rows(clock):
    net = make_net("plain")
    models = {"dense": net.extract(spec={}), "small": net.extract(spec=SMALL)}
    settings = [Setting(1, seconds=0.3), Setting(64, seconds=0.3)]
    rows = bench(models, SIZE, settings)
    assert [(row.model, row.batch_size) for row in rows] == [("dense", 1), ("small", 1), ("dense", 64), ("small", 64)]
    weights = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for row in rows:
        assert row.speedup == pytest.approx(weights["dense"] / weights[row.model])
        assert row.median_ms == 1000 * weights[row.model]
        assert row.images_per_second == pytest.approx(row.batch_size / weights[row.model])
        assert row.macs == net.macs({} if row.model == "dense" else SMALL, attention=True)
        assert row.ideal == net.macs(attention=True) / row.macs
    turns = [weight for weight, setting in clock if setting.batch_size == 1]
    assert turns == [weights["dense"], weights["small"]] * 3  # they take turns


def test_nothing_to_time():
    with pytest.raises(StrataViTError, match="a super-network has many sizes; extract"):
        bench({"net": make_net("plain")}, SIZE, [Setting()])
    with pytest.raises(StrataViTError, match="at least one model and one setting"):
        bench({}, SIZE, [Setting()])


@pytest.mark.parametrize("family", ["plain", "distilled", "no_bias"])
def test_the_dense_model_is_rebuilt(family):
    net = make_net(family)
    for spec in ({}, SMALL, dict.fromkeys(net.resolve(None), 0)):
        small = net.extract(spec=spec)
        models = beside_dense(small, "small")
        assert list(models) == ["dense", "small"]
        cost = stratavit.models.cost.linear_macs(models["dense"], net.data_config["input_size"], attention=True)
        if any(spec.values()) or not spec:
            assert cost == net.macs(attention=True)


def test_a_model_of_unknown_origin_stands_alone():
    assert list(beside_dense(make_model("plain"), "mine")) == ["mine"]


def test_a_small_model_that_is_called_dense():
    assert list(beside_dense(make_net("plain").extract(spec=SMALL), "dense")) == ["dense", "small"]


@pytest.mark.parametrize("junk", [[], "x", {"blocks.9.attn": 3}, {"blocks.0.attn": "wide"}])
def test_a_provenance_that_tells_nonsense(junk):
    small = make_net("plain").extract(spec=SMALL)
    small.provenance["dense_spec"] = junk
    with pytest.raises(StrataViTError, match="cannot be built from the provenance of mine"):
        beside_dense(small, "mine")


def test_command(tmp_path, capsys):
    net = make_net("plain", stratified=True)
    net.save(tmp_path / "run")
    stratavit.save(net.extract(macs=0.5), tmp_path / "small")
    quick = ["--seconds", "0.02", "--batches", "1,3", "--threads", "1", "--json"]
    capsys.readouterr()
    assert main(["bench", str(tmp_path / "run"), *quick, "--shares", "1,0.8,0.5,0.0001"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = [row["model"] for row in told["rows"]]
    assert names == ["dense", "0.8", "0.5"] * 4
    assert {(row["runtime"], row["batch_size"]) for row in told["rows"]} == {
        (runtime, batch) for runtime in ("eager", "onnx") for batch in (1, 3)
    }
    assert all(0 < row["median_ms"] <= row["p90_ms"] and row["threads"] == 1 for row in told["rows"])

    assert main(["bench", str(tmp_path / "small"), *quick, "--dtype", "bfloat16"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in told["rows"]] == ["dense", "small"] * 2
    assert {row["dtype"] for row in told["rows"]} == {"bfloat16"}

    assert main(["bench", str(tmp_path / "run"), *quick[:-1], "--macs", "60%", "--runtimes", "eager"]) == 0
    table = capsys.readouterr().out
    assert "dense" in table

    assert main(["bench", str(tmp_path / "run"), "--shares", "0.0001,0.0002"]) == 2
    assert "none of the shares 0.0001, 0.0002 is reachable" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "small"), "--macs", "0.5"]) == 2
    assert "one size only" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_answers_as_the_model_does():
    model = make_model("plain").eval()
    run = latency.runner(model, SIZE, Setting(runtime="compiled"))
    with torch.no_grad():
        images = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(run.run(), model(images), atol=1e-4)
