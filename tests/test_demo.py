"""The demo's own parts; that the command runs end to end is in `test_cli`."""

import json
import sys

import pytest
import torch

import stratavit
from stratavit import StrataViTError, demo
from stratavit.cli.parser import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What four epochs leave, and what the command said."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result, view = demo.run(out, torch.device("cpu"), epochs=4, overwrite=False)
    return out, result, view


def test_digits_are_split_once_and_for_all():
    train, test = demo.digits()
    assert (len(train), len(test)) == (1437, 360)
    assert train.tensors[0].shape[1:] == (1, 8, 8)
    both = torch.cat([train.tensors[0], test.tensors[0]])
    assert abs(float(both.mean())) < 0.01
    assert abs(float(both.std()) - 1) < 0.01
    again = demo.digits()
    assert torch.equal(again[0].tensors[1], train.tensors[1])
    assert set(test.tensors[1].tolist()) == set(range(10))


def test_no_test_image_is_trained_on():
    train, test = demo.digits()
    seen = {image.numpy().tobytes() for image in train.tensors[0]}
    assert not [image for image in test.tensors[0] if image.numpy().tobytes() in seen]


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(StrataViTError, match=r"pip install 'stratavit\[demo\]'"):
        demo.digits()


def test_shifts_move_by_at_most_one_pixel():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4, 4] = 1
    generator = torch.Generator().manual_seed(0)
    moved = [demo.shifted(image, generator) for _ in range(100)]
    assert {tuple(x.shape) for x in moved} == {(1, 1, 8, 8)}
    places = {tuple(x[0, 0].nonzero()[0].tolist()) for x in moved}
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


def test_training_teaches(finished):
    """Four epochs get five standard errors above chance; the full model is the first point."""
    _, result, _ = finished
    assert result["points"][0]["share"] == 1
    assert result["points"][0]["top1"] > 10 + 5 * 100 * (0.1 * 0.9 / 360) ** 0.5
    assert result["points"][0]["n"] == 360


def test_everything_is_there(finished):
    out, result, view = finished
    assert {path.name for path in out.iterdir()} == {"curve.csv", "curve.png", "small", "super-network"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len((out / "curve.csv").read_text().splitlines()) == len(result["points"]) + 1
    assert (out / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert any(str(out) in str(line) for line in view)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_saved_half_model_is_the_one_that_was_measured(finished):
    out, result, _ = finished
    small, net = stratavit.load(out / "small"), stratavit.SuperNet.load(out / "super-network")
    loader = torch.utils.data.DataLoader(demo.digits()[1], batch_size=256)
    assert stratavit.evaluate(small, loader).to_dict() == pytest.approx(result["half"], rel=1e-6)
    assert net.macs(net.spec(macs=0.5)) == result["budget"]["got"] <= result["budget"]["asked"]
    assert sum(p.numel() for p in small.parameters()) == net.params(net.spec(macs=0.5))
    assert result["difference"] <= 1e-5


def test_a_second_run_needs_overwrite(finished, capsys, monkeypatch):
    out, _, _ = finished

    def work(folder, device, epochs):
        (folder / "new.txt").touch()
        return {}, []

    monkeypatch.setattr(demo, "_work", work)
    before = sorted(out.rglob("*"))
    assert main(["demo", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_overwrite_replaces_the_whole_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").touch()
    monkeypatch.setattr(demo, "_work", lambda folder, device, epochs: ((folder / "new.txt").touch() or {}, []))
    assert main(["demo", "--out", str(tmp_path / "out"), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "out")}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new.txt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), StrataViTError("disagrees")])
def test_a_failed_demo_leaves_nothing(tmp_path, monkeypatch, failure):
    def work(folder, device, epochs):
        (folder / "half.txt").touch()
        raise failure

    monkeypatch.setattr(demo, "_work", work)
    assert main(["demo", "--out", str(tmp_path / "new" / "out")]) == (130 if failure.args == () else 2)
    assert list(tmp_path.iterdir()) == []
