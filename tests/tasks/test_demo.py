"""The demo: its images, and the main job end to end."""

import contextlib
import io
import json

import pytest
import torch
from command_line import refusal

import stratavit
from stratavit.cli.parser import main
from stratavit.tasks import demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of the command after four epochs, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main(["demo", "--epochs", "4", "--device", "cpu", "--out", str(out), "--json"]) == 0
    return out, json.loads(text.getvalue(), parse_constant=pytest.fail)


def test_digits_are_split_once_and_for_all():
    train, test = demo.digits()
    assert (len(train), len(test)) == (1437, 360)
    assert train.tensors[0].shape[1:] == (1, 8, 8)
    both = torch.cat([train.tensors[0], test.tensors[0]])
    assert abs(float(both.mean())) < 0.01
    assert abs(float(both.std()) - 1) < 0.01
    assert torch.equal(demo.digits()[0].tensors[1], train.tensors[1])
    assert set(test.tensors[1].tolist()) == set(range(10))
    seen = {image.numpy().tobytes() for image in train.tensors[0]}
    assert not [image for image in test.tensors[0] if image.numpy().tobytes() in seen]


def test_training_teaches(finished):
    """Four epochs get five standard errors above chance; the full model is the first point."""
    first = finished[1]["points"][0]
    assert (first["share"], first["n"]) == (1, 360)
    assert first["top1"] > 10 + 5 * 100 * (0.1 * 0.9 / 360) ** 0.5


def test_everything_is_there(finished):
    out, result = finished
    assert {path.name for path in out.iterdir()} == {"curve.csv", "curve.png", "report.html", "small", "super-network"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len((out / "curve.csv").read_text().splitlines()) == len(result["points"]) + 1
    assert (out / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert result["folder"] == str(out)


def test_the_saved_half_model_is_the_one_that_was_measured(finished):
    out, result = finished
    small, net = stratavit.load(out / "small"), stratavit.SuperNet.load(out / "super-network")
    loader = torch.utils.data.DataLoader(demo.digits()[1], batch_size=256)
    assert stratavit.evaluate(small, loader).to_dict() == pytest.approx(result["half"], rel=1e-6)
    assert net.macs(net.spec(macs=0.5)) == result["budget"]["got"] <= result["budget"]["asked"]
    assert sum(p.numel() for p in small.parameters()) == net.params(net.spec(macs=0.5))
    assert result["difference"] <= 1e-5


def test_a_second_run_needs_overwrite(finished, capsys, monkeypatch):
    """And is refused without it, with nothing changed; `write_folder` has tests of its own."""
    out, before = finished[0], sorted(finished[0].rglob("*"))
    monkeypatch.setattr(demo, "_work", lambda folder, device, epochs: ({"new": True}, []))
    assert "--overwrite" in refusal(capsys, "demo", "--out", out)
    assert sorted(out.rglob("*")) == before
