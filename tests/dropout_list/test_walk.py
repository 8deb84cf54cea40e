"""The measurement of the list: nested states within their shares, and nothing left behind."""

import copy
import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from helpers import PLAN, enliven, keyed, make_batches, make_images, make_model, make_net, relative_error
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from stratavit import StrataViTError, SuperNet
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.dropout_list import marginal_effects, walk
from stratavit.dropout_list.walk import Walk

IMAGES = make_images(3, seed=9)
BATCHES = [images for images, _ in make_batches()]


def walked(family, plan=PLAN, loader=BATCHES):
    net = copy.deepcopy(make_net(family))
    return net, *walk.walk(net.model, net.sites, net.cost, loader, plan)


def test_states_nest_within_their_shares(family):
    plan = Walk(states=((0.85, 1), (0.75, 2), (0.65, 1)), images=6)
    net, states, ratios, mean = walked(family, plan)
    assert [state.share for state in states] == [0.85, 0.75, 0.65]
    assert ratios.keys() == {site.name for site in net.sites}
    assert sum(ratios.values()) == pytest.approx(0, abs=1e-9)
    for state in states:
        assert net.cost.macs(state.widths) <= state.share * net.cost.macs()
        assert all(state.widths[site.name] in site.steps[1:] for site in net.sites)
    for larger, smaller in pairwise(states):
        assert all(smaller.widths[name] <= larger.widths[name] for name in ratios)
    assert (mean is None) == (family == "distilled")
    assert mean is None or (len(mean.shares) == 3 and mean.vectors.shape == (3, net.model.embed_dim))


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.floats(-2, 2), st.floats(-1, 9)), min_size=1, max_size=6))
def test_ratios_move_along_the_effects_by_no_more_than_the_rate(values):
    ratios, effects = ({name: pair[which] for name, pair in values.items()} for which in (0, 1))
    found = walk.moved(ratios, effects, 0.3)
    assert found.keys() == ratios.keys()
    if sum(effects.values()) <= 0:
        assert found == ratios
        return
    assert sum(found.values()) == pytest.approx(0, abs=1e-9)
    moves = {name: found[name] - ratios[name] for name in ratios}
    assert max(moves.values()) - min(moves.values()) <= 0.6 + 1e-9
    in_order = [moves[name] for name in sorted(moves, key=effects.get)]
    assert all(a <= b + 1e-9 for a, b in pairwise(in_order))


@pytest.mark.parametrize(
    "options",
    [
        {"states": ()},
        {"states": ((0.5, 1), (0.5, 1))},
        {"states": ((1.0, 1),)},
        {"states": ((0.5, 0),)},
        {"images": 0},
        {"rate": 0.0},
    ],
)
def test_plans_that_cannot_be_walked_are_refused(options):
    with pytest.raises(StrataViTError, match="plan"):
        Walk(**options)


def test_sites_of_a_single_unit_are_neither_measured_nor_judged():
    """head_dim 8 is one unit: it has no step, and its ratio only follows the mean."""
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0, num_classes=7
    )
    net = SuperNet(enliven(model)).contract(make_batches())
    cut = {site.name: site.steps[-1] if site.kind == "attention" else site.steps[8] for site in net.sites}
    found = marginal_effects.Reference(net.model, net.sites, list(map(keyed, BATCHES)), DenseOutputs()).effects(
        net.cost, cut
    )[0]
    assert found.keys() == {"blocks.0.mlp", "blocks.1.mlp"}
    _, ratios, _ = walk.walk(net.model, net.sites, net.cost, BATCHES, PLAN)
    assert ratios["blocks.0.attn"] == pytest.approx(ratios["blocks.1.attn"])
    assert net.stratify(BATCHES, plan=PLAN).strata is not None


def test_a_network_that_was_moved_between_contract_and_stratify_follows():
    net = copy.deepcopy(make_net("plain"))
    expected = copy.deepcopy(net).stratify(BATCHES, plan=PLAN)
    net.double().stratify([images.double() for images in BATCHES], plan=PLAN)
    assert net.strata.entries == expected.strata.entries
    assert torch.allclose(net.final_mean.vectors, expected.final_mean.vectors, atol=1e-4)


