"""Widths belong to a call and weights to the network as it is: no call sees another's size, none an older weight."""

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers import PLAN, make_batches, make_images, make_model, make_net
from torch.func import functional_call

from stratavit import StrataViTError, SuperNet, evaluate, knn
from stratavit.elastic.compensation import Moments, compensate

IMAGES = make_images(2, seed=9)
HALF = {"blocks.0.attn": 8, "blocks.0.mlp": 30, "blocks.1.attn": 8, "blocks.1.mlp": 30}


def each(change):
    """Of every elastic module, without gradient."""

    @torch.no_grad()
    def changed(net):
        for module in net.elastic.values():
            change(module)

    return changed


def step(net):
    net(IMAGES, {site.name: site.width // 2 for site in net.sites}).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.01).step()


def scale_through_numpy(module):
    module.out.weight.detach().numpy()[...] *= 1.2


def renewed(module):
    """The new one may get the memory, and so the `id`, of the old one."""
    factor, ridge, energy = vars(module.moments).values()
    module.moments = None
    module.moments = Moments(factor, ridge, energy * 100)


WEIGHTS = {
    "training step": step,
    "other weights": each(lambda m: setattr(m.out, "weight", torch.nn.Parameter(m.out.weight * 1.2))),
    "bias": each(lambda m: m.out.bias.add_(0.3)),
    "data in place": each(lambda m: m.out.weight.data.mul_(1.2)),  # around autograd's version counter
    "through NumPy": each(scale_through_numpy),
    "mean's data": each(lambda m: m.channel_mean.data.add_(0.3)),
}
CHANGES = WEIGHTS | {
    "nothing": lambda net: None,
    "state dict": lambda net: net.load_state_dict({name: t * 1.1 for name, t in net.state_dict().items()}),
    "gain": each(lambda m: setattr(m, "gain", 0.1)),
    "moments": each(lambda m: setattr(m, "moments", replace(m.moments, energy=1e6))),
    "moments at the old ones' place": each(renewed),
    "mean": each(lambda m: setattr(m, "channel_mean", m.channel_mean * 2)),
    "contract": lambda net: net.contract(make_batches((12,))[:1], token_weight=0.0, objective="feature"),
    "type": lambda net: net.double(),
}


def solved(net, module, width):
    """The compensated second map, straight from the formula."""
    with torch.no_grad():
        mean = module.channel_mean.T.flatten().float()
        weight = module.out_by_coordinate().float()
        kept, shift = compensate(weight, mean, module.moments, width * module.heads, module.gain)
        kept = kept.unflatten(1, (width, module.heads)).transpose(1, 2).flatten(1)
        return kept.to(module.out.weight.dtype), (module.out.bias.float() + shift).to(module.out.weight.dtype)


@pytest.mark.parametrize("change", CHANGES)
def test_elastic_and_extracted_weights_are_computed_from_what_is_there(change):
    net = copy.deepcopy(make_net("plain"))
    with torch.no_grad():
        before = net(IMAGES, HALF)
        net.extract(spec=HALF, verbose=False)
    CHANGES[change](net)
    images = IMAGES.to(next(net.parameters()).dtype)
    small = net.extract(spec=HALF, verbose=False)
    with torch.no_grad():
        after = net(images, HALF)
        assert torch.allclose(after, small(images), atol=1e-5)
        for name, module in net.elastic.items():
            weight, bias = solved(net, module, HALF[name])
            layer = small.get_submodule(f"{name}.{'proj' if module.attention else 'fc2'}")
            assert torch.equal(layer.weight, weight)
            assert torch.equal(layer.bias, bias)
    assert torch.equal(after.float(), before) == (change == "nothing")


@pytest.mark.parametrize("change", CHANGES)
def test_a_specialised_network_extracts_what_is_there(change):
    """With moments, whatever was kept for serving: extraction never reads it."""
    net = copy.deepcopy(make_net("plain"))
    net.specialise(HALF, moments=True)
    CHANGES[change](net)
    fresh = copy.deepcopy(net)
    for module in fresh.elastic.values():
        module.corrected.clear()
    ours, theirs = (one.extract(spec=HALF, verbose=False).state_dict() for one in (net, fresh))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("change", WEIGHTS)
def test_released_moments_refuse_to_extract_from_other_weights(change):
    net = copy.deepcopy(make_net("plain"))
    net.specialise(HALF)
    net.extract(spec=HALF, verbose=False)
    CHANGES[change](net.requires_grad_(True))
    with pytest.raises(StrataViTError, match="width"):
        net.extract(spec=HALF, verbose=False)


@pytest.mark.parametrize("specialised", [False, True])
def test_functional_call_runs_the_weights_that_it_is_given(specialised):
    """In a loop, as merging and evolution do: memory that is freed comes again for other weights."""
    net, name = copy.deepcopy(make_net("plain")), "model.blocks.0.mlp.fc2.weight"
    if specialised:
        net.specialise(HALF, moments=True)
    weight = dict(net.named_parameters())[name].detach().clone()
    for turn in range(5):
        fresh = copy.deepcopy(make_net("plain"))
        with torch.no_grad():
            fresh.get_parameter(name).copy_(weight * (1 + 0.05 * turn))
            found = functional_call(net, {name: weight * (1 + 0.05 * turn)}, (IMAGES, HALF))
            assert torch.equal(found, fresh(IMAGES, HALF)), turn


def test_a_state_dict_brings_no_moments_and_says_so(capsys):
    net, other = copy.deepcopy(make_net("plain")), SuperNet(make_model("plain"))
    net.load_state_dict(make_net("plain").state_dict())
    assert "moments" in capsys.readouterr().err
    other.load_state_dict(net.state_dict())  # knows nothing of its channels yet
    assert capsys.readouterr().err == ""


def sizes_of(net):
    return [net.spec(macs=share) for share in (1.0, 0.8, 0.6, 0.45)]


@pytest.mark.parametrize("family", ["plain", "distilled"])
@pytest.mark.parametrize("how", ["call", "at", "specialised", "extract"])
def test_four_sizes_at_once_are_those_of_four_alone(family, how):
    net = copy.deepcopy(make_net(family, stratified=True)).eval()
    specs = sizes_of(net)
    if how == "specialised":
        net.specialise(*specs)

    @torch.inference_mode()
    def answer(spec):
        if how == "extract":
            return net.extract(spec=spec, verbose=False)(IMAGES)
        if how == "at":
            with net.at(spec) as model:
                return model(IMAGES)
        return net(IMAGES, spec)

    alone = [answer(spec) for spec in specs]
    assert len({float(found.sum()) for found in alone}) == len(specs)
    turns = [number % len(specs) for number in range(24)]
    with ThreadPoolExecutor(len(specs)) as pool:
        found = list(pool.map(lambda number: answer(specs[number]), turns))
    assert all(torch.equal(one, alone[number]) for one, number in zip(found, turns, strict=True))


@pytest.mark.parametrize("judge", [evaluate, lambda net, loader, spec: knn(net, loader, loader, spec, k=3)])
def test_threads_that_measure_do_not_meet(judge):
    net = copy.deepcopy(make_net("plain", stratified=True)).eval()
    loader, specs = make_batches(), sizes_of(net)
    alone = [judge(net, loader, spec) for spec in specs]
    with ThreadPoolExecutor(len(specs)) as pool:
        assert list(pool.map(lambda spec: judge(net, loader, spec), specs * 3)) == alone * 3


def test_tasks_of_one_thread_do_not_meet():
    net = copy.deepcopy(make_net("plain", stratified=True)).eval()
    specs = sizes_of(net)

    async def answer(spec):
        with net.at(spec) as model:
            await asyncio.sleep(0)  # another task goes on here
            return model(IMAGES)

    async def together():
        return await asyncio.gather(*(answer(spec) for spec in specs))

    with torch.no_grad():  # of the thread
        alone = [net(IMAGES, spec) for spec in specs]
        found = asyncio.run(together())
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_a_size_ends_with_its_context_also_after_an_error():
    net = copy.deepcopy(make_net("plain", stratified=True)).eval()
    with torch.no_grad():
        full = net(IMAGES)
        with pytest.raises(ValueError, match="unpack"), net.at(HALF) as model:
            model(IMAGES[:, :, 0])
        assert torch.equal(net.model(IMAGES), full)
        with net.at(HALF) as model:
            half = model(IMAGES)
            with net.at() as inner:
                assert torch.equal(inner(IMAGES), full)
            assert torch.equal(model(IMAGES), half)


def test_calibration_inside_a_context_sees_the_full_network():
    ours, theirs = (copy.deepcopy(make_net("plain")) for _ in range(2))
    with ours.at(HALF):
        ours.contract(make_batches()).stratify(make_batches(), plan=PLAN)
    theirs.contract(make_batches()).stratify(make_batches(), plan=PLAN)
    assert ours.strata.entries == theirs.strata.entries


def test_recomputed_blocks_are_refused_for_sub_networks():
    """They would run in the backward pass, when the widths are gone."""
    net = copy.deepcopy(make_net("plain")).train()
    net.model.set_grad_checkpointing(True)
    net(IMAGES).sum().backward()
    with pytest.raises(StrataViTError, match="checkpointing"):
        net(IMAGES, HALF)
    with torch.no_grad():
        expected = copy.deepcopy(make_net("plain"))(IMAGES, HALF)
        assert torch.equal(net.eval()(IMAGES, HALF), expected)


def test_a_compiled_network_follows_its_sizes():
    """The graph breaks where the size is read; no size is baked in."""
    net = copy.deepcopy(make_net("plain", stratified=True)).eval()
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        for spec in sizes_of(net)[1:3] * 2:
            assert torch.allclose(compiled(IMAGES, spec), net(IMAGES, spec), atol=1e-6)
