"""Attention's heads: where a network's code tells them apart by reshaping, they are what can go.

Between the reshaping that takes the channels of queries, keys and values apart into heads and the one that puts those
of the result together again, each head is one channel to torch-pruning's graph: whatever is computed there, products of
matrices and softmax, keeps heads apart, or the proof finds it out (proof.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from torch_pruning.dependency import index_mapping, shape_infer
from torch_pruning.dependency.node import Node
from torch_pruning.ops import OPTYPE

_PARTIAL = (
    index_mapping._SplitIndexMapping,
    index_mapping._ConcatIndexMapping,
    index_mapping._SliceIndexMapping,
)


@dataclass(frozen=True)
class Heads:
    """Where channels are told apart into ``count`` heads, each of ``width`` channels of the result."""

    apart: Sequence[Node]
    count: int
    width: int


def tell_heads(graph) -> list[Heads]:
    """Let the graph speak of heads between the reshapings that take channels apart into them and put them together.

    Args:
        graph: a ``ChannelGraph``; its reshapings know their shapes, as ``node.grad_fn.before`` and ``after``.
    """
    found, ending = [], graph.ending
    for node in graph.module2node.values():
        merged = _merged(node) if node.type == OPTYPE.RESHAPE else None
        if merged is None or len(ending[node]) != 1:
            continue
        read = shape_infer.infer_in_channels_recursively(graph, node, [0])
        if read not in (None, prod(merged)) and all(reader.type != OPTYPE.SPLIT for reader in node.outputs):
            continue
        heads, width = merged
        inside, apart = _between(node, heads)
        if not apart or not all(_is_of_channels(graph, start, ending[start], sizes) for start, sizes in apart.items()):
            continue
        for inner in inside:
            for neighbour in (inner, *inner.inputs, *inner.outputs):
                for dependency in neighbour.dependencies:
                    if inner in (dependency.source, dependency.target):
                        kept = [m for m in dependency.index_mapping if not isinstance(m, _PARTIAL)]
                        dependency.index_mapping[:] = kept
            if inner.type == OPTYPE.SPLIT:
                inner.module.split_sizes = None
        for start, sizes in apart.items():
            _map(ending[start][0], *_head_of_channel(sizes, heads))
        of_head = [list(range(head * width, (head + 1) * width)) for head in range(heads)]
        _map(ending[node][0], of_head, [[channel // width] for channel in range(heads * width)])
        found.append(Heads(list(apart), heads, width))
    return found


def _merged(node: Node) -> tuple[int, int] | None:
    """The sizes of two neighbouring dimensions that a reshaping makes one of; what is behind may change by itself."""
    before, after = _shapes(node)
    for dim in range(1, min(len(after), len(before) - 1)):
        others_stay = before[:dim] == after[:dim] and prod(before[dim + 2 :]) == prod(after[dim + 1 :])
        if others_stay and before[dim] * before[dim + 1] == after[dim] > before[dim + 1]:
            return before[dim], before[dim + 1]
    return None


def _taken_apart(node: Node) -> tuple[int, ...] | None:
    """The sizes into which a reshaping takes one dimension apart; what is behind may change by itself."""
    before, after = _shapes(node)
    for dim in range(1, len(before)):
        for end in range(len(after), dim + 1, -1):
            sizes = after[dim:end]
            others_stay = before[:dim] == after[:dim] and prod(before[dim + 1 :]) == prod(after[end:])
            if others_stay and prod(sizes) == before[dim] > max(sizes):
                return sizes
    return None


def _is_of_channels(graph, start: Node, edges: list, sizes: tuple[int, ...]) -> bool:
    """Whether it is channels that a reshaping takes apart."""
    return len(edges) == 1 and graph.channels_on(edges[0]) == prod(sizes)


def _shapes(node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(getattr(node.grad_fn, "before", ())), tuple(getattr(node.grad_fn, "after", ()))


def _between(end: Node, heads: int) -> tuple[set[Node], dict[Node, tuple[int, ...]]]:
    """What lies between the end and the reshapings that take channels apart into heads, and those with their sizes."""
    inside, apart, waiting = set(), {}, list(end.inputs)
    while waiting:
        node = waiting.pop()
        if node in inside or node in apart or node.type == OPTYPE.PARAMETER:
            continue
        sizes = _taken_apart(node) if node.type == OPTYPE.RESHAPE else None
        if sizes is not None and heads in sizes:
            apart[node] = sizes
        elif list(getattr(node.module, "parameters", lambda: ())()):
            return set(), {}  # a layer, or a norm, of what is no channel there
        else:
            inside.add(node)
            waiting += node.inputs
    return inside, apart


def _head_of_channel(sizes: tuple[int, ...], heads: int) -> tuple[list[list[int]], list[list[int]]]:
    """Channel -> its head, and head -> its channels, where channels are counted through dimensions of these sizes."""
    places = [place for place, size in enumerate(sizes) if size == heads]
    inner = [place for place in places if place < len(sizes) - 1]
    step = prod(sizes[(inner or places)[-1] + 1 :])
    head_of = [[channel // step % heads] for channel in range(prod(sizes))]
    return head_of, [[channel for channel, (own,) in enumerate(head_of) if own == head] for head in range(heads)]


def _map(edge, forth: list[list[int]], back: list[list[int]]) -> None:
    """Let an edge lead from each channel to those of ``forth``, and the other way by ``back``."""

    def by(table: list[list[int]]) -> Callable:
        pair = index_mapping._helpers._HybridIndex
        return lambda pairs: [pair(new, r) for c, r in pairs if c < len(table) for new in table[c]]

    edge.forth.index_mapping.append(by(forth))
    edge.back.index_mapping.insert(0, by(back))
