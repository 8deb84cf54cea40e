"""Fine-tuning of one small model, by the loop that PIAD uses; teachers; the command line."""

import copy
import dataclasses
import json

import pytest
import timm
import torch
from helpers import CLASSES, make_batches, make_images, make_model, make_net
from PIL import Image
from training_runs import TINY, CrashError, Images, assert_same, crash, terminate

import stratavit
from stratavit import Recipe, StrataViTError
from stratavit.cli.parser import main
from stratavit.elastic.plain import Constant
from stratavit.training import run_files
from stratavit.training.recipe import FINETUNING, LIST_KEYS
from stratavit.training.teacher import Teacher

PLAIN = dataclasses.replace(TINY, mode="plain")
SPEC = {"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 20}


def small():
    return make_net("plain").extract(spec=SPEC, verbose=False)


def run(out, data=None, model=None, recipe=PLAIN, **options):
    return stratavit.finetune(model or small(), data or Images(), make_batches(), recipe, out, cpu=True, **options)


def outcome(folder):
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in run_files.Journal(folder / "log.jsonl").rows()]
    return run_files.read_state(folder), log, (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "run"
    return folder, run(folder)


def test_what_a_run_leaves(finished):
    folder, model = finished
    names = {"state.pt", "log.jsonl", "model.safetensors", "stratavit.json"}
    assert {path.name for path in folder.iterdir()} == names
    loaded = stratavit.load(folder)
    with torch.no_grad():
        assert torch.equal(loaded(make_images(3)), model(make_images(3)))
    assert not model.training
    assert isinstance(model.blocks[0].mlp, Constant)
    assert loaded.provenance["finetune"]["recipe"] == PLAIN.to_dict()
    assert loaded.provenance["spec"]["blocks.1.mlp"] == 20
    rows = run_files.Journal(folder / "log.jsonl").rows()
    assert [(row["kind"], row["epoch"]) for row in rows if row["kind"] == "eval"] == [("eval", 2), ("eval", 3)]
    (point,) = rows[-1]["points"]
    assert point["n"] == 12
    assert point["macs"] == model.provenance["macs"] == make_net("plain").macs(SPEC)
    assert point["params"] == sum(p.numel() for p in model.parameters())


def test_every_weight_learns_but_norms_that_only_a_constant_reads(finished):
    before, after = small().state_dict(), finished[1].state_dict()
    assert before.keys() == after.keys()
    assert "blocks.1.attn.bias" in before
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {f"blocks.{norm}.{part}" for norm in ("0.norm2", "1.norm1") for part in ("weight", "bias")}


def test_it_lowers_the_loss():
    data, model = Images(), small()
    batch = [(data.images, data.labels)]
    before = stratavit.evaluate(model, batch).loss
    calm = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "drop_path": 0.0}
    stratavit.finetune(model, data, None, dataclasses.replace(PLAIN, epochs=10, list_epochs=1, **calm), cpu=True)
    assert stratavit.evaluate(model, batch).loss < 0.7 * before


@pytest.mark.parametrize("at", [7, 38, 50])
def test_stopped_and_resumed(tmp_path, finished, at):
    with pytest.raises(KeyboardInterrupt, match="of 9; resume"):
        run(tmp_path / "run", Images(at, terminate))
    run(tmp_path / "run", resume=True)
    assert_same(outcome(tmp_path / "run"), outcome(finished[0]))


def test_a_crash_goes_back_to_the_last_state(tmp_path, finished):
    with pytest.raises(CrashError):
        run(tmp_path / "run", Images(60, crash))
    run(tmp_path / "run", resume=True)
    assert_same(outcome(tmp_path / "run"), outcome(finished[0]))


def test_without_a_folder_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run(None, recipe=dataclasses.replace(PLAIN, epochs=1, list_epochs=1))
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_the_papers_fine_tuning():
    recipe = Recipe.from_dict(FINETUNING)
    assert (recipe.epochs, recipe.lr, recipe.min_lr, recipe.warmup_epochs) == (30, 5e-5, 1e-6, 0)
    assert Recipe.read(None, {"lr": 1e-3}, FINETUNING) == dataclasses.replace(recipe, lr=1e-3)


