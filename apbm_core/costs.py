"""What a network costs at any widths, parameters and multiply-accumulates, from one trace of the dense network.

A layer's cost is a product, ``out * in * kernel``, and both of its sides are affine in the widths of the groups of
layers that feed it: so many channels that stay, and so many for each unit (one, for a convolution by itself; more
behind a flattened map or where channels are tied; those of several groups behind a concatenation). The anatomy says
which. So one trace prices every network that could be cut out of the dense one, and none of them is built::

    costs = CostTable.trace(model, example_inputs)
    costs.parameters({"features.conv1": 32})        # everything else dense
    costs.macs({"features.conv1": 32})
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apbm_core.anatomy import Anatomy, check_names
from apbm_core.counting import count_parameters
from apbm_core.errors import ConfigError
from apbm_core.forward import call, evaluation_mode, tensors_in
from apbm_core.groups import LAYERS, is_depthwise, outputs_of

By = Literal["params", "macs"]


@dataclass(frozen=True)
class Channels:
    """How many channels one side of a layer has: ``fixed`` ones, and for each named group so many for each unit."""

    fixed: int
    per_unit: Mapping[str, int]

    def at(self, widths: Mapping[str, int]) -> int:
        """Their number at these widths."""
        return self.fixed + sum(each * widths[name] for name, each in self.per_unit.items())

    def fixing(self, widths: Mapping[str, int]) -> "Channels":
        """The same with the named ones at these widths for good."""
        fixed = {name: each for name, each in self.per_unit.items() if name in widths}
        left = {name: each for name, each in self.per_unit.items() if name not in widths}
        return Channels(self.fixed + sum(each * widths[name] for name, each in fixed.items()), left)


@dataclass(frozen=True)
class LayerCost:
    """One layer with parameters that depend on the widths, or with multiply-accumulates.

    Attributes:
        name: its module's name.
        outputs: channels it puts out.
        inputs: channels that each of its outputs sums over: those of its group in a grouped convolution; 1 for norms.
        kernel: weights for each pair of an input and an output, k * k; 0 for norms.
        positions: how often each weight is used for one example: the pixels of the output.
        vectors: trainable numbers for each output besides the weights: a bias; a norm's scale and shift.
        is_trained: whether the weights are trainable.
    """

    name: str
    outputs: Channels
    inputs: Channels
    kernel: int
    positions: float
    vectors: int
    is_trained: bool = True

    def weights(self, widths: Mapping[str, int]) -> int:
        """How many weights it has at these widths."""
        return self.kernel * self.outputs.at(widths) * self.inputs.at(widths) if self.kernel else 0

    def parameters(self, widths: Mapping[str, int], stripes: int | None = None) -> int:
        """Its trainable numbers; with only so many vectors of one weight an input in place of all, if that is given."""
        weights = self.weights(widths) if stripes is None else stripes * self.inputs.at(widths)
        return self.is_trained * weights + self.vectors * self.outputs.at(widths)

    def macs(self, widths: Mapping[str, int]) -> float:
        """Its multiply-accumulates for one example."""
        return self.positions * self.weights(widths) if self.positions else 0


class CostTable:
    """Parameters and multiply-accumulates of a network as functions of its widths.

    What lies outside convolutions, linear layers and what follows their channels is counted at its dense size.

    Attributes:
        widths: the dense network's: name -> units of each group of layers that can be cut, in the network's order. A
            group goes by its first layer; of a convolution by itself the units are its filters.
        layers: the table, a row a layer.
        fixed_parameters, fixed_macs: the cost of everything that is not in the table.
    """

    def __init__(self, widths: Mapping[str, int], layers: Sequence[LayerCost], parameters: int, macs: float):
        self.widths, self.layers = dict(widths), tuple(layers)
        self.fixed_parameters = parameters - sum(layer.parameters(self.widths) for layer in self.layers)
        self.fixed_macs = macs - sum(layer.macs(self.widths) for layer in self.layers)

    @classmethod
    def trace(cls, model: nn.Module, example_inputs: Any) -> "CostTable":
        """The table of a dense network whose widths are those of each ``nn.Conv2d`` that can be cut by itself.

        Args:
            model: any network without parametrizations, on any device, the meta device included; not modified.
            example_inputs: one batch of images the network accepts, (N, c, h, w): multiply-accumulates are stated for
                one image of this size.

        Raises:
            UnsupportedNetwork: the network does not run on the inputs, or torch-pruning cannot trace it.
        """
        device = next((parameter.device for parameter in model.parameters()), example_inputs.device)
        return cls.of(Anatomy(model, example_inputs[:1].to(device), coupled=False))

    @classmethod
    def of(cls, anatomy: Anatomy) -> "CostTable":
        """The table of a network whose groups are known; multiply-accumulates are those of one of its examples."""
        units = {name: anatomy.groups[name].units for name in anatomy.reasons if name in anatomy.groups}
        sides: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
        for name, group in anatomy.groups.items():
            for (target, side), each in group.sides.items():
                sides[target][side][name] = each
        positions, macs = _positions(anatomy)
        layers = [
            _row(name, module, sides.get(name, {}), positions.get(name, 0), units)
            for name, module in anatomy.model.named_modules()
        ]
        for name, parameter in anatomy.model.named_parameters():  # those outside of the layers that are known
            if parameter.requires_grad and (per_unit := sides.get(name, {}).get("itself")):
                count = sum(each * units[group] for group, each in per_unit.items())
                layers.append(LayerCost(name, Channels(0, per_unit), Channels(1, {}), 0, 0, parameter.numel() // count))
        return cls(units, [layer for layer in layers if layer is not None], count_parameters(anatomy.model), macs)

    def parameters(self, widths: Mapping[str, int] | None = None, stripes: Mapping[str, int] | None = None) -> int:
        """Trainable parameters at these widths.

        Args:
            widths: units of each group; one that is not named is dense.
            stripes: where a convolution does not hold all of its weights, how many vectors of one weight for each of
                its inputs it does (:mod:`apbm_core.study.networks.stripes`).

        Raises:
            ConfigError: a name is not one of ``self.widths``.
        """
        at, stripes = self.complete(widths), stripes or {}
        return self.fixed_parameters + sum(layer.parameters(at, stripes.get(layer.name)) for layer in self.layers)

    def macs(self, widths: Mapping[str, int] | None = None) -> int:
        """Multiply-accumulates of one example at these widths; arguments and errors as :meth:`parameters`."""
        at = self.complete(widths)
        return round(self.fixed_macs + sum(layer.macs(at) for layer in self.layers))

    def complete(self, widths: Mapping[str, int] | None) -> dict[str, int]:
        """These widths, and the dense ones of what they do not name."""
        check_names(widths or {}, self.widths)
        return self.widths | dict(widths or {})

    def row(self, name: str) -> LayerCost:
        """The row of a convolution or linear layer."""
        return next(row for row in self.layers if row.name == name)

    def size_function(self, by: By = "params", names: Collection[str] | None = None) -> "CostPolynomial":
        """``parameters`` or ``macs`` as a function of the widths of ``names``, in the order of ``widths``.

        Args:
            by: "params" or "macs".
            names: what the function's arguments are the widths of, by default of all; the others are dense.

        Raises:
            ConfigError: another ``by``, or an unknown name.
        """
        if by not in ("params", "macs"):
            raise ConfigError(f"by is {by!r}; choose 'params' or 'macs'.")
        check_names(names or (), self.widths)
        place = {name: i for i, name in enumerate(n for n in self.widths if names is None or n in names)}
        fixed = {name: width for name, width in self.widths.items() if name not in place}
        size = CostPolynomial(len(place), self.fixed_parameters if by == "params" else self.fixed_macs)
        for layer in self.layers:
            weight = layer.kernel * (layer.is_trained if by == "params" else layer.positions)
            vectors = layer.vectors if by == "params" else 0
            outputs, inputs = layer.outputs.fixing(fixed), layer.inputs.fixing(fixed)
            size.constant += weight * outputs.fixed * inputs.fixed + vectors * outputs.fixed
            for name, each in outputs.per_unit.items():
                size.linear[place[name]] += each * (weight * inputs.fixed + vectors)
            for name, each in inputs.per_unit.items():
                size.linear[place[name]] += each * weight * outputs.fixed
                for other, times in outputs.per_unit.items():
                    size.add_pair(place[name], place[other], each * times * weight)
        return size


class CostPolynomial:
    """A cost multiplied out, of degree two: made for searches, which ask for it very often.

    Attributes:
        constant, linear, pairs: its terms; ``pairs[i][j]`` is the factor of ``widths[i] * widths[j]``, for i != j in
            both of its places.
    """

    def __init__(self, number: int, constant: float):
        self.constant, self.linear = constant, [0] * number
        self.squares: list[float] = [0] * number
        self.pairs: list[dict[int, float]] = [defaultdict(int) for _ in range(number)]

    def add_pair(self, i: int, j: int, factor: float) -> None:
        if i == j:
            self.squares[i] += factor
        elif factor:
            self.pairs[i][j] += factor
            self.pairs[j][i] += factor

    def __call__(self, widths: Sequence[int]) -> int:
        """The size at these widths.

        Raises:
            ConfigError: they are not one number for each name.
        """
        if len(widths) != len(self.linear):
            raise ConfigError(f"widths has {len(widths)} numbers; this network takes {len(self.linear)}.")
        total = self.constant
        for i, width in enumerate(widths):
            total += width * (self.linear[i] + self.squares[i] * width)
            total += width * sum(factor * widths[j] for j, factor in self.pairs[i].items() if j < i)
        return round(total)

    def change(self, widths: Sequence[int], i: int, width: int) -> float:
        """How much larger the size is with ``width`` in place of ``widths[i]``."""
        slope = self.linear[i] + sum(factor * widths[j] for j, factor in self.pairs[i].items())
        return (width - widths[i]) * (slope + self.squares[i] * (width + widths[i]))


def _positions(anatomy: Anatomy) -> tuple[dict[str, float], float]:
    """How often each layer's weights are used for one example, by name; and all the network's multiply-accumulates."""
    found: dict[str, float] = defaultdict(int)
    batch = max(1, len(tensors_in(anatomy.inputs)[0]))

    def count(name: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        if getattr(module, "transposed", False):  # each value that is read meets every weight of its channel
            found[name] += given.numel() // module.in_channels
        else:
            found[name] += output.numel() // outputs_of(module)

    handles = [
        module.register_forward_hook(lambda module, given, output, name=name: count(name, module, given[0], output))
        for name, module in anatomy.model.named_modules()
        if isinstance(module, LAYERS)
    ]
    counter = FlopCounterMode(display=False)  # as counting.count_macs does
    try:
        with torch.no_grad(), evaluation_mode(anatomy.model), counter:
            call(anatomy.model, anatomy.inputs)
    finally:
        for handle in handles:
            handle.remove()
    per_example = {name: _ratio(positions, batch) for name, positions in found.items()}
    return per_example, _ratio(counter.get_total_flops() // 2, batch)


def _ratio(number: int, batch: int) -> float:
    """A quotient that stays a whole number where it is one."""
    return number / batch if number % batch else number // batch


def _row(
    name: str, module: nn.Module, sides: Mapping[str, Mapping[str, int]], positions: float, units: Mapping[str, int]
) -> LayerCost | None:
    """The module's row, or None if its cost is the same at all widths.

    Args:
        sides: "in" and "out" -> the groups that its channels go with -> how many for each unit.
        units: of the dense network's groups.
    """

    def channels(count: int, side: str, groups: int = 1) -> Channels:
        per_unit = {group: each // groups for group, each in sides.get(side, {}).items()}
        return Channels(count - sum(each * units[group] for group, each in per_unit.items()), per_unit)

    if isinstance(module, LAYERS):
        bias = module.bias is not None and module.bias.requires_grad
        outputs = channels(outputs_of(module), "out")
        if isinstance(module, nn.Linear):
            inputs, kernel = channels(module.in_features, "in"), 1
        else:
            inputs_of_one = module.in_channels // module.groups
            own = is_depthwise(module)  # its inputs are its outputs
            inputs = Channels(inputs_of_one, {}) if own else channels(inputs_of_one, "in", module.groups)
            kernel = math.prod(module.kernel_size)
        return LayerCost(name, outputs, inputs, kernel, positions, int(bias), module.weight.requires_grad)
    parameters = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
    if not sides or not parameters:
        return None
    count = parameters[0].shape[-1]  # a norm's or an embedding's channels
    numbers = sum(parameter.numel() for parameter in parameters)
    if count == 1:  # a PReLU with one slope for all channels
        return None
    return LayerCost(name, channels(count, "out"), Channels(1, {}), 0, 0, numbers // count)
