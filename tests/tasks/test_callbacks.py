"""Their own loop: the callbacks in the real Trainers of transformers and Lightning, on a toy task."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, make_batches, make_images, make_net, same_tensors
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training_runs import CrashError
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback, TrainingArguments

import stratavit
from stratavit.calibration import contraction
from stratavit.calibration.moments import moments_of
from stratavit.calibration.statistics import collect
from stratavit.tasks.drawn_size import DrawnSize
from stratavit.tasks.piad_task import PiadTask
from stratavit.training.recipe import Recipe
from stratavit.training.task import SampledNetwork
from stratavit.utils.random_streams import stream

STEPS, SAVED = 6, 3  # of every run here, two batches each, in two epochs; after so many there is a checkpoint
STAGES = {"stages": 2, "stage_steps": 2}
COUNT = 24  # images: batches of 4, two for a step


class Images(Dataset):
    """Random images with labels."""

    def __init__(self, named):
        self.images, self.named = make_images(COUNT, seed=5), named
        self.labels = torch.randint(0, CLASSES, (COUNT,), generator=torch.Generator().manual_seed(6))

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        pair = self.images[index], self.labels[index]
        return dict(zip(("pixel_values", "labels"), pair, strict=True)) if self.named else pair


class Record:
    """What every call of the network ran at, and whether it had gradients; one of those may fail."""

    def __init__(self, net):
        self.runs, self.fails_at = [], None
        net.register_forward_hook(self, with_kwargs=True)

    def __call__(self, net, args, kwargs, output):
        spec = args[1] if len(args) > 1 else kwargs.get("spec")
        self.runs.append((torch.is_grad_enabled(), net.resolve(spec)))
        if self.fails_at == len(self.learning):
            raise CrashError

    @property
    def learning(self):
        return [widths for gradient, widths in self.runs if gradient]


def proxy():
    """Images to measure on, in an order that changes the loop's random numbers."""
    ((images, labels),) = make_batches((12,))
    return DataLoader(TensorDataset(images, labels), 5, shuffle=True)


def fresh(method="default", stratified=True):
    return copy.deepcopy(make_net("plain", method, stratified))


# ---- the two libraries ------------------------------------------------------------------------------------------


