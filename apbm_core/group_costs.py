"""Parameters and MACs of a network of any groups at any widths, uncut: which module loses how much with a unit.

:mod:`apbm_core.costs` does it for convolutions that are groups of their own, in the order that the studies need.
"""

from collections.abc import Mapping

import torch
from torch import nn

from apbm_core.anatomy import Anatomy
from apbm_core.forward import call, evaluation_mode, tensors_in
from apbm_core.groups import LAYERS


class GroupCosts:
    """Parameters and multiply-accumulates of a network at any number of kept units.

    Args:
        anatomy: of the network. MACs are those of its convolutions and linear layers, for its example inputs, divided
            by the size of the batch.
    """

    def __init__(self, anatomy: Anatomy):
        self.groups = anatomy.groups
        self._losses: dict[tuple[str, str], list[tuple[str, int]]] = {}  # side -> (group, channels of a unit)
        for name, group in anatomy.groups.items():
            for side, count in group.sides.items():
                self._losses.setdefault(side, []).append((name, count))
        self._modules = {n: m for n, m in anatomy.model.named_modules() if list(m.parameters(recurse=False))}
        self._products = _products(anatomy)

    def parameters(self, units: Mapping[str, int]) -> int:
        """Trainable scalars when these groups keep so many units, and the others all of theirs."""
        total, seen = 0, set()
        for name, module in self._modules.items():
            for key, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                total += round(parameter.numel() * self._share(name, module, key, units))
        return total

    def macs(self, units: Mapping[str, int]) -> int:
        """Multiply-accumulates for one example."""
        return round(
            sum(
                count * self.left(name, "out", units) * self.left(name, "in", units)
                for name, count in self._products.items()
            )
        )

    def of_layer(self, name: str, units: Mapping[str, int]) -> tuple[int, int]:
        """A layer's own parameters and MACs."""
        module = self._modules[name]
        parameters = module.named_parameters(recurse=False)
        own = sum(round(p.numel() * self._share(name, module, key, units)) for key, p in parameters)
        left = self.left(name, "out", units) * self.left(name, "in", units)
        return own, round(self._products.get(name, 0) * left)

    def _share(self, name: str, module: nn.Module, key: str, units: Mapping[str, int]) -> float:
        """What share of a parameter is left."""
        label = f"{name}.{key}" if name else key
        if (label, "itself") in self._losses:
            return self.left(label, "itself", units)
        share = self.left(name, "out", units)
        return share * self.left(name, "in", units) if isinstance(module, LAYERS) and key == "weight" else share

    def left(self, name: str, side: str, units: Mapping[str, int]) -> float:
        """The share of a module's channels that is left on one side."""
        losses = self._losses.get((name, side), ())
        if not losses:
            return 1.0
        width = self._width(name, side)
        gone = sum((self.groups[g].units - units.get(g, self.groups[g].units)) * count for g, count in losses)
        return 1 - gone / width

    def _width(self, name: str, side: str) -> int:
        module = self._modules.get(name)
        if module is None:  # a parameter outside of the layers that torch-pruning knows
            return sum(self.groups[g].units * count for g, count in self._losses[name, side])
        if isinstance(module, nn.Linear):
            return module.in_features if side == "in" else module.out_features
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.in_channels if side == "in" else module.out_channels
        return module.embedding_dim if isinstance(module, nn.Embedding) else module.weight.shape[-1]


def _products(anatomy: Anatomy) -> dict[str, float]:
    """Layer -> the multiply-accumulates of its calls in one forward pass, for one example."""
    counts: dict[str, float] = {}
    batch = max(1, len(tensors_in(anatomy.inputs)[0]))

    def count(name: str, module: nn.Module, given: tuple, output: torch.Tensor) -> None:
        is_transposed = getattr(module, "transposed", False)
        places = given[0].numel() // given[0].shape[1] if is_transposed else None
        if places is None:
            places = output.numel() // module.weight.shape[0]
        counts[name] = counts.get(name, 0) + places * module.weight.numel() / batch

    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: count(name, m, i, o))
        for name, module in anatomy.model.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        with torch.no_grad(), evaluation_mode(anatomy.model):
            call(anatomy.model, anatomy.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counts
