"""Models as the command line names them: a local path always wins, then repositories on the hub and timm's names."""

from __future__ import annotations

from pathlib import Path

from stratavit.artifacts import folder_format
from stratavit.artifacts.model_names import is_on_hub, repository_of, timm_name
from stratavit.interop.transformers.folders import is_folder_of_transformers


def saved_at(name: str) -> str:
    """The folder of RUN or SMALL, which is fetched if its name is that of a repository on the hub.

    Raises:
        ArtifactError: The hub does not give the repository.
    """
    repository = repository_of(name)
    return name if repository is None else str(_fetched(repository))


def model_named(name: str) -> str:
    """The folder of MODEL, or its name for timm; a repository on the hub is fetched if StrataViT can read its files.

    Raises:
        ArtifactError: The hub does not give the repository.
    """
    repository = repository_of(name)
    if repository is None or not is_on_hub(timm_name(f"hf-hub:{repository}")):  # timm's own
        return name
    folder = _fetched(repository)
    readable = (folder / folder_format.JSON_FILE).is_file() or is_folder_of_transformers(folder)
    return str(folder) if readable else f"hf-hub:{repository}"


def short_name(name: str) -> str:
    """What files that are made of a saved folder are called after it: of ``user/name`` on the hub, ``name``."""
    repository = repository_of(name)
    return name.rstrip("/") if repository is None else repository.rpartition("/")[2]


def _fetched(repository: str) -> Path:
    from stratavit.reports import hub  # its client is of use here only

    return hub.fetch(repository)
