"""L1: a filter matters as much as its absolute weights add up to (Li et al., Pruning Filters for Efficient ConvNets).

For one layer's own filters this is torch-pruning's ``MagnitudeImportance(p=1)``, which wants a traced group of coupled
layers to say the same; the tests hold the two equal.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from apbm_core.study.methods.ranking import RankingOptions, prune_by
from apbm_core.study.networks.layers import named_convolutions

LABEL = "L1"
SUMMARY = "filters of the smallest L1 norm go"
SOURCE = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"
PLACE, COLOUR, MARKER = 70, "#56B4E9", "p"


def scores(model: nn.Module, layers: Sequence[str], images: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
    """The L1 norm of every filter of the named convolutions: name -> (n,), float64, on the CPU; larger = keep.

    ``images`` and ``seed`` play no part. The model is only read.

    Raises:
        ConfigError: a name is not a convolution of the model.
    """
    return {
        name: convolution.weight.detach().cpu().double().abs().flatten(1).sum(1)
        for name, convolution in named_convolutions(model, layers).items()
    }


Options, prune = RankingOptions, prune_by(scores)
