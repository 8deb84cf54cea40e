"""Sums of covariances on the host: the same network, and bytes that are counted exactly."""

import pytest
import torch
from helpers import make_batches, make_model, relative_error
from timm.models.vision_transformer import VisionTransformer

from stratavit import StrataViTError, SuperNet, convert
from stratavit.calibration import accumulators, sums_place
from stratavit.calibration.statistics import observe
from stratavit.elastic.network import sites_in
from stratavit.models.families import elastic_sites

BATCHES = make_batches()


def state(net):
    """All that contraction leaves: weights, means, moments."""
    found = dict(net.model.state_dict())
    for name, module in net.elastic.items():
        pairs = ((module.channel_mean, module.moments), *module.crossed)
        for number, (mean, moments) in enumerate(pairs):
            found |= {f"{name}.mean{number}": mean, f"{name}.factor{number}": moments.to("cpu").factor}
    return found


def test_on_a_cpu_all_places_are_one(source):
    """Bit for bit."""
    expected = state(SuperNet(source).contract(BATCHES, memory="device"))
    for memory in ("auto", "host"):
        found = state(SuperNet(source).contract(BATCHES, memory=memory))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_streamed_products_make_the_same_network(source, monkeypatch):
    """As from a GPU: each product is made apart and then added."""
    images, made = torch.cat([images for images, _ in BATCHES]), []
    for streamed in (False, True):
        monkeypatch.setattr(accumulators, "_elsewhere", lambda x, streamed=streamed: streamed)
        made.append(SuperNet(source).contract(BATCHES, memory="host"))
    first, second = made
    spec = {site.name: site.width // 2 for site in first.sites}
    with torch.no_grad():
        assert relative_error(second(images), first(images)) <= 1e-5
        assert relative_error(second(images, spec), first(images, spec)) <= 1e-4


@pytest.mark.parametrize(("share", "flush"), [(0.5, 99), (0.0, 99), (0.5, 1)])
def test_bytes_are_counted_exactly(share, flush, monkeypatch):
    monkeypatch.setattr(accumulators, "FLUSH", flush)
    model = SuperNet(make_model("plain")).model
    counted = sums_place.count_bytes(sites_in(model).values(), flushed=flush == 1)
    observers, _ = observe(model, BATCHES * 2, "auto", "none", "count", share, host=True)
    products = [one for observer in observers.values() for _, one in observer._covariance._sums.values()]
    rows = [row for one in products for part in one._sums for row in part]
    assert sum(row.nbytes for row in rows) == counted.sums
    assert max(len(one._flat) for one in products) * 4 == counted.product
    net = SuperNet(make_model("plain")).contract(BATCHES, token_weight=share)
    kept = [m for site in net.elastic.values() for m in (site.moments, *(moments for _, moments in site.crossed))]
    assert sum(moments.nbytes for moments in kept) == counted.kept


def test_auto_goes_to_the_host_where_the_device_is_small(source, monkeypatch):
    model = SuperNet(source).model
    need = sums_place.count_bytes(sites_in(model).values())
    assert need.peak >= max(need.sums, need.kept)
    for free, host in ((None, False), (2 * need.peak, False), (2 * need.peak - 2, True)):
        monkeypatch.setattr(sums_place, "free_bytes", lambda device, free=free: free)
        assert sums_place.on_host(model, BATCHES, "auto") is host
        assert sums_place.on_host(model, BATCHES, "host")
        assert not sums_place.on_host(model, BATCHES, "device")
    monkeypatch.setattr(sums_place, "free_bytes", lambda device: 2 * need.peak)
    assert sums_place.on_host(model, iter(BATCHES), "auto")  # of unknown length: perhaps moved to float64


def test_a_vit_g_fits_a_card_of_24_gb_with_its_sums_on_the_host():
    """Counted on the meta device: sums and moments take more than half of the card, one product hardly anything."""
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11)
    sites, _ = elastic_sites(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    found = sums_place.count_bytes(sites.values())
    assert len(sites) == 80
    assert found.peak > 0.5 * (24e9 - weights)  # so that `auto` takes the host
    assert weights + found.product < 0.2 * 24e9


def test_a_wrong_place_is_one_clear_sentence(source):
    for run in (lambda: SuperNet(source).contract(BATCHES, memory="disk"), lambda: convert(source, BATCHES, memory=1)):
        with pytest.raises(StrataViTError, match="memory: expected 'auto', 'device' or 'host'"):
            run()
