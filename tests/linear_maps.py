"""Linear maps and covariances of what they read, ordinary and degenerate."""

import torch


def problem(seed, m=6, outputs=10):
    """A map ``[outputs, m]`` and a covariance ``[m, m]`` of uneven spectrum, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, m, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * m, m, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -1.5, m) @ torch.randn(m, m, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x)


DEGENERATE = {  # each makes one of an ordinary map and covariance
    "singular covariance": lambda w, s: (w, s[:, :3] @ s[:3]),
    "zero covariance": lambda w, s: (w, s * 0),
    "zero weight": lambda w, s: (w * 0, s),
    "more channels than outputs": lambda w, s: (w[:2], s),
    "equal columns": lambda w, s: (w[:, :1].expand_as(w), s),
    "tiny": lambda w, s: (w * 1e-12, s * 1e-24),
    "huge": lambda w, s: (w * 1e12, s * 1e24),
}
