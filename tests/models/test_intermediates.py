"""Small models of all families return intermediate maps as timm's readers ask for them: in a detector's backbone."""

import architectures
import pytest
import torch
from helpers import make_images, relative_error
from timm.models._features import FeatureGetterNet

from stratavit import SuperNet

IMAGES = make_images(2, seed=9)
NAMES = [name for name in (*architectures.NAMES, *architectures.STAGED) if not name.endswith(".maps")]


@pytest.mark.parametrize("name", NAMES)
def test_intermediate_maps_of_a_small_model_are_the_elastic_ones(name):
    """And those of the full size are the source's; what a model says of its maps stays."""
    source = architectures.make(name)
    net = SuperNet(source).eval()
    spec = {site.name: site.width // 2 for site in net.sites}

    def maps(model):
        with torch.no_grad():
            return model.forward_intermediates(IMAGES, intermediates_only=True)

    small = net.extract(spec=spec, verbose=False).eval()
    expected, full, ours = maps(source), maps(net.extract(spec={}, verbose=False).eval()), maps(small)
    with net.at(spec) as elastic:
        theirs = maps(elastic)
    assert len(expected) > 1
    for ours_one, theirs_one, full_one, source_one in zip(ours, theirs, full, expected, strict=True):
        assert relative_error(ours_one, theirs_one) < 1e-5
        assert relative_error(full_one, source_one) < 1e-5
        assert ours_one.shape == source_one.shape
    assert relative_error(ours[-1], expected[-1]) > 1e-4
    assert small.feature_info == source.feature_info
    backbone = FeatureGetterNet(small, out_indices=(0, 1))
    with torch.no_grad():
        assert all(map(torch.equal, backbone(IMAGES), ours[:2]))
