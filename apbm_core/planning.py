"""How many filters each group of layers keeps, so that a target of parameters, MACs or latency is met.

Sizes are computed (costs.py); latency is measured on networks that are cut for it.
"""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from apbm_core import similarity
from apbm_core.anatomy import Anatomy, check_names
from apbm_core.costs import CostTable
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.forward import call, evaluation_mode
from apbm_core.groups import Group, outputs_of
from apbm_core.width_rules import balanced_path, balanced_widths, entropy_budget_widths, uniform_widths
from apbm_core.widths import WidthProblem

By = Literal["params", "macs", "latency"]
Rule = Literal["uniform", "balanced", "entropy"]

_LATENCY_TOLERANCE = 0.02  # in shares of the dense network's: what its measurements differ by


def plan(
    model: nn.Module,
    example_inputs: Any,
    keep: float | Mapping[str, float | int] = 0.5,
    ignore: Collection[str] = (),
    groups: bool = True,
    target: float | None = None,
    by: By = "params",
    widths: Rule = "uniform",
    min_filters: int = 1,
    multiple: int = 1,
) -> "Plan":
    """What :func:`apbm_core.fuse` would do, without doing it: a table of the layers, what they keep, and why not.

    Arguments and errors are those of ``fuse``.
    """
    anatomy = Anatomy(model, example_inputs, groups)
    return plan_of(anatomy, wanted_units(anatomy, keep, ignore, target, by, widths, min_filters, multiple))


def wanted_units(
    anatomy: Anatomy,
    keep: float | Mapping[str, float | int],
    ignore: Collection[str] = (),
    target: float | None = None,
    by: By = "params",
    widths: Rule = "uniform",
    min_filters: int = 1,
    multiple: int = 1,
) -> dict[str, int]:
    """How many units each group keeps, by the groups' names; arguments and errors as those of ``fuse``."""
    reasons, model = anatomy.reasons, anatomy.model
    check_names(ignore, reasons)
    if min_filters < 1 or multiple < 1:
        raise ConfigError(f"min_filters is {min_filters} and multiple {multiple}; both are whole numbers from 1.")
    if isinstance(keep, Mapping):
        check_names(keep, reasons)
        said: dict[str, str] = {}  # group -> the layer that speaks for it
        for name in (name for name in reasons if name in keep and name not in ignore):
            if reasons[name] is not None:
                raise UnsupportedNetwork(f"layer {name!r} cannot be fused: {reasons[name]}.")
            first = said.setdefault(anatomy.group_of(name).name, name)
            if keep[first] != keep[name]:
                raise ConfigError(f"layer {name!r} is tied to {first!r}, but keep says {keep[name]} and {keep[first]}.")
        wanted = {group: _units_for(anatomy.groups[group], name, keep[name]) for group, name in said.items()}
    else:
        wanted = {name: _units_for(group, name, keep) for name, group in anatomy.groups.items()}
    wanted = {name: units for name, units in wanted.items() if not set(anatomy.groups[name].layers) & set(ignore)}
    if not wanted:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4] if reason)
        raise UnsupportedNetwork(
            f"no layer of this {type(model).__name__} can be fused ({why or 'it has no layer that others read'}). "
            "Networks whose blocks have inner convolutions, such as VGG, ResNet or DenseNet, can."
        )
    if target is not None:
        return units_for_target(anatomy, list(wanted), target, by, widths, min_filters, multiple)
    return {name: allowed_units(anatomy.groups[name], units, min_filters, multiple) for name, units in wanted.items()}


def _units_for(group: Group, layer: str, share: float | int) -> int:
    """How many units a group keeps, whose layer ``layer`` keeps this share or number of its filters."""
    together = group.layers[layer].shape[1]
    kept = parse_keep(share, group.units * together, layer)
    if not isinstance(share, Integral):
        return parse_keep(share, group.units, layer)
    if kept % together:
        raise ConfigError(f"layer {layer!r} keeps {together} filters together; {share} is no multiple of that.")
    return kept // together


