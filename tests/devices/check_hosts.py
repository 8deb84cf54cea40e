"""Parts of larger models on a device that is not the CPU; batches come from a loader on the CPU."""

import pytest
import torch
from hosted_models import HOSTS, batches_for, make
from torch.utils._pytree import tree_map_only

import stratavit
from stratavit import Walk
from stratavit.hosts.converting import host_outputs, uncut_error

PLAN = Walk(states=((0.7, 1), (0.5, 1)), images=12)


@pytest.mark.parametrize("name", ["CLIP", "Depth Anything", "UperNet", "SigLIP 2", "timm"])
def test_a_part_is_cut_in_place(name, device):
    host, batches = make(HOSTS[name]), batches_for(HOSTS[name])
    expected = host_outputs(host, batches[0])
    net = stratavit.convert_part(host.to(device), HOSTS[name].part, batches, plan=PLAN)
    batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batches[0])
    for found, one in zip(host_outputs(host, batch), expected, strict=True):
        assert torch.allclose(found.cpu(), one, rtol=1e-3, atol=1e-4)
    assert uncut_error(net, batch) <= 1e-4
    assert net.place(macs=0.75, verbose=False) is host
    assert {tensor.device for tensor in host.state_dict().values()} == {device}
    host_outputs(host, batch)
