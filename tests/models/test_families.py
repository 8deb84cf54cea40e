"""The contract that every supported model keeps, whatever its family: function, sizes, prefixes, files, training."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise

import architectures
import pytest
import timm
import torch
from helpers import PLAN, change_weights, enliven, make_images, relative_error

import stratavit
from stratavit import StrataViTError, SuperNet
from stratavit.calibration.objectives import distance
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.models.architecture import describe
from stratavit.models.cost import linear_macs
from stratavit.utils.model import classes_of

LABELS = torch.arange(12) % 7
BATCHES = [(make_images(12)[:7], LABELS[:7]), (make_images(12)[7:], LABELS[7:])]
IMAGES = make_images(3, seed=9)
GROUPED = ("twins_svt_small", "hiera_tiny_224")  # timm's attention has an axis of windows, also where it is not cut
every_model = pytest.mark.parametrize("name", architectures.ALL)
every_kind = pytest.mark.parametrize("name", architectures.KINDS)


@cache
def source(name):
    return architectures.make(name)


@cache
def converted(name, method="default"):
    """A super-network with its list. Shared between tests: copy it before changing it."""
    net = SuperNet(source(name)).contract(BATCHES, method=method)
    return (net.stratify(BATCHES, plan=PLAN) if method == "default" else net.stratify(BATCHES)).eval()


def output(model, *args):
    with torch.no_grad():
        return tensor_of(model(IMAGES, *args))


def specs(net):
    """Full size, along the list, and widths that no list would give."""
    length = len(net.strata)
    listed = [net.spec(position=length * part // 4) for part in range(5)]
    odd = {site.name: max(1, site.width // (2 + number % 3)) for number, site in enumerate(net.sites)}
    gone = {site.name: 0 for site in net.sites[: len(net.sites) // 2]}
    return [{}, *listed, odd, gone, {net.sites[-1].name: 0}]


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "default") for name in architectures.ALL), *((name, "paper") for name in architectures.KINDS)],
)
def test_function_and_costs(name, method):
    """Contraction keeps the function; extracted is elastic and costs what was said."""
    net, plain = converted(name, method), stratavit.as_timm(source(name))
    size, full = net.data_config["input_size"], output(net)
    assert relative_error(output(SuperNet(source(name))), output(source(name))) < 1e-5
    assert relative_error(full, output(source(name))) < 2e-5
    assert net.params() == sum(parameter.numel() for parameter in plain.parameters())
    for attention in (False, True):
        assert net.macs(attention=attention) == linear_macs(plain, size, attention=attention)
    for spec in specs(net):
        small = net.extract(spec=spec)
        assert type(small) is type(source(name)) or name == architectures.TORCHVISION
        assert relative_error(output(small) - output(net, spec) + full, full) < 1e-5
        small = stratavit.as_timm(small)
        for attention in (False, True):
            assert linear_macs(small, size, attention=attention) == net.macs(spec, attention=attention)
        assert sum(parameter.numel() for parameter in small.parameters()) == net.params(spec)


@every_model
def test_prefixes_nest_and_budgets_are_met(name):
    net = converted(name)
    widths = [net.strata.spec(position) for position in range(len(net.strata) + 1)]
    costs = [net.macs(spec) for spec in widths]
    for larger, smaller in pairwise(widths):
        assert smaller <= larger
        assert smaller != larger
    assert costs == sorted(costs, reverse=True)
    assert all(width == 0 for width in widths[-1].values())
    largest_step = max(before - after for before, after in pairwise(costs))
    lowest = costs[-1] / costs[0]
    for part in (0.9, 0.7, 0.3):
        share = lowest + part * (1 - lowest)
        assert 0 <= round(share * net.macs()) - net.budget(macs=share).got < largest_step  # of whole MACs


@every_model
def test_saved_and_loaded_is_the_same(name, tmp_path):
    net = converted(name)
    spec = specs(net)[3]
    net.save(tmp_path / "net")
    loaded = SuperNet.load(tmp_path / "net").eval()
    assert torch.equal(output(loaded, spec), output(net, spec))
    assert loaded.origin == net.origin
    if name in architectures.KINDS:
        model = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
        assert relative_error(output(model), output(net.model)) < 1e-5
    small = net.extract(spec=spec)
    stratavit.save(small, tmp_path / "small")
    back = stratavit.load(tmp_path / "small")
    assert type(back) is type(small)
    assert torch.equal(output(back), output(small))
    described = describe(stratavit.as_timm(source(name)))
    assert described | {"sites": {}} == net.description | {"sites": {}}


@every_model
def test_gradients_reach_all_weights_of_a_prefix(name):
    """A small step along them lowers the loss; without drop path, which is random."""
    net = copy.deepcopy(converted(name))
    spec = {site.name: site.width // 2 for site in net.sites}
    optimiser, losses = torch.optim.SGD(net.parameters(), lr=1e-5), []
    for _ in range(2):
        losses.append(net(IMAGES, spec).square().sum())
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[1] < losses[0]
    for module in net.elastic.values():
        assert module.out.weight.grad.any()


@every_kind
def test_what_recovery_of_all_sizes_learns_is_a_part_of_every_size_but_the_full_one(name, tmp_path):
    net, before = copy.deepcopy(converted(name)), converted(name)
    change_weights(net)
    for spec in specs(net)[1:]:
        found = output(net, spec)
        assert relative_error(output(net.extract(spec=spec)), found) < 1e-5
        assert relative_error(found, output(before, spec)) > 1e-3 or spec == net.resolve(None)
    assert torch.equal(output(net), output(before))
    assert net.state_dict().keys() == before.state_dict().keys()
    net.save(tmp_path / "net", moments=False)
    net.compensation = "mean"  # that of a network without moments
    assert torch.equal(output(SuperNet.load(tmp_path / "net", moments=False), spec), output(net, spec))


@pytest.mark.parametrize(
    "name", [*architectures.KINDS, *GROUPED, *architectures.TRANSFORMERS[:1], architectures.TORCHVISION]
)
def test_exported_to_onnx_matches(name, tmp_path):
    net = converted(name)
    for number, spec in enumerate(specs(net)[0:4:3] if name in GROUPED else specs(net)[3:4]):
        small = net.extract(spec=spec)
        assert stratavit.export(small, tmp_path / f"{number}.onnx", images=IMAGES).difference < 1e-4


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224"])
def test_a_few_steps_of_piad_lower_the_loss(name):
    """On a toy task: which quarter of the image is brighter; without a head, the features of another model.

    Compared with a run of the same steps that learns nothing, so that list and means are the same.
    """
    pytest.importorskip("accelerate")
    images, labels = make_images(32, seed=5), torch.arange(32) % 4
    for number, label in enumerate(labels.tolist()):
        images[number, :, 16 * (label // 2) :, 16 * (label % 2) :] += 2
    data = torch.utils.data.TensorDataset(images, labels)
    headless = not classes_of(converted(name))
    recipe = {"epochs": 15, "list_epochs": 1, "batch_size": 16, "ema_decay": 0.0, "smoothing": 0.0, "mixup": 0.0}
    recipe |= {"cutmix": 0.0, "repeats": 1, "workers": 0, "tracker": "none", "drop_path": 0.0, "weight_decay": 0.0}
    teacher = enliven(copy.deepcopy(stratavit.as_timm(source(name))), seed=1) if headless else None
    target = labels if teacher is None else teacher(images).detach()

    def trained(lr):
        """Loss at three sizes."""
        net = copy.deepcopy(converted(name))
        changes = {"lr": lr, "min_lr": lr, "sampling": "sandwich"}
        stratavit.train_piad(net, data, config=recipe | changes, cpu=True, teacher=teacher)
        losses = []
        for position in (0, len(net.strata) // 2, len(net.strata)):
            with torch.no_grad():
                found = net(images, net.strata.spec(position))
            loss = distance(found, target, 0) if headless else torch.nn.functional.cross_entropy(found, target)
            losses.append(float(loss))
        return losses

    assert sum(trained(0.01)) < 0.9 * sum(trained(1e-9))


# ---- types and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", architectures.NAMES)
def test_half_precision_is_taken_and_a_hook_is_not(name):
    """Rounding stays within what is allowed of two forms of one model; a change does not."""
    model = copy.deepcopy(source(name)).bfloat16()
    SuperNet(model)
    model.register_forward_hook(lambda module, args, out: out.roll(1, -1))
    with pytest.raises(StrataViTError):
        SuperNet(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_kind
def test_other_types_go_through_files(name, dtype, tmp_path):
    net = SuperNet(copy.deepcopy(source(name)).to(dtype)).eval()
    small = net.extract(spec={net.sites[0].name: net.sites[0].width // 2})
    net.save(tmp_path / "net")
    stratavit.save(small, tmp_path / "small")
    images = IMAGES.to(dtype)
    with torch.no_grad():
        for back, model in ((SuperNet.load(tmp_path / "net").eval(), net), (stratavit.load(tmp_path / "small"), small)):
            assert torch.equal(back(images), model(images))


OPTIONS = {
    "eva02, any image size": ("eva02_tiny_patch14_224", {"dynamic_img_size": True}),
    "eva02, no class token": ("eva02_tiny_patch14_224", {"class_token": False, "global_pool": "avg"}),
    "eva02, registers": ("eva02_tiny_patch14_224", {"num_reg_tokens": 2}),
    "eva02, patches dropped in training": ("eva02_tiny_patch14_224", {"patch_drop_rate": 0.1}),
    "swin, any image size": ("swin_tiny_patch4_window7_224", {"strict_img_size": False}),
    "swin, narrow MLPs": ("swin_tiny_patch4_window7_224", {"mlp_ratio": 2.0}),
    "swin, windows by stage": ("swin_tiny_patch4_window7_224", {"window_size": ((4, 4), (2, 2))}),
    "swin-v2, narrow MLPs": ("swinv2_tiny_window8_256", {"mlp_ratio": 2.0}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_survive_conversion_and_files(option, tmp_path):
    name, more = OPTIONS[option]
    try:
        model = architectures.make(name, **more)
    except TypeError:
        assert "window_size" in more
        pytest.skip(f"timm {timm.__version__} has one window for all stages")
    net = SuperNet(model).contract([IMAGES]).eval()
    small = net.extract(spec={site.name: max(1, site.width // 2) for site in net.sites})
    stratavit.save(small, tmp_path / "small")
    net.save(tmp_path / "net")
    assert relative_error(output(net), output(model)) < 2e-5
    assert torch.equal(output(stratavit.load(tmp_path / "small")), output(small))
    assert torch.equal(output(SuperNet.load(tmp_path / "net").eval()), output(net))