def test_whether_it_was_cross_fitted_is_reported(tmp_path):
    net = copy.deepcopy(make_net("plain")).stratify(BATCHES, plan=PLAN)
    assert net.provenance["stratify"]["cross_fitted"]
    net.save(tmp_path / "run")
    again = SuperNet.load(tmp_path / "run").stratify(BATCHES, plan=PLAN)
    assert not again.provenance["stratify"]["cross_fitted"]


def test_inference_mode_is_refused_in_words():
    net = copy.deepcopy(make_net("plain"))
    with torch.inference_mode():
        for run in (net.contract, net.stratify):
            with pytest.raises(StrataViTError, match=r"outside torch\.inference_mode"):
                run(make_batches())


def test_shares_out_of_reach_are_left_out():
    net, states, _, mean = walked("plain", Walk(states=((0.6, 1), (0.1, 2)), images=4))
    assert [state.share for state in states] == [0.6]
    assert len(mean.shares) == 1
    states, ratios, mean = walk.walk(net.model, net.sites, net.cost, BATCHES, Walk(states=((0.1, 1),)))
    assert (states, mean) == ([], None)
    assert not any(ratios.values())


def test_the_walk_is_deterministic_also_where_gradients_are_switched_off():
    _, states, ratios, mean = walked("plain")
    with torch.no_grad():
        _, *again = walked("plain")
    assert (states, ratios, mean.shares) == (*again[:2], again[2].shares)
    assert torch.equal(mean.vectors, again[2].vectors)


def test_cut_networks_whose_output_is_not_finite_are_refused():
    net = copy.deepcopy(make_net("plain"))
    net.model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(StrataViTError, match="NaN or infinite"):
        net.stratify(BATCHES, plan=PLAN)
    assert net.strata is None


def state_of(net):
    return (
        {name: (p.clone(), p.requires_grad, p.grad) for name, p in net.model.named_parameters()},
        [module.training for module in net.model.modules()],
        [(m.width, m.probe, m.observer, m.bypassed, m.gain, m.moments, m.compensation) for m in net.elastic.values()],
    )


@pytest.mark.parametrize(("training", "broken"), [(True, []), (False, []), (True, [torch.zeros(2, 4, 32, 32)])])
def test_stratify_leaves_nothing_behind_also_when_it_fails(training, broken):
    net = copy.deepcopy(make_net("plain")).train(training)
    net.compensation = "mean"
    net.model.cls_token.requires_grad_(False)
    net.model.blocks[0].eval()
    before = state_of(net)
    with pytest.raises(StrataViTError) if broken else nullcontext():
        net.stratify([BATCHES[0], *broken], plan=PLAN)
    after = state_of(net)
    for name, (value, required, gradient) in before[0].items():
        assert torch.equal(value, after[0][name][0])
        assert required == after[0][name][1], name
        assert gradient is after[0][name][2]
    assert before[1:] == after[1:]


@pytest.mark.parametrize("name", ["plain", "avg_pool"])
def test_a_model_without_a_head_has_effects(name):
    model = make_model(name)
    model.reset_classifier(0)
    net = SuperNet(model).contract(BATCHES, objective="feature").stratify(BATCHES, plan=PLAN)
    spec = net.spec(macs=0.6)
    with torch.no_grad():
        small = net.extract(spec=spec)(IMAGES)
        assert small.shape == (3, model.embed_dim)
        assert relative_error(small, net(IMAGES, spec)) <= 1e-5
    assert any(net.provenance["stratify"]["states"])


def test_half_precision_models_are_measured_in_float32_and_cast_back():
    net = SuperNet(make_model("plain", dtype=torch.bfloat16)).contract(make_batches())
    before = {name: t.clone() for name, t in net.model.state_dict().items()}
    net.stratify(make_batches(), plan=PLAN)
    assert all(torch.equal(t, before[name]) for name, t in net.model.state_dict().items())
    assert net.strata is not None
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


