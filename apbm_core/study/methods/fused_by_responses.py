"""APBM on a trained network, important by responses: those filters stay whose part the others could take over least.

As fused_once.py, but who stays follows from what the filters answer to training images and what the next layer makes of
it (:mod:`apbm_core.redundancy`), not from their weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apbm_core.anatomy import Anatomy
from apbm_core.errors import ConfigError
from apbm_core.study.methods import entropy_cut
from apbm_core.study.methods.ranking import SEEN, RankingOptions, prune_by
from apbm_core.trained import departures, see

LABEL = "APBM, fused once by responses"
SUMMARY = "filters that the next layer can do without are fused once into it"
SOURCE = "ours: backward elimination by the least squares of He, Zhang, Sun, Channel Pruning, ICCV 2017"
PLACE, COLOUR, MARKER, DEFAULT = 13, "#A50F15", "o", False


def scores(model: nn.Module, layers: Sequence[str], images: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
    """The step in which each filter goes if one after the other is taken over: name -> (n,), float64; larger = keep.

    Layers whose channels nothing reads that could take them over are scored by relative entropy. ``seed`` plays no
    part. The model is only read.

    Raises:
        ConfigError: there are no images.
    """
    if images is None or not len(images):
        raise ConfigError("what filters answer is seen on images, and there are none; give some training images.")
    anatomy = Anatomy(model, images[:2], coupled=False, prove=False)
    followed = {name: 1 for name in layers if name in anatomy.groups}
    orders = departures(anatomy, followed, see(anatomy, followed, images.split(128)))
    left = [name for name in layers if name not in orders]
    found = {name: order.to(torch.float64) for name, order in orders.items()}
    found |= entropy_cut.scores(model, left) if left else {}
    return {name: found[name] for name in layers}


Options, prune = RankingOptions, prune_by(scores, images=SEEN, fuses=True)
