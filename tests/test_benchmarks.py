"""What published tables depend on: rows survive an interruption, and words follow the number of images."""

import argparse
import importlib
from pathlib import Path

import pytest
import timm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def imagenet(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("imagenet")


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("families")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.mark.parametrize("part", ["contract", "memory", "training", "latency", "conversion"])
def test_the_benchmark_of_gpus_runs_on_a_cpu(gpu, part):
    assert part in gpu.PARTS
    sizes = {
        "images": 16,
        "calibration_batch": 8,
        "batch_size": 4,
        "repeat": 1,
        "runtimes": ["eager"],
        "dtype": "float32",
    }
    args = argparse.Namespace(device="cpu", models=["DeiT-Ti"], quick=True, **sizes)
    rows = gpu.safe(gpu.PARTS[part][1], "DeiT-Ti", args)
    assert bool(rows) == (part != "memory")  # which no CPU counts
    assert all(value > 0 for row in rows for value in row.values() if isinstance(value, float))


def test_a_family_is_as_good_as_its_worst_model(families):
    good = {"family": "A", "model": "a", "smallest": "10.0%", **dict.fromkeys(families.BOUNDS, 0.0)}
    inexact = good | {"model": "b", "smallest": "9.0%", "costs": 3.0, "extracted": 1e-7}
    refused = [good | {"model": name, "ONNX": "StrataViTError: no"} for name in ("c", "d")]
    (row,) = families.by_family([good, inexact, *refused])
    assert row["models"] == 4
    assert row["kept"] == "1 of 4"
    assert row["smallest"] == "10.0%"
    assert row["files"] == "equal"
    assert row["costs"] == "3.0e+00 (b)"
    assert row["extracted"] == "1.0e-07 (b)"
    assert row["ONNX"] == "StrataViTError: no (c, d)"


def test_a_model_that_is_not_converted_has_its_reason_in_every_column(families):
    row = families.checked("no model")
    assert {row[part] for part in families.BOUNDS} == {"not converted: KeyError: 'no model'"}


def test_a_figure_that_is_no_number_is_a_failure(families):
    assert not families.fits("ONNX", families.figure(lambda: float("nan")))
    assert families.figure(lambda: 1 / 0) == "ZeroDivisionError: division by zero"


def test_a_journal_goes_on_where_it_stopped(imagenet, tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    first = imagenet.Journal(path, "model", "size")
    first.add({"model": "a", "size": "6/12", "top-1": 50.0})
    again = imagenet.Journal(path, "model", "size")
    assert again.rows == first.rows
    assert {"model": "a", "size": "6/12"} in again
    assert {"model": "a", "size": "4/12"} not in again


def test_only_all_images_make_an_imagenet_accuracy(imagenet):
    args = argparse.Namespace(bank=None, calibration=1000)
    assert imagenet.note(args, {50_000}).startswith("ImageNet accuracy, all 50,000")
    for counts in ({433}, {49_999}, {433, 50_000}):
        assert "not ImageNet accuracy" in imagenet.note(args, counts)


def test_shares_are_of_the_same_models_dense_accuracy(imagenet):
    key = {"model": "a", "list": "width"}
    sizes = {"12/12": 80.0, "6/12": 60.0, "4/12": ""}
    rows = imagenet.with_shares([key | {"size": size, "top-1": top1, "images": 10} for size, top1 in sizes.items()])
    assert [row["kept of dense, %"] for row in rows] == [100.0, 75.0, ""]
    assert [row["top-1, %"] for row in rows] == [80.0, 60.0, "out of reach"]


def test_every_row_of_a_model_has_a_key_of_its_own(imagenet):
    rows = [tuple(imagenet.row_key(key, *size).values()) for key in imagenet.MODELS for size in imagenet.sizes()]
    assert len(set(rows)) == len(rows) == 5 * (1 + 2 * 4)


def test_timm_has_weights_of_every_model(imagenet):
    assert {model.name for model in imagenet.MODELS.values()} <= set(timm.list_pretrained())
