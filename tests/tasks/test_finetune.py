"""Fine-tuning of one small model, by the loop that PIAD uses; teachers; the command line."""

import copy
import dataclasses
import json

import pytest
import timm
import torch
from helpers import CLASSES, make_batches, make_images, make_model, make_net
from torch.utils.data import Subset
from training_runs import CALM, ONE, TINY, Images, assert_same, crash, interrupted, names, outcome, rows, write_images

import stratavit
from stratavit import StrataViTError
from stratavit.cli.parser import main
from stratavit.elastic.plain import Constant
from stratavit.training.recipe import LIST_KEYS
from stratavit.training.teacher import Teacher

PLAIN, SHORT = (dataclasses.replace(recipe, mode="plain") for recipe in (TINY, ONE))
SPEC = {"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 20}


def small():
    return make_net("plain").extract(spec=SPEC, verbose=False)


def run(out, data=None, model=None, recipe=PLAIN, **options):
    return stratavit.finetune(model or small(), data or Images(), make_batches(), recipe, out, cpu=True, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "run"
    return folder, run(folder)


def test_what_a_run_leaves(finished):
    folder, model = finished
    assert names(folder) == {"state.pt", "log.jsonl", "model.safetensors", "stratavit.json", "config.json"}
    loaded = stratavit.load(folder)
    with torch.no_grad():
        assert torch.equal(loaded(make_images(3)), model(make_images(3)))
    assert not model.training
    assert isinstance(model.blocks[0].mlp, Constant)
    assert loaded.provenance["finetune"]["recipe"] == PLAIN.to_dict()
    assert loaded.provenance["spec"]["blocks.1.mlp"] == 20
    evaluations = [row for row in rows(folder) if row["kind"] == "eval"]
    assert [row["epoch"] for row in evaluations] == [0, 2, 3]
    (point,) = evaluations[-1]["points"]
    assert point["n"] == 12
    assert point["macs"] == model.provenance["macs"] == make_net("plain").macs(SPEC)
    assert point["params"] == sum(p.numel() for p in model.parameters())


def test_every_weight_learns_but_norms_that_only_a_constant_reads(finished):
    before, after = small().state_dict(), finished[1].state_dict()
    assert before.keys() == after.keys()
    assert "blocks.1.attn.bias" in before
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {f"blocks.{norm}.{part}" for norm in ("0.norm2", "1.norm1") for part in ("weight", "bias")}


def test_it_lowers_the_loss_and_leaves_nothing_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    data, model = Images(), small()
    batch = [(data.images, data.labels)]
    before = stratavit.evaluate(model, batch).loss
    stratavit.finetune(model, data, None, dataclasses.replace(PLAIN, **CALM, epochs=10, smoothing=0.0), cpu=True)
    assert stratavit.evaluate(model, batch).loss < 0.7 * before
    assert names(tmp_path) == set()


@pytest.mark.parametrize("count", [3, 12, 24])
def test_the_default_recipe_learns_from_few_images(tmp_path, count):
    """It reaches more than half of the way to the labels of the images that it is trained on."""
    data, model = Images(), small()
    images, labels = data.images[:count], data.labels[:count]
    before = stratavit.evaluate(model, [(images, labels)])
    config = {"workers": 0, "tracker": "none", "lr": 0.05}
    out = tmp_path / "run"
    stratavit.finetune(model, Subset(data, range(count)), [(images, labels)], config, out, cpu=True)
    (first, *_, last) = (row["points"][0] for row in rows(out) if row["kind"] == "eval")
    assert (first["top1"], first["loss"]) == (before.top1, before.loss)
    assert last["loss"] < 0.5 * first["loss"]


@pytest.mark.parametrize(("at", "happens"), [(7, None), (60, crash)])
def test_interrupted_and_resumed(tmp_path, finished, at, happens):
    options = {} if happens is None else {"happens": happens}
    interrupted(lambda data, resume: run(tmp_path / "run", data, resume=resume), at, **options)
    assert_same(outcome(tmp_path / "run"), outcome(finished[0]))


def test_drop_path_of_the_models_own_rests_afterwards():
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=32, drop_path_rate=0.5)
    stratavit.finetune(model, Images(), None, SHORT, cpu=True)
    assert not any(module.training for module in model.modules())


def test_mistakes(tmp_path, finished):
    with pytest.raises(StrataViTError, match="folder of the interrupted run"):
        run(None, resume=True)
    with pytest.raises(StrataViTError, match="train_piad"):
        run(tmp_path / "run", model=make_net("plain"))
    with pytest.raises(StrataViTError, match="another model"):
        run(finished[0], model=make_model("plain"), resume=True)
    net = copy.deepcopy(make_net("plain"))
    with pytest.raises(StrataViTError, match="kind = small model; now it is default"):
        stratavit.train_piad(net, Images(), None, None, finished[0], proxy=make_batches(), resume=True, cpu=True)


# ---- teachers -----------------------------------------------------------------------------------


def test_a_teacher_sees_images_as_it_was_trained():
    model = make_model("registers")
    model.data_config = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.1)}
    student = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    pixels = torch.rand(4, 3, 32, 32)

    def normal(config):
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (pixels - mean) / std

    with torch.no_grad():
        assert torch.allclose(Teacher(model, student)(normal(student)), model(normal(model.data_config)), atol=1e-4)


