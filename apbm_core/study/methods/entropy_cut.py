"""The cut by relative entropy: APBM's importance as a criterion on a trained network, and nothing fused.

The control of fusing once (handover.py): the same filters stay, what reads the others does without.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apbm_core.fusion import FusionSettings
from apbm_core.study.methods.ranking import RankingOptions, prune_by
from apbm_core.study.networks.layers import named_convolutions

LABEL = "relative entropy, cut"
SUMMARY = "filters of the least relative entropy go, and nothing is fused"
SOURCE = "the importance of Qu, Zhang, Wang, 2022, as a criterion on a trained network; ours"
PLACE, COLOUR, MARKER, DEFAULT = 16, "#6A3D9A", "1", False


@torch.no_grad()
def scores(model: nn.Module, layers: Sequence[str], images: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
    """``S_i`` of every filter of the named convolutions at APBM's last temperature: name -> (n,); larger = keep.

    ``images`` and ``seed`` play no part. The model is only read.

    Raises:
        ConfigError: a name is not a convolution of the model, or its weights are not finite.
    """
    found = {}
    for name, convolution in named_convolutions(model, layers).items():
        weight = convolution.weight.detach()
        fusion = FusionSettings().fusion(len(weight), len(weight))
        log_p, _ = fusion.log_similarity(weight, progress=1.0)
        found[name] = fusion.importance(log_p, weight).cpu().double()
    return found


Options, prune = RankingOptions, prune_by(scores)
