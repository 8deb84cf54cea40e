"""How a host calls its part, found by running it on the user's batches: images, arguments, and what it reads back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from stratavit.data.pixels import keys_of
from stratavit.errors import StrataViTError, one_line, out_of_memory
from stratavit.utils.model import eval_mode, frozen, model_device
from stratavit.utils.progress import track

Call = Callable[[nn.Module, Any], Any]


@dataclass
class Calls:
    """What a part was given while its host ran.

    Attributes:
        images: Name of the argument that holds them.
        unsqueezed: They are patches ``[B, N, values]``, kept as ``[B, 1, N, values]``.
        packed: These came in one sequence ``[B*N, values]``, next to the grid of every image.
        batches: The images of each call, in float32 on the CPU.
        arguments: The others, which were the same in every call.
        by_image: Key of an image -> arguments that are its own.
        first: Images of the last call that the first batch led to.
    """

    images: str = ""
    unsqueezed: bool = False
    packed: bool = False
    batches: list[Tensor] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    by_image: dict[bytes, dict[str, Tensor]] = field(default_factory=dict)
    first: int = 0

    def add(self, given: Mapping[str, Any], part: str) -> None:
        """Remembers one call.

        Raises:
            StrataViTError: The part was given no images, or tensors that belong neither to one image nor to all.
        """
        name = next((key for key, value in given.items() if _are_images(value)), None)
        sequence = _sequence(given) if name is None else None
        if sequence is not None:
            name, self.packed = sequence[0], True
            given = {**given, name: self._unpacked(given[name], sequence[1], part)}
        if name is None or (self.images and name != self.images):
            raise StrataViTError(f"{part} is given no images [B, C, H, W] or [B, N, C]; name a part that reads them")
        images = given[name].detach().float().cpu()
        self.images, self.unsqueezed = name, images.dim() == 3
        images = images.unsqueeze(1) if self.unsqueezed else images
        own = {key: value.detach().cpu() for key, value in given.items() if key != name and isinstance(value, Tensor)}
        for key, value in own.items():
            if value.dim() == 0 or len(value) != len(images):
                raise StrataViTError(
                    f"{part}: the argument {key} has no row for every image; its host cannot be followed"
                )
        self.batches.append(images.clone())
        self.arguments = {key: value for key, value in given.items() if key != name and key not in own}
        for row, image in enumerate(keys_of(images) if own else []):
            self.by_image[image] = {name: value[row].clone() for name, value in own.items()}

    def _unpacked(self, patches: Tensor, counts: list[int], part: str) -> Tensor:
        """A sequence ``[B*N, values]`` as ``[B, N, values]``; images must have as many patches as earlier ones."""
        found = {*counts, *(images.shape[2] for images in self.batches)}
        if len(found) > 1:
            raise StrataViTError(
                f"{part} is given images of {min(found)} to {max(found)} patches; give batches whose images are all of "
                "one size (resized beforehand, or by the processor's smallest and largest size)"
            )
        return patches.unflatten(0, (len(counts), -1))

    def count(self) -> int:
        """Images of all calls."""
        return sum(map(len, self.batches))


def _are_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (3, 4)


def _sequence(given: Mapping[str, Any]) -> tuple[str, list[int]] | None:
    """Name of the patches of all images in one sequence ``[N, values]``, and how many each has; None if there are none.

    The sequence is known by another argument: time, height and width of the patches of every image, ``[B, 3]``.
    """
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor) and value.dim() == 2}
    grids = [value for value in tensors.values() if not value.is_floating_point() and value.shape[1] == 3]
    for key, patches in tensors.items():
        for grid in grids if patches.is_floating_point() else ():
            counts = grid.prod(dim=1).tolist()
            if sum(counts) == len(patches):
                return key, counts
    return None


def run_host(host: nn.Module, batch: Any, call: Call | None) -> Any:
    """The output of a host for one of the user's batches, on its device.

    Raises:
        StrataViTError: It fails on it.
    """
    device = model_device(host)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    try:
        if call is not None:
            return call(host, batch)
        if isinstance(batch, Mapping):
            return host(**{key: moved(value) for key, value in batch.items()})
        return host(moved(batch[0] if isinstance(batch, list | tuple) else batch))
    except StrataViTError:
        raise
    except Exception as error:  # of the host, whatever it does
        if out_of_memory(error):
            raise
        raise StrataViTError(
            f"this {type(host).__name__} fails on a batch of the loader ({type(error).__name__}: {one_line(error)}); "
            "give batches that it takes, as a mapping of its arguments or images alone, or say how to call it: "
            "call=lambda model, batch: ..."
        ) from error


def record_calls(
    host: nn.Module, part: nn.Module, name: str, loader: Iterable[Any], call: Call | None, limit: int
) -> tuple[Calls, Any]:
    """Runs a host on batches, until its part has seen `limit` images.

    Returns:
        The calls of the part; the first batch.

    Raises:
        StrataViTError: There are no batches, the host fails, does not run the part, or see `Calls.add`.
    """
    calls, first = Calls(), None
    names = list(signature(part.forward).parameters)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.add({**dict(zip(names, args, strict=False)), **kwargs}, name)

    with part.register_forward_pre_hook(note, with_kwargs=True), eval_mode(host), torch.no_grad():
        for batch in track(loader, "run the model"):
            run_host(host, batch, call)
            if not calls.batches:
                raise StrataViTError(f"{name} did not run when its model ran on the first batch; name a part that does")
            if first is None:
                first, calls.first = batch, len(calls.batches[-1])
            if calls.count() >= limit:
                break
    if first is None:
        raise StrataViTError("convert_part: the loader gave no batches; check the data or the loader")
    return calls, first


def outputs_read(
    host: nn.Module, part: nn.Module, batch: Any, call: Call | None, images: int, packed: bool = False
) -> list[int]:
    """Numbers of the tensors in a part's output that its host reads: those that the host's output depends on.

    All floating ones if the host itself is the part, or keeps no graph.

    Args:
        host, part, batch, call: See `record_calls`.
        images: That the part gets for this batch, in its last call.
        packed: Tokens of all of them are in one sequence.

    Raises:
        StrataViTError: There are none, or they do not have a row for every image.
    """
    leaves: list[Any] = []

    def cut_off(module: nn.Module, args: Any, output: Any) -> Any:
        found = tree_map(lambda leaf: leaf.detach().requires_grad_(True) if _is_map(leaf) else leaf, output)
        leaves[:] = tree_leaves(found)
        return found

    with eval_mode(host), frozen(host), torch.enable_grad(), part.register_forward_hook(cut_off):
        output = run_host(host, batch, call)
    maps = [
        number
        for number, leaf in enumerate(leaves)
        if _is_map(leaf) and leaf.dim() > 1 and (len(leaf) == images or (packed and len(leaf) % images == 0))
    ]
    handed = {id(leaf) for leaf in leaves}  # what a host only hands through, it does not read
    made = [leaf for leaf in tree_leaves(output) if _is_map(leaf) and leaf.requires_grad and id(leaf) not in handed]
    totals = [leaf.float().square().sum() for leaf in made]
    if host is not part and totals and maps:
        gradients = torch.autograd.grad(
            sum(totals[1:], totals[0]), [leaves[number] for number in maps], allow_unused=True
        )
        maps = [n for n, g in zip(maps, gradients, strict=True) if g is not None and bool(g.any())] or maps
    if not maps:
        raise StrataViTError(
            f"a {type(part).__name__} returns no tensors with a row for every image; name another part"
        )
    return maps


def _is_map(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
