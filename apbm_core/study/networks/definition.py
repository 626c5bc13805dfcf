"""What a network's file says of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True, eq=False)
class Network:
    """A network that can be built with fewer filters.

    Attributes:
        label: how tables and plots call it.
        module: ``module(num_classes, widths, **options)``, the network with these filter counts; logits (N,
            num_classes) of images (N, 3, h, w).
        widths: filters of its prunable convolutions when it is dense, from input to output. Which convolutions these
            are is found by tracing (:func:`apbm_core.surgery.prunable_layers`).
        options: keyword arguments of ``module`` and the values that each may have, the default first.
        sides: the smallest and the largest side, in pixels, of square images it can be trained on; None for no limit.
        needs: why, as it stands after "so that".
        shortcuts: whether identities run beside its prunable convolutions.
    """

    label: str
    module: Callable[..., nn.Module]
    widths: tuple[int, ...]
    options: Mapping[str, tuple] = field(default_factory=dict)
    sides: tuple[int, int | None] = (1, None)
    needs: str = "there is an image"
    shortcuts: bool = False
