"""Where a layer's channels go, by torch-pruning's graph of the network, which is told what autograd knows better.

torch-pruning (``DependencyGraph``) builds its graph along autograd's; each edge maps channels to channels, which is put
right first (channel_maps.py). Here the channels that hang on a layer's are followed to the end, and removed.
"""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.dependency.node import Node
from torch_pruning.ops import OPTYPE

from apbm_core.channel_maps import ChannelGraph, Pair
from apbm_core.errors import UnsupportedNetwork
from apbm_core.forward import call, describe, tensors_in
from apbm_core.remembered import SizeWatch, Split, write_sizes

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_TOO_MANY = 500_000  # channels on the way; a reshaping that is taken for another lets them grow without end


@dataclass(frozen=True)
class Reached:
    """A module, parameter or operation, and its channels that hang on those of a layer.

    Attributes:
        node: torch-pruning's.
        side: "out" or "in", the channels that it makes (as norms and activations do as well) or reads; of a parameter
            "itself".
        pairs: the channels, in order, each with the output channel of the layer that it hangs on: of several that are
            tied to each other, the first.
    """

    node: Node
    side: str
    pairs: list[tuple[int, int]]


class Trace:
    """A network's dependencies.

    Attributes:
        model: the network, in evaluation mode from then on.
        names: of its modules and parameters, and of the splits whose sizes its modules remember.

    Args:
        model: becomes part of it.
        inputs: one batch the network accepts.

    Raises:
        UnsupportedNetwork: torch-pruning cannot trace it.
    """

    def __init__(self, model: nn.Module, inputs: Any):
        self.model, watch = model, SizeWatch()
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            for parameter, _ in flags:  # torch-pruning follows gradients
                parameter.requires_grad_(parameter.is_floating_point())
            with warnings.catch_warnings(), torch.enable_grad(), watch.watching(model):
                warnings.simplefilter("ignore")
                self.graph = ChannelGraph().build_dependency(
                    model.eval(),
                    example_inputs=inputs,
                    forward_fn=call,
                    output_transform=lambda out: [tensor for tensor in tensors_in(out) if tensor.grad_fn is not None],
                )
        except Exception as error:
            raise UnsupportedNetwork(
                f"torch-pruning cannot trace this {type(model).__name__} on inputs of shape {describe(inputs)}: "
                f"{error}. Check that model(example_inputs) runs and is plain PyTorch."
            ) from error
        finally:
            for parameter, trained in flags:
                parameter.requires_grad_(trained)
        self.names = {module: name for name, module in model.named_modules()}
        self.names |= {parameter: name for name, parameter in model.named_parameters()}
        self._dimensions = {self.names[parameter]: dim for parameter, dim in self.graph.unwrapped_parameters}
        self._splits: dict[str, Split] = {}
        self._read = watch.read
        for node in self.graph.module2node.values():
            if node.type == OPTYPE.SPLIT and node.module.split_sizes:
                self._name_split(node, watch.owners.get(node.grad_fn), tuple(node.module.split_sizes))
        for heads in self.graph.heads:
            for node in heads.apart:
                self._name_split(node, watch.owners.get(node.grad_fn.function), (heads.count,), heads.width)
        for node in self.graph.module2node.values():  # autograd's nodes hold on to the feature maps
            node.grad_fn = None
            if node.type == OPTYPE.SLICE:
                node.module.grad_fn = None

    def _name_split(self, node: Node, owner: str | None, sizes: tuple[int, ...], width: int | None = None) -> None:
        if owner is not None:
            name = f"{owner} split {len(self._splits)}"
            self.names[node.module] = name
            self._splits[name] = Split(owner, sizes, width)

    def reached(self, layer: nn.Module) -> list[Reached]:
        """Everything that the output channels of a layer are tied to, the layer itself first.

        A grouped convolution, a norm over groups of channels, or a split into so many parts ties those that have the
        same place in each group or part.

        Raises:
            UnsupportedNetwork: they multiply on the way.
        """
        pruner = self.graph.get_pruner_of_module(layer)
        start, ties = (self.graph.module2node[layer], pruner.prune_out_channels), _Ties(pruner.get_out_channels(layer))
        found = {start: {channel: channel for channel in range(len(ties.above))}}
        waiting, count = [(*start, found[start])], 0
        while waiting:
            node, handler, channels = waiting.pop()
            for edge in node.dependencies:
                if not edge.is_triggered_by(handler):
                    continue
                pairs = [Pair(*pair) for pair in channels.items()]
                for mapping in filter(None, edge.index_mapping):
                    pairs = mapping(pairs)
                known, size, new = found.setdefault((edge.target, edge.handler), {}), self._size(edge), {}
                for channel, root in pairs:
                    if channel in known:
                        ties.tie(known[channel], root)
                    elif size is None or channel < size:
                        known[channel] = new[channel] = root
                if new:
                    waiting.append((edge.target, edge.handler, new))
                    count += len(new)
                if count > _TOO_MANY:
                    raise UnsupportedNetwork("its channels multiply on the way")
        sides = self._sides(found).items()
        for (node, side), channels in sides:
            for channel, root in channels.items():
                ties.tie(channels.get(channel % self._period(node, side), root), root)
        return [
            Reached(*side, sorted((c, ties.top(r)) for c, r in channels.items()))
            for side, channels in sides
            if channels
        ]

    def _period(self, node: Node, side: str) -> int:
        """Channels of which the places differ by this are in the same place of groups or parts."""
        sizes = node.module.split_sizes if node.type == OPTYPE.SPLIT and node.module not in self.names else None
        if sizes:
            return sizes[0] if len(set(sizes)) == 1 else sum(sizes)
        groups = groups_in(node.module)
        return channels_of(node.module, side) // groups if groups > 1 else sys.maxsize

    def _sides(self, found: Mapping) -> dict[tuple[Node, str], dict[int, int]]:
        is_out = self.graph.is_out_channel_pruning_fn
        return {
            (node, "itself" if node.type == OPTYPE.PARAMETER else "out" if is_out(handler) else "in"): channels
            for (node, handler), channels in found.items()
        }

    def _size(self, edge: Any) -> int | None:
        """How many channels the side has that an edge speaks of, where they are counted."""
        is_out = self.graph.is_out_channel_pruning_fn(edge.handler)
        return (self.graph.get_out_channels if is_out else self.graph.get_in_channels)(edge.target)

    def remove(self, model: nn.Module, gone: Mapping[tuple[str, str], Tensor]) -> None:
        """Remove channels from a copy of the network.

        Args:
            model: the copy; changed.
            gone: (name, side), as in :class:`Reached` -> the channels that go.
        """
        for (name, side), channels in gone.items():
            if side == "itself":
                self._shorten(model, name, channels)
            elif name not in self._splits:
                module = model.get_submodule(name)
                is_instance_norm = isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels
                pruner = self.graph.get_pruner_of_module(module)
                pruner.pruning_dim = -1
                remove = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
                remove(module, channels.tolist())
                if is_instance_norm:
                    module.num_groups = module.num_channels
        of_splits = {name: channels for (name, _), channels in gone.items() if name in self._splits}
        write_sizes(model, self._splits, of_splits, self._read)

    def _shorten(self, model: nn.Module, name: str, channels: Tensor) -> None:
        owner, _, key = name.rpartition(".")
        module, dim = model.get_submodule(owner), self._dimensions[name]
        old = getattr(module, key)
        stays = torch.ones(old.shape[dim], dtype=torch.bool).index_fill_(0, channels, False).nonzero()[:, 0]
        new = old.detach().index_select(dim, stays.to(old.device))
        setattr(module, key, nn.Parameter(new, requires_grad=old.requires_grad))


def outputs_of(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def channels_of(module: nn.Module, side: str) -> int:
    """How many channels a grouped convolution or a norm over groups has on a side, "in" or "out"."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    return module.out_channels if side == "out" else module.in_channels


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def groups_in(module: nn.Module) -> int:
    """Of how many groups of channels a module works on each by itself; 1 where it works on all, or on each channel."""
    if isinstance(module, nn.modules.conv._ConvNd) and not is_depthwise(module):
        return module.groups
    if isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels:
        return module.num_groups
    return 1


class _Ties:
    """Which of n channels are tied to each other."""

    def __init__(self, n: int):
        self.above = list(range(n))

    def top(self, channel: int) -> int:
        """The first of those that a channel is tied to."""
        while self.above[channel] != channel:
            self.above[channel] = self.above[self.above[channel]]
            channel = self.above[channel]
        return channel

    def tie(self, one: int, other: int) -> None:
        first, second = sorted((self.top(one), self.top(other)))
        self.above[second] = first