class Shuffled:
    """The labelled images in another order and in other batches at every pass."""

    def __init__(self, count, seed):
        self.images, self.labels = (torch.cat(parts) for parts in zip(*make_batches((count,)), strict=True))
        self.images, self.generator = self.images.double(), torch.Generator().manual_seed(seed)

    def __iter__(self):
        order = torch.randperm(len(self.images), generator=self.generator)
        size = int(torch.randint(3, 9, (1,), generator=self.generator))
        return iter(list(zip(self.images[order].split(size), self.labels[order].split(size), strict=True)))


def listed(loader, family, objective):
    net = SuperNet(make_model(family, dtype=torch.float64)).contract(loader, objective=objective)
    return net.stratify(loader, plan=Walk(states=((0.75, 2), (0.5, 2)), images=10))


@pytest.mark.parametrize("objective", ["cross_entropy", "sampled"])
def test_the_list_does_not_depend_on_the_loaders_order(family, objective):
    in_order = make_batches((32,), dtype=torch.float64)
    expected = listed(in_order, family, objective)
    found = listed(Shuffled(32, 1), family, objective)
    assert found.strata.entries == expected.strata.entries
    if expected.final_mean is not None:
        assert torch.allclose(found.final_mean.vectors, expected.final_mean.vectors, atol=1e-5)


class Augmented:
    """Other pixels at every pass."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        return iter([(x + 0.1 * torch.randn(x.shape, generator=self.generator), y) for x, y in make_batches()])


def warned_by(net, loader, capsys):
    capsys.readouterr()
    net.stratify(loader, plan=Walk(states=((0.75, 2), (0.5, 2)), images=6))
    return capsys.readouterr().err.splitlines()


def test_images_that_contract_did_not_see_are_reported_once(capsys):
    for loader, other in ((Augmented(), None), (make_batches(), [make_images(12, seed=5)])):
        net = SuperNet(make_model("plain")).contract(loader)
        (line,) = warned_by(net, other or loader, capsys)
        assert "contract" in line
        assert "augmentation" in line
        assert warned_by(net, other or loader, capsys) == [line]  # a second list is no better


def test_no_warning_where_images_are_those_of_contract(capsys, tmp_path):
    net = SuperNet(make_model("plain")).contract(make_batches())
    assert warned_by(net, make_batches((2, 10)), capsys) == []
    assert warned_by(net.double(), make_batches((2, 10)), capsys) == []
    more = [*make_batches(), make_images(12, seed=5)]  # a third of a step's images may be known by chance
    net = SuperNet(make_model("plain")).contract(more)
    assert warned_by(net, make_batches(), capsys) == []
    net.save(tmp_path / "run")
    assert warned_by(SuperNet.load(tmp_path / "run"), [make_images(12, seed=5)], capsys) == []  # not known
    net = SuperNet(make_model("plain")).contract(make_batches(), method="paper")
    net.stratify([make_images(12, seed=5)])
    assert capsys.readouterr().err == ""


def test_the_last_step_is_taken_back_where_it_made_things_worse(monkeypatch):
    """Effects are of first order: a step may leave a module with so little that the network breaks."""
    one, two = (Walk(states=((0.6, steps),), images=5, rate=0.9) for steps in (1, 2))
    measure = walk.Reference.measure

    def at_distance(value):
        return lambda *asked: measure(*asked)._replace(distance=value)

    monkeypatch.setattr(walk.Reference, "measure", at_distance(0.0))
    stepped, after_one = walked("plain", two), walked("plain", one)
    assert stepped[2] != after_one[2]
    for broken in (math.inf, math.nan):
        monkeypatch.setattr(walk.Reference, "measure", at_distance(broken))
        taken_back = walked("plain", two)
        assert taken_back[2] == after_one[2]
        assert taken_back[3].vectors.tolist() != stepped[3].vectors.tolist()  # it belongs to the widths that are kept
