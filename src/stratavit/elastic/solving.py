"""Compensation of several modules at a time: the systems of one shape are solved in one call, where that is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stratavit.elastic.base import ElasticSite, Solved
from stratavit.elastic.compensation import System, solve_together
from stratavit.utils.devices import queues_work

STACKED_BYTES = 2**29  # of systems that are solved in one call: a stack is a copy


@torch.no_grad()
def solved_alike(asked: Mapping[ElasticSite, Sequence[int]]) -> dict[ElasticSite, list[Solved]]:
    """Systems of modules at widths with their solutions, for `ElasticSite.outs_at`; those of one shape are stacked.

    Modules are left out where nothing is solved, or where each solves its own. No gradients.
    """
    found: dict[ElasticSite, list[Solved]] = {}
    places: list[tuple[ElasticSite, int, System]] = []
    for module, widths in asked.items():
        # on a CPU a call more costs less than the copy of a stack
        solving = module.to_solve(widths) if queues_work(module.out.weight.device) else []
        if solving:
            systems = module.systems(solving)
            places += [(module, index, system) for index, system in enumerate(systems)]
            found[module] = [(system, system.projected) for system in systems]  # until it is solved
    for group in _groups([system for _, _, system in places]):
        solutions = solve_together([places[i][2] for i in group])  # [S, C, k]
        for i, solution in zip(group, solutions, strict=True):
            module, index, system = places[i]
            found[module][index] = system, solution
    return found


def fixed_outs(widths: Mapping[ElasticSite, int]) -> dict[ElasticSite, tuple[Tensor, Tensor]]:
    """`ElasticSite.fixed_out` of modules at widths, where there is something to compute."""
    solved = solved_alike({module: [width] for module, width in widths.items()})
    found = {module: module.fixed_out(width, solved.get(module)) for module, width in widths.items()}
    return {module: pair for module, pair in found.items() if pair is not None}


def _groups(systems: Sequence[System]) -> list[list[int]]:
    """Indices of systems of one shape, as many together as may be stacked."""
    alike: dict[tuple[torch.Size, torch.Size, torch.device], list[int]] = {}
    for i, (factor, projected) in enumerate(systems):
        alike.setdefault((factor.shape, projected.shape, factor.device), []).append(i)
    groups = []
    for indices in alike.values():
        most = max(1, STACKED_BYTES // sum(part.numel() * part.element_size() for part in systems[indices[0]]))
        groups += [indices[start : start + most] for start in range(0, len(indices), most)]
    return groups
