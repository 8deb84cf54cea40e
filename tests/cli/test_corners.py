"""Branches and sentences that no other test has reason to come by."""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import accelerate
import architectures
import pytest
import timm
import torch
from helpers import CLASSES, PLAN, make_batches, make_images, make_model, make_net
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import nn
from training_runs import TINY, Images, run

import stratavit
from stratavit import ArtifactError, Spec, StrataViTError, SuperNet, UnsupportedModelError
from stratavit.artifacts import folder_format, timm_config
from stratavit.calibration import statistics
from stratavit.cli.parser import main
from stratavit.data import image_files
from stratavit.data.batches import watched
from stratavit.elastic.layers import describe_layer
from stratavit.errors import described, one_line, shown
from stratavit.evaluation import features, latency
from stratavit.files import folders, lock
from stratavit.interop import torchvision_vit
from stratavit.interop.equivalence import check_equivalent
from stratavit.interop.transformers import models
from stratavit.models import architecture, size_checks
from stratavit.models.families import vit
from stratavit.reports import curve, model_card
from stratavit.training import distributed, run_files
from stratavit.utils import signals

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


# ---- models -----------------------------------------------------------------------------------------------------


def test_more_buffers_than_the_weights_explain(tmp_path, monkeypatch):
    stratavit.save(architectures.make("SwinForImageClassification"), tmp_path / "swin")
    monkeypatch.setattr(size_checks, "BUFFERS", -(1 << 40))
    with pytest.raises(ArtifactError, match=r"would compute .* numbers beside its weights"):
        stratavit.load(tmp_path / "swin")


def test_a_model_of_no_fixed_size():
    model = make_model("plain")
    model.patch_embed.img_size = None
    assert architecture.resolve_data_config(model)["input_size"] == (3, 224, 224)


def test_a_beit_without_biases_of_qkv_is_refused():
    with pytest.raises(ArtifactError, match="expected no such part"):
        SuperNet(Beit(**SMALL, qkv_bias=False))


def test_models_without_storage_are_not_compared():
    """Others that differ so much are refused."""
    with torch.device("meta"):
        check_equivalent(nn.Linear(1, 2), nn.Linear(1, 2), (3, 1, 1))
    with pytest.raises(UnsupportedModelError):
        check_equivalent(nn.Linear(1, 2), nn.Linear(1, 2), (3, 1, 1))


def test_attention_of_another_kind_tells_nothing():
    model = make_model("plain")
    for block in model.blocks:
        block.attn = nn.Identity()
    assert vit._attention_arguments(model) == {}


def test_a_module_that_no_site_becomes():
    with pytest.raises(ArtifactError, match="cannot describe x: a Identity is none of the layers"):
        describe_layer("x", nn.Identity())


def test_a_model_of_transformers_of_another_class():
    with pytest.raises(UnsupportedModelError, match="cannot cut a Identity of transformers: expected one of"):
        models.layout_of(nn.Identity())


def test_origins_that_are_none():
    small = stratavit.as_timm(architectures.make("ViTForImageClassification"))
    with pytest.raises(ArtifactError, match=r"origin: expected one of .*, got 'Other'"):
        models.from_timm(small, {"class": "Other"})
    with pytest.raises(ArtifactError, match="origin: ViTForImageClassification cannot be built: "):
        models.from_timm(small, {"class": "ViTForImageClassification", "config": {"hidden_size": "x"}})


def test_classes_of_a_model_of_transformers():
    from stratavit.utils.model import classes_of

    model = architectures.make("ViTForImageClassification")
    assert classes_of(model) == model.config.num_labels


def test_a_name_of_torchvisions_that_has_no_other_in_timm():
    assert torchvision_vit._renamed("encoder.layers.encoder_layer_3.other.bias") == "blocks.3.other.bias"