def test_a_teacher_of_another_precision_and_input_size():
    student = {"input_size": (3, 48, 40), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    teacher = Teacher(make_model("plain").to(torch.bfloat16), student)
    assert teacher(torch.randn(2, 3, 48, 40)).shape == (2, CLASSES)


def test_a_teacher_alone_sets_the_targets():
    """With all of the target the teacher's, the labels do not matter; without, they do."""
    calm = dataclasses.replace(SHORT, **CALM, distil=1.0)
    shuffled = Images()
    shuffled.labels = (shuffled.labels + 1) % CLASSES
    taught = [run(None, data, recipe=calm, teacher=make_model("registers")) for data in (None, shuffled)]
    assert_same(dict(taught[0].state_dict()), dict(taught[1].state_dict()))
    alone = [run(None, data, recipe=dataclasses.replace(calm, distil=0.0)) for data in (None, shuffled)]
    assert not torch.equal(alone[0].head.weight, alone[1].head.weight)


def test_a_teacher_teaches_the_full_network_of_piad_too():
    nets = [copy.deepcopy(make_net("plain")) for _ in range(2)]
    recipe = dataclasses.replace(ONE, distil=1.0)
    for net, teacher in zip(nets, (make_model("registers"), None), strict=True):
        stratavit.train_piad(net, Images(), None, recipe, proxy=make_batches(), cpu=True, teacher=teacher)
    assert not torch.equal(nets[0].model.head.weight, nets[1].model.head.weight)


def test_teachers_that_cannot_teach(tmp_path):
    with pytest.raises(StrataViTError, match="distil is 0"):
        run(tmp_path / "run", teacher=make_model("plain"))
    assert not (tmp_path / "run").exists()
    other = timm.create_model("test_vit", num_classes=3)
    with pytest.raises(StrataViTError, match=f"has 3 classes, the student {CLASSES}"):
        run(tmp_path / "run", recipe=dataclasses.replace(PLAIN, distil=0.5), teacher=other)


def test_a_resumed_run_keeps_its_teacher(tmp_path):
    recipe = dataclasses.replace(SHORT, distil=0.5)
    run(tmp_path / "run", recipe=recipe, teacher=make_model("registers"))
    with pytest.raises(StrataViTError, match="distil needs a teacher"):
        run(tmp_path / "run", recipe=recipe, resume=True)
    with pytest.raises(StrataViTError, match=r"teacher = VisionTransformer \w{8}; now it is VisionTransformer \w{8}"):
        run(tmp_path / "run", recipe=recipe, resume=True, teacher=make_model("registers", seed=1))
    run(tmp_path / "run", recipe=None, resume=True, teacher=make_model("registers"))


# ---- the command line ---------------------------------------------------------------------------

FLAGS = ["--epochs=1", "--batch-size=4", "--repeats=1", "--workers=0", "--tracker=none", "--device=cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images of three classes, a small model of seven, and it fine-tuned with a new head."""
    folder = tmp_path_factory.mktemp("finetune-cli")
    for split in ("train", "val"):
        write_images(folder / "data" / split, classes=3)
    stratavit.save(small(), folder / "small")
    assert main(command(folder, folder / "tuned", "--new-head")) == 0
    return folder


def command(work, out, *more):
    return ["finetune", str(work / "small"), "--data", str(work / "data"), "--out", str(out), *FLAGS, *more]


def test_finetune_with_a_new_head(work, tmp_path, capsys):
    assert main(command(work, tmp_path / "tuned")) == 2
    error = capsys.readouterr().err
    assert "7 classes" in error
    assert "--new-head" in error
    assert not (tmp_path / "tuned").exists()
    assert main([*command(work, tmp_path / "tuned", "--new-head"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["images"], result["points"][0]["n"]) == (3, 12, 12)
    tuned = stratavit.load(tmp_path / "tuned")
    assert tuned.num_classes == tuned.head.out_features == 3
    assert "macs" not in tuned.provenance
    assert stratavit.load(work / "small").num_classes == CLASSES
    evaluated = ["evaluate", str(tmp_path / "tuned"), "--data", str(work / "data"), "--workers", "0", "--json"]
    assert main(evaluated) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == result["points"][0]["top1"]


def test_a_saved_dense_model_is_converted(work, tmp_path, capsys):
    stratavit.save(make_model("plain"), tmp_path / "dense")
    arguments = command(work, tmp_path / "tuned", "--new-head")
    assert main([arguments[0], str(tmp_path / "dense"), *arguments[2:]]) == 0
    convert = ["--data", str(work / "data"), "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["convert", str(tmp_path / "dense"), *convert[:-1], str(tmp_path / "unlabelled")]) == 0
    assert "without labels" in capsys.readouterr().err  # three folders are not the classes of a head of seven
    assert main(["convert", str(tmp_path / "tuned"), *convert, "--num-classes", "3"]) == 2
    assert "leave out --weights" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "tuned"), *convert]) == 0
    net, dense = stratavit.SuperNet.load(tmp_path / "run"), stratavit.load(tmp_path / "tuned")
    with torch.no_grad():
        assert torch.allclose(net(make_images(3)), dense(make_images(3)), atol=1e-4)


def test_a_teacher_by_folder(work, tmp_path, capsys):
    out = tmp_path / "again"
    assert main(command(work, out, "--new-head", "--teacher", str(work / "small"), "--distil", "0.5")) == 2
    assert "has 7 classes, the student 3" in capsys.readouterr().err
    assert main(command(work, out, "--new-head", "--teacher", str(work / "tuned"), "--distil", "0.5")) == 0
    assert stratavit.load(out).provenance["finetune"]["teacher"].startswith("vit_tiny_patch16_224 ")
    assert main(command(work, tmp_path / "no", "--new-head", "--teacher-weights", "x.pth")) == 2
    assert "--teacher" in capsys.readouterr().err


def test_only_keys_with_an_effect_are_flags(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    assert "--lr FLOAT" in text
    assert "(default: 0.0005)" in text
    assert not [key for key in LIST_KEYS if f"--{key.replace('_', '-')} " in text]
