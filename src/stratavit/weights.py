"""A state dict into a model, strictly, with a sentence for what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from stratavit.errors import ArtifactError, StrataViTError, one_line


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Loads a state dict strictly.

    Raises:
        ArtifactError: A tensor is missing, unknown, of the wrong shape, or not finite; the first one is named.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ArtifactError(f"{source}: {name} is missing; is this checkpoint of the same architecture?")
        if name not in expected:
            raise ArtifactError(
                f"{source}: {name} is not part of the model; is this checkpoint of the same architecture?"
            )
        ours, theirs = tuple(expected[name].shape), tuple(tensors[name].shape)
        if ours != theirs:
            hint = "; set --num-classes to the checkpoint's" if name.startswith("head") else ""
            raise ArtifactError(f"{source}: {name} has shape {theirs}, the model expects {ours}{hint}")
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise ArtifactError(f"{source}: {name} holds NaN or infinite values; give a sound checkpoint")
    model.load_state_dict(dict(tensors), strict=True, assign=assign)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


@contextmanager
def unreachable(name: str) -> Iterator[None]:
    """Turns whatever a download raises into one sentence with the way out.

    Raises:
        StrataViTError: Pretrained weights cannot be fetched.
    """
    try:
        yield
    except Exception as error:  # each hub's client has errors of its own
        raise StrataViTError(
            f"cannot fetch pretrained weights of {name}: {one_line(error)}; give a local checkpoint with --weights FILE"
        ) from error