def test_arguments_that_an_architecture_sets_itself(monkeypatch):
    """Then there is no config.json that timm could load by."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    description, config = architecture.describe(model), architecture.resolve_data_config(model)
    assert timm_config.timm_config(description, config) is not None
    built = architecture.build(description, device="meta")
    monkeypatch.setattr(architecture, "build", lambda *args, **options: built)
    monkeypatch.setattr(timm, "create_model", failing(TypeError("got multiple values for keyword argument 'depth'")))
    assert timm_config.timm_config(description, config) is None


# ---- what is measured -------------------------------------------------------------------------------------------


def test_neighbours_of_nothing():
    model, batches = make_model("plain"), make_batches()
    with pytest.raises(StrataViTError, match="knn: expected k of at least 1 and a temperature above 0, got 0"):
        stratavit.knn(model, batches, batches, k=0)
    with pytest.raises(StrataViTError, match="knn: the bank gave no images"):
        stratavit.knn(model, [], batches)
    with pytest.raises(StrataViTError, match="knn: the bank has the label -1, expected numbers of classes"):
        stratavit.knn(model, [(images, labels * 0 - 1) for images, labels in batches], batches)
    with pytest.raises(StrataViTError, match="the loader gives no labels"):
        stratavit.knn(model, [make_images(2)], batches)


def test_a_judge_by_text_embeddings():
    model, batches = make_model("plain"), make_batches()
    judge = curve.judge_of(model, embeddings=torch.eye(CLASSES, features.features(model, make_images(1)).shape[1]))
    assert judge(model, batches).n == sum(len(labels) for _, labels in batches)


def test_features_that_no_gradient_comes_to():
    observer = statistics.SiteObserver(make_net("plain").elastic["blocks.0.attn"], "weighted", None)
    observer.features(torch.zeros(1, 2, 3, 2, 16))
    assert observer._held == []


def test_cut_networks_that_answer_with_no_numbers(monkeypatch):
    from stratavit.dropout_list import build

    net = make_net("plain")
    monkeypatch.setattr(build, "walk", lambda *args: ([], {"blocks.0.attn": float("nan")}, []))
    with pytest.raises(StrataViTError, match="a cut network answered NaN or infinity"):
        build.by_effects(net.model, net.sites, net.cost, make_batches(), PLAN)


def test_what_a_timing_holds():
    assert latency.Timing.of([0.1, 0.2, 0.3], 4).to_dict()["median_ms"] == pytest.approx(200)


def test_a_runtime_that_is_not_here_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(latency, "load_session", failing(StrataViTError("pip install it")), raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(StrataViTError, match="pip install"):
        stratavit.time_model(make_model("plain"), (3, 32, 32), stratavit.Setting(runtime="onnx", seconds=0.01))


def test_values_from_files_in_sentences():
    assert described([10**5000]) == "a very large list"


def test_what_other_libraries_say_is_printable():
    assert one_line(ValueError("a\x00b\ud800c\nsecond line")) == r"a\x00b\ud800c"
    assert one_line(ValueError()) == "ValueError"
    assert shown("blocks.0\n" * 99) == (r"blocks.0\n" * 99)[:200]


def test_a_spec_of_something_else():
    with pytest.raises(StrataViTError, match="spec: expected a mapping of site names to widths, got int"):
        Spec(5)
    assert repr(Spec({"a": 1})) == "Spec({'a': 1})"


# ---- files ------------------------------------------------------------------------------------------------------


def test_files_that_are_no_files(tmp_path, monkeypatch):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ArtifactError, match="is damaged or not a safetensors file"):
        folders.read_tensors(tmp_path / "folder.safetensors")
    with pytest.raises(ArtifactError, match=r"is incomplete: gone\.safetensors is missing"):
        folders.read_tensors(tmp_path / "gone.safetensors")
    (tmp_path / "large.json").write_text('{"a": 1}')
    monkeypatch.setattr(folders, "LARGEST_TEXT", 3)
    with pytest.raises(ArtifactError, match="larger than"):
        folders.read_json(tmp_path / "large.json")


def test_folders_of_images_that_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", failing(PermissionError(13, "Permission denied")))
    with pytest.raises(StrataViTError, match=r"data: .* cannot be read \(Permission denied\)"):
        image_files.list_images(tmp_path)


def test_a_state_that_memory_is_too_small_for(tmp_path):
    with pytest.raises(MemoryError), run_files.checkpoint_errors(tmp_path):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


def test_weights_without_an_average():
    model = make_model("plain")
    run_files.put_weights(run_files.weights_of(make_model("plain", seed=3), None), model, None)
    assert torch.equal(model.head.weight, make_model("plain", seed=3).head.weight)


def test_a_card_leaves_out_sizes_that_cannot_be_had(monkeypatch):
    net = make_net("plain", stratified=True)
    monkeypatch.setattr(model_card, "SHARES", ("12/12", "0/12"))
    text = model_card.model_card(net, "user/name")
    assert "| 12/12 |" in text
    assert "| 0/12 |" not in text


# ---- locks, signals, processes ----------------------------------------------------------------------------------


def test_signals_are_left_alone_in_other_threads():
    before, asked = signal.getsignal(signal.SIGTERM), []

    def work():
        with signals.raised(), distributed.stop_on_signal() as stop:
            asked.append((signal.getsignal(signal.SIGTERM), stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [(before, False)]


def test_a_fault_that_is_no_workers_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="shapes"), watched(""):
        raise RuntimeError("shapes differ")


def test_accelerate_that_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate, "Accelerator", failing(ValueError("fp8 needs other hardware")))
    with pytest.raises(StrataViTError, match="train: Accelerate cannot start: fp8"):
        distributed.accelerator(TINY, tmp_path, cpu=True)


def test_processes_that_were_launched_and_not_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(num_processes=1, log_with=[])
    monkeypatch.setattr(accelerate, "Accelerator", lambda **options: alone)
    with pytest.raises(StrataViTError, match="2 processes were launched, but Accelerate joined 1"):
        distributed.accelerator(TINY, tmp_path, cpu=True)


def test_a_tracker_that_fails_at_the_end(capsys):
    tracker = SimpleNamespace(finish=failing(OSError(28, "No space left on device")))
    distributed.release(
        SimpleNamespace(unwrap_model=lambda model, **options: model, trackers=[tracker]), make_model("plain")
    )
    assert "train: the tracker's last numbers are lost: the disk is full" in capsys.readouterr().err


def test_states_are_saved_as_often_as_asked(tmp_path):
    run(tmp_path / "run", recipe=dataclasses.replace(TINY, save_every=2))
    assert run_files.read_state(tmp_path / "run")["ended"] == TINY.epochs


def test_a_folder_that_is_filled_while_it_is_locked(tmp_path, monkeypatch):
    from stratavit.training import launch

    take = lock.Lock.take

    def overtaken(self):
        take(self)
        (self.path.parent / "state.pt").touch()

    monkeypatch.setattr(lock.Lock, "take", overtaken)
    with pytest.raises(ArtifactError, match="is not empty; give another folder"):
        launch.make_folder(tmp_path / "run", False, lock.Lock(tmp_path / "run"))


def test_a_lock_that_cannot_be_set_leaves_no_folders(tmp_path, monkeypatch):
    from stratavit.training import launch

    monkeypatch.setattr(lock.Lock, "take", failing(OSError(28, "No space left on device")))
    with pytest.raises(ArtifactError, match="the disk is full"):
        launch.make_folder(tmp_path / "a" / "b" / "run", False, lock.Lock(tmp_path / "a" / "b" / "run"))
    assert not any(tmp_path.iterdir())


def test_a_model_without_a_head_needs_a_teacher(tmp_path):
    model = make_model("plain")
    model.reset_classifier(0)
    with pytest.raises(StrataViTError, match="the model has no head; give a teacher"):
        stratavit.finetune(model, Images(), None, dataclasses.replace(TINY, mode="plain"), tmp_path / "run", cpu=True)


def test_raw_weights_are_kept_where_asked(tmp_path):
    small = make_net("plain").extract(spec={"blocks.0.attn": 8}, verbose=False)
    recipe = dataclasses.replace(TINY, mode="plain", keep="raw")
    tuned = stratavit.finetune(small, Images(), None, recipe, tmp_path / "run", cpu=True)
    state = run_files.read_state(tmp_path / "run")
    assert torch.equal(state["weights"]["head.weight"], tuned.head.weight)


# ---- the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A super-network and a small model with images for them."""
    from PIL import Image

    root = tmp_path_factory.mktemp("corners")
    net = make_net("plain", stratified=True)
    net.save(root / "run")
    stratavit.save(net.extract(spec={"blocks.0.attn": 8}, verbose=False), root / "small")
    for split in ("train", "val"):
        for label in range(CLASSES):
            (root / "data" / split / f"c{label}").mkdir(parents=True)
            Image.new("RGB", (40, 40), (30 * label, 0, 0)).save(root / "data" / split / f"c{label}" / "0.png")
    return root