def test_keys_and_files_fill_up_with_the_papers_fine_tuning(tmp_path):
    off = {"workers": 0, "tracker": "none", "batch_size": 4, "repeats": 1, "epochs": 1}
    (tmp_path / "recipe.toml").write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in off.items()))
    for config in (off, tmp_path / "recipe.toml"):
        model = stratavit.finetune(small(), Images(), None, config, cpu=True)
        assert model.provenance["finetune"]["recipe"] == Recipe.from_dict(FINETUNING | off).to_dict()


def test_drop_path_of_the_models_own_rests_afterwards():
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=32, drop_path_rate=0.5)
    stratavit.finetune(model, Images(), None, dataclasses.replace(PLAIN, epochs=1, list_epochs=1), cpu=True)
    assert not any(module.training for module in model.modules())


def test_mistakes(tmp_path, finished):
    with pytest.raises(StrataViTError, match="distil needs a teacher here"):
        run(tmp_path / "run", recipe=dataclasses.replace(PLAIN, distil=0.5))
    with pytest.raises(StrataViTError, match="give the folder of the interrupted run"):
        run(None, resume=True)
    with pytest.raises(StrataViTError, match="super-network: train it with train_piad"):
        run(tmp_path / "run", model=make_net("plain"))
    with pytest.raises(StrataViTError, match="images = 24; now it is 12"):
        run(finished[0], data=torch.utils.data.Subset(Images(), range(12)), resume=True)
    with pytest.raises(StrataViTError, match="state of another model"):
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
        assert torch.allclose(Teacher.of(model, student)(normal(student)), model(normal(model.data_config)), atol=1e-4)


def test_a_teacher_in_half_precision():
    teacher = Teacher.of(make_model("plain").bfloat16(), {"input_size": (3, 32, 32), "mean": (0,) * 3, "std": (1,) * 3})
    assert teacher(make_images(2)).shape == (2, CLASSES)


