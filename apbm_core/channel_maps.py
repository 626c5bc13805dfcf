"""What each edge of torch-pruning's graph does to the numbers of channels, told to it where autograd knows better.

Which result of a split an edge reads, where a concatenation's parts begin, and how a reshaping, a gate or a shuffle of
pixels renumbers channels.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch_pruning
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.node import Node
from torch_pruning.ops import OPTYPE

from apbm_core.heads import Heads, tell_heads


class Pair(NamedTuple):
    """A channel, and the one of those asked for that it hangs on; the names are torch-pruning's."""

    idx: int
    root_idx: int


class ChannelGraph(torch_pruning.DependencyGraph):
    """torch-pruning's graph, with the numbers put right that it maps channels to.

    Attributes:
        heads: of attention, of which the graph speaks where they are told apart.
        ending, beginning: node -> the edges that end, or begin, there.
    """

    heads: list[Heads]
    ending: Mapping[Node, list["_Edge"]]
    beginning: Mapping[Node, list["_Edge"]]

    def build_dependency(self, *args: Any, **kwargs: Any) -> "ChannelGraph":
        super().build_dependency(*args, **kwargs)
        self.ending, self.beginning, self._channels = defaultdict(list), defaultdict(list), {}
        for edge in self._edges:
            self.ending[edge.reader].append(edge)
            self.beginning[edge.maker].append(edge)
        for node in self.module2node.values():  # torch-pruning's map of repeated heads forgets whose channels they are
            for edge in node.dependencies:
                edge.index_mapping[:] = [
                    m for m in edge.index_mapping if not isinstance(m, index_mapping._GQAIndexMapping)
                ]
        _tell_parts(self)
        self.heads = tell_heads(self)
        return self

    def _build_dependency(self, module2node: dict) -> None:
        super()._build_dependency(module2node)
        self._edges = list(_edges_of(self))
        _tell_reshapings(self)  # before anything is concluded from them
        known = Counter(edge.reader for edge in self._edges if edge.reader.type == OPTYPE.CONCAT)
        for node, count in known.items():
            if count == len(node.inputs):  # told later; torch-pruning might add what it does not know
                node.module.concat_sizes = [0] * count

    def channels_on(self, edge: "_Edge") -> int | None:
        """How many channels the tensor on an edge has, by what was made last of them; None where that is not known."""
        node, into = edge.maker, self.ending[edge.maker]
        if node not in self._channels:
            self._channels[node] = self.get_out_channels(node)  # of a layer, norm or parameter
            if self._channels[node] is None and node.type not in (OPTYPE.SPLIT, OPTYPE.SLICE):
                self._channels[node] = self._worked_out(node, into)
        if node.type in (OPTYPE.SPLIT, OPTYPE.SLICE) and into:
            whole, dim = self.channels_on(into[0]), _dimension(node.grad_fn, into[0].shape)
            return edge.shape[dim] if whole == into[0].shape[dim] else whole
        return self._channels[node]

    def _worked_out(self, node: Node, into: list["_Edge"]) -> int | None:
        known = [count for count in map(self.channels_on, into) if count is not None]
        if node.type == OPTYPE.CONCAT and len(known) == len(into) > 0:
            dim = _dimension(node.grad_fn, into[0].shape)
            if all(count == edge.shape[dim] for count, edge in zip(known, into, strict=True)):
                return sum(known)
        name = node.grad_fn.name() if hasattr(node.grad_fn, "name") else ""
        told = getattr(node.grad_fn, "_saved_self_sizes", ())
        if known and name.startswith("PixelShuffle"):
            return known[0] // node.grad_fn._saved_upscale_factor**2
        if known and name.startswith("PixelUnshuffle"):
            return known[0] * node.grad_fn._saved_downscale_factor**2
        if known and name.startswith("GluBackward"):
            return known[0] // 2
        if node.type == OPTYPE.RESHAPE and told:
            return node.grad_fn.after[1]
        return known[0] if known else None


def parts_of(node: Node, shape: torch.Size) -> tuple[int, list[int]]:
    """The dimension in which a split splits a tensor of this shape, and the sizes of the parts."""
    dim = _dimension(node.grad_fn, shape)
    if not hasattr(node.grad_fn, "_saved_split_size"):
        return dim, list(node.grad_fn._saved_split_sizes)
    size = node.grad_fn._saved_split_size
    return dim, [min(size, shape[dim] - start) for start in range(0, shape[dim], size)]


class _Edge(NamedTuple):
    """From the node that makes a tensor to one that reads it, both ways; of several results, which one is read."""

    maker: Node
    reader: Node
    forth: Any
    back: Any
    result: int
    shape: torch.Size


