"""The two steps of a conversion, without training: sorting the knowledge, and the list of what leaves first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import nn
from typing_extensions import Self

from stratavit import contraction, listing, sensitivity, strata
from stratavit.answers import Answers
from stratavit.errors import StrataViTError
from stratavit.objectives import Objective
from stratavit.pixels import Seen
from stratavit.prices import priced
from stratavit.sizes import Method, Sized, known_method
from stratavit.statistics import SiteStatistics, collect
from stratavit.structure import in_float32
from stratavit.timing import Setting
from stratavit.walk import Walk
from stratavit.wpac import CRITERIA, Criterion, scatter_needed

TOKEN_WEIGHT = 0.5


class Convertible(Sized):
    """The conversion of a super-network; `SuperNet` gives it what it rests on."""

    model: Any
    provenance: dict[str, Any]
    _answers: Answers | None  # of the full model to the images of `contract`, for `stratify`
    _seen: Seen | None = None  # the images of `contract`, if it kept moments of folds

    def at(self, spec: Mapping[str, int] | None = None, fixed: bool = False) -> AbstractContextManager[nn.Module]:
        """Runs `model` at a spec inside."""
        raise NotImplementedError

    def contract(
        self,
        loader: Iterable[Any],
        method: Method | None = None,
        criterion: Criterion | None = None,
        objective: Objective = "auto",
        seed: int = 0,
        token_weight: float = TOKEN_WEIGHT,
    ) -> Self:
        """Sorts the knowledge inside every module, in place, without changing the function.

        One forward and one backward pass over the calibration images (the paper uses 1,024).

        Args:
            loader: Yields images ``[B, 3, H, W]``, ``(images,)``, ``(images, labels [B])``, or mappings of these:
                images under ``pixel_values``, ``image`` or ``images``, labels under ``labels`` or ``label``. The
                order does not matter.
            method: ``paper`` is exactly the paper (WPAC); ``default`` sorts by what each module adds to the
                residual stream and gathers what `compensation` needs. If None, what the criterion implies.
            criterion: What channels are sorted by: ``output`` (default method), ``wpac`` (paper), or a baseline
                (``random``, ``magnitude``, ``taylor``, ``hessian``, ``pca``); only ``output`` goes with ``default``.
            objective: What is differentiated, see `statistics.collect`; ``auto`` suits the method and the labels.
            seed: For ``random`` and for the objective ``sampled``.
            token_weight: Share of a token's weight that follows the gradient norm at the module's output
                (default method).

        Returns:
            self.

        Raises:
            StrataViTError: Bad images, labels or options.
        """
        if criterion is not None and criterion not in CRITERIA:
            raise StrataViTError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
        if not 0 <= token_weight <= 1:
            raise StrataViTError(f"token_weight: expected a share from 0 to 1, got {token_weight!r}")
        implied: Method = "default" if criterion in (None, "output") else "paper"
        method = implied if method is None else known_method(method)
        if criterion is not None and method != implied:
            raise StrataViTError(f"criterion {criterion!r} belongs to method={implied!r}, got method={method!r}")
        criterion = criterion or ("output" if method == "default" else "wpac")
        share = token_weight if criterion == "output" else None
        answers = None if share is None else Answers()
        with in_float32(self.model), self.at():
            scatter = scatter_needed(criterion)
            statistics = collect(self.model, loader, objective, scatter, "contract", share, seed, answers)
        contraction.apply(self.model, statistics, criterion, seed)
        self.released = False
        if answers is not None:
            answers.seal(self.model)  # contraction keeps the function
        self._answers, self._seen = answers, None if answers is None else answers.seen
        self.strata, self.final_mean, self.method = None, None, method
        self.provenance["contract"] = {
            "method": method,
            "criterion": criterion,
            "objective": objective,
            "images": next(iter(statistics.values())).images,
            "seed": seed,
            "token_weight": share,
        }
        return self

    def stratify(
        self,
        loader: Iterable[Any],
        method: Method | None = None,
        objective: Objective = "auto",
        measure: sensitivity.Measure = "auto",
        plan: Walk | None = None,
        seed: int = 0,
        price: Literal["macs", "latency"] = "macs",
        setting: Setting | None = None,
    ) -> Self:
        """Makes the one-shot dropout list, down to the smallest size, in place; no training.

        Args:
            loader: The calibration images, several times over, in any order. Best those of `contract`, pixel by
                pixel (no random augmentation), and on the same object: each is then measured with moments that do
                not contain it. If they are others, a line on standard error says so.
            method: ``default`` measures at cut networks what one more unit brings (`walk`); ``paper`` ranks units by
                sensitivity of the module times Taylor importance, per MAC, with tails merged (method
                section 2). As set by `contract` if None.
            objective: ``paper``: for the Taylor importance, see `statistics.collect`.
            measure: ``paper``: of sensitivity, ``top1``, ``cost`` or ``auto``, see `sensitivity.bypass_sensitivity`.
            plan: ``default``: sizes and numbers of images.
            seed: ``paper``: for the objective ``sampled``.
            price: What a unit's importance is divided by: its MACs (paper), or its ``latency`` on the device that the
                weights are on.
            setting: For ``latency``; one image, eager, if None.

        Returns:
            self.

        Raises:
            StrataViTError: Bad images, labels or options.
        """
        method = self.method if method is None else known_method(method)
        final_mean, cost = None, priced(self.cost, self.elastic, price, setting)
        with in_float32(self.model), self.at():
            if method == "paper":
                entries, statistics, facts = listing.by_importance(
                    self.model, self.sites, cost, loader, objective, measure, seed
                )
                self._fill_means(statistics)
            else:
                if any(module.channel_mean.numel() == 0 for module in self.elastic.values()):
                    self._fill_means(collect(self.model, loader, objective, "none", "means"))
                known = self._answers if self._answers is not None and self._answers.belong_to(self.model) else None
                before, self.compensation = self.compensation, "full"
                try:
                    entries, final_mean, facts = listing.by_effects(
                        self.model, self.sites, cost, loader, plan or Walk(), known, self._seen
                    )
                finally:
                    self.compensation = before
        self._answers = None
        if method != self.method:
            self.method = method
        self.final_mean = final_mean
        self.strata = strata.Strata(self.sites, entries)
        self.provenance["stratify"] = {"method": method, "price": price, "prices": cost.prices, **facts}
        return self

    def _fill_means(self, statistics: Mapping[str, SiteStatistics]) -> None:
        for name, module in self.elastic.items():
            if module.channel_mean.numel() == 0:
                contraction.set_mean(module, statistics[name].channel_mean)
