"""Does a model that was rebuilt from its description and its weights compute what the model itself computes?

What a model computes may be defined elsewhere: in hooks, in a `forward` set on an instance, in a method that a subclass
overrides. None of it is in a folder, so one random image is run to find it. What hooks do at random, or only later, no
image shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stratavit.errors import StrataViTError, one_line, out_of_memory
from stratavit.models.source_checks import own_routines
from stratavit.utils.classifier import head_layers
from stratavit.utils.model import eval_mode, model_device, model_dtype
from stratavit.utils.wrappers import has_hooks

TOLERANCE = 1e-4  # of the largest output, in float32 and float64
COARSE = 0.05  # in half types, where the same sums in another order differ by some of the last of 8 bits


class Subject(NamedTuple):
    """A model that is run.

    Attributes:
        model: Whose modules are compared.
        run: Images to outputs; most often the model itself.
    """

    model: nn.Module
    run: Callable[[Tensor], Any]


def check_same_outputs(
    verb: str, error: type[StrataViTError], source: Subject, others: Sequence[Subject], size: Sequence[int]
) -> None:
    """Whether all of `others` compute what `source` does, on one random image.

    Args:
        verb: What cannot be done to the source otherwise: ``cut`` or ``save``.
        error: The class to raise.
        source: The model as it was given.
        others: What is made of it: rebuilt, run stage by stage, cut.
        size: Of its images, ``[C, H, W]``.

    Raises:
        StrataViTError: Of the class `error`: one computes something else, and the first module that differs is named;
            or the source cannot run such an image, or outputs no numbers.
    """
    dtype, start = model_dtype(source.model), f"cannot {verb} this {type(source.model).__name__}"
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(model_device(source.model), dtype)
    allowed = TOLERANCE if dtype in (torch.float32, torch.float64) else COARSE
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # nothing is compiled for one image
        for subject in (source, *others):
            stack.enter_context(eval_mode(subject.model))
        expected, failure = _outputs(source, image)
        if failure is not None:
            raise error(
                f"{start}: it fails on a random image of {list(size)}, the input_size of its data_config ({failure}); "
                "give a model that runs"
            )
        for output in expected:
            if not isinstance(output, Tensor):
                raise error(f"{start}: it returns a {type(output).__name__}, expected a tensor of logits or features")
            if not output.isfinite().all():
                raise error(
                    f"{start}: it returns NaN or infinite values for a random image, in {output.dtype}; give sound "
                    "weights, or more bits: model.float()"
                )
        for other in others:
            found, failure = _outputs(other, image)
            off = 0.0 if failure else max(map(_distance, found, expected))
            if failure or not off <= allowed:
                how = f"without it: {failure}" if failure else f"outputs differ by {off:.1e} of the largest"
                raise error(
                    f"{start}: {_culprit(source, other, image, allowed)} computes something that is in neither "
                    f"weights nor constructor arguments ({how}); take it out, merge it into the weights, or apply it "
                    "outside of the model"
                )


def _outputs(subject: Subject, image: Tensor) -> tuple[list[Any], str | None]:
    """The output and what the head reads, as a head of zeros hides what happens before it; or how the run failed."""
    read: list[Any] = []
    with ExitStack() as stack:
        for layer in head_layers(subject.model).values():
            hook = layer.register_forward_pre_hook(lambda module, args: read.append(args[0]), prepend=True)
            stack.enter_context(hook)
        try:
            return [subject.run(image), *read], None
        except Exception as error:  # a model can fail in any way
            if out_of_memory(error):
                raise
            return [], f"{type(error).__name__}: {one_line(error)}"


def _distance(found: Any, expected: Tensor) -> float:
    """The largest difference over the largest expected value."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def _culprit(source: Subject, other: Subject, image: Tensor, allowed: float) -> str:
    """Name and peculiarity of the first, innermost module that makes something else of the same input."""
    theirs, ours = _calls(source, image), _calls(other, image)

    def differs(name: str, side: int) -> bool:
        expected, found = theirs[name][side], ours[name][side]
        return isinstance(expected, Tensor) and isinstance(found, Tensor) and not _distance(found, expected) <= allowed

    shared = [name for name in theirs if name in ours]
    name = next((name for name in shared if differs(name, 1)), "")
    while name and (name not in shared or differs(name, 0)):
        name = name.rpartition(".")[0]
    module = source.model.get_submodule(name)
    facts = ["a hook"] if has_hooks(module) else []
    facts += [f"{key} of its own" for key in own_routines(module)]
    if type(module).__module__.split(".")[0] not in ("timm", "torch", "stratavit"):
        facts.append(f"methods of the class {type(module).__name__}")
    return (name or "the model itself") + (f" ({' and '.join(facts)})" if facts else "")


def _calls(subject: Subject, image: Tensor) -> dict[str, tuple[Any, Any]]:
    """Module -> input and output of its first call, in order of completion."""
    inputs: dict[str, Any] = {}
    found: dict[str, tuple[Any, Any]] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.setdefault(name, _kept(args[0] if args else None))

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.setdefault(name, (inputs[name], _kept(output)))

    with ExitStack() as stack:
        for name, module in subject.model.named_modules():
            stack.enter_context(module.register_forward_pre_hook(partial(before, name), prepend=True))
            stack.enter_context(module.register_forward_hook(partial(after, name)))
        with suppress(Exception):  # what came before it is known
            subject.run(image)
    return found


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
