"""Models with what others of their family lack or have."""

import pytest
import timm
from helpers import make_model
from timm.models.beit import Beit

from stratavit import ArtifactError, SuperNet
from stratavit.artifacts import timm_config
from stratavit.models import architecture


def test_a_model_of_no_fixed_size():
    model = make_model("plain")
    model.patch_embed.img_size = None
    assert architecture.resolve_data_config(model)["input_size"] == (3, 224, 224)


def test_a_beit_without_biases_of_qkv_is_refused():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with pytest.raises(ArtifactError):
        SuperNet(Beit(**sizes, qkv_bias=False))


def test_arguments_that_an_architecture_sets_itself(monkeypatch):
    """Then there is no config.json that timm could load by."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    description, config = architecture.describe(model), architecture.resolve_data_config(model)
    assert timm_config.timm_config(description, config) is not None
    built = architecture.build(description, device="meta")

    def twice(*args, **options):
        raise TypeError("got multiple values for keyword argument 'depth'")

    monkeypatch.setattr(architecture, "build", lambda *args, **options: built)
    monkeypatch.setattr(timm, "create_model", twice)
    assert timm_config.timm_config(description, config) is None
