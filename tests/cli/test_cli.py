"""The command line end to end on a tiny image folder, and each way to get it wrong."""

import errno
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import chain

import pytest
import timm
import torch
from command_line import MODEL, make_folder, output, refusal, small_models
from helpers import Bomb, enliven
from rich.table import Table
from safetensors.torch import load_file, save_file

import stratavit
from stratavit.artifacts import folder_format
from stratavit.cli import bench as bench_module
from stratavit.cli.parser import COMMANDS, _print, main
from stratavit.utils import progress

CLASSES = ("ant", "bee", "cat")
QUICK = ["--batch-size", "6", "--workers", "0"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Three classes of noise images, a lively checkpoint with a head of three, a super-network and a small model."""
    folder = tmp_path_factory.mktemp("cli")
    make_folder(folder / "data", CLASSES, train=3, val=3)
    with small_models():
        save_file(enliven(timm.create_model(MODEL, num_classes=3)).state_dict(), folder / "model.safetensors")
        assert main(convert(folder, folder / "run")) == 0
        assert main(["extract", str(folder / "run"), "--macs", "0.6", "--out", str(folder / "small")]) == 0
        yield folder


@pytest.fixture
def run(work):
    return work / "run"


@pytest.fixture
def data(work):
    return ["--data", work / "data", *QUICK]


def convert(work, out, **changes):
    options = {"data": work / "data", "weights": work / "model.safetensors", "num-classes": 3, "images": 6} | changes
    pairs = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    return ["convert", MODEL, "--out", str(out), *QUICK, *chain.from_iterable(pairs)]


# ---- the main job ---------------------------------------------------------------------------------------


def test_info_and_extract_agree(run, tmp_path, capsys):
    got = output(capsys, "extract", run, "--macs", "60%", "--out", tmp_path / "small")
    assert got["got"] <= got["asked"]
    assert got["params"] == sum(p.numel() for p in stratavit.load(tmp_path / "small").parameters())
    facts = output(capsys, "info", tmp_path / "small")
    assert (facts["kind"], facts["macs"], facts["widths"]) == ("sub-network", got["macs"], got["spec"])
    facts = output(capsys, "info", run)
    assert (facts["kind"], facts["macs"]) == ("super-network", stratavit.SuperNet.load(run).macs())
    assert facts["widths"]["blocks.0.attn"] == 16
    assert facts["provenance"]["source"] == {"model": MODEL, "weights": "model.safetensors"}
    assert facts["provenance"]["contract"]["images"] == 6


def test_options_of_convert(work, run, tmp_path, capsys):
    """Moments can be left out; a baseline implies the method of the paper."""
    got = output(capsys, *convert(work, tmp_path / "less"), "--no-moments", "--memory", "host")
    facts = [output(capsys, "info", folder) for folder in (tmp_path / "less", run)]
    assert got["moments_bytes"] == facts[0]["moments_bytes"] < facts[1]["moments_bytes"]
    assert [fact["compensation"] for fact in facts] == ["mean", "full"]
    got = output(capsys, *convert(work, tmp_path / "a"), "--criterion", "random", "--objective", "prediction")
    assert got["images"] == 6
    assert stratavit.SuperNet.load(tmp_path / "a").method == "paper"


def test_what_every_sub_network_keeps(work, tmp_path, capsys):
    """As in Python; a folder says so, and a pattern that fits nothing is refused before any work."""
    kept = ["--ignore", "blocks.0.*", "blocks.1.attn", "--min-width", "3", "*.mlp=25%"]
    found = output(capsys, *convert(work, tmp_path / "run"), *kept)["floors"]
    assert found == output(capsys, "info", tmp_path / "run")["floors"]
    widths = {"blocks.0.attn": 16, "blocks.0.mlp": 192, "blocks.1.attn": 16, "blocks.1.mlp": 48, "blocks.2.attn": 3}
    assert widths.items() <= found.items()
    assert main(["info", str(tmp_path / "run")]) == 0
    assert "blocks.1.attn" in refusal(capsys, *convert(work, tmp_path / "no"), "--ignore", "blocks.1.atn")
    assert "--min-width" in refusal(capsys, *convert(work, tmp_path / "no"), "--min-width", "*.attn=17")
    assert "'wide'" in refusal(capsys, *convert(work, tmp_path / "no"), "--min-width", "wide")


def test_extract_prints_asked_got_and_reachable_and_the_path_as_it_is(run, tmp_path, capsys):
    place = tmp_path / "[red]:smile:"
    place.mkdir()
    assert main(["extract", str(run), "--params", "80%", "--out", str(place / "x")]) == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("asked ", "got ", "reachable ", f"wrote {place / 'x'}"))


def test_extract_keeps_several_budgets(run, data, tmp_path, capsys):
    costs = ["--macs", "80%", "--memory", "0.15", "--dtype", "float16"]
    goals = ["--max-drop", "34", *data]
    got = output(capsys, "extract", run, *costs, *goals, "--out", tmp_path / "small")
    assert [bound["kind"] for bound in got["bounds"]] == ["macs", "memory_mb", "max_drop"]
    assert all(bound["got"] <= bound["asked"] for bound in got["bounds"])
    assert got["bounds"][1]["got"] == pytest.approx(2e-6 * got["params"])
    dense = output(capsys, "evaluate", run, *data)
    small = output(capsys, "evaluate", tmp_path / "small", *data)
    assert dense["top1"] - small["top1"] == pytest.approx(got["bounds"][2]["got"])


def test_extract_writes_the_type_that_was_asked_for(run, data, tmp_path, capsys):
    got = output(capsys, "extract", run, "--memory", "50%", "--dtype", "float16", "--out", tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert got["dtype"] == "float16"
    assert got["memory_mb"] == pytest.approx(got["got"]) == 2e-6 * got["params"]
    whole = output(capsys, "extract", run, "--position", got["position"], "--out", tmp_path / "whole")
    assert whole["memory_mb"] == pytest.approx(2 * got["memory_mb"])
    losses = [output(capsys, "evaluate", tmp_path / name, *data)["loss"] for name in ("half", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert output(capsys, "export", tmp_path / "half", "--half")["difference"] < 0.05


def test_extract_several_sizes(run, tmp_path, capsys):
    got = output(capsys, "extract", run, "--macs", "10/12,60%", "--params", "99%", "--out", tmp_path / "small")
    places = [tmp_path / "small-10of12", tmp_path / "small-60pct"]
    assert [model["small"] for model in got["models"]] == list(map(str, places))
    for model, place, share in zip(got["models"], places, (10 / 12, 0.6), strict=True):
        assert output(capsys, "info", place)["macs"] == model["macs"] <= share * stratavit.SuperNet.load(run).macs()
    for amounts in (["--macs", "60%,0.0001"], ["--macs", "60%,70%", "--params", "60%,70%"], ["--macs", "60%,60%"]):
        refusal(capsys, "extract", run, *amounts, "--out", tmp_path / "other")
    assert sorted(tmp_path.iterdir()) == places


def test_evaluate_an_onnx_file(work, data, tmp_path, capsys):
    output(capsys, "export", work / "small", "--out", tmp_path / "small.onnx")
    found = output(capsys, "evaluate", tmp_path / "small.onnx", *data)
    eager = output(capsys, "evaluate", work / "small", *data)
    assert found["loss"] == pytest.approx(eager["loss"], rel=1e-4)
    assert (found["top1"], found["n"], found["model"]) == (eager["top1"], 9, str(tmp_path / "small.onnx"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_evaluate_in_mixed_precision_and_name_the_size(run, data, capsys, precision):
    exact, mixed = (
        output(capsys, "evaluate", run, "--macs", "60%", *data, "--precision", kind) for kind in ("no", precision)
    )
    assert exact["loss"] != mixed["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert exact["model"] == str(run)
    assert [bound["kind"] for bound in exact["budget"]] == ["macs"]
    assert exact["budget"][0]["got"] == exact["macs"] <= exact["budget"][0]["asked"]


def test_evaluate_tells_the_size_of_a_small_model(run, work, data, tmp_path, capsys):
    small = tmp_path / "small"
    cut = output(capsys, "extract", run, "--macs", "60%", "--out", small)
    found = output(capsys, "evaluate", small, *data)
    assert [found[key] for key in ("macs", "params")] == [cut[key] for key in ("macs", "params")]


def test_tables_in_a_file_are_whole(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    cells = [f"column {number:06}" for number in range(10)]
    assert _print(Namespace(json=False, command="curve"), {}, [Table(*cells)]) == 0
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in cells)


def test_errors_are_objects_under_json(run, tmp_path, capsys):
    assert main(["extract", str(run), "--macs", "50", "--out", str(tmp_path / "x"), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["type"], found["exit_code"]) == ("extract", "BudgetError", 2)
    assert "did you mean 50%?" in found["error"]


def estimates(text, title):
    """The percentages of the lines of one job; nothing else may show progress, nor move the cursor."""
    assert not set(text) & {"\r", "\x1b"}
    shown = re.findall(r"^([\w ]+): (\d+)%, about \d+ s left$", text, re.MULTILINE)
    assert {name for name, _ in shown} == {title}
    return [int(share) for _, share in shown]


@pytest.mark.parametrize("method", ["default", "paper"])
def test_convert_shows_one_estimate(work, tmp_path, capsys, monkeypatch, method):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    monkeypatch.setattr("stratavit.tasks.convert.check_dense", lambda *_: None)  # has an estimate of its own
    assert main([*convert(work, tmp_path / "run"), "--method", method]) == 0
    shown = estimates(capsys.readouterr().err, "convert")
    assert shown == sorted(shown)
    assert shown[-1] == 100


def test_an_accuracy_says_how_long_it_takes(run, data, tmp_path, capsys, monkeypatch):
    """How much is measured before it begins, then one estimate for all sizes."""
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    words = ["extract", run, "--max-drop", "34%", *data, "--limit", "6", "--out", tmp_path / "small"]
    assert main([*map(str, words)]) == 0
    lines = capsys.readouterr().err.splitlines()
    first = next(number for number, line in enumerate(lines) if "sizes on 6 images" in line)
    assert not any("find max_drop" in line for line in lines[:first])
    shown = estimates("\n".join(lines[first:]), "find max_drop")
    assert 0 < max(shown) <= 100


def test_extract_within_a_latency(run, tmp_path, capsys):
    got = output(capsys, "extract", run, "--latency", "1000", "--latency-batch", "2", "--out", tmp_path / "small")
    assert (got["kind"], got["asked"], got["position"]) == ("latency_ms", 1000, 0)


def test_small_and_elastic_source_and_converted_evaluate_alike(work, run, data, capsys):
    small = output(capsys, "evaluate", work / "small", *data)
    elastic = output(capsys, "evaluate", run, "--macs", "0.6", *data)
    assert small["n"] == elastic["n"] == 9
    assert small["loss"] == pytest.approx(elastic["loss"], rel=1e-5)
    source = output(capsys, "evaluate", MODEL, "--weights", work / "model.safetensors", "--num-classes", 3, *data)
    converted = output(capsys, "evaluate", run, *data)
    assert source["loss"] == pytest.approx(converted["loss"], rel=1e-4)
    assert source["top1"] == converted["top1"]


def test_measuring_by_text_embeddings(work, data, tmp_path, capsys):
    save_file({"classes": torch.eye(3, 48)}, tmp_path / "texts.safetensors")
    got = output(capsys, "evaluate", work / "small", *data, "--zero-shot", tmp_path / "texts.safetensors")
    assert got["n"] == 9


def test_curve_writes_table_and_picture(run, data, tmp_path, capsys):
    got = output(capsys, "curve", run, *data, "--shares", "1,8/12", "--out", tmp_path / "c")
    assert [point["asked"] for point in got["points"]] == ["1", "8/12"]
    assert len((tmp_path / "c" / "curve.csv").read_text().splitlines()) == 3
    assert (tmp_path / "c" / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for earlier in (run, tmp_path / "c"):  # a super-network, or the folder of its curve
        again = output(capsys, "curve", run, *data, "--shares", "1,4/12", "--before", earlier, "--out", tmp_path / "d")
        befores = [point["before"] for point in again["points"]]
        assert befores == [again["points"][0]["top1"], again["points"][1]["top1"] if earlier == run else None]
        shutil.rmtree(tmp_path / "d")
    assert "curve" in refusal(capsys, "curve", run, *data, "--before", tmp_path / "none", "--out", tmp_path / "d")


def test_unreadable_images_are_left_out_with_a_count(work, tmp_path, capsys):
    folder = make_folder(tmp_path, CLASSES, val=1)
    (folder / "val" / "bee" / "torn.png").write_bytes((folder / "val" / "bee" / "0.png").read_bytes()[:60])
    assert main(["evaluate", str(work / "small"), "--data", str(folder), *QUICK]) == 0
    captured = capsys.readouterr()
    assert "left out 1 unreadable" in captured.err
    assert "over 3 images" in captured.out


# ---- bench ----------------------------------------------------------------------------------------------


def test_bench_of_a_super_network(run, capsys):
    quick = ["--seconds", "0.01", "--batches", "1,3", "--threads", "1"]
    rows = output(capsys, "bench", run, *quick, "--shares", "1")["rows"]
    ran = [(row["runtime"], row["batch_size"]) for row in rows]
    assert ran == [(runtime, batch) for runtime in ("eager", "onnx") for batch in (1, 3)]
    assert all(0 < row["median_ms"] <= row["p90_ms"] and row["threads"] == 1 for row in rows)
    rows = output(capsys, "bench", run, *quick, "--shares", "1,0.8,0.0001", "--runtimes", "eager")["rows"]
    assert [row["model"] for row in rows] == ["dense", "0.8"] * 2


def test_bench_of_a_small_model(work, capsys, monkeypatch):
    quick = ["--seconds", "0.01", "--batches", "1"]
    rows = output(capsys, "bench", work / "small", *quick, "--dtype", "bfloat16")["rows"]
    assert [(row["model"], row["dtype"]) for row in rows] == [("dense", "bfloat16"), ("small", "bfloat16")]
    monkeypatch.setattr(bench_module, "has_onnx", lambda: False)
    assert main(["bench", str(work / "small"), *quick]) == 0
    text = capsys.readouterr().out
    assert "dense" in text
    assert "pip install 'stratavit[export]'" in text


# ---- bad input ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(work, tmp_path_factory):
    """Weights, images and a class map that are no use."""
    folder, state = tmp_path_factory.mktemp("bad"), load_file(work / "model.safetensors")
    save_file(state | {"norm.bias": torch.full((48,), torch.nan)}, folder / "nan.safetensors")
    save_file({"something": torch.zeros(2)}, folder / "other.safetensors")
    save_file(timm.create_model("resnet18", num_classes=3).state_dict(), folder / "resnet.safetensors")
    torch.save({"model": Bomb(folder / "exploded")}, folder / "bomb.pth")
    (folder / "map.txt").write_text("ant\nbee\ndog\n")
    for name, classes in (("empty", ()), ("unreadable", CLASSES)):
        (folder / name).mkdir()
        for label in classes:
            (folder / name / label).mkdir()
            (folder / name / label / "a.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("weights", "missing.safetensors", "is not a file"),
        ("weights", "nan.safetensors", "norm.bias"),
        ("weights", "other.safetensors", "is missing"),
        ("weights", "bomb.pth", "not loaded"),
        ("num-classes", None, "head.bias .*--num-classes"),
        ("data", "empty", "holds no images"),
        ("data", "unreadable", "no images"),
        ("class-map", "map.txt", "cat is not a class"),
    ],
)
def test_convert_refuses_bad_input(work, bad, tmp_path, capsys, option, value, expected):
    line = refusal(capsys, *convert(work, tmp_path / "out", **{option: value and bad / value}))
    assert re.search(expected, line)
    assert not (tmp_path / "out").exists()
    assert not (bad / "exploded").exists()


def test_a_model_that_cannot_be_cut(capsys, work, bad, tmp_path):
    arguments = convert(work, tmp_path / "out", weights=bad / "resnet.safetensors")
    arguments[1] = "resnet18"
    assert "ResNet" in refusal(capsys, *arguments)


def test_images_are_looked_for_before_weights_are_fetched(tmp_path, capsys, monkeypatch):
    for module in ("tasks.convert", "cli.measure"):
        monkeypatch.setattr(f"stratavit.{module}.model_at", None)
    for arguments in (["convert", MODEL, "--out", tmp_path / "out"], ["evaluate", MODEL]):
        assert f"{tmp_path / 'none'} is not a folder" in refusal(capsys, *arguments, "--data", tmp_path / "none")


def test_no_hub_access(capsys, work, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Cannot reach the hub\nsecond line")

    monkeypatch.setattr(timm, "create_model", offline)
    line = refusal(capsys, *convert(work, tmp_path / "out", weights=None))
    assert "Cannot reach the hub" in line
    assert "--weights" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["extract", "RUN", "--macs", "1G"],
        ["extract", "RUN", "--macs", "1G", "--runtime", "slow", "--out", "x"],
        ["bench", "RUN", "--batches", "0"],
        ["curve", "RUN", "--data", "d", "--shares", "1,"],
        ["fly"],
    ],
)
def test_usage_errors_exit_with_2(arguments):
    assert main(arguments) == 2


def test_budgets_and_options_that_cannot_be_met(work, run, data, tmp_path, capsys):
    small, low = work / "small", ["--shares", "0.001"]
    for expected, *arguments in (
        ("one size only", "evaluate", small, "--macs", "0.5", *data),
        ("one size only", "bench", small, "--macs", "0.5"),
        ("reachable range", "extract", run, "--macs", "12G", "--out", tmp_path / "out"),
        ("at least one budget", "extract", run, "--out", tmp_path / "out"),
        ("--memory", "extract", run, "--memory", "0.001", "--out", tmp_path / "out"),
        ("'fast'", "extract", run, "--latency", "fast", "--out", tmp_path / "out"),
        ("--data", "extract", run, "--max-drop", "1", "--out", tmp_path / "out"),
        ("'slow'", "bench", run, "--runtimes", "eager,slow"),
        ("0.001", "bench", run, *low),
        ("0.001", "curve", run, *data, *low, "--out", tmp_path / "curve"),
        ("--knn and --zero-shot", "evaluate", small, *data, "--knn", "3", "--zero-shot", "x.safetensors"),
        ("missing", "info", work / "data"),
        ("is not a folder", "extract", tmp_path / "none", "--macs", "0.5", "--out", tmp_path / "out"),
        ("--device cpu", *convert(work, tmp_path / "out"), "--device", "toaster"),
    ):
        assert expected in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_refused_before_any_work(work, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "--overwrite" in refusal(capsys, *convert(work, tmp_path / "out"))
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_disk_full(run, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_format, "save_file", full)
    assert "No space left" in refusal(capsys, "extract", run, "--macs", "0.8", "--out", tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_interrupted(work, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stratavit.SuperNet, "stratify", interrupted)
    assert "interrupted" in refusal(capsys, *convert(work, tmp_path / "out"), code=130)
    assert list(tmp_path.iterdir()) == []


# ---- help -----------------------------------------------------------------------------------------------


def test_started_as_a_module():
    done = subprocess.run([sys.executable, "-m", "stratavit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"stratavit {stratavit.__version__}\n"


def test_every_command_has_help(capsys):
    assert len(COMMANDS) == 15
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "--json" in capsys.readouterr().out
