"""Mistakes are named before any work: what was typed, then what is not there, then where the result goes."""

import pytest
from command_line import make_folder, output, refusal
from fake_hub import fake_hub
from helpers import CLASSES, make_net

import stratavit
from stratavit.cli import bench, commands, measure, recover, train
from stratavit.cli.parser import main
from stratavit.reports import hub as hub_module
from stratavit.tasks import convert as conversion

DATA = ["--data", "data", "--workers", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A super-network, a small model, images of its classes, and a folder and a file that are taken."""
    folder = tmp_path_factory.mktemp("checks")
    make_folder(folder / "data", [str(number) for number in range(CLASSES)], train=1, val=1)
    net = make_net("plain", stratified=True)
    net.save(folder / "run")
    stratavit.save(net.extract(macs=0.5, verbose=False), folder / "small")
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("keep")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    """The folder to work in; loading anything there fails the test."""
    monkeypatch.chdir(place)

    def loaded(*args, **kwargs):
        raise AssertionError("work began before the mistake was named")

    for module in (bench, commands, conversion, measure, recover, train):
        for name in ("SuperNet", "model_at"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, loaded)
    return place


IMAGES = "--data data --workers 0"
MODEL = "deit_tiny_patch16_224"
ORDER = [  # a command with three mistakes, what is said of one after the other, how the first two are put right
    (
        "extract none --macs 50 --out taken",
        ("did you mean 50%", "none is not a folder", "taken is not empty"),
        (("--macs 50", "--macs 50%"), ("none", "run")),
    ),
    (
        "extract run --top1 0.7 --data none --out taken",
        ("did you mean 70%", "none is not a folder", "taken is not empty"),
        (("0.7", "70%"), ("none", "data")),
    ),
    (
        f"extract run --max-drop high {IMAGES} --class-map none --out taken",
        ("'high'", "none is not a file", "taken is not empty"),
        (("high", "2%"), ("--class-map none", "")),
    ),
    (
        f"curve small {IMAGES} --device toaster --out taken",
        ("toaster", "small holds a sub-network", "taken is not empty"),
        (("toaster", "cpu"), ("small", "run")),
    ),
    (
        f"report none {IMAGES} --knn --zero-shot none --out taken/mine.txt",
        ("--knn and --zero-shot", "none is not a folder", "taken/mine.txt exists"),
        (("--zero-shot none", ""), ("none", "run")),
    ),
    (
        f"convert {MODEL[:-1]} {IMAGES} --criterion taylor --method default --out taken",
        ("criterion 'taylor'", f"did you mean {MODEL}", "taken is not empty"),
        (("--criterion taylor", ""), (MODEL[:-1], MODEL)),
    ),
    (
        "push none nobody/ --dry-run taken",
        ("nobody/", "none is not a folder", "taken is not empty"),
        (("nobody/", "nobody/model"), ("none", "small")),
    ),
]


@pytest.mark.parametrize(("line", "said", "repairs"), ORDER, ids=[line.split()[0] for line, *_ in ORDER])
def test_mistakes_are_named_in_one_order(here, capsys, line, said, repairs):
    """Each is named first while those after it are there, too: to put it right is to see the next one."""
    for expected, repair in zip(said, (*repairs, ("", "")), strict=True):
        found = refusal(capsys, *line.split())
        assert expected in found
        assert sum(other in found for other in said) == 1
        line = line.replace(*repair, 1)
    assert (here / "taken" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("at least one budget", ["extract", "run", "--out", "taken"]),
        ("--data", ["extract", "run", "--top1", "70%", "--out", "taken"]),
        ("--position", ["extract", "run", "--position", "3", "--macs", "50%", "--out", "taken"]),
        ("did you mean 50%", ["evaluate", "run", "--macs", "50", *DATA]),
        ("did you mean 50%", ["bench", "run", "--params", "50"]),
        ("did you mean 50%", ["predict", "run", "none.png", "--macs", "50"]),
        ("none.png is neither", ["predict", "run", "none.png"]),
        (f"stratavit convert {MODEL}", ["extract", MODEL, "--macs", "50%", "--out", "taken"]),
        ("stratavit convert timm/deit_tiny", ["info", "timm/deit_tiny_patch16_224.fb_in1k"]),
        ("stratavit extract", ["export", "run"]),
        ("taken is a folder", ["export", "small", "--out", "taken"]),
        ("stratavit extract", ["finetune", "run", *DATA[:2], "--out", "taken"]),
        ("small holds", ["train", "small", *DATA[:2], "--out", "taken"]),
        ("none is not a folder", ["train", "run", "--data", "none", "--out", "taken"]),
        ("none is not a folder", ["recover", "none", *DATA[:2], "--out", "taken"]),
        ("--teacher", ["recover", "small", *DATA[:2], "--teacher-weights", "x", "--out", "taken"]),
        ("is not a folder, and timm", ["evaluate", "none", *DATA]),
        ("none.onnx is not a file", ["evaluate", "none.onnx", *DATA]),
        ("none.xml is not a file", ["evaluate", "none.xml", *DATA]),
        ("--before: none", ["curve", "run", *DATA, "--before", "none", "--out", "taken"]),
        ("none is not a file", ["evaluate", "small", *DATA, "--zero-shot", "none"]),
        ("(user/name)", ["info", "none"]),
    ],
)  # fmt: skip
def test_the_mistake_itself_is_named(here, capsys, said, line):
    assert said in refusal(capsys, *line)


@pytest.fixture
def repository(place, tmp_path, monkeypatch):
    """The hub has the super-network as ``someone/net`` and the small model as ``someone/small``."""
    with fake_hub() as found:
        for name, folder in (("net", "run"), ("small", "small")):
            found.repos[f"someone/{name}"] = {file.name: file.read_bytes() for file in (place / folder).iterdir()}
        download = hub_module.snapshot_download

        def snapshot(*args, **options):
            return download(*args, **{**options, "endpoint": found.url, "cache_dir": tmp_path / "cache"})

        monkeypatch.setattr(hub_module, "snapshot_download", snapshot)
        monkeypatch.chdir(place)
        yield found


def test_a_repository_on_the_hub_in_the_place_of_a_folder(repository, place, tmp_path, capsys, monkeypatch):
    assert main(["info", "someone/net", "--json"]) == 0
    assert capsys.readouterr().err == ""  # no bar in a file
    for name in ("someone/net", "hf_hub:someone/net"):
        got = output(capsys, "extract", name, "--macs", "50%", "--out", tmp_path / name[:3])
        assert (
            got["macs"] == output(capsys, "extract", "run", "--macs", "50%", "--out", tmp_path / f"{name[:3]}2")["macs"]
        )
    assert output(capsys, "info", "someone/net")["macs"] == output(capsys, "info", "run")["macs"]
    for name, folder in (("someone/net", "run"), ("someone/small", "small"), ("hf-hub:someone/small", "small")):
        there, here = (output(capsys, "evaluate", place, *DATA)["loss"] for place in (name, folder))
        assert there == here
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    output(capsys, "export", "someone/small", "--format", "torch")
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["small.pt2"]


def test_a_local_path_wins_over_the_hub(repository, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "net").symlink_to(place / "small")
    assert output(capsys, "info", "someone/net")["kind"] == "sub-network"


def test_neither_here_nor_there(repository, tmp_path, capsys):
    for command in (["info"], ["extract", "--macs", "50%", "--out", tmp_path / "x"], ["evaluate", *DATA]):
        found = refusal(capsys, command[0], "someone/absent", *command[1:])
        assert all(word in found for word in ("someone/absent", "folder", "hub"))
    assert not (tmp_path / "x").exists()
