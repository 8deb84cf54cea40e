"""How an exported file compares with the model it came from, and which images can tell."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.choices import Format
from stratavit.elastic.merging import MergingBlock, similarities, split
from stratavit.errors import StrataViTError
from stratavit.interop.onnx_file import Runner

TOLERANCE = 1e-4  # of the largest logit of an image
FLOOR = 1e-10  # and this: what is left where logits cancel out
TIED = 1e-5  # cosines that are nearer than this may be ordered otherwise by another runtime


@dataclass(frozen=True)
class Parity:
    """How an exported file compares with the model it came from.

    Attributes:
        file: The file, or the folder of ``openvino`` and ``transformers``.
        format: ``onnx``, ``openvino``, ``torch`` or ``transformers``.
        size: Of the file or the folder, bytes.
        images: Number of images compared.
        difference: Largest absolute difference of a logit.
        largest: Largest absolute logit.
        agreement: Of an int8 file: percent of the images with the same first class as the model's; for a model that
            outputs features, or maps of tokens, 100 times the mean cosine. None of others.
        measure: What `agreement` is, in words; empty if it is None.
        tied: Images that were left out, because their outputs differ and two of their merges are tied, see `compared`.
    """

    file: str
    format: Format
    size: int
    images: int
    difference: float
    largest: float
    agreement: float | None = None
    measure: str = ""
    tied: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        wrote = f"wrote {self.file} ({self.size / 2**20:.3g} MiB)"
        if self.agreement is not None:
            return f"{wrote}; int8 and float32 agree: {self.agreement:.1f} % over {self.images} images ({self.measure})"
        left_out = f"; {self.tied} more left out: merges tied to within rounding" if self.tied else ""
        return (
            f"{wrote}; largest logit difference to eager {self.difference:.1e} "
            f"over {self.images} images (largest logit {self.largest:.3g}){left_out}"
        )


def compared(
    run: Runner, model: nn.Module, expected: Tensor, batches: list[Tensor], format: Format, tolerance: float
) -> tuple[float, int]:
    """Compares a file with its model, image by image.

    Which tokens merge is a choice: where two are alike to within rounding, another runtime may merge the other one,
    and neither is wrong. An image that differs is left out if one of its merges is tied so (`merge_margins`), as long
    as at least half of the images are compared.

    Args:
        run: Runs the file.
        model: In eval mode.
        expected: Its outputs for the first batch or more, ``[B, ...]``.
        batches: What to run; the first images, again and again.
        format, tolerance: See `export.export`.

    Returns:
        The largest difference of a logit, and the number of images that were left out.

    Raises:
        StrataViTError: The outputs differ, or most images cannot be compared.
    """
    found = torch.cat([run(batch) for batch in batches])
    wanted = torch.cat([expected[: len(batch)] for batch in batches])
    differences, largest = (x.abs().flatten(1).amax(1) for x in (found - wanted, wanted))  # [B]
    beyond = differences / (tolerance * largest + FLOOR)
    wrong = ~(beyond <= 1)  # NaN does not pass either
    left_out = torch.zeros_like(wrong)
    if wrong.any():
        tied = merge_margins(model, batches[0]) <= TIED
        left_out = wrong & beyond.isfinite() & torch.cat([tied[: len(batch)] for batch in batches])
    images = torch.zeros(len(batches[0]), dtype=torch.bool)
    for own in left_out.split([len(batch) for batch in batches]):
        images[: len(own)] |= own
    count = int(images.sum())
    certain = bool((wrong & ~left_out).any())
    if 2 * count > len(images) and not certain:
        raise StrataViTError(
            f"export: in {count} of {len(images)} images two merges of tokens are tied to within rounding, so the "
            f"{format} file cannot be checked on them; nothing was written, give other images"
        )
    if certain:
        worst = int(beyond.nan_to_num(torch.inf).where(wrong, -1.0).argmax())
        difference, size = float(differences[worst]), float(largest[worst])
        raise StrataViTError(
            f"export: the outputs of the {format} file differ from the model's: a logit by {difference:.2e}, "
            f"more than {tolerance:.0e} of the largest logit of that image, {size:.3g}; nothing was written"
        )
    return float(differences[~left_out].max()), count


@torch.no_grad()
def merge_margins(model: nn.Module, images: Tensor) -> Tensor:
    """By how much the merges of each image are decided: the least gap of two cosines, ``[B]``, infinite for none."""
    found = [torch.full((len(images),), torch.inf)]
    patches: list[int] = []  # of an image, before any merge

    def note(block: MergingBlock, _: Any, __: Any, normed: Tensor) -> None:
        now, keep = normed.shape[1] - block.prefix, block.kept()
        patches.append(now)
        if keep:  # 0 drops all patches
            removed = now - block.passed_on(keep, patches[0], now)
            similar = similarities(normed[:, block.prefix :], *split(now, normed.device))
            found.append(_margin(similar, removed).cpu())

    with ExitStack() as stack:
        for block in model.modules():
            if isinstance(block, MergingBlock):
                stack.callback(block.norm1.register_forward_hook(partial(note, block)).remove)
        model(images)
    return torch.stack(found).amin(dim=0)


def _margin(similar: Tensor, removed: int) -> Tensor:
    """Gap of cosines ``[B, S, T]`` between the last token that joins another and the first that does not, ``[B]``.

    Or between the two most similar ones that a token could join, where that is less.
    """
    gaps = [similar.new_full((len(similar),), torch.inf)]
    best = similar.topk(min(2, similar.shape[2]), dim=2).values  # [B, S, 1 or 2]
    values, order = best[:, :, 0].sort(dim=1, descending=True)  # [B, S]
    if 0 < removed < values.shape[1]:
        gaps.append(values[:, removed - 1] - values[:, removed])
    if removed and best.shape[2] > 1:
        gaps.append((best[:, :, 0] - best[:, :, 1]).gather(1, order[:, :removed]).amin(dim=1))
    return torch.stack(gaps).amin(dim=0)
