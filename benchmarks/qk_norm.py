"""Attention that normalises q and k (qk-norm): q and k whole against cut, at the same MACs.

    python benchmarks/qk_norm.py

Small ViTs with qk-norm, LayerNorm and RMSNorm, are trained on scikit-learn's digits and converted, heads in steps of 4
coordinates. Whole: as the library does it. Cut: q and k keep some coordinates of every head, the norm's statistics are
estimated from these, and v and MLPs keep as much more as the MACs allow. KL divergence and top-1, without training
after the cut.

Which coordinates: those of the best map of this rank for the scores in the least squares sense; or the largest terms of
the scores as they are; or whole heads leave, which the norms allow. Statistics: exact (as if they cost nothing), of
what is kept alone, times a constant factor, weights fitted to tokens, or weights from second moments, as if q and k
were normally distributed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import write_results
from timm.layers import RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import stratavit
from stratavit import SuperNet
from stratavit.elastic.attention import ElasticSplit
from stratavit.tasks import demo

TWELFTHS = (10, 8, 6, 4, 3, 2)
EPOCHS, HEAD = 12, 32
STATISTICS = ("exact", "kept alone", "constant factor", "fitted", "moments")
NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": RmsNorm}
TIED = "as wide as v"
RULES: dict[str, Callable[[int], int]] = {  # width of v -> width of q and k
    **{f"all {width}": lambda _, width=width: width for width in (24, 16, 8)},
    TIED: lambda v: v,
    "from v = 16 on": lambda v: min(HEAD, 2 * v),
    "from v = 8 on": lambda v: min(HEAD, 4 * v),
}


def normed_vit(norm: str) -> VisionTransformer:
    """The demo's ViT with qk-norm; Xavier's weights learn digits in seconds."""
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    model = VisionTransformer(**sizes, embed_dim=3 * HEAD, depth=4, num_heads=3, qk_norm=True, norm_layer=NORMS[norm])
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
    nn.init.normal_(model.pos_embed, std=0.3)
    return model


class CutScores:
    """What replaces q and k of one attention module, from what it computes at full size.

    Shape legend: S samples (tokens of images), H heads, d full head_dim, a kept width.
    """

    def __init__(self, module: Any) -> None:
        self.norms, self.seen, self.projections = (module.q_norm, module.k_norm), [], {}
        self.width, self.statistic, self.by_axes = HEAD, "fitted", True

    def centred(self, raw: Tensor) -> Tensor:
        """Before the norm's division: LayerNorm subtracts the mean, which could be folded into the weights."""
        return raw - raw.mean(-1, keepdim=True) if isinstance(self.norms[0], nn.LayerNorm) else raw

    def see(self, q: Tensor, k: Tensor) -> None:
        """Keeps q and k ``[B, H, N, d]`` before the norms."""
        self.seen.append((q, k))

    def normed(self) -> tuple[Tensor, Tensor]:
        """q and k after the norms, k without its mean over keys: ``[H, S, d]``, float64."""
        q, k = (torch.cat(one) for one in zip(*self.seen, strict=True))
        q, k = self.norms[0](q), self.norms[1](k)
        k = k - k.mean(dim=2, keepdim=True)
        return tuple(x.double().transpose(0, 1).flatten(1, 2) for x in (q, k))  # type: ignore[return-value]

    def fit(self, width: int) -> tuple[Any, Any]:
        """Maps ``[H, a, d]`` of gained q and k, and the weights ``[H, a + 1]`` that estimate the norms' statistics."""
        if (width, self.by_axes) in self.projections:
            return self.projections[width, self.by_axes]
        maps = self.best_maps(width) if self.by_axes else self.largest(width)
        found = []
        for number, (norm, project) in enumerate(zip(self.norms, maps, strict=True)):
            plain = self.centred(torch.cat([pair[number] for pair in self.seen])).double()
            plain = plain.transpose(0, 1).flatten(1, 2)  # [H, S, d]
            power, project = plain.square().mean(-1), project * norm.weight.double()
            kept = (plain @ project.mT).square()  # [H, S, a]
            relative = torch.cat([kept, kept.new_ones(*kept.shape[:2], 1)], dim=-1) / power.unsqueeze(-1)
            fitted = torch.linalg.lstsq(relative, torch.ones_like(power).unsqueeze(-1)).solution.squeeze(-1)
            factor = (power.mean(1) / kept.sum(-1).mean(1)).unsqueeze(1).expand(-1, width)
            zero, alone = torch.zeros_like(factor[:, :1]), torch.full_like(factor, 1 / width)
            weights = {"fitted": fitted, "moments": from_moments(plain, project)}
            weights |= {"constant factor": torch.cat([factor, zero], 1), "kept alone": torch.cat([alone, zero], 1)}
            found.append((project.float(), {key: value.float() for key, value in weights.items()}, power.min().float()))
        self.projections[width, self.by_axes] = tuple(found)
        return self.projections[width, self.by_axes]

    def largest(self, width: int) -> list[Tensor]:
        """Rows of the unit matrix, ``[H, a, d]``: those whose terms of the scores are largest."""
        q, k = (x.square().mean(1) for x in self.normed())  # [H, d]
        rows = torch.eye(HEAD, dtype=q.dtype)[(q * k).topk(width, dim=-1).indices]
        return [rows, rows]

    def best_maps(self, width: int) -> list[Tensor]:
        """Maps ``[H, a, d]`` of normed q and k with the scores of least squared error, over all queries and keys."""
        roots = []
        for x in self.normed():
            values, axes = torch.linalg.eigh(x.mT @ x / x.shape[1])
            values = values.clamp(min=values.max() * 1e-9)
            roots.append((axes * values.sqrt().unsqueeze(1), axes / values.sqrt().unsqueeze(1)))
        (q_root, q_back), (k_root, k_back) = roots  # C = root root^T; back is the inverse transpose
        left, strengths, right = torch.linalg.svd(q_root.mT @ k_root)
        gain = strengths[:, :width].sqrt().unsqueeze(-1)
        return [gain * (left[..., :width].mT @ q_back.mT), gain * (right[:, :width] @ k_back.mT)]

    def cut(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k ``[B, H, N, d]`` before the norms to those that scores are made of, ``[B, H, N, a]``."""
        if self.width >= HEAD:
            return self.norms[0](q), self.norms[1](k)
        return tuple(
            self._normed(x, norm, number, *fitted)
            for number, (x, norm, fitted) in enumerate(zip((q, k), self.norms, self.fit(self.width), strict=True))
        )  # type: ignore[return-value]

    def _normed(self, x: Tensor, norm: Any, number: int, project: Tensor, weights: Any, least: Tensor) -> Tensor:
        plain = self.centred(x)
        kept = plain @ project.mT  # [B, H, N, a]; the norm's gain is in the map
        if self.statistic == "exact":
            power = plain.square().mean(-1, keepdim=True)
        else:
            own = weights[self.statistic]
            power = (kept.square() * own[:, None, :-1]).sum(-1, keepdim=True) + own[:, None, -1:]
        found = kept * power.clamp(min=least / 4).rsqrt()
        bias = getattr(norm, "bias", None)  # that of k is the same for all keys, so the softmax does not see it
        return found if bias is None or number else found + (project @ (bias / norm.weight)).unsqueeze(1)


def from_moments(plain: Tensor, project: Tensor) -> Tensor:
    """Weights ``[H, a + 1]`` that estimate the mean square of ``[H, S, d]`` from squares of what ``[H, a, d]`` keeps.

    Of normally distributed x with covariance C, squares of b.x have covariances 2 (b C b')^2 among each other and
    2 |C b|^2 with the square of x.
    """
    covariance = plain.mT @ plain / plain.shape[1]
    crossed = project @ covariance  # [H, a, d]
    products = (crossed @ project.mT).square()
    ridge = 1e-6 * products.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(len(project[0]))
    weights = torch.linalg.solve(products + ridge, crossed.square().mean(-1))
    kept = (crossed * project).sum(-1)  # mean squares
    rest = covariance.diagonal(dim1=1, dim2=2).mean(1) - (weights * kept).sum(1)
    return torch.cat([weights, rest.unsqueeze(1)], dim=1)


@contextmanager
def watched(cuts: dict[Any, CutScores], record: bool = False) -> Iterator[None]:
    """Attention computes scores from `cuts`, inside."""

    def scored(self: Any, x: Tensor, features: Tensor, rope: Any) -> Any:
        q, k = (F.linear(x, *part).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.parts()[:2])
        if record:
            cuts[self].see(q, k)
        return *cuts[self].cut(q, k), features[0], self.full_width**-0.5

    with mock.patch.object(ElasticSplit, "scored", scored):
        yield


def saved(net: SuperNet, widths: dict[str, int], rule: Callable[[int], int]) -> int:
    """MACs that q and k do without."""
    sites = [site for site in net.sites if site.kind == "attention" and widths[site.name]]
    lost = {site.name: HEAD - min(HEAD, rule(widths[site.name])) for site in sites}
    return sum(net.cost.tokens[s.name] * s.dim * s.heads * 2 * lost[s.name] for s in sites)


def spec_for(net: SuperNet, share: float, rule: Callable[[int], int]) -> Any:
    """The first size on the list whose MACs, with q and k cut by the rule, are within a share of the full network's."""
    for position in range(len(net.strata) + 1):
        widths = net.strata.spec(position)
        if net.macs(widths) - saved(net, dict(widths), rule) <= share * net.macs():
            return widths
    raise ValueError(f"no size of {share:.2f}")


def measured(net: SuperNet, dense: Tensor, images: Tensor, labels: Tensor) -> Iterator[tuple[str, str, float, float]]:
    """Rule and statistic, share, KL to the dense model and top-1."""
    names = {net.model.get_submodule(site.name): site.name for site in net.sites if site.kind == "attention"}
    cuts = {module: CutScores(module) for module in names}
    calibration = next(iter(DataLoader(Subset(demo.digits()[0], range(512)), 512)))[0]
    with watched(cuts, record=True):
        net(calibration)
    arms: list[tuple[str, str, bool, Callable[[int], int]]] = [("whole", "fitted", True, lambda _: HEAD)]
    arms += [(name, "fitted", True, rule) for name, rule in RULES.items()]
    arms += [(f"{TIED}, {one}", one, True, RULES[TIED]) for one in STATISTICS if one != "fitted"]
    arms += [(f"{TIED}, coordinates", "fitted", False, RULES[TIED])]
    for name, statistic, by_axes, rule in arms:
        for twelfth in TWELFTHS:
            widths = spec_for(net, twelfth / 12, rule)
            for module, cut in cuts.items():
                cut.width, cut.statistic, cut.by_axes = rule(widths[names[module]]), statistic, by_axes
            with watched(cuts):
                logits = net(images, widths)
            yield name, f"{twelfth}/12", *compared(logits, dense, labels)


def compared(logits: Tensor, dense: Tensor, labels: Tensor) -> tuple[float, float]:
    """KL to the dense model and top-1."""
    kl = F.kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="batchmean")
    return float(kl), 100 * float((logits.argmax(-1) == labels).float().mean())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=1)
    args = arguments.parse_args()
    train, test = demo.digits()
    calibration = DataLoader(Subset(train, range(512)), 256)
    images, labels = next(iter(DataLoader(test, 360)))
    rows: list[dict[str, Any]] = []
    for norm in ("LayerNorm", "RMSNorm"):
        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        top1 = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            model = normed_vit(norm)
            demo.train(model, train, EPOCHS, torch.device("cpu"))
            net = SuperNet(copy.deepcopy(model), demo.DATA_CONFIG).contract(calibration)
            net.set_units(head_dim_unit=4)
            net.stratify(calibration).eval()
            with torch.no_grad():
                dense = model(images).log_softmax(-1)
                top1.append(100 * float((dense.argmax(-1) == labels).float().mean()))
                for arm, size, *numbers in measured(net, dense, images, labels):
                    found.setdefault(arm, {}).setdefault(size, []).append((numbers[0], numbers[1]))
            net = SuperNet(copy.deepcopy(model), demo.DATA_CONFIG, whole_heads=True).contract(calibration)
            net.stratify(calibration).eval()
            with torch.no_grad():
                for twelfth in TWELFTHS:
                    logits = net(images, net.spec(macs=twelfth / 12))
                    runs = found.setdefault("whole heads leave", {}).setdefault(f"{twelfth}/12", [])
                    runs.append(compared(logits, dense, labels))
        for arm, sizes in found.items():
            means = {size: [sum(one) / len(one) for one in zip(*runs, strict=True)] for size, runs in sizes.items()}
            row = {"norm": norm, "dense": f"{sum(top1) / len(top1):.1f}", "q and k": arm}
            rows.append(row | {size: f"{kl:.3f} ({share:.1f})" for size, (kl, share) in means.items()})
            print(rows[-1], flush=True)
    note = f"KL (top-1), mean of {args.seeds} seeds; stratavit {stratavit.__version__}."
    write_results("qk-norm", rows, note)


if __name__ == "__main__":
    main()
