"""Which layers hang together: filters whose outputs are added, gated or normed with others' go together or not at all.

Who reads and who follows a layer's channels is torch-pruning's business (``DependencyGraph``): it follows them through
norms, activations, pooling, concatenations, depthwise convolutions and flattening. Here its findings become *groups*:
all layers that make the same channels, and how their channels correspond. A grouped convolution, or a norm over groups
of channels, ties a channel to one in each group: such channels are a *unit* of several, kept or removed as one.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import lcm, prod
from types import SimpleNamespace

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.PReLU)
_NOT_FOLLOWED = (OPTYPE.MHA, OPTYPE.LSTM, OPTYPE.CUSTOMIZED)


@dataclass(frozen=True, eq=False)
class Group:
    """Layers whose filters are kept or removed together.

    Attributes:
        name: its first layer, in the network's order.
        layers: each layer's output channels, shape (units, channels of a unit); row u is unit u.
        sides: (module or parameter, "in", "out" or "itself") -> how many of its channels belong to one unit.
        reason: why nothing of it can go, or None.
    """

    name: str
    layers: Mapping[str, Tensor]
    sides: Mapping[tuple[str, str], int] = field(default_factory=dict)
    reason: str | None = None

    @property
    def units(self) -> int:
        return len(self.layers[self.name])

    @property
    def copies(self) -> int:
        """Channels of a unit."""
        return self.layers[self.name].shape[1]

    @property
    def touched(self) -> set[str]:
        """The modules, and the parameters outside of them, of which something goes."""
        return {name for name, _ in self.sides}

    @property
    def kind(self) -> tuple:
        """The same for groups of the same place in blocks that repeat each other: names but for their numbers, size."""
        return tuple(re.sub(r"\b\d+\b", "#", name) for name in sorted(self.touched)), self.units

    def but(self, reason: str) -> "Group":
        return replace(self, reason=reason)

    def in_larger_units(self) -> Iterator["Group"]:
        """The same layers with units of several filters, as gates, shuffles and pixel shuffles may ask for."""
        for size, is_consecutive in ((2, False), (4, True), (2, True), (4, False)):
            if self.copies > 1 or self.units % size or self.units // size < 2:
                continue
            shape = (-1, size) if is_consecutive else (size, -1)
            layers = {name: channels.view(shape) for name, channels in self.layers.items()}
            layers = layers if is_consecutive else {name: channels.T for name, channels in layers.items()}
            yield replace(self, layers=layers, sides={side: count * size for side, count in self.sides.items()})


def tell_shapes(graph: torch_pruning.DependencyGraph) -> None:
    """Tell a graph of torch-pruning's the sizes of what is reshaped, under the name that it looks for.

    Autograd has renamed them; without them every reshaping, of heads and windows too, is taken for a flattening of
    channels and places (or for its reverse), and the numbers of channels explode.
    """
    for node in graph.module2node.values():
        if node.type != OPTYPE.RESHAPE or not hasattr(node.grad_fn, "_saved_self_sym_sizes"):
            continue
        before, after = node.grad_fn._saved_self_sym_sizes, node.grad_fn._input_metadata[0].shape
        of_examples = before[0] == after[0]
        if of_examples and len(after) == 2 and len(before) > 2:
            told = (before[0], before[1], prod(before[2:]), 1)
        elif of_examples and len(before) == 2 and len(after) > 2:
            told = (before[1],)
        else:
            told = ()  # channels and places stay apart, or cannot be followed
        node.grad_fn = SimpleNamespace(_saved_self_sizes=told)
    for node in graph.module2node.values():  # what was concluded without the sizes; it concludes anew for each group
        for dependency in node.dependencies:
            if OPTYPE.RESHAPE in (node.type, dependency.target.type):
                dependency.index_mapping[0] = None


def outputs_of(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def removes_outputs(layer: nn.Module):
    """torch-pruning's function that removes a layer's filters."""
    linear = isinstance(layer, nn.Linear)
    return torch_pruning.prune_linear_out_channels if linear else torch_pruning.prune_conv_out_channels


def find_groups(
    graph: torch_pruning.DependencyGraph,
    calls: Mapping[str, int],
    kept_as_they_are: Mapping[str, str],
    unfusable: Mapping[str, str],
    coupled: bool,
) -> dict[str, Group]:
    """The groups of a network, by the names of their first layers.

    Args:
        graph: of the network.
        calls: how often the forward pass calls each module.
        kept_as_they_are: modules that must not change -> why.
        unfusable: layers whose filters must stay -> why.
        coupled: False: each ``nn.Conv2d`` is a group of its own, and those that others are tied to cannot go.
    """
    names = {module: name for name, module in graph.model.named_modules()}
    names |= {parameter: name for name, parameter in graph.model.named_parameters()}
    found: dict[str, Group] = {}
    seen: set[str] = set()
    for module, name in names.items():
        if not isinstance(module, LAYERS if coupled else nn.Conv2d) or name in seen:
            continue
        group = _group(graph, module, names, calls.get(name, 0), coupled)
        for touched in sorted(group.touched):
            if group.reason is None and touched in kept_as_they_are:
                group = group.but(kept_as_they_are[touched])
        for member in group.layers:
            if group.reason is None and member in unfusable:
                group = group.but(unfusable[member])
        seen |= {name} if group.reason else set(group.layers)
        found[name] = group
    return found


def _group(graph, layer: nn.Module, names: Mapping, calls: int, coupled: bool) -> Group:
    name, n = names[layer], outputs_of(layer)
    alone = Group(name, {name: torch.arange(n)[:, None]})
    if is_depthwise(layer) or (layer_groups(layer) > 1 and not coupled):
        return alone.but("it is a grouped or depthwise convolution, which follows the layer that feeds it")
    if calls == 0 or (calls > 1 and not coupled):
        return alone.but(f"the forward pass calls it {calls} times")
    if layer not in graph.module2node:
        return alone.but("torch-pruning does not see it in the computation")
    if n < 2:
        return alone.but("it has a single filter")
    asked = list(range(n)) if coupled else [0]  # one filter of a layer by itself stands for all of them
    try:
        items = list(graph.get_pruning_group(layer, removes_outputs(layer), asked))
    except Exception as error:
        return alone.but(f"torch-pruning cannot follow its outputs ({type(error).__name__}: {error})")
    if not coupled:
        reason = _why_not_alone(graph, items, layer, names)
        return alone.but(reason) if reason else replace(alone, sides=_sides(graph, items, names))
    layers: dict[str, Tensor] = {}
    blocks, is_read = 1, False
    for item in items:
        dep, module, kind = item.dep, item.dep.target.module, item.dep.target.type
        label = names.get(module)
        if kind == OPTYPE.OUTPUT:
            return alone.but("the network returns its outputs")
        if kind in _NOT_FOLLOWED:
            return alone.but(f"its outputs go through {label}, a {type(module).__name__}")
        if label is None:  # an operation without parameters
            continue
        is_out = graph.is_out_channel_pruning_fn(dep.handler)
        follows = not isinstance(module, LAYERS) or is_depthwise(module)
        in_order = list(item.idxs) == list(item.root_idxs) == list(range(n))
        if not follows and is_out:
            if len(item.idxs) != outputs_of(module) or sorted(item.root_idxs) != list(range(n)):
                return alone.but(f"its outputs are coupled with a part of those of {label}")
            layers[label] = torch.as_tensor(item.idxs)[torch.as_tensor(item.root_idxs).argsort()]
        is_read |= not follows and not is_out
        parts = _channel_groups(module)
        if parts > 1 and not is_depthwise(module):
            if not in_order or (is_out and isinstance(module, nn.modules.conv._ConvTransposeNd)):
                return alone.but(f"its outputs reach {label}, which works on groups of channels, in another order")
            blocks = lcm(blocks, parts)
    if not is_read:
        return alone.but("no layer reads its outputs, so they are the network's own output")
    if n % blocks or n // blocks < 2:
        return alone.but(f"its {n} filters serve {blocks} groups of channels, so there is none to spare")
    units = n // blocks
    layers = {label: channels.view(blocks, units).T for label, channels in layers.items()}
    return Group(name, layers, {side: count // units for side, count in _sides(graph, items, names).items()})


def _sides(graph, items: Collection, names: Mapping) -> dict[tuple[str, str], int]:
    """(module or parameter, "in", "out" or "itself") -> of how many of its channels torch-pruning speaks."""
    sides = defaultdict(set)  # a layer that reads channels twice loses both copies
    for item in items:
        label, is_out = names.get(item.dep.target.module), graph.is_out_channel_pruning_fn(item.dep.handler)
        if label is not None:
            side = "itself" if item.dep.target.type == OPTYPE.PARAMETER else "out" if is_out else "in"
            sides[label, side].update(item.idxs)
    return {side: len(channels) for side, channels in sides.items()}


def layer_groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def _channel_groups(module: nn.Module) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups
    if isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels:
        return module.num_groups
    return 1


def _why_not_alone(graph, items: Collection, layer: nn.Module, names: Mapping) -> str | None:
    """Why this convolution's filters cannot go without those of others, or None."""
    is_read = False
    for item in items:
        dep, module = item.dep, item.dep.target.module
        label = names.get(module, "another layer")
        if module is layer:
            continue
        if dep.target.type == OPTYPE.OUTPUT:
            return "the network returns its outputs"
        if dep.target.type == OPTYPE.PARAMETER:
            return f"its outputs are combined with the parameter {label}"
        is_out = graph.is_out_channel_pruning_fn(dep.handler)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if getattr(module, "groups", 1) > 1 and not is_depthwise(module):
                return f"its outputs feed the grouped convolution {label}"
            if is_out and not is_depthwise(module):
                return f"its outputs are coupled with those of {label} (a sum or a gate)"
            is_read |= not is_out
        elif list(module.parameters(recurse=False)) and not isinstance(module, _CHANNELWISE):
            return f"its outputs go through {label}, a {type(module).__name__}"
    return None if is_read else "no layer reads its outputs, so they are the network's own output"
