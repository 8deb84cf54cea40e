"""To and from the Hugging Face hub, or any folder: super-networks and sub-networks, by huggingface_hub."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from typing_extensions import Unpack

from stratavit.artifacts import folder_format, sub_network
from stratavit.artifacts.timm_config import FILE as TIMM_FILE
from stratavit.budgets.constraints import BudgetArgs
from stratavit.errors import ArtifactError, BudgetError
from stratavit.evaluation import curve_points
from stratavit.files.folders import write_folder
from stratavit.interop.libraries import as_timm
from stratavit.interop.transformers.folders import PROCESSOR
from stratavit.reports import plots
from stratavit.reports.model_card import CARD_FILE, CURVE_FILE, model_card
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device

FILES = (folder_format.JSON_FILE, folder_format.WEIGHTS_FILE, folder_format.MOMENTS_FILE, TIMM_FILE)


def from_pretrained(
    name: str | Path,
    *,
    spec: Mapping[str, int] | None = None,
    verbose: bool = True,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    device: torch.device | str = "cpu",
    moments: bool = True,
    **asked: Unpack[BudgetArgs],
) -> nn.Module:
    """A super-network or a sub-network from the hub or a folder; from a super-network any size at once.

    Args:
        name: ``user/name`` on the hub, or a folder, which comes first if there is one.
        spec: Widths of the sub-network to return.
        verbose: Print asked, got and reachable range to standard error.
        revision: Branch, tag or commit.
        token: Of the hub, for private repositories; None is the one that is logged in.
        cache_dir: Where downloads are kept; None is the hub's cache.
        endpoint: Address of another hub.
        device: Of the weights.
        moments: Read second moments, see `SuperNet.load`.
        **asked: Budgets of the sub-network to return, see `SuperNet.budget`, such as ``macs="50%"``.

    Returns:
        A plain small model if its size is asked for, or the repository holds one; else the `SuperNet`.

    Raises:
        ArtifactError: The repository cannot be fetched, is not one of StrataViT's, or is damaged.
        StrataViTError: The device is not there.
        BudgetError: The budget cannot be met, or the repository holds one size only.
    """
    device = pick_device(str(device))
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "endpoint": endpoint}
    folder = Path(name) if Path(name).is_dir() else fetch(str(name), **options)
    sized = spec is not None or any(value is not None for value in asked.values())
    if folder_format.kind(folder) == folder_format.SUB:
        if sized:
            raise BudgetError(f"{name} has one size only; budgets are for super-networks")
        return sub_network.load(folder, device)
    net = SuperNet.load(folder, device, moments)
    return net.extract(spec=spec, verbose=verbose, **asked) if sized else net


def fetch(name: str, **options: Any) -> Path:
    """Downloads the files of a repository on the hub that StrataViT reads; those that are here are not fetched again.

    Args:
        name: ``user/name``.
        **options: Of `huggingface_hub.snapshot_download`.

    Returns:
        The folder, in the hub's cache.

    Raises:
        ArtifactError: The repository cannot be fetched.
    """
    patterns = [*FILES, PROCESSOR]
    try:
        with _bars_on_terminals_only():
            return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except Exception as error:  # the transport below huggingface_hub, and so its errors, differ by version
        raise ArtifactError(
            f"{name!r} is neither a local folder nor a repository that the hub gives: {_line(error)}"
        ) from error


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Turns the client's progress bars off where they would fill a file with control characters."""
    off = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if off:
        disable_progress_bars()
    try:
        yield
    finally:
        if off:
            enable_progress_bars()


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    points: Sequence[curve_points.Point] = (),
    licence: str | None = None,
    base_model: str | None = None,
    moments: bool = True,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    message: str = "Upload by StrataViT",
) -> str:
    """Uploads a super-network or a sub-network with a model card; makes the repository if it is not there.

    Args:
        model: A `SuperNet`, a small model, or a folder of one.
        repo_id: ``user/name``.
        points: Accuracy against size (`curve`), for the card; a folder's own ``curve.csv`` if empty.
        licence: Of the weights, the hub's name for it, such as ``apache-2.0``: that of the model they come from.
        base_model: Repository of the model that it was made from; the one that `convert` recorded if None.
        moments: Upload the second moments of a super-network, see `SuperNet.save`.
        private: Make the repository private.
        token: With write access; None is the one that is logged in.
        revision: Branch; None is main.
        endpoint: Address of another hub.
        message: Of the commit.

    Returns:
        Address of the repository.

    Raises:
        ArtifactError: The model cannot be saved, or the hub refuses or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "upload"
        write_upload(model, folder, repo_id, points, licence, moments, base_model=base_model)
        try:
            api = HfApi(endpoint=endpoint, token=token)
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise ArtifactError("it is there already, and public; make it private on the hub, or take another name")
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                delete_patterns=[*FILES, CURVE_FILE],  # of another model that was there; what is uploaded stays
            )
        except Exception as error:  # likewise
            raise ArtifactError(f"cannot upload to {repo_id!r}: {_line(error)}") from error
    return str(url)


def check_names(repo_id: str, base_model: str | None = None) -> None:
    """Checks that the hub allows the name of a repository, and of the base model.

    Raises:
        ArtifactError: It does not.
    """
    for name, what in ((repo_id, "upload to"), (base_model, "name the base model")):
        try:
            validate_repo_id(repo_id if name is None else name)
        except HFValidationError as error:
            raise ArtifactError(f"cannot {what} {name!r}: {_line(error)}") from error


def write_upload(
    model: nn.Module | str | Path,
    out: str | Path,
    repo_id: str,
    points: Sequence[curve_points.Point] = (),
    licence: str | None = None,
    moments: bool = True,
    overwrite: bool = False,
    base_model: str | None = None,
) -> Path:
    """Writes what `push_to_hub` uploads: the saved files, the card, and the curve's picture if there is a curve.

    Raises:
        ArtifactError: The hub does not allow the name, the model cannot be saved, or the folder cannot be written.
    """
    check_names(repo_id, base_model)
    if not points and isinstance(model, str | Path):
        points = curve_points.read_csv(Path(model) / "curve.csv")
    if isinstance(model, str | Path):
        super_network = folder_format.kind(model) == folder_format.SUPER
        model = SuperNet.load(model) if super_network else sub_network.load(model)
    if not isinstance(model, SuperNet):
        model = as_timm(model)  # of transformers: what is saved, and described by the card
    title = repo_id.rpartition("/")[2]

    def write(folder: Path) -> None:
        if isinstance(model, SuperNet):
            model.save(folder, moments=moments)
        else:
            sub_network.save(model, folder)
        if points:
            plots.plot(points, folder / CURVE_FILE, title)
        card = model_card(model, repo_id, points, licence, base_model)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")

    return write_folder(out, write, overwrite)


def _line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__
