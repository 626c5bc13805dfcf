"""Which layers hang together: filters whose outputs are added, gated or normed with others' go together or not at all.

Who reads and who follows a layer's channels is found in tracing.py, through norms, activations, pooling, splits and
concatenations, depthwise convolutions and flattening. Here what is found becomes *groups*:
all layers that make the same channels, and how their channels correspond. Channels that are tied to each other are a
*unit*, kept or removed as one: those of a channel in each part of a split, or in each group of a grouped convolution.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd

import torch
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

from apbm_core.errors import UnsupportedNetwork
from apbm_core.tracing import LAYERS, Reached, Trace, channels_of, groups_in, is_depthwise, outputs_of

_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.PReLU)
_NOT_FOLLOWED = (OPTYPE.MHA, OPTYPE.LSTM, OPTYPE.CUSTOMIZED)


@dataclass(frozen=True, eq=False)
class Group:
    """Layers whose filters are kept or removed together.

    Attributes:
        name: its first layer that all channels of the others hang on.
        layers: each layer's output channels, shape (units, channels of a unit in this layer); row u is unit u.
        pairs: (module or parameter, "in", "out" or "itself") -> its channels that go with the group's, shape (k, 2):
            each with the output channel of the first layer that it hangs on.
        reason: why nothing of it can go, or None.
    """

    name: str
    layers: Mapping[str, Tensor]
    pairs: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    reason: str | None = None

    @property
    def units(self) -> int:
        return len(self.layers[self.name])

    @property
    def copies(self) -> int:
        """Channels of a unit; where its layers have different numbers, what those have in common."""
        return gcd(*(channels.shape[1] for channels in self.layers.values()))

    @property
    def touched(self) -> set[str]:
        """The modules, and the parameters outside of them, of which something goes."""
        return {name for name, _ in self.pairs}

    @property
    def sides(self) -> dict[tuple[str, str], int]:
        """(module or parameter, "in", "out" or "itself") -> how many of its channels belong to one unit."""
        return {side: len(pairs[:, 0].unique()) // self.units for side, pairs in self.pairs.items()}

    def without(self, kept: Tensor) -> dict[tuple[str, str], Tensor]:
        """(module or parameter, "in", "out" or "itself") -> which of its channels go if these units are kept."""
        gone = torch.ones(self.units, dtype=torch.bool)
        gone[kept.cpu()] = False
        asked = self.layers[self.name][gone].flatten()
        return {side: pairs[torch.isin(pairs[:, 1], asked), 0].unique() for side, pairs in self.pairs.items()}

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
            yield replace(self, layers=layers)


def find_groups(
    trace: Trace,
    calls: Mapping[str, int],
    kept_as_they_are: Mapping[str, str],
    unfusable: Mapping[str, str],
    coupled: bool,
) -> dict[str, Group]:
    """The groups of a network, by the names of their first layers.

    Args:
        trace: of the network.
        calls: how often the forward pass calls each module.
        kept_as_they_are: modules that must not change -> why.
        unfusable: layers whose filters must stay -> why.
        coupled: False: each ``nn.Conv2d`` is a group of its own, and those that others are tied to cannot go.
    """
    names = trace.names
    found: dict[str, Group] = {}
    seen: set[str] = set()
    for module, name in names.items():
        if not isinstance(module, LAYERS if coupled else nn.Conv2d) or name in seen:
            continue
        group = _group(trace, module, calls, coupled)
        for touched in sorted(group.touched):
            if group.reason is None and touched in kept_as_they_are:
                group = group.but(kept_as_they_are[touched])
        for member in group.layers:
            if group.reason is None and member in unfusable:
                group = group.but(unfusable[member])
        seen |= {name} if group.reason else set(group.layers)
        found[name] = group
    return found


def _group(trace: Trace, layer: nn.Module, calls: Mapping[str, int], coupled: bool, tried=()) -> Group:
    names = trace.names
    name, n = names[layer], outputs_of(layer)
    called = calls.get(name, 0)
    alone = Group(name, {name: torch.arange(n)[:, None]})
    if is_depthwise(layer) or (layer_groups(layer) > 1 and not coupled):
        return alone.but("it is a grouped or depthwise convolution, which follows the layer that feeds it")
    if called == 0 or (called > 1 and not coupled):
        return alone.but(f"the forward pass calls it {called} times")
    if layer not in trace.graph.module2node:
        return alone.but("torch-pruning does not see it in the computation")
    if n < 2:
        return alone.but("it has a single filter")
    try:
        items = trace.reached(layer)
    except UnsupportedNetwork as error:
        return alone.but(str(error))
    except Exception as error:
        return alone.but(f"torch-pruning cannot follow its outputs ({type(error).__name__}: {error})")
    if not coupled:
        reason = _why_not_alone(items, layer, names)
        if reason is None and items[0].pairs != [(channel, channel) for channel in range(n)]:
            reason = "its outputs are tied to each other"
        return alone.but(reason) if reason else replace(alone, pairs=_pairs(items, names))
    made: dict[str, list[tuple[int, int]]] = {}  # layer -> its channels, and which of the asked ones each hangs on
    is_read = False
    for item in items:
        module, kind = item.node.module, item.node.type
        label = names.get(module)
        if kind == OPTYPE.OUTPUT:
            return alone.but("the network returns its outputs")
        if kind in _NOT_FOLLOWED:
            return alone.but(f"its outputs go through {label}, a {type(module).__name__}")
        if label is None:  # an operation without parameters
            continue
        follows = not isinstance(module, LAYERS) or is_depthwise(module)
        if not follows and item.side == "out":
            made[label] = item.pairs
            if len({channel for channel, _ in item.pairs}) < outputs_of(module):  # more hangs on those of that layer
                if module is layer or module in tried:
                    return alone.but(f"its outputs are coupled with a part of those of {label}")
                return _group(trace, module, calls, coupled, (*tried, layer))
        is_read |= not follows and item.side == "in"
        if groups_in(module) > 1:  # of which trace.reached ties those of the same place, if it reaches all of them
            is_partial = len(item.pairs) < channels_of(module, item.side)
            if is_partial or (item.side == "out" and isinstance(module, nn.modules.conv._ConvTransposeNd)):
                return alone.but(f"its outputs reach {label}, which works on groups of channels, in another order")
    if not is_read:
        return alone.but("no layer reads its outputs, so they are the network's own output")
    layers = _units(made)
    if len(layers[name]) < 2:
        return alone.but(f"its {n} filters are all tied to each other, so there is none to spare")
    return Group(name, layers, _pairs(items, names))


def _units(made: Mapping[str, list[tuple[int, int]]]) -> dict[str, Tensor]:
    """The channels of each layer, shape (units, channels of a unit): as many units as can be, all alike.

    Args:
        made: layer -> its channels, each with the first of those that it is tied to.
    """
    tied: dict[int, dict[str, list[int]]] = {}
    for label, pairs in made.items():
        for channel, first in pairs:
            tied.setdefault(first, {name: [] for name in made})[label].append(channel)
    kinds: dict[tuple[int, ...], list[dict[str, list[int]]]] = defaultdict(list)
    for first in sorted(tied):
        kinds[tuple(map(len, tied[first].values()))].append(tied[first])
    units = gcd(*map(len, kinds.values()))
    parts = [[part for kind in kinds.values() for part in kind[unit::units]] for unit in range(units)]
    return {label: torch.tensor([[c for part in unit for c in part[label]] for unit in parts]) for label in made}


def _pairs(items: Collection[Reached], names: Mapping) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], list] = defaultdict(list)
    for item in items:
        if (label := names.get(item.node.module)) is not None:
            found[label, item.side] += item.pairs
    return {side: torch.tensor(pairs).unique(dim=0) for side, pairs in found.items()}


def layer_groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def _why_not_alone(items: Collection[Reached], layer: nn.Module, names: Mapping) -> str | None:
    """Why this convolution's filters cannot go without those of others, or None."""
    is_read = False
    for item in items:
        module, kind = item.node.module, item.node.type
        label = names.get(module, "another layer")
        if module is layer:
            continue
        if kind == OPTYPE.OUTPUT:
            return "the network returns its outputs"
        if kind == OPTYPE.PARAMETER:
            return f"its outputs are combined with the parameter {label}"
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if getattr(module, "groups", 1) > 1 and not is_depthwise(module):
                return f"its outputs feed the grouped convolution {label}"
            if item.side == "out" and not is_depthwise(module):
                return f"its outputs are coupled with those of {label} (a sum or a gate)"
            is_read |= item.side == "in"
        elif list(module.parameters(recurse=False)) and not isinstance(module, _CHANNELWISE):
            return f"its outputs go through {label}, a {type(module).__name__}"
    return None if is_read else "no layer reads its outputs, so they are the network's own output"