def test_a_teacher_of_another_input_size():
    teacher = Teacher.of(make_model("plain"), {"input_size": (3, 48, 40), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    assert teacher.size == (32, 32)
    assert teacher(torch.randn(2, 3, 48, 40)).shape == (2, CLASSES)


def test_a_teacher_alone_sets_the_targets(tmp_path):
    """With all of the target the teacher's, the labels do not matter; without, they do."""
    calm = dataclasses.replace(PLAIN, epochs=1, list_epochs=1, mixup=0.0, cutmix=0.0, distil=1.0)
    shuffled = Images()
    shuffled.labels = (shuffled.labels + 1) % CLASSES
    taught = [run(None, data, recipe=calm, teacher=make_model("registers")) for data in (None, shuffled)]
    assert_same(dict(taught[0].state_dict()), dict(taught[1].state_dict()))
    alone = [run(None, data, recipe=dataclasses.replace(calm, distil=0.0)) for data in (None, shuffled)]
    assert not torch.equal(alone[0].head.weight, alone[1].head.weight)


def test_a_teacher_teaches_the_full_network_of_piad_too():
    calm = dataclasses.replace(TINY, epochs=1, list_epochs=1, distil=1.0)
    nets = [copy.deepcopy(make_net("plain")) for _ in range(2)]
    teachers = (make_model("registers"), None)
    for net, teacher in zip(nets, teachers, strict=True):
        stratavit.train_piad(net, Images(), None, calm, proxy=make_batches(), cpu=True, teacher=teacher)
    assert not torch.equal(nets[0].model.head.weight, nets[1].model.head.weight)


def test_teachers_that_cannot_teach(tmp_path):
    with pytest.raises(StrataViTError, match="distil is 0"):
        run(tmp_path / "run", teacher=make_model("plain"))
    assert not (tmp_path / "run").exists()
    other = timm.create_model("test_vit", num_classes=3)
    with pytest.raises(StrataViTError, match=f"has 3 classes, the student {CLASSES}"):
        run(tmp_path / "run", recipe=dataclasses.replace(PLAIN, distil=0.5), teacher=other)


def test_a_resumed_run_keeps_its_teacher(tmp_path):
    recipe = dataclasses.replace(PLAIN, distil=0.5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Images(20, terminate), recipe=recipe, teacher=make_model("registers"))
    with pytest.raises(StrataViTError, match="distil needs a teacher here"):
        run(tmp_path / "run", recipe=recipe, resume=True)
    with pytest.raises(StrataViTError, match=r"teacher = VisionTransformer \w{8}; now it is VisionTransformer \w{8}"):
        run(tmp_path / "run", recipe=recipe, resume=True, teacher=make_model("registers", seed=1))
    run(tmp_path / "run", recipe=None, resume=True, teacher=make_model("registers"))


# ---- the command line ---------------------------------------------------------------------------

FAST = [
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--repeats",
    "1",
    "--workers",
    "0",
    "--tracker",
    "none",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images of three classes, and a small model of seven."""
    folder = tmp_path_factory.mktemp("finetune-cli")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            (folder / "data" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = torch.randint(0, 256, (36, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / "data" / split / name / f"{number}.png")
    stratavit.save(small(), folder / "small")
    return folder


def command(work, out, *more):
    return ["finetune", str(work / "small"), "--data", str(work / "data"), "--out", str(out), *FAST, *more]


def test_finetune_with_a_new_head_and_convert(work, tmp_path, capsys):
    out = tmp_path / "tuned"
    assert main([*command(work, out, "--new-head"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["images"], result["points"][0]["n"]) == (6, 12, 12)
    tuned = stratavit.load(out)
    assert tuned.num_classes == tuned.head.out_features == 3
    assert "macs" not in tuned.provenance
    assert stratavit.load(work / "small").num_classes == CLASSES
    assert main(["evaluate", str(out), "--data", str(work / "data"), "--workers", "0", "--json"]) == 0
    top1 = json.loads(capsys.readouterr().out)["top1"]
    assert top1 == result["points"][0]["top1"]


def test_a_saved_dense_model_is_converted(work, tmp_path, capsys):
    stratavit.save(make_model("plain"), tmp_path / "dense")
    data = ["--data", str(work / "data"), "--workers", "0", "--device", "cpu"]
    assert main(["convert", str(tmp_path / "dense"), *data, "--out", str(tmp_path / "run")]) == 2
    assert "7 classes" in capsys.readouterr().err
    tuned = ["finetune", str(tmp_path / "dense"), "--data", str(work / "data"), "--out", str(tmp_path / "tuned")]
    assert main([*tuned, *FAST, "--new-head"]) == 0
    assert main(["convert", str(tmp_path / "tuned"), *data, "--out", str(tmp_path / "run")]) == 0
    net, dense = stratavit.SuperNet.load(tmp_path / "run"), stratavit.load(tmp_path / "tuned")
    with torch.no_grad():
        assert torch.allclose(net(make_images(3)), dense(make_images(3)), atol=1e-4)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "tuned"), *data, "--num-classes", "3", "--out", str(tmp_path / "no")]) == 2
    assert "leave out --weights" in capsys.readouterr().err


def test_a_teacher_by_folder(work, tmp_path, capsys):
    teacher = ["--teacher", str(work / "small"), "--distil", "0.5"]
    assert main(command(work, tmp_path / "tuned", "--new-head", *teacher)) == 2
    assert "has 7 classes, the student 3" in capsys.readouterr().err
    assert main(command(work, tmp_path / "tuned", "--new-head")) == 0
    teacher[1] = str(tmp_path / "tuned")
    assert main(command(work, tmp_path / "again", "--new-head", *teacher)) == 0
    assert stratavit.load(tmp_path / "again").provenance["finetune"]["teacher"].startswith("vit_tiny_patch16_224 ")
    capsys.readouterr()
    assert main(command(work, tmp_path / "no", "--new-head", "--teacher-weights", "x.pth")) == 2
    assert "needs --teacher" in capsys.readouterr().err


def test_only_keys_with_an_effect_are_flags(work, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    assert "--lr FLOAT" in text
    assert "(default: 5e-05)" in text
    assert not [key for key in LIST_KEYS if f"--{key.replace('_', '-')} " in text]


def test_classes_that_do_not_fit_name_the_way_out(work, tmp_path, capsys):
    assert main(command(work, tmp_path / "tuned")) == 2
    error = capsys.readouterr().err
    assert "7 classes" in error
    assert "--new-head" in error
    assert not (tmp_path / "tuned").exists()