def _edges_of(graph: torch_pruning.DependencyGraph) -> Iterator[_Edge]:
    """The edges of which autograd knows the tensor."""
    for reader in graph.module2node.values():
        sources = [
            (function, result)
            for function, result in getattr(reader.grad_fn, "next_functions", ())
            if function is not None
        ]
        sources = [
            (function, result)
            for function, result in sources
            if not hasattr(function, "variable") or any(function.variable is p for p, _ in graph.unwrapped_parameters)
        ]
        if len(sources) != len(reader.inputs):  # a module that is called more than once
            continue
        seen: Counter = Counter()
        for (function, result), maker, back in zip(sources, reader.inputs, reader.dependencies, strict=False):
            places = [place for place, node in enumerate(maker.outputs) if node is reader]
            forth = maker.dependencies[len(maker.inputs) + places[seen[maker]]]
            seen[maker] += 1
            if hasattr(function, "variable"):
                shape = function.variable.shape
            else:
                shape = torch.Size(function._input_metadata[result].shape)
            yield _Edge(maker, reader, forth, back, result, shape)


def _tell_reshapings(graph: torch_pruning.DependencyGraph) -> None:
    """Tell a graph the sizes of what is reshaped, under the name that torch-pruning looks for.

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
        shapes = {"before": tuple(before), "after": tuple(after)}
        node.grad_fn = SimpleNamespace(_saved_self_sizes=told, function=node.grad_fn, **shapes)


def _tell_parts(graph: ChannelGraph) -> None:
    """Tell a graph which channels each edge of a split, a concatenation, a gate or a shuffle of pixels speaks of."""

    def is_of_channels(edge: _Edge, dim: int) -> bool:
        return edge.shape[dim] == graph.channels_on(edge)

    for node in graph.module2node.values():
        into, out_of = graph.ending[node], graph.beginning[node]
        name = node.grad_fn.name() if hasattr(node.grad_fn, "name") else ""
        if node.type == OPTYPE.SPLIT and len(into) == 1 and len(out_of) == len(node.outputs):
            dim, sizes = parts_of(node, into[0].shape)
            is_told = is_of_channels(into[0], dim)
            node.module.split_sizes = sizes if is_told else None
            for edge in out_of:
                part = sum(sizes[: edge.result]), sizes[edge.result]
                _set_part(edge.forth, edge.back, part if is_told else None)
        elif node.type == OPTYPE.CONCAT and len(into) == len(node.inputs) and node.enable_index_mapping:
            dim = _dimension(node.grad_fn, into[0].shape)
            is_told, start = all(is_of_channels(edge, dim) for edge in into), 0
            for edge in into:
                _set_part(edge.back, edge.forth, (start, edge.shape[dim]) if is_told else None)
                start += edge.shape[dim]
        elif name.startswith(("PixelShuffle", "PixelUnshuffle")):
            factor = getattr(node.grad_fn, "_saved_upscale_factor", None) or node.grad_fn._saved_downscale_factor
            together, apart = (index_mapping._FlattenIndexMapping(factor**2, reverse) for reverse in (True, False))
            if "Un" in name:
                together, apart = apart, together
            for edge in into:
                edge.forth.index_mapping.append(together)
                edge.back.index_mapping.insert(0, apart)
        elif name.startswith("GluBackward"):
            for edge in into:
                half = edge.shape[_dimension(node.grad_fn, edge.shape)] // 2
                edge.forth.index_mapping.append(lambda pairs, half=half: [Pair(c % half, r) for c, r in pairs])
                edge.back.index_mapping.insert(
                    0, lambda pairs, half=half: [Pair(c + more, r) for c, r in pairs for more in (0, half)]
                )


def _set_part(forth: Any, back: Any, part: tuple[int, int] | None) -> None:
    """Let an edge from the whole to a part of its channels, (first, how many), say which they are; and its reverse."""
    for dependency in (forth, back):
        dependency.index_mapping[:] = [m for m in dependency.index_mapping if not isinstance(m, _PARTS)]
    if part is not None:
        start, size = part
        forth.index_mapping.insert(0, lambda pairs: [Pair(c - start, r) for c, r in pairs if 0 <= c - start < size])
        back.index_mapping.append(lambda pairs: [Pair(c + start, r) for c, r in pairs])


_PARTS = (index_mapping._SplitIndexMapping, index_mapping._ConcatIndexMapping)


def _dimension(function: Any, shape: torch.Size) -> int:
    dim = function._saved_dim
    return (dim - 2**64 if dim >= 2**63 else dim) % len(shape)