class HuggingFaceModel(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Module(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train_hugging_face(net, path, callbacks, resume=False):
    arguments = TrainingArguments(
        output_dir=str(path / "checkpoints"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=SAVED,
        save_strategy="steps",
        save_steps=SAVED,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    data = Images(named=True)
    trainer = HuggingFaceTrainer(
        HuggingFaceModel(net), arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=str(path / "checkpoints" / f"checkpoint-{SAVED}") if resume else None)


def train_lightning(net, path, callbacks, resume=False):
    seed_everything(3, verbose=False)
    path.mkdir(exist_ok=True)
    saving = ModelCheckpoint(path / "checkpoints", "saved-{step}", every_n_train_steps=SAVED, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        callbacks=[*callbacks, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = Images(named=False)
    checkpoint = path / "checkpoints" / f"saved-step={SAVED}.ckpt" if resume else None
    trainer.fit(Module(net), DataLoader(data, 4), DataLoader(data, 8), ckpt_path=checkpoint)


class Library:
    def __init__(self, name, train, callback, base, event):
        self.name, self.train, self.callback, self.base, self.event = name, train, callback, base, event

    def run(self, net, path, resume=False, extra=(), **options):
        """A run with our callback; returns it."""
        callback = self.callback(proxy(), path / "trained", **{**STAGES, **options})
        self.train(net, path, [*extra, callback], resume)
        return callback

    def at_step_end(self, does):
        """A callback of the library that does something after every batch, before ours."""
        return type("Extra", (self.base,), {self.event: lambda self, *args, **kwargs: does()})()


LIBRARIES = {
    "transformers": Library(
        "transformers", train_hugging_face, stratavit.SuperNetTrainerCallback, TrainerCallback, "on_optimizer_step"
    ),
    "lightning": Library(
        "lightning", train_lightning, stratavit.SuperNetLightningCallback, Callback, "on_train_batch_end"
    ),
}


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


@pytest.fixture(scope="module", params=LIBRARIES)
def finished(request, tmp_path_factory):
    """A run from beginning to end: its library, folder, network, record and callback."""
    path, net, library = tmp_path_factory.mktemp(request.param), fresh(), LIBRARIES[request.param]
    record = Record(net)
    return library, path, net, record, library.run(net, path)


# ---- sizes ------------------------------------------------------------------------------------------------------


def test_every_batch_runs_a_drawn_size_of_the_list_so_far(finished):
    _, _, net, record, callback = finished
    assert len(record.learning) == 2 * STEPS
    assert len({tuple(widths.values()) for widths in record.learning}) > 3
    assert record.learning[-1] == net.resolve(callback.drawn.spec)
    half = net.macs() * (1 - Recipe().reduction / STAGES["stages"])
    first = record.learning[: 2 * STAGES["stage_steps"]]
    assert all(net.macs(widths) > 0.8 * half for widths in first)  # the first stage has half of the list


def test_sizes_follow_the_seed(library, tmp_path):
    def sizes(folder, seed):
        net = fresh()
        record = Record(net)
        library.run(net, tmp_path / folder, config={"seed": seed})
        return record.learning

    assert sizes("one", 1) == sizes("again", 1) != sizes("other", 2)


def test_the_size_of_a_batch_follows_from_seed_and_number(finished):
    """From nothing else, in particular not from the process; along the list that the network came with."""
    library, _, net, record, _ = finished
    places, given = range(len(net.strata) + 1), fresh().strata
    for batch in range(STAGES["stage_steps"] * STAGES["stages"], 2 * STEPS):  # the list is finished
        moment = {"transformers": divmod(batch, 2), "lightning": (batch,)}[library.name]
        position = stream(0, "draw", *moment).choice(places)
        assert record.learning[batch] == net.resolve(given.spec(position))


def test_evaluation_runs_the_full_size(finished):
    _, _, net, record, _ = finished
    evaluated = [widths for gradient, widths in record.runs if not gradient]
    assert evaluated
    assert all(widths == net.resolve(None) for widths in evaluated)


class Teaching(nn.Module):
    """Calls the network without gradients, at a named size, at the full size, and as the callback has it."""

    def __init__(self, net, named):
        super().__init__()
        self.net, self.named = net, named

    def forward(self, images):
        with torch.no_grad():
            self.net(images)
        self.net(images, self.named)
        self.net(images, spec={})
        return self.net(images, None)


def test_a_named_spec_and_a_pass_without_gradients_run_what_they_say(library, tmp_path):
    net = fresh()
    named, full, record = net.resolve(net.strata.spec(1)), net.resolve(None), Record(net)
    library.train(Teaching(net, named), tmp_path, [library.callback(make_batches(), **STAGES)])
    starts = [i for i in range(1, len(record.runs)) if record.runs[i - 1 : i + 1] == [(False, full), (True, named)]]
    assert len(starts) == 2 * STEPS
    assert all(record.runs[i + 1] == (True, full) for i in starts)
    assert len({tuple(record.runs[i + 2][1].values()) for i in starts}) > 3


# ---- the network is left alone ----------------------------------------------------------------------------------


def test_nothing_is_left_of_it_after_training(finished):
    _, _, net, _, _ = finished
    images = make_images(2)
    assert not net.training
    assert not net._forward_pre_hooks
    assert torch.equal(net.train()(images), net(images, net.resolve(None)))
    net.eval()


def test_calls_after_a_training_that_failed_run_the_full_size(library, tmp_path):
    net, images = fresh(), make_images(2)
    record = Record(net)
    record.fails_at = 5  # in the middle of a step
    with pytest.raises(CrashError):
        library.run(net, tmp_path)
    assert record.learning[-1] != net.resolve(None)
    record.fails_at = None
    net.train()(images)
    assert record.runs[-1] == (True, net.resolve(None))


def test_a_network_whose_training_failed_can_be_trained_again(library, tmp_path):
    net = fresh()
    record = Record(net)
    record.fails_at = 5
    callback = library.callback(make_batches(), **STAGES)
    with pytest.raises(CrashError):
        library.train(net, tmp_path / "failed", [callback])
    record.fails_at, record.runs = None, []
    library.train(net, tmp_path / "again", [callback])
    assert len(record.learning) == 2 * STEPS
    assert not net._forward_pre_hooks


def test_other_threads_and_copies_run_the_full_size_while_it_trains(library, tmp_path):
    net, images, found = fresh(), make_images(2), []
    full = net(images, net.resolve(None))

    def look():
        copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        thread = threading.Thread(target=lambda: found.append(net(images)))
        thread.start()
        thread.join()
        found.extend(one(images) for one in copies)
        found.append(net(images, net.resolve(None)))

    library.run(net, tmp_path, extra=[library.at_step_end(look)])
    assert len(found) >= 4 * STEPS
    for start in range(0, len(found), 4):
        assert all(torch.equal(one, found[start + 3]) for one in found[start : start + 3])
    assert not torch.equal(found[-1], full)  # it had learnt by then


def test_a_run_that_draws_the_full_size_is_one_without_the_callback(library, tmp_path, monkeypatch):
    """The loop's own random numbers, order, steps and weights are not touched."""
    plain, ours = fresh(), fresh()
    library.train(plain, tmp_path / "plain", [])
    full = [SampledNetwork(ours.resolve(None), ours.macs())]
    monkeypatch.setattr(PiadTask, "draw", lambda self, generator: full)
    library.run(ours, tmp_path / "ours")
    assert same_tensors(plain.model.state_dict(), ours.model.state_dict())
    assert not same_tensors(plain.model.state_dict(), fresh().model.state_dict())


# ---- what is kept -----------------------------------------------------------------------------------------------


def test_what_was_saved_loads_and_extracts(finished):
    _, path, net, _, callback = finished
    images, loaded = make_images(2, seed=9), stratavit.SuperNet.load(path / "trained")
    spec = loaded.spec(macs=0.6)
    assert same_tensors(loaded.model.state_dict(), net.model.state_dict())
    assert loaded.strata.to_json() == net.strata.to_json()
    with torch.no_grad():
        assert torch.equal(loaded(images, spec), net(images, spec))
        torch.testing.assert_close(loaded.extract(spec=spec)(images), net(images, spec), atol=1e-5, rtol=1e-4)
    assert loaded.provenance["train"]["steps"] == STEPS
    assert loaded.provenance["train"]["stages"] == STAGES["stages"]
    assert callback.training.begun == STEPS // STAGES["stage_steps"]


def test_means_are_those_of_the_weights_that_were_saved(finished):
    _, path, _, _, _ = finished
    loaded = stratavit.SuperNet.load(path / "trained")
    again = copy.deepcopy(loaded)
    statistics = collect(again.model, make_batches(), "auto", "none", "means", contraction.TOKEN_WEIGHT)
    for name, module in again.elastic.items():
        mean = moments_of(module, statistics[name])[0].to(module.channel_mean)
        torch.testing.assert_close(mean, module.channel_mean, atol=1e-5, rtol=1e-4)


def test_there_is_a_network_at_every_checkpoint(library, tmp_path):
    """Also in mid-run, where the list is not finished."""
    found = []

    def look():
        if (tmp_path / "trained").exists():
            found.append(len(stratavit.SuperNet.load(tmp_path / "trained").strata))

    net = fresh()
    library.run(net, tmp_path, extra=[library.at_step_end(look)], stage_steps=4)
    assert 0 < found[0] < len(net.strata)


@pytest.mark.parametrize("method", ["default", "paper"])
def test_a_resumed_run_is_one_that_was_not_interrupted(library, method, tmp_path):
    """Sizes, weights, list, means and moments; the list is measured, and stages begin in between."""
    options = {"config": {"list_source": "progressive"}, "stage_steps": 2}
    whole, part = fresh(method), fresh(method)
    record, rest = Record(whole), Record(part)
    library.run(whole, tmp_path, **options)
    expected = {file.name: file.read_bytes() for file in (tmp_path / "trained").iterdir()}
    library.run(part, tmp_path, resume=True, **options)
    assert rest.learning == record.learning[2 * SAVED :]
    assert {file.name: file.read_bytes() for file in (tmp_path / "trained").iterdir()} == expected


def test_a_resumed_run_with_other_options_is_refused(library, tmp_path):
    library.run(fresh(), tmp_path)
    for options in ({"config": {"seed": 1}}, {"stages": 1}, {"stage_steps": 1}):
        with pytest.raises(stratavit.StrataViTError, match=next(iter(options.get("config", options)))):
            library.run(fresh(), tmp_path, resume=True, **options)


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"config": {"lr": 1e-3}}, "lr"),
        ({"config": {"sampling": "sandwich"}}, "sandwich"),
        ({"config": {"reduction": 2.0}}, "reduction"),
        ({"stage_steps": 0}, "stage_steps"),
        ({"stages": 0}, "epochs"),
    ],
)
def test_bad_options_are_refused_when_it_is_made(library, options, field):
    with pytest.raises(stratavit.StrataViTError, match=field):
        library.callback(make_batches(), **options)


def test_bad_runs_are_refused_before_the_first_step(library, tmp_path):
    net = fresh()
    record = Record(net)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for model, options, error, field in (
        (nn.Linear(3, 3), {}, stratavit.StrataViTError, "SuperNet"),
        (nn.ModuleList([net, fresh()]), {}, stratavit.StrataViTError, "found 2"),
        (net, {"stages": 7, "stage_steps": 1}, stratavit.StrataViTError, "stages"),
        (net, {"out": tmp_path / "taken"}, stratavit.ArtifactError, "taken"),
        (net, {"out": tmp_path, "overwrite": True}, stratavit.ArtifactError, "checkpoints"),
        (fresh().double(), {}, stratavit.StrataViTError, "float64"),
    ):
        with pytest.raises(error, match=field):
            library.train(model, tmp_path / "here", [library.callback(make_batches(), **{**STAGES, **options})])
    assert record.learning == []
    assert (tmp_path / "taken" / "file").exists()


@pytest.mark.parametrize(
    ("name", "missing"), [("SuperNetTrainerCallback", "transformers"), ("SuperNetLightningCallback", "lightning")]
)
def test_a_missing_library_is_one_sentence(name, missing):
    """The name is there, so that all names can be imported; only making a callback needs the library."""
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom stratavit import {name}\nprint('there')\n{name}([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "there\n"
    assert done.stderr.splitlines()[-1].startswith("stratavit.errors.StrataViTError")
    assert "pip install" in done.stderr.splitlines()[-1]


def test_it_must_be_called_by_a_loop():
    with pytest.raises(stratavit.StrataViTError, match="lightning"):
        DrawnSize().set({}, ("lightning",))
