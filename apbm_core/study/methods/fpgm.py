"""FPGM: filters near the geometric median of their layer are the ones the others can replace (He et al., CVPR 2019).

The median minimises the sum of distances to the layer's filters, so, as the paper does, that sum measures how near a
filter is to it. torch-pruning's ``FPGMImportance`` does not serve here: it takes the distances of ``|w|^p``, to which a
filter and its negative are the same.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from apbm_core.similarity import pairwise_distances
from apbm_core.study.methods.ranking import RankingOptions, prune_by
from apbm_core.study.networks.layers import named_convolutions

LABEL = "FPGM"
SUMMARY = "filters nearest to their layer's geometric median go"
SOURCE = "He et al., Filter Pruning via Geometric Median, CVPR 2019"
PLACE, COLOUR, MARKER = 80, "#8C6D31", "*"


def scores(model: nn.Module, layers: Sequence[str], images: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
    """The sum of Euclidean distances from every filter of a named convolution to the layer's others; larger = keep.

    ``images`` and ``seed`` play no part. The model is only read.

    Returns:
        name -> (n,), float64, on the CPU.

    Raises:
        ConfigError: a name is not a convolution of the model, or its weights are not finite.
    """
    return {
        name: pairwise_distances(convolution.weight).sum(1).cpu().double()
        for name, convolution in named_convolutions(model, layers).items()
    }


Options, prune = RankingOptions, prune_by(scores)
