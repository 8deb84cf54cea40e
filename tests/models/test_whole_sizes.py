"""Families of which timm builds no smaller models: function, costs and files, without a list."""

import architectures
import pytest
import torch
from helpers import relative_error

import stratavit
from stratavit import SuperNet
from stratavit.models.cost import linear_macs


@pytest.mark.parametrize("name", architectures.WHOLE)
def test_function_costs_and_files(name, tmp_path):
    torch.manual_seed(0)
    model, side = architectures.make(name), architectures.side(name)
    images = torch.randn(2, 3, side, side)
    net = SuperNet(model).contract([(torch.randn(6, 3, side, side), torch.arange(6))]).eval()
    size = net.data_config["input_size"]
    assert size == (3, side, side)
    with torch.no_grad():
        source = model(images)
        assert relative_error(net(images), source) < 2e-5
        spec = {site.name: site.width // (2 + number % 3) for number, site in enumerate(net.sites)}
        for cut in (spec, spec | {net.sites[0].name: 0}):
            small = net.extract(spec=cut, verbose=False).eval()
            assert relative_error(small(images), net(images, cut)) < 1e-5
            for attention in (False, True):
                assert linear_macs(small, size, attention=attention) == net.macs(cut, attention=attention)
            assert sum(parameter.numel() for parameter in small.parameters()) == net.params(cut)
        stratavit.save(small, tmp_path / "small")
        assert torch.equal(stratavit.load(tmp_path / "small").eval()(images), small(images))
        net.save(tmp_path / "net")
        assert torch.equal(SuperNet.load(tmp_path / "net").eval()(images, spec), net(images, spec))
