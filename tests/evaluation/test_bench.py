"""bench: rows for every model and setting, ratios against the first model, the dense one rebuilt from a small one."""

import pytest
import timm
from helpers import enliven, make_model, make_net

from stratavit import Setting, StrataViTError, SuperNet, bench
from stratavit.cli.bench import with_dense
from stratavit.evaluation import latency
from stratavit.models.cost import linear_macs

SIZE = (3, 32, 32)
SMALL = {"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 20}


def test_rows(monkeypatch):
    """Every pass takes as many seconds as the model has weights."""
    turns = []

    def pass_times(run, setting, at_least):
        turns.append((run(), setting.batch_size))
        return [float(run())] * at_least

    def runner(model, *_):
        return lambda: sum(p.numel() for p in model.parameters())

    monkeypatch.setattr(latency, "runner", runner)
    monkeypatch.setattr(latency, "pass_times", pass_times)
    net = make_net("plain")
    models = {"dense": net.extract(spec={}), "small": net.extract(spec=SMALL)}
    rows = bench(models, SIZE, [Setting(1, seconds=0.3), Setting(64, seconds=0.3)])
    assert [(row.model, row.batch_size) for row in rows] == [("dense", 1), ("small", 1), ("dense", 64), ("small", 64)]
    weights = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for row in rows:
        assert row.speedup == pytest.approx(weights["dense"] / weights[row.model])
        assert row.median_ms == 1000 * weights[row.model]
        assert row.images_per_second == pytest.approx(row.batch_size / weights[row.model])
        spec = {} if row.model == "dense" else SMALL
        assert (row.macs, row.macs_with_attention) == (net.macs(spec), net.macs(spec, attention=True))
        assert row.ideal == net.macs() / row.macs
        assert (row.spread, row.unrest) == (0, 0)
    assert [weight for weight, batch in turns if batch == 1] == [weights["dense"], weights["small"]] * 5


def test_nothing_to_time():
    with pytest.raises(StrataViTError, match="super-network"):
        bench({"net": make_net("plain")}, SIZE, [Setting()])
    with pytest.raises(StrataViTError, match="at least one model"):
        bench({}, SIZE, [Setting()])


@pytest.mark.parametrize(
    "family", ["plain", "distilled", "no_bias", "vit_small_patch16_dinov3", "beit_base_patch16_224"]
)
def test_the_dense_model_is_rebuilt(family):
    if "_patch16" in family:  # q and k stay as they are, or lie apart
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        net = SuperNet(enliven(timm.create_model(family, **sizes)))
    else:
        net = make_net(family)
    for spec in ({}, SMALL):
        models = with_dense(net.extract(spec=spec), "dense")
        assert list(models) == ["dense", "small"]
        assert linear_macs(models["dense"], net.data_config["input_size"]) == net.macs()


def test_a_model_whose_dense_one_cannot_be_rebuilt_stands_alone():
    assert list(with_dense(make_model("plain"), "mine")) == ["mine"]
    net = make_net("plain")
    assert list(with_dense(net.extract(spec=dict.fromkeys(net.resolve(None), 0)), "mine")) == ["mine"]
    small = net.extract(spec=SMALL)
    small.provenance["dense_macs"] += 1
    assert list(with_dense(small, "mine")) == ["mine"]
