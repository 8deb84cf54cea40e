"""Vision towers that read all images of a batch as one sequence of patches, with one map for q, k and v."""

import copy
import json

import pytest
import torch
from hosted_models import HOSTS, batches_for, make, packed

import stratavit
from stratavit import ArtifactError, StrataViTError
from stratavit.dropout_list.walk import Walk
from stratavit.hosts.converting import host_outputs
from stratavit.interop.part_sites import elastic_sites_in
from stratavit.interop.transformers.small_modules import small_module

PLAN = Walk(states=((0.7, 1), (0.4, 1)), images=12)
QWEN = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"]


@pytest.mark.parametrize("name", QWEN)
def test_a_cut_module_is_the_full_one_without_some_pairs(name):
    """The stock module with zeros in the rows of the pairs that go, and in what v loses, computes the same."""
    found, _ = elastic_sites_in(make(HOSTS[name]).model.visual)
    site = next(one for one in found.values() if one.attention)
    stock, half, width = copy.deepcopy(site.stock), site.full_width // 2, 4
    site.pairs = torch.randperm(half, generator=torch.Generator().manual_seed(0))
    gone = site.pairs[half // 2 :].tolist()
    small = small_module(site, width)
    with torch.no_grad():
        for tensor in (stock.qkv.weight, stock.qkv.bias):
            q, k, v = tensor.unflatten(0, (3, site.heads, -1))
            for one in (q, k):
                one[:, [*gone, *(i + half for i in gone)]] = 0
            v[:, width:] = 0
    x, turns = torch.randn(24, 32), torch.rand(24, half).tile(2) * 6
    given = {"cu_seqlens": torch.tensor([0, 8, 24]), "position_embeddings": (turns.cos(), turns.sin())}
    assert type(small) is type(stock)
    assert small.qkv.out_features == site.heads * (half + half + width)
    torch.testing.assert_close(small(x, **given), stock(x, **given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", QWEN)
def test_sizes_at_which_pairs_are_gone_come_back_from_files(name, tmp_path):
    host, batch = make(HOSTS[name]), batches_for(HOSTS[name])[0]
    net = stratavit.convert_part(host, "visual", batches_for(HOSTS[name]), plan=PLAN)
    assert any(site.pairs.tolist() != list(range(8)) for site in net.elastic.values() if site.attention), "not ordered"
    net.place(spec={site.name: 4 for site in net.sites if site.kind == "attention"})
    host.save_pretrained(tmp_path)
    expected, back = host_outputs(host, batch), stratavit.load_transformers(tmp_path)
    assert all(map(torch.equal, host_outputs(back, batch), expected))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 10**12
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="max_position_embeddings"):
        stratavit.load_transformers(tmp_path)
    again, uncut = elastic_sites_in(host.model.visual)
    assert not any(site.attention for site in again.values())
    assert all("full model" in reason for reason in uncut.values())


def test_costs_are_those_of_one_image():
    """Counted by hand: patches, three blocks, the merger of four patches each; and products within windows."""
    net = stratavit.convert_part(make(HOSTS["Qwen2-VL"]), "visual", batches_for(HOSTS["Qwen2-VL"]), plan=PLAN)
    linear = 32 * 96 * 32 + 3 * 32 * (4 * 32 * 32 + 2 * 32 * 64) + 8 * (128 * 128 + 128 * 32)
    assert net.macs() == linear
    assert net.macs(attention=True) == linear + 3 * 2 * 32 * 32 * 32
    net = stratavit.convert_part(make(HOSTS["Qwen2.5-VL"]), "visual", batches_for(HOSTS["Qwen2.5-VL"]), plan=PLAN)
    assert net.macs(attention=True) - net.macs() == 2 * 32 * 32 * (16 + 32 + 16), (
        "windows of 16 tokens, but for block 1"
    )


def test_images_of_several_sizes_are_refused():
    def features(host, batch):
        return host.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])

    first, uneven, larger = packed(2), packed(2), packed(3)
    uneven["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 12]])
    larger["image_grid_thw"] = torch.tensor([[1, 6, 8], [1, 8, 6]])
    for loader, found in (([uneven], "16 to 48 patches"), ([first, larger], "32 to 48 patches")):
        with pytest.raises(StrataViTError, match=found):
            stratavit.convert_part(make(HOSTS["Qwen2-VL"]), "visual", loader, call=features)
