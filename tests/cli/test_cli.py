"""The command line end to end on a tiny image folder, and each way to get it wrong."""

import errno
import json
import pickle
import subprocess
import sys
from itertools import chain

import pytest
import timm
import torch
from helpers import Bomb, enliven
from PIL import Image
from safetensors.torch import load_file, save_file

import stratavit
from stratavit.artifacts import folder_format
from stratavit.cli.parser import main, parser

MODEL = "deit_tiny_patch16_224"
CLASSES = ("ant", "bee", "cat")
FAST = ["--batch-size", "6", "--workers", "0"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Three classes of noise images, and a lively checkpoint with a head of three."""
    folder = tmp_path_factory.mktemp("cli")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in CLASSES:
            (folder / "data" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = torch.randint(0, 256, (48, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / "data" / split / name / f"{number}.png")
    model = enliven(timm.create_model(MODEL, num_classes=3))
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "bee").mkdir()
    return folder


@pytest.fixture(scope="module")
def run(work):
    """A converted super-network."""
    assert main([*convert(work, work / "run"), "--json"]) == 0
    return work / "run"


def convert(work, out, **changes):
    options = {"data": work / "data", "weights": work / "model.safetensors", "num-classes": 3, "images": 6} | changes
    pairs = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    return ["convert", MODEL, "--out", str(out), *FAST, *chain.from_iterable(pairs)]


def answer(capsys, arguments):
    """Runs a command with --json: stdout must be one JSON object and nothing else."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, arguments, code=2):
    """Runs a command that must fail with one line on standard error; returns the line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("data: ")]  # what was read until then
    assert len(lines) == 1, captured.err
    return lines[0]


# ---- the main job ---------------------------------------------------------------------------------------


def test_info_tells_the_truth(run, capsys):
    facts = answer(capsys, ["info", run])
    assert facts["kind"] == "super-network"
    assert facts["macs"] == stratavit.SuperNet.load(run).macs()
    assert facts["widths"]["blocks.0.attn"] == 64
    assert facts["provenance"]["source"]["model"] == MODEL
    assert facts["provenance"]["contract"]["images"] == 6


def test_extract_meets_the_budget_and_info_agrees(run, tmp_path, capsys):
    told = answer(capsys, ["extract", run, "--macs", "50%", "--out", tmp_path / "small"])
    assert told["got"] <= told["asked"]
    small = stratavit.load(tmp_path / "small")
    assert told["params"] == sum(p.numel() for p in small.parameters())
    facts = answer(capsys, ["info", tmp_path / "small"])
    assert (facts["kind"], facts["macs"], facts["widths"]) == ("sub-network", told["macs"], told["spec"])


def test_extract_prints_asked_got_and_reachable(run, tmp_path, capsys):
    assert main(["extract", str(run), "--params", "4M", "--out", str(tmp_path / "small")]) == 0
    text = capsys.readouterr().out
    assert "asked 4M" in text
    assert "got " in text
    assert "reachable " in text


def test_extract_keeps_several_budgets(work, run, tmp_path, capsys):
    costs = ["--macs", "60%", "--memory", "8", "--dtype", "float16"]
    told = answer(capsys, ["extract", run, *costs, "--out", tmp_path / "one"])
    assert [bound["kind"] for bound in told["bounds"]] == ["macs", "memory_mb"]
    assert all(bound["got"] <= bound["asked"] for bound in told["bounds"])
    assert told["bounds"][1]["got"] == pytest.approx(2e-6 * told["params"])

    goals = ["--max-drop", "34", "--data", work / "data", *FAST]
    told = answer(capsys, ["extract", run, *costs, *goals, "--out", tmp_path / "two"])
    drop = told["bounds"][2]
    assert (drop["kind"], drop["asked"]) == ("max_drop", 34)
    dense = answer(capsys, ["evaluate", run, "--data", work / "data", *FAST])
    small = answer(capsys, ["evaluate", tmp_path / "two", "--data", work / "data", *FAST])
    assert dense["top1"] - small["top1"] == pytest.approx(drop["got"])
    assert drop["got"] <= 34


def test_extract_within_a_latency(run, tmp_path, capsys):
    told = answer(capsys, ["extract", run, "--latency", "1000", "--latency-batch", "2", "--out", tmp_path / "small"])
    assert (told["kind"], told["asked"], told["position"]) == ("latency_ms", 1000, 0)


def test_small_and_elastic_evaluate_alike(work, run, tmp_path, capsys):
    answer(capsys, ["extract", run, "--macs", "0.4", "--out", tmp_path / "small"])
    data = ["--data", work / "data", *FAST]
    small = answer(capsys, ["evaluate", tmp_path / "small", *data])
    elastic = answer(capsys, ["evaluate", run, "--macs", "0.4", *data])
    assert small["n"] == elastic["n"] == 9
    assert small["loss"] == pytest.approx(elastic["loss"], rel=1e-5)


def test_converted_and_source_evaluate_alike(work, run, capsys):
    data = ["--data", work / "data", *FAST]
    weights = ["--weights", work / "model.safetensors", "--num-classes", 3]
    source, converted = answer(capsys, ["evaluate", MODEL, *weights, *data]), answer(capsys, ["evaluate", run, *data])
    assert source["loss"] == pytest.approx(converted["loss"], rel=1e-4)
    assert source["top1"] == converted["top1"]


def test_curve_writes_table_and_picture(work, run, tmp_path, capsys):
    told = answer(capsys, ["curve", run, "--data", work / "data", "--shares", "1,6/12", "--out", tmp_path / "c", *FAST])
    assert [point["asked"] for point in told["points"]] == ["1", "6/12"]
    assert len((tmp_path / "c" / "curve.csv").read_text().splitlines()) == 3
    assert (tmp_path / "c" / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_moments_can_be_left_out(work, run, tmp_path, capsys):
    told = answer(capsys, [*convert(work, tmp_path / "less"), "--no-moments"])
    facts = [answer(capsys, ["info", folder]) for folder in (tmp_path / "less", run)]
    assert told["moments_bytes"] == facts[0]["moments_bytes"] < facts[1]["moments_bytes"]
    assert [fact["compensation"] for fact in facts] == ["mean", "full"]


def test_weights_load_into_plain_timm(work, run):
    timm.create_model(MODEL, num_classes=3).load_state_dict(load_file(run / "model.safetensors"), strict=True)


def test_paper_method_and_baselines(work, tmp_path, capsys):
    told = answer(capsys, [*convert(work, tmp_path / "a"), "--criterion", "random", "--objective", "prediction"])
    assert told["images"] == 6
    assert stratavit.SuperNet.load(tmp_path / "a").method == "paper"


def test_unreadable_images_are_left_out_with_a_count(work, tmp_path, capsys):
    for name in CLASSES:
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / name / "good.png")
    (tmp_path / "val" / "bee" / "torn.png").write_bytes((tmp_path / "val" / "bee" / "good.png").read_bytes()[:60])
    arguments = ["--weights", work / "model.safetensors", "--num-classes", 3, "--data", tmp_path, *FAST]
    assert main(["evaluate", MODEL, *map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert "left out 1 unreadable" in captured.err
    told = json.loads(captured.out)
    assert (told["n"], told["unreadable"]) == (3, 1)


# ---- bad input ------------------------------------------------------------------------------------------


def bad_weights(folder, work, kind):
    state = load_file(work / "model.safetensors")
    path = folder / "bad.safetensors"
    if kind == "truncated":
        path.write_bytes((work / "model.safetensors").read_bytes()[:5000])
    elif kind == "nan":
        state["blocks.3.mlp.fc1.weight"][0, 0] = float("nan")
        save_file(state, path)
    elif kind == "other":
        save_file({"something": torch.zeros(2)}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "is not a file"),
        ("truncated", "damaged"),
        ("nan", "blocks.3.mlp.fc1.weight holds NaN"),
        ("other", "is missing"),
    ],
)
def test_bad_weights(work, tmp_path, capsys, kind, expected):
    weights = bad_weights(tmp_path, work, kind)
    assert expected in complaint(capsys, convert(work, tmp_path / "out", weights=weights))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_code_is_not_run(work, tmp_path, capsys):
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"model": Bomb(tmp_path / "exploded")}))
    torch.save({"model": Bomb(tmp_path / "exploded")}, tmp_path / "bomb2.pth")
    for name in ("bomb.pth", "bomb2.pth"):
        assert "not loaded" in complaint(capsys, convert(work, tmp_path / "out", weights=tmp_path / name))
    assert not (tmp_path / "exploded").exists()


def test_wrong_head_size_names_the_option(work, tmp_path, capsys):
    line = complaint(capsys, convert(work, tmp_path / "out", **{"num-classes": None}))
    assert "head.bias" in line
    assert "--num-classes" in line


def test_unknown_model_gets_a_suggestion(capsys, work, tmp_path):
    arguments = convert(work, tmp_path / "out")
    arguments[1] = "deit_tinny_patch16_224"
    assert MODEL in complaint(capsys, arguments)


def test_unsupported_architecture(capsys, work, tmp_path):
    model = timm.create_model("resnet18", num_classes=3)
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    arguments = convert(work, tmp_path / "out", weights=tmp_path / "resnet.safetensors")
    arguments[1] = "resnet18"
    assert "ResNet" in complaint(capsys, arguments)


def test_images_are_looked_for_before_weights_are_fetched(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stratavit.cli.convert.model_at", None)
    for arguments in (["convert", MODEL, "--out", tmp_path / "out"], ["evaluate", MODEL]):
        message = complaint(capsys, [*arguments, "--data", tmp_path / "imagenet"])
        assert f"data: {tmp_path / 'imagenet'} is not a folder" in message


def test_no_hub_access(capsys, work, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Cannot reach the hub\nsecond line")

    monkeypatch.setattr(timm, "create_model", offline)
    line = complaint(capsys, convert(work, tmp_path / "out", weights=None))
    assert "Cannot reach the hub" in line
    assert "--weights" in line


def image_folder(folder, kind):
    root = folder / "images"
    if kind == "missing":
        return root
    root.mkdir()
    for name in CLASSES if kind == "unreadable" else CLASSES[:2] if kind == "two classes" else ():
        (root / name).mkdir()
        (root / name / "a.png").write_bytes(b"no image")
    return root


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "is not a folder"),
        ("empty", "no usable images"),
        ("two classes", "2 class folders, but the model's head has 3 classes; give --class-map"),
    ],
)
def test_bad_image_folders(work, tmp_path, capsys, kind, expected):
    line = complaint(capsys, convert(work, tmp_path / "out", data=image_folder(tmp_path, kind)))
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_unreadable_images(work, tmp_path, capsys):
    data = image_folder(tmp_path, "unreadable")
    assert main(convert(work, tmp_path / "out", data=data)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("3 unreadable" in line for line in lines)
    assert "no images" in lines[-1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("ant\nbee\nbee\n", "'bee' appears twice"),
        ("ant\nbee\ndog\n", "is not a class of"),
        ("", "is empty"),
        ("x\ny\nz\n", "class map"),
    ],
)
def test_bad_class_maps(work, tmp_path, capsys, names, expected):
    (tmp_path / "map.txt").write_text(names)
    assert expected in complaint(capsys, convert(work, tmp_path / "out", **{"class-map": tmp_path / "map.txt"}))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (["--macs", "0.1%"], "reachable range"),
        (["--macs", "12G"], "reachable range"),
        (["--macs", "1"], "a share is written 1.0"),
        (["--macs", "half"], "cannot read 'half'"),
        (["--params", "150%"], "at most 1"),
        (["--position", "-1"], "whole number from 0"),
        ([], "give at least one budget"),
        (["--position", "3", "--macs", "0.5"], "goes with no other budget"),
        (["--memory", "0.001"], "memory_mb: asked '0.001' = 0.001, but the reachable range is"),
        (["--latency", "fast"], "cannot read 'fast'"),
        (["--max-drop", "1"], "is measured on labelled images; give data"),
    ],
)
def test_bad_budgets(run, tmp_path, capsys, budget, expected):
    assert expected in complaint(capsys, ["extract", run, *budget, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_usage_errors_exit_with_2(run, tmp_path, capsys):
    for arguments in (
        ["extract", str(run), "--macs", "1G"],
        ["extract", str(run), "--macs", "1G", "--runtime", "slow", "--out", "x"],
        ["bench", str(run), "--runtimes", "eager,slow"],
        ["bench", str(run), "--batches", "0"],
        ["fly"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_a_model_has_no_budget(work, run, tmp_path, capsys):
    answer(capsys, ["extract", run, "--macs", "0.5", "--out", tmp_path / "small"])
    line = complaint(capsys, ["evaluate", tmp_path / "small", "--macs", "0.5", "--data", work / "data"])
    assert "one size only" in line


def test_a_taken_folder_is_refused_before_any_work(work, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "--overwrite" in complaint(capsys, convert(work, tmp_path / "out", weights=tmp_path / "not even there"))
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_wrong_kind_of_folder(work, run, tmp_path, capsys):
    assert "missing" in complaint(capsys, ["info", work / "data"])
    assert "is not a folder" in complaint(
        capsys, ["extract", tmp_path / "none", "--macs", "0.5", "--out", tmp_path / "out"]
    )


def test_a_missing_device(work, tmp_path, capsys):
    assert "--device cpu" in complaint(capsys, [*convert(work, tmp_path / "out"), "--device", "toaster"])


def test_disk_full(run, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_format, "save_file", full)
    line = complaint(capsys, ["extract", run, "--macs", "0.5", "--out", tmp_path / "new" / "out"])
    assert "No space left" in line
    assert list(tmp_path.iterdir()) == []


def test_interrupted(work, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stratavit.SuperNet, "stratify", interrupted)
    assert "interrupted" in complaint(capsys, convert(work, tmp_path / "out"), code=130)
    assert list(tmp_path.iterdir()) == []


# ---- help -----------------------------------------------------------------------------------------------


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "stratavit", "--help"], capture_output=True, text=True, check=True)
    assert "convert" in done.stdout


@pytest.mark.parametrize(
    "command", ["convert", "train", "extract", "evaluate", "curve", "report", "bench", "info", "demo"]
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


# ---- demo -----------------------------------------------------------------------------------------------


def test_demo(tmp_path, capsys):
    told = answer(capsys, ["demo", "--epochs", "1", "--out", tmp_path / "demo"])
    assert told["difference"] <= 1e-5
    assert (tmp_path / "demo" / "curve.png").stat().st_size > 10_000
    small = stratavit.load(tmp_path / "demo" / "small")
    assert small.head.out_features == 10
    assert stratavit.SuperNet.load(tmp_path / "demo" / "super-network").strata is not None
    assert "--overwrite" in complaint(capsys, ["demo", "--epochs", "1", "--out", tmp_path / "demo"])
