"""Random: the filters stay by lot, a seeded one; the control that every criterion must beat."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apbm_core.study.methods.ranking import RankingOptions, prune_by
from apbm_core.study.networks.layers import named_convolutions

LABEL = "random"
SUMMARY = "filters go by lot"
SOURCE = "the control that every criterion must beat"
PLACE, COLOUR, MARKER = 90, "#999999", "X"


def scores(model: nn.Module, layers: Sequence[str], images: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Uniform numbers in [0, 1) for every filter of the named convolutions: name -> (n,), float64, on the CPU.

    A layer's numbers depend on ``seed`` and the layer's name alone, not on which other layers are asked for, nor on the
    global random state, which stays as it is. ``images`` plays no part.

    Raises:
        ConfigError: a name is not a convolution of the model.
    """
    return {
        name: torch.rand(convolution.weight.shape[0], generator=_generator(seed, name), dtype=torch.float64)
        for name, convolution in named_convolutions(model, layers).items()
    }


def _generator(seed: int, layer: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()  # hash() of a string changes from run to run
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits: a signed seed


Options, prune = RankingOptions, prune_by(scores)
