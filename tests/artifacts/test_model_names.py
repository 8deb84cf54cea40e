"""Which names are repositories on the hub, and what timm calls a model that is named as there."""

import pytest

from stratavit.artifacts.model_names import repository_of, timm_name

KNOWN = "deit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (KNOWN, KNOWN),
        (f"{KNOWN}.fb_in1k", f"{KNOWN}.fb_in1k"),
        (f"timm/{KNOWN}.fb_in1k", f"{KNOWN}.fb_in1k"),
        (f"hf_hub:timm/{KNOWN}.fb_in1k", f"{KNOWN}.fb_in1k"),
        (f"hf-hub:timm/{KNOWN}", KNOWN),
        (f"timm/{KNOWN}.of_tomorrow", f"hf-hub:timm/{KNOWN}.of_tomorrow"),
        ("timm/diet_tiny", "diet_tiny"),  # timm could not build it: refused, with the names that are near
        ("hf_hub:someone/model", "hf-hub:someone/model"),
        ("someone/model", "someone/model"),
        ("vit_b_16", "vit_b_16"),
    ],
)
def test_timms_own_names(name, expected):
    assert timm_name(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("someone/model-v1.0", "someone/model-v1.0"),
        ("HF_hub:someone/model", "someone/model"),
        *((path, None) for path in ("model", "./model", "../model", "/model", "a/b/c", "someone/", "~/model", "a/b c")),
    ],
)
def test_repositories(name, expected):
    assert repository_of(name) == expected


def test_a_path_that_is_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "model").mkdir(parents=True)
    assert repository_of("someone/model") is None
    assert repository_of("hf-hub:someone/model") == "someone/model"
