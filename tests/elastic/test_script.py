"""`torch.jit.script` takes the small models of every family, as it takes timm's own, and they answer the same."""

import copy
import io
import warnings

import architectures
import pytest
import torch
from helpers import make_images

from stratavit import SuperNet
from stratavit.elastic.plain import Constant, SplitAttention

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
IMAGES = make_images(3, seed=9)


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, file = torch.jit.script(module), io.BytesIO()
        torch.jit.save(made, file)
        file.seek(0)
        return torch.jit.load(file)


@pytest.mark.parametrize("name", [name for name in architectures.NAMES if "naflex" not in name])  # nor does timm's
def test_small_models_of_every_family(name):
    """Sites in turn are left out, cut to one channel, halved and uncut."""
    net, cut = SuperNet(architectures.make(name)).contract([IMAGES]).eval(), {}
    for number, site in enumerate(net.sites):
        cut[site.name] = (0, 1, max(1, site.width // 2), site.width)[number % 4]
    small = net.extract(spec=cut, verbose=False)
    with torch.no_grad():
        assert torch.equal(scripted(small)(IMAGES), small(IMAGES))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.qk_norm", "swinv2_tiny_window8_256"])
def test_gradients_are_those_of_the_model(name):
    net = SuperNet(architectures.make(name)).eval()
    small = net.extract(spec={site.name: site.width // 2 for site in net.sites}, verbose=False)
    gradients = []
    for model in (small, scripted(copy.deepcopy(small))):
        model.zero_grad()
        model(IMAGES).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 10
    assert all(torch.allclose(g, gradients[1][key], rtol=1e-4, atol=1e-6) for key, g in gradients[0].items())


N, H, A = 5, 2, 4
ROPE = torch.randn(N, 2 * A, generator=torch.manual_seed(1))
SEEN = torch.ones(N, N, dtype=torch.bool).tril()
ARGUMENTS = {
    "none": {},
    "rotary": {"rope": ROPE},
    "numbers added": {"attn_mask": torch.arange(25.0).view(N, N) / 25},
    "not seen": {"attn_mask": SEEN},
    "causal": {"is_causal": True},
    "shared": {"shared_rel_pos_bias": torch.arange(50.0).view(1, H, N, N) % 3},
    "shared, of ViTs": {"shared_rel_pos": torch.arange(50.0).view(1, H, N, N) % 3},
    "windows": {"mask": torch.arange(75.0).view(3, N, N) / 75},
    "windows and shared": {"mask": torch.arange(75.0).view(3, N, N), "shared_rel_pos_bias": torch.ones(1, H, N, N) / 3},
    "rotary and shared": {"rope": ROPE, "shared_rel_pos_bias": torch.ones(1, H, N, N), "attn_mask": torch.ones(N, N)},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("half", [False, True])
def test_whatever_blocks_give_to_their_attention(arguments, half):
    torch.manual_seed(0)
    given, x = ARGUMENTS[arguments], torch.randn(6, N, 8)
    attention = SplitAttention(8, H, A, 3, 0.5, rotate_half=half).eval()
    assert torch.equal(scripted(attention)(x, **given), attention(x, **given))
    changed = not torch.allclose(attention(x, **given), attention(x), rtol=1e-3)
    assert changed == bool(given)


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("dim", [0, 8])
def test_a_constant_takes_them_and_stays_one(arguments, dim):
    constant, x = Constant(dim), torch.randn(6, N, 8)
    with torch.no_grad():
        expected = torch.zeros(6, N, 8)
        if constant.bias is not None:
            expected += constant.bias.uniform_()
    given = ARGUMENTS[arguments]
    assert torch.equal(constant(x, **given), expected)
    assert torch.equal(scripted(constant)(x, **given), expected)
