"""APBM: make a convolutional network small while it trains from scratch, by fusing its filters.

Three verbs for any network::

    slim = apbm_core.fuse(model, example_inputs, keep=0.5)  # physically small, banks of dense width behind it
    ...  # your own training loop; once an epoch: apbm_core.rescore(slim, progress=epoch / epochs)
    ...  # optional, after each rescore: apbm_core.collapse(slim, optimizer) drops banks that are done
    net = apbm_core.compact(slim)  # plain nn.Conv2d network, same logits

and one for a network that is trained already::

    net = apbm_core.fuse_trained(model, example_inputs, batches, keep=0.5)  # small and plain at once; fine-tune it
"""

from apbm_core.compress import collapse, compact, fuse, rescore
from apbm_core.errors import ApbmError
from apbm_core.fusion import FusionSettings
from apbm_core.planning import Plan, plan
from apbm_core.surgery import prunable_layers, slim, why_not_prunable
from apbm_core.trained import fuse_trained

__version__ = "0.2.0"

__all__ = [
    "ApbmError",
    "FusionSettings",
    "Plan",
    "collapse",
    "compact",
    "fuse",
    "fuse_trained",
    "plan",
    "prunable_layers",
    "rescore",
    "slim",
    "why_not_prunable",
]
