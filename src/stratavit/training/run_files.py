"""What a training run leaves on disk: its state in one file, its log, and the super-network at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratavit.errors import ArtifactError, StrataViTError, one_line, out_of_memory, reason_of
from stratavit.files.atomic import readable_errors
from stratavit.files.torch_checkpoint import check_archive
from stratavit.version import __version__

FORMAT = "stratavit/training-state/1"
STATE_FILE, LOG_FILE = "state.pt", "log.jsonl"


def resume_hint(folder: Path, then: str = ", resume it to go on") -> str:
    """What is left of a run if it ends now, for a sentence; `then`: what to do with it."""
    resumable = (folder / STATE_FILE).exists()
    return f"the last state in {folder} is sound{then}" if resumable else "there is no state to resume yet"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the state of a run; killed at any moment, the old or the new one is there, whole.

    Args:
        folder: Of the run.
        state: Tensors and plain values only.

    Raises:
        ArtifactError: It cannot be written; the old state is left.
    """
    temporary = folder / f".{STATE_FILE}.part"
    try:
        with readable_errors(folder / STATE_FILE, resume_hint(folder)):
            with temporary.open("wb") as file:
                torch.save({"format": FORMAT, "release": __version__, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / STATE_FILE)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote; runs no code from the file.

    Raises:
        ArtifactError: There is none, it is damaged or of another version.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise ArtifactError(f"{folder} holds no interrupted training ({STATE_FILE}); start without resuming")
    anew = "start the training anew in another folder"
    try:
        check_archive(path, "", anew)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ArtifactError:
        raise
    except Exception as error:  # what torch raises for damage differs with its place
        if out_of_memory(error):
            raise MemoryError(one_line(error)) from error
        raise ArtifactError(f"{path} is damaged; {anew}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a training state of this version of StrataViT ({FORMAT})")
    return LoadedState(state, path)


class LoadedState(dict[str, Any]):
    """A state that was read: a key that it lacks is told in a sentence.

    Args:
        state: Its content.
        path: Of its file.
    """

    def __init__(self, state: dict[str, Any], path: Path) -> None:
        super().__init__(state)
        self.path = path

    def __missing__(self, key: str) -> Any:
        wrote = self.get("release")
        release = f"StrataViT {wrote}" if isinstance(wrote, str) else "an older StrataViT, before states named theirs"
        raise ArtifactError(
            f"{self.path} lacks {key!r}, which StrataViT {__version__} needs to go on: it was written by {release}; "
            "resume with that release, or start the training anew in another folder"
        )


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turns whatever a part of a state raises that is not of the form it should have into one sentence.

    Raises:
        ArtifactError: Of the state in `folder`.
    """
    try:
        yield
    except StrataViTError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        if out_of_memory(error):
            raise MemoryError(one_line(error)) from error
        raise ArtifactError(
            f"{folder / STATE_FILE} is not the state of such a run ({type(error).__name__}: {one_line(error)}); "
            "start the training anew in another folder"
        ) from error


def weights_of(model: nn.Module, averaged: nn.Module | None) -> dict[str, Any]:
    """Weights and averaged weights, for a state."""
    return {"weights": model.state_dict(), "ema": None if averaged is None else averaged.state_dict()}


def put_weights(state: dict[str, Any], model: nn.Module, averaged: nn.Module | None) -> None:
    """Gives models the weights of a state.

    Raises:
        StrataViTError: They are another model's.
    """
    weights, ema = state["weights"], state["ema"]
    try:
        model.load_state_dict(weights)
        if averaged is not None:
            averaged.load_state_dict(ema)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise StrataViTError("this is the state of another model; resume with the one it began with") from error


def publish(save: Callable[[Path], None], names: Sequence[str], folder: Path) -> None:
    """Puts files into a run's folder, beside its state and log.

    Args:
        save: Writes them to a folder of their own.
        names: Of the files; the one that makes them a result comes last. One that was not written is taken away.
        folder: Of the run.

    Raises:
        ArtifactError: They cannot be written.
    """
    temporary = folder / ".result"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while it moved them
    try:
        save(temporary)
        for name in names:
            if (temporary / name).exists():
                (temporary / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    except (OSError, ArtifactError) as error:
        raise ArtifactError(
            f"cannot write the result to {folder}: {reason_of(error)}; {resume_hint(folder)}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_row(row: Any) -> bool:
    numbers = int | float
    if not isinstance(row, dict) or "kind" not in row:
        return False
    return isinstance(row.get("epoch"), numbers) and isinstance(row.get("seconds", 0), numbers)


class Journal:
    """The log of a run, one JSON object per line; every row has the number of epochs that had ended.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row.

        Raises:
            ArtifactError: It cannot be written.
        """
        with readable_errors(self.path, resume_hint(self.path.parent)), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows: objects with kind and epoch. Lines that are none, such as a last one cut short, are left out."""
        found = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.splitlines():
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if _is_row(row):
                    found.append(row)
        return found

    def rewind(self, epoch: int) -> None:
        """Forgets what was written after so many epochs: a run that is resumed there writes it again.

        Raises:
            ArtifactError: It cannot be written; the log is as it was.
        """
        kept = "".join(json.dumps(row) + "\n" for row in self.rows() if row["epoch"] <= epoch)
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            with readable_errors(self.path, resume_hint(self.path.parent)):
                part.write_text(kept, encoding="utf-8")
                part.replace(self.path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
