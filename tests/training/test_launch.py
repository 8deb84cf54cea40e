"""What a run of training needs before it begins and leaves when it ends: processes, folders, trackers, weights."""

import dataclasses
import signal
import sys
import threading
from types import SimpleNamespace

import accelerate
import pytest
import torch
from helpers import make_model, make_net
from training_runs import ONE, TINY, CrashError, Images, crash, names, run

import stratavit
from stratavit import ArtifactError, StrataViTError
from stratavit.files.lock import Lock
from stratavit.training import distributed, run_files
from stratavit.utils import signals

FULL = OSError(28, "No space left on device")


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_signals_are_left_alone_in_other_threads():
    before, asked = signal.getsignal(signal.SIGTERM), []

    def work():
        with signals.raised(), distributed.stop_on_signal() as stop:
            asked.append((signal.getsignal(signal.SIGTERM), stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [(before, False)]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (failing(ValueError("fp8 needs other hardware")), "Accelerate .*fp8"),
        (lambda **options: SimpleNamespace(num_processes=1, log_with=[]), "2 processes .* 1"),
    ],
)
def test_processes_that_cannot_be_joined(tmp_path, monkeypatch, found, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", found)
    with pytest.raises(StrataViTError, match=message):
        distributed.accelerator(TINY, tmp_path, cpu=True)


def test_a_tracker_that_fails_at_the_end(capsys):
    trackers = [SimpleNamespace(finish=failing(FULL))]
    unchanged = SimpleNamespace(unwrap_model=lambda model, **options: model, trackers=trackers)
    distributed.release(unchanged, make_model("plain"))
    assert "the disk is full" in capsys.readouterr().err


def test_a_lock_that_cannot_be_set_leaves_no_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(Lock, "take", failing(FULL))
    with pytest.raises(ArtifactError, match="the disk is full"):
        run(tmp_path / "a" / "b" / "run")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_filled_while_it_is_locked(tmp_path, monkeypatch):
    take = Lock.take

    def overtaken(self):
        take(self)
        (self.path.parent / "mine.txt").touch()

    monkeypatch.setattr(Lock, "take", overtaken)
    with pytest.raises(ArtifactError, match="is not empty"):
        run(tmp_path / "run")
    assert names(tmp_path / "run") == {"mine.txt"}


def test_a_state_that_memory_is_too_small_for_is_not_damaged(tmp_path):
    with pytest.raises(MemoryError), run_files.checkpoint_errors(tmp_path):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


def test_states_are_saved_as_often_as_asked_and_raw_weights_are_kept(tmp_path):
    recipe = dataclasses.replace(TINY, save_every=2, keep="raw")

    def tuned(data, resume):
        small = make_net("plain").extract(spec={"blocks.0.attn": 8}, verbose=False)
        return stratavit.finetune(small, data, None, recipe, tmp_path / "run", resume=resume, cpu=True)

    with pytest.raises(CrashError):
        tuned(Images(40, crash), False)
    assert run_files.read_state(tmp_path / "run")["ended"] == 0
    model, state = tuned(Images(), True), run_files.read_state(tmp_path / "run")
    assert state["ended"] == TINY.epochs
    assert torch.equal(state["weights"]["head.weight"], model.head.weight)


def test_a_model_without_a_head_needs_a_teacher(tmp_path):
    model = make_model("plain")
    model.reset_classifier(0)
    with pytest.raises(StrataViTError, match="teacher"):
        stratavit.finetune(model, Images(), None, ONE, tmp_path / "run", cpu=True)


def test_accelerate_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(StrataViTError, match=r"pip install 'stratavit\[train\]'"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
