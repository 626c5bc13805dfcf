"""What every ranking criterion shares: finding the layers, checking the scores, choosing the filters that stay."""

import difflib
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from apbm_core.errors import ConfigError


def named_convolutions(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Conv2d]:
    """The convolutions called ``layers``, as name -> module, in that order.

    Raises:
        ConfigError: a name is no module of the model, or a module that is no ``nn.Conv2d``.
    """
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name in layers:
        if name not in convolutions:
            near = difflib.get_close_matches(name, convolutions, n=3, cutoff=0.3) or list(convolutions)[:3]
            raise ConfigError(
                f"{name!r} is not a convolution of this {type(model).__name__}; "
                f"use names of its nn.Conv2d modules, such as {', '.join(near) or 'none, for it has none'}."
            )
    return {name: convolutions[name] for name in layers}


def keep_largest(scores: Tensor, m: int, layer: str = "a layer") -> Tensor:
    """The filters that stay: ascending indices of the ``m`` largest scores, shape (m,), int64, on the CPU.

    Of equal scores the filter with the lower index stays, so a choice is the same on every device and in every run.

    Args:
        scores: one score a filter, shape (n,); the larger, the more the filter matters.
        m: how many filters stay, 1 to n.
        layer: the layer's name, for the error messages.

    Raises:
        ConfigError: ``m`` is not a whole number in 1..n, or the scores are not one finite number a filter.
    """
    if scores.ndim != 1:
        raise ConfigError(
            f"the scores of {layer} have shape {tuple(scores.shape)}; give one number a filter, shape (n,)."
        )
    if not isinstance(m, Integral) or isinstance(m, bool) or not 1 <= m <= len(scores):
        raise ConfigError(
            f"cannot keep {m!r} of the {len(scores)} filters of {layer}; give a whole number from 1 to n."
        )
    scores = scores.detach().cpu()
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise ConfigError(
            f"the scores of {layer} are not finite at filters {bad[:5]}, so no order "
            "exists; check the layer's weights and the training images for NaN or infinite values."
        )
    return torch.argsort(scores, descending=True, stable=True)[:m].sort().values
