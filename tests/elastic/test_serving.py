"""Several sizes from one set of weights: the same answers, no copies, and every byte accounted for."""

import copy

import pytest
import torch
from helpers import CLASSES, make_batches, make_images, make_net, tensors_of
from torch.utils.data import TensorDataset

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet

IMAGES = make_images(3, seed=8)


def served(family="plain", **options):
    net = copy.deepcopy(make_net(family, stratified=True))
    specs = [net.spec(macs=share) for share in (0.8, 0.5)]
    with torch.inference_mode():
        expected = [net(IMAGES, spec).clone() for spec in [{}, *specs]]
    return net, specs, expected, net.specialise(*specs, **options)


@pytest.mark.parametrize("family", ["plain", "no_bias", "distilled"])
def test_specialised_sizes_answer_as_before(family):
    net, specs, expected, _ = served(family)
    with torch.inference_mode():
        for _ in range(2):  # one after the other, and back
            for spec, answer in zip([{}, *specs], expected, strict=True):
                assert torch.equal(net(IMAGES, spec), answer)


def test_nothing_is_computed_while_serving(monkeypatch):
    net, specs, _, _ = served(moments=True)
    for module in net.elastic.values():
        monkeypatch.setattr(module, "compensated_outs", None)
    with torch.inference_mode():
        for spec in specs:
            net(IMAGES, spec)


def test_every_byte_is_counted():
    for moments in (True, False):
        net, specs, _, memory = served(moments=moments)
        assert sum(tensors_of(net).values()) == memory.total
        corrected = 0
        for name, module in net.elastic.items():
            widths = {spec[name] for spec in specs} - {0, module.full_width}
            corrected += sum(4 * (module.out.out_features * (module.heads * width + 1)) for width in widths)
        assert memory.corrected == corrected > 0
        assert (memory.moments > 0) == moments
        assert memory.weights == 4 * sum(p.numel() for p in net.parameters())
        assert f"{memory.total / 1e6:.2f} MB: weights {memory.weights / 1e6:.2f}" in str(memory)


def test_a_family_by_its_means_costs_little_more_than_the_largest(tmp_path):
    net = make_net("plain", stratified=True)
    net.save(tmp_path / "run")
    lean = SuperNet.load(tmp_path / "run", moments=False)
    memory = lean.memory()
    assert (memory.moments, memory.corrected) == (0, 0)
    assert memory.means == 4 * sum(site.heads * site.width for site in lean.sites)
    by_mean = copy.deepcopy(net)
    by_mean.save(tmp_path / "mean", moments=False)
    reference = SuperNet.load(tmp_path / "mean")
    with torch.inference_mode():
        for share in (1.0, 0.7, 0.4):
            spec = lean.spec(macs=share)
            assert torch.equal(lean(IMAGES, spec), reference(IMAGES, spec))


def test_sizes_that_were_not_named_follow_the_mean():
    net, _, _, _ = served()
    other = net.spec(macs=0.65)
    mean = copy.deepcopy(make_net("plain", stratified=True))
    for module in mean.elastic.values():
        module.moments = None
    name = next(name for name in other if other[name] not in net.elastic[name].corrected)
    module, expected = net.elastic[name], mean.elastic[name]
    for found, wanted in zip(module.weights_at(other[name]), expected.weights_at(other[name]), strict=True):
        assert (found is None and wanted is None) or torch.equal(found, wanted)


@pytest.mark.parametrize("change", ["trained", "cast", "copied"])
def test_corrections_of_other_weights_are_never_used(change):
    net, specs, _, _ = served()
    if change == "trained":
        with torch.no_grad():
            for module in net.elastic.values():
                module.out.weight.mul_(1.1)
    net = net.half().float() if change == "cast" else copy.deepcopy(net) if change == "copied" else net
    with torch.inference_mode(), pytest.raises(StrataViTError, match="width"):
        net(IMAGES, specs[0])


def test_with_moments_corrections_follow_the_weights():
    net, specs, _, _ = served(moments=True)
    with torch.no_grad():
        for module in net.elastic.values():
            module.out.weight.mul_(1.1)
    fresh = copy.deepcopy(net)
    for module in fresh.elastic.values():
        module.corrected.clear()
    with torch.inference_mode():
        assert torch.equal(net(IMAGES, specs[0]), fresh(IMAGES, specs[0]))
    net.train()
    net(IMAGES, specs[0]).sum().backward()
    assert any(module.out.weight.grad.any() for module in net.elastic.values())


def test_released_moments_are_not_saved_over(tmp_path):
    net, _, _, _ = served()
    bare = copy.deepcopy(make_net("plain", stratified=True))
    bare.specialise()
    for one in (net, bare):
        with pytest.raises(ArtifactError, match="specialise"):
            one.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    net.contract(make_batches()).save(tmp_path / "run")  # moments anew
    assert SuperNet.load(tmp_path / "run").memory().moments > 0


def test_extraction_serves_the_specialised_sizes_too():
    net, specs, expected, _ = served()
    small = net.extract(spec=specs[1])
    with torch.inference_mode():
        assert torch.allclose(small(IMAGES), expected[2], atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == net.params(specs[1])
    assert not tensors_of(net).keys() & tensors_of(small).keys()


def test_training_after_serving(tmp_path):
    """Trained on from a network that was specialised: nothing stale is kept, and the result is saved."""
    images = TensorDataset(make_images(8), torch.arange(8) % CLASSES)
    recipe = {"epochs": 1, "list_epochs": 1, "batch_size": 4, "workers": 0, "tracker": "none", "repeats": 1}
    net, _, _, _ = served(moments=True)
    stratavit.train_piad(net, images, None, recipe, tmp_path / "out", cpu=True)
    assert not any(module.corrected for module in net.elastic.values())
    assert SuperNet.load(tmp_path / "out").strata.entries == net.strata.entries
    frozen, _, _, _ = served()
    with pytest.raises(StrataViTError, match="frozen"):
        stratavit.train_piad(frozen, images, None, recipe, tmp_path / "other", cpu=True)
