"""Does a model rebuilt from its description and its weights answer as the model itself does?

What a model computes may lie elsewhere: in hooks, in a `forward` set on an instance, in a method that a subclass
overrides. None of it is in a folder, so it is found out by one random image. What hooks do at random, or only later, no
image tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stratavit.errors import ArtifactError, StrataViTError, UnsupportedModelError, one_line, out_of_memory
from stratavit.models.source_checks import own_routines
from stratavit.utils.classifier import head_layers
from stratavit.utils.model import eval_mode, model_device, model_dtype
from stratavit.utils.wrappers import has_hooks

TOLERANCE = 1e-4  # of the largest answer, in float32 and float64
COARSE = 0.05  # in half types, where the same sums in another order differ by some of the last of 8 bits
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError)
Runner = Callable[[Tensor], Any]


class Subject(NamedTuple):
    """A model that answers.

    Attributes:
        model: Whose modules are looked at.
        run: Images to answers; most often the model itself.
    """

    model: nn.Module
    run: Runner


class Call(NamedTuple):
    """One call of a module: what went in and what came out, if these are tensors."""

    inputs: Tensor | None
    output: Tensor | None


def check_cut(source: nn.Module, rebuilt: nn.Module, ours: Subject, size: tuple[int, ...]) -> None:
    """Whether a model may be cut: rebuilt from its description, and run by our stages, it answers as it is.

    Args:
        source: The model as it was given.
        rebuilt: See `architecture.filled`.
        ours: The elastic copy, run stage by stage.
        size: Of its images, ``[C, H, W]``.

    Raises:
        UnsupportedModelError: It does not; the module that differs first is named.
        StrataViTError: It cannot run such an image, or answers with no numbers.
    """
    _check("cut", UnsupportedModelError, Subject(source, source), (Subject(rebuilt, rebuilt), ours), size)


def check_saved(model: Subject, rebuilt: nn.Module, size: tuple[int, ...]) -> None:
    """Whether a model may be saved: what loading rebuilds answers as it does.

    Raises:
        ArtifactError: It does not; the module that differs first is named.
        StrataViTError: See `check_cut`.
    """
    _check("save", ArtifactError, model, (Subject(rebuilt, rebuilt),), size)


def check_extracted(net: Subject, small: nn.Module, size: tuple[int, ...]) -> None:
    """Whether a small model answers as the super-network that it was cut out of does at its size.

    Raises:
        StrataViTError: It does not; the module that differs first is named.
    """
    _check("extract from", StrataViTError, net, (Subject(small, small),), size)


def _check(
    verb: str, error: type[StrataViTError], source: Subject, others: tuple[Subject, ...], size: tuple[int, ...]
) -> None:
    kind, dtype = type(source.model).__name__, model_dtype(source.model)
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(model_device(source.model), dtype)
    allowed = TOLERANCE if dtype in (torch.float32, torch.float64) else COARSE
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # nothing is compiled for one image
        for subject in (source, *others):
            stack.enter_context(eval_mode(subject.model))
        try:
            expected = _answers(source, image)
        except Exception as failure:  # a model can fail in any way
            if out_of_memory(failure):
                raise
            raise error(
                f"cannot {verb} this {kind}: it fails on a random image of {list(size)}, the input_size of its "
                f"data_config ({type(failure).__name__}: {one_line(failure)}); give a model that runs"
            ) from failure
        _check_numbers(expected, f"cannot {verb} this {kind}", error)
        for other in others:
            off = _distance_or_failure(other, image, expected)
            if isinstance(off, str) or not off <= allowed:
                how = off if isinstance(off, str) else f"answers differ by {off:.1e} of the largest"
                where = _culprit(source, other, image, allowed)
                raise error(
                    f"cannot {verb} this {kind}: {where} computes something that is in neither weights nor constructor "
                    f"arguments ({how}); take it out, merge it into the weights, or apply it outside of the model"
                )


def _distance_or_failure(other: Subject, image: Tensor, expected: list[Any]) -> float | str:
    try:
        return _distance(_answers(other, image), expected)
    except _FAILURES as failure:
        if out_of_memory(failure):
            raise
        return f"without it: {type(failure).__name__}: {one_line(failure)}"


def _answers(subject: Subject, image: Tensor) -> list[Any]:
    """The answer, and what the head reads: a head of zeros hides what happens before it."""
    read: list[Any] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: read.append(args[0]), prepend=True)
        for layer in head_layers(subject.model).values()
    ]
    try:
        return [subject.run(image), *read]
    finally:
        for handle in handles:
            handle.remove()


def _check_numbers(answers: list[Any], start: str, error: type[StrataViTError]) -> None:
    for answer in answers:
        if not isinstance(answer, Tensor):
            raise error(f"{start}: it answers with a {type(answer).__name__}, expected a tensor of logits or features")
        if not answer.isfinite().all():
            raise error(
                f"{start}: it answers with NaN or infinite values to a random image, in {answer.dtype}; give sound "
                "weights, or more bits: model.float()"
            )


def _distance(found: list[Any], expected: list[Any]) -> float:
    """Of the largest value."""
    pairs = list(zip(found, expected, strict=True))
    if any(not isinstance(ours, Tensor) or ours.shape != theirs.shape for ours, theirs in pairs):
        return float("inf")
    return max(_off(ours, theirs) for ours, theirs in pairs)


def _off(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))


def _culprit(source: Subject, other: Subject, image: Tensor, allowed: float) -> str:
    """Name and peculiarity of the first, innermost module that answers otherwise to the same input."""
    theirs, ours = _calls(source, image), _calls(other, image)

    def alike(key: tuple[str, int], side: int) -> bool:
        if key not in ours:
            return True
        there, here = theirs[key][side], ours[key][side]
        if not isinstance(there, Tensor) or not isinstance(here, Tensor):
            return True
        return there.shape == here.shape and _off(here, there) <= allowed

    for key in theirs:
        if alike(key, 1):
            continue
        name = key[0]
        while name and not ((name, 0) in theirs and alike((name, 0), 0)):
            name = name.rpartition(".")[0]
        return _described(source.model, name)
    return _described(source.model, "")


def _calls(subject: Subject, image: Tensor) -> dict[tuple[str, int], Call]:
    """All calls of modules by name and number, in order of completion."""
    found: dict[tuple[str, int], Call] = {}
    waiting: dict[str, list[Tensor | None]] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        waiting.setdefault(name, []).append(_kept(args[0] if args else None))

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        number = sum(1 for known, _ in found if known == name)
        found[name, number] = Call(waiting[name].pop(), _kept(output))

    with _hooked(subject.model, before, after), suppress(*_FAILURES):  # what came before it is known
        subject.run(image)
    return found


@contextmanager
def _hooked(model: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(before, name), prepend=True))
        handles.append(module.register_forward_hook(partial(after, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(value: Any) -> Tensor | None:
    return value.clone() if isinstance(value, Tensor) else None


def _described(model: nn.Module, name: str) -> str:
    module = model.get_submodule(name)
    facts = ["a hook"] if has_hooks(module) else []
    facts += [f"{key} of its own" for key in own_routines(module)]
    overridden = _overridden(module)
    if overridden:
        facts.append(f"{', '.join(overridden)} of the class {type(module).__name__}")
    where = name or "the model itself"
    return f"{where} ({' and '.join(facts)})" if facts else where


def _overridden(module: nn.Module) -> list[str]:
    """Methods that classes define which are neither timm's nor torch's nor ours."""
    names: list[str] = []
    for kind in type(module).__mro__:
        if kind.__module__.split(".")[0] in ("timm", "torch", "stratavit"):
            break
        names += [key for key, value in vars(kind).items() if callable(value) and key != "__init__"]
    return sorted(set(names))
