"""A quadratic that updaters descend."""

import torch

START = torch.randn(6, generator=torch.Generator().manual_seed(0))
CURVATURES = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.0, 2.0])


def quadratic(params):
    return (CURVATURES * (params - 0.3).square()).sum() / 2