def told(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_two_ways_to_measure(folder, capsys):
    options = ["--data", folder / "data", "--workers", "0", "--knn", "3", "--zero-shot", "x.safetensors"]
    assert "two ways to measure; give one" in told(capsys, "evaluate", folder / "small", *options)


def test_measuring_by_text_embeddings(folder, tmp_path, capsys):
    width = SuperNet.load(folder / "run").model.num_features
    save_file({"classes": torch.eye(CLASSES, width)}, tmp_path / "texts.safetensors")
    options = ["--data", folder / "data", "--workers", "0", "--zero-shot", tmp_path / "texts.safetensors", "--json"]
    assert main([*map(str, ["evaluate", folder / "small", *options])]) == 0
    assert f'"n": {CLASSES}' in capsys.readouterr().out


def test_shares_that_cannot_be_had(folder, capsys, tmp_path):
    options = ["--data", folder / "data", "--workers", "0", "--shares", "0.001", "--out", tmp_path / "curve"]
    assert "none of the shares 0.001 is reachable" in told(capsys, "curve", folder / "run", *options)


@pytest.mark.parametrize("shares", ["x", "0", "1/0", "1,"])
def test_shares_that_are_none(folder, capsys, shares):
    with pytest.raises(SystemExit):
        main(["curve", str(folder / "run"), "--data", "d", "--shares", shares])
    assert "as a share above 0 and at most 1" in capsys.readouterr().err


def test_timing_without_onnx_runtime(folder, capsys, monkeypatch):
    module = importlib.import_module("stratavit.cli.bench")
    monkeypatch.setattr(module, "has_onnx", lambda: False)
    assert main(["bench", str(folder / "small"), "--batches", "1", "--seconds", "0.01"]) == 0
    assert "ONNX Runtime is not here: pip install 'stratavit[export]'" in capsys.readouterr().out


def test_brackets_and_colons_of_a_path_are_printed_as_they_are(folder, tmp_path, capsys):
    (tmp_path / "[red]:smile:").mkdir()
    assert main(["extract", str(folder / "run"), "--macs", "80%", "--out", str(tmp_path / "[red]:smile:" / "x")]) == 0
    assert "[red]:smile:" in capsys.readouterr().out


def test_the_table_of_the_docs(capsys):
    assert main(["models", "vit_tiny_patch16_224", "--markdown"]) == 0
    assert "| " in capsys.readouterr().out


def test_processes_that_are_not_the_first_say_nothing(folder, tmp_path, capsys, monkeypatch):
    module = importlib.import_module("stratavit.cli.train")
    monkeypatch.setattr(module, "leave_process_group", lambda: None)
    monkeypatch.setenv("RANK", "1")
    options = ["--data", folder / "data", "--device", "cpu", "--workers", "0", "--tracker", "none", "--epochs", "1"]
    options += ["--batch-size", "4", "--repeats", "1", "--json"]
    for command, target, *own in (("train", "run", "--list-epochs", "1"), ("finetune", "small")):
        assert main([*map(str, [command, folder / target, "--out", tmp_path / command, *options, *own])]) == 0
    assert capsys.readouterr().out == ""


def test_started_as_a_module():
    ended = subprocess.run([sys.executable, "-m", "stratavit", "--version"], capture_output=True, text=True)
    assert ended.returncode == 0
    assert stratavit.__version__ in ended.stdout


def test_budgets_of_a_small_model(folder, capsys):
    assert "has one size only" in told(capsys, "bench", folder / "small", "--macs", "50%")
    assert folder_format.kind(folder / "small") == folder_format.SUB