def parse_keep(value: int | float, n: int, name: str) -> int:
    """Number of filters that ``keep`` asks for in a layer of n: a ratio in (0, 1] as a float, or an int from 1 to n.

    A ratio keeps round(ratio * n) filters, at least one. The type decides: ``1`` is one filter, ``1.0`` is all of them.

    Raises:
        ConfigError: If ``value`` is neither; the message names the layer ``name``.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and 1 <= value <= n:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < value <= 1:
        return max(1, round(float(value) * n))
    raise ConfigError(
        f"keep for layer {name!r} is {value!r}; give a ratio above 0 and up to 1.0 (a float), "
        f"or a whole number of filters from 1 to {n} (an int)."
    )


def units_for_target(
    anatomy: Anatomy,
    names: Collection[str],
    target: float,
    by: By = "params",
    rule: Rule = "uniform",
    min_filters: int = 1,
    multiple: int = 1,
) -> dict[str, int]:
    """How many units each named group keeps so that ``target`` of the size is removed, and hardly more.

    Args:
        target: the share of the parameters, MACs or latency to remove, in (0, 1).
        by: what of; latency is the median time of a forward pass on the example inputs, on their device, now.
        rule: "uniform": the same share of every group; "balanced": the widths of the largest harmonic mean, which are
            narrow where filters are expensive; "entropy": more of groups whose filters resemble each other,
            the share (1 - R)^g of a group of redundancy R (methods.md 1, entropy budget), for trained networks.

    Raises:
        ConfigError: ``target`` is out of range, or more than these layers have.
    """
    if not 0 < target < 1:
        raise ConfigError(f"target is {target!r}; give the share to remove, above 0 and below 1.")
    if by not in ("params", "macs", "latency") or rule not in ("uniform", "balanced", "entropy"):
        raise ConfigError(
            f"by = {by!r}, widths = {rule!r}; by is params, macs or latency, widths uniform, balanced or entropy."
        )
    costs = CostTable.of(anatomy)
    groups = [anatomy.groups[name] for name in costs.widths if name in names]
    dense, limits = [group.units for group in groups], {"multiple": multiple, "minimum": min_filters}
    limits["copies"] = [group.copies for group in groups]

    def named(widths: Sequence[int]) -> dict[str, int]:
        return {group.name: width for group, width in zip(groups, widths, strict=True)}

    if by == "latency":
        measured = {"tolerance": _LATENCY_TOLERANCE, "is_measured": True}
        size = lambda widths: _latency(anatomy, named(widths))  # noqa: E731
        problem = WidthProblem(dense, size, target, **limits, **measured)
    else:
        problem = WidthProblem(dense, costs.size_function(by, names), target, **limits, from_below=True)
    if rule == "entropy":
        solution = entropy_budget_widths(problem, [_redundancy(anatomy, group) for group in groups])
    elif rule == "balanced" and by == "latency":  # what another filter takes is too little to measure
        path = list(balanced_path(WidthProblem(dense, costs.size_function("params", names), 0.0, **limits)))
        solution, _ = problem.meet_along(lambda share: path[min(round(share * len(path)), len(path) - 1)])
    else:
        solution = balanced_widths(problem) if rule == "balanced" else uniform_widths(problem)
    return named(solution.widths)


def allowed_units(group: Group, wanted: float, min_filters: int = 1, multiple: int = 1) -> int:
    """The number of units next to ``wanted`` that keeps ``min_filters`` and a multiple of ``multiple`` filters."""
    kept = max(1, round(wanted), -(-min_filters // group.copies))
    while (kept * group.copies) % multiple and kept < group.units:
        kept += 1
    return min(kept, group.units)


def _redundancy(anatomy: Anatomy, group: Group) -> float:
    """``R = mean_i exp(H_i) / n`` at tau = 1 over the group's first layer: the share that a filter resembles."""
    layer = dict(anatomy.model.named_modules())[group.name]
    rows = layer.weight.detach().transpose(0, 1) if getattr(layer, "transposed", False) else layer.weight.detach()
    n = len(rows)
    log_p = similarity.log_similarity(similarity.scale_free(similarity.pairwise_distances(rows)), math.log(max(n, 2)))
    return min(0.999, similarity.entropy(log_p).exp().mean().item() / n)


def _latency(anatomy: Anatomy, units: Mapping[str, int], calls: int = 7) -> float:
    """Median seconds of a forward pass of the network cut to so many units (which ones makes no difference)."""
    model = anatomy.cut({name: torch.arange(count) for name, count in units.items()})[0] if units else anatomy.model
    times = []
    with torch.no_grad(), evaluation_mode(model):
        for _ in range(calls + 2):
            start = time.perf_counter()
            call(model, anatomy.inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return median(times[2:])


@dataclass(frozen=True)
class Plan:
    """What would become of each layer; prints as a table, and :meth:`frame` is a DataFrame where pandas is there.

    Attributes:
        rows: one a layer: its name, group, filters, kept, parameters, MACs, and why not (where it is left alone).
        parameters, macs: of the whole network, dense and then.
    """

    rows: tuple[dict[str, Any], ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]

    def frame(self) -> Any:
        """The rows as a pandas DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError(f"pandas is not installed ({error}); rows holds the same.") from None
        return pandas.DataFrame(list(self.rows))

    def __str__(self) -> str:
        heads = list(self.rows[0]) if self.rows else []
        cells = [heads]
        for row in self.rows:
            cells.append([f"{value:,}" if isinstance(value, int) else value for value in row.values()])
        widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
        numbers = {"filters", "kept", "parameters", "MACs"}
        lines = [
            "  ".join(
                cell.rjust(width) if head in numbers else cell.ljust(width)
                for head, cell, width in zip(heads, row, widths, strict=True)
            ).rstrip()
            for row in cells
        ]
        (p0, p1), (m0, m1) = self.parameters, self.macs
        lines.append(f"{p0:,} -> {p1:,} parameters ({1 - p1 / max(p0, 1):.1%} less), {m0:,} -> {m1:,} MACs")
        return "\n".join(lines)


def plan_of(anatomy: Anatomy, units: Mapping[str, int]) -> Plan:
    """The table of what keeping so many units of these groups would come to."""
    costs, rows, modules = CostTable.of(anatomy), [], dict(anatomy.model.named_modules())
    at, group_of = costs.complete(units), {layer: group for group in anatomy.groups.values() for layer in group.layers}
    for name, reason in anatomy.reasons.items():
        group, row = group_of.get(name), costs.row(name)
        why = reason or ("" if group.name in units else "not asked for")
        rows.append(
            {"layer": name, "group": group.name if group else "", "filters": outputs_of(modules[name])}
            | {"kept": row.outputs.at(at), "parameters": row.parameters(at), "MACs": round(row.macs(at))}
            | {"why not": why}
        )
    return Plan(tuple(rows), (costs.parameters(), costs.parameters(units)), (costs.macs(), costs.macs(units)))
