"""What a network costs at any filter counts, parameters and multiply-accumulates, from one trace of the dense network.

A layer's cost is a product, ``out * in * kernel``, and both of its sides are affine in the filter counts of the layers
that feed it: so many channels that stay, and so many for each filter (one; more behind a flattened map; those of
several layers behind a concatenation). torch-pruning's dependency graph says which. So one trace prices every network
that :func:`apbm_core.surgery.slim` could cut out of the dense one, and none of them is built::

    costs = CostTable.trace(model, example_inputs)
    costs.parameters({"features.conv1": 32})        # everything else dense
    costs.macs({"features.conv1": 32})
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apbm_core.anatomy import check_names, trace_dependencies
from apbm_core.counting import count_parameters
from apbm_core.errors import ConfigError
from apbm_core.forward import evaluation_mode
from apbm_core.surgery import prunable_layers

By = Literal["params", "macs"]


@dataclass(frozen=True)
class Channels:
    """How many channels one side of a layer has: ``fixed`` ones, and for each named layer so many for each filter."""

    fixed: int
    per_filter: Mapping[str, int]

    def at(self, widths: Mapping[str, int]) -> int:
        """Their number at these filter counts."""
        return self.fixed + sum(each * widths[name] for name, each in self.per_filter.items())


@dataclass(frozen=True)
class LayerCost:
    """One layer with parameters that depend on the filter counts, or with multiply-accumulates.

    Attributes:
        name: its module's name.
        outputs: channels it puts out.
        inputs: channels that each of its outputs sums over; 1 for depthwise convolutions and for norms.
        kernel: weights for each pair of an input and an output, k * k; 0 for norms.
        positions: how often each weight is used for one image: the pixels of the output.
        vectors: trainable numbers for each output besides the weights: a bias; a norm's scale and shift.
        is_trained: whether the weights are trainable.
    """

    name: str
    outputs: Channels
    inputs: Channels
    kernel: int
    positions: int
    vectors: int
    is_trained: bool = True

    def weights(self, widths: Mapping[str, int]) -> int:
        """How many weights it has at these filter counts."""
        return self.kernel * self.outputs.at(widths) * self.inputs.at(widths) if self.kernel else 0


class CostTable:
    """Parameters and multiply-accumulates of a network as functions of its filter counts.

    What lies outside convolutions, linear layers and the norms between them is counted at its dense size.

    Attributes:
        widths: name -> filters of each prunable convolution of the dense network, in the network's order.
        layers: the table, a row a layer.
        fixed_parameters, fixed_macs: the cost of everything that is not in the table.
    """

    def __init__(self, widths: Mapping[str, int], layers: Sequence[LayerCost], parameters: int, macs: int):
        self.widths, self.layers = dict(widths), tuple(layers)
        self.fixed_parameters = self.fixed_macs = 0
        self.fixed_parameters, self.fixed_macs = parameters - self.parameters(), macs - self.macs()

    @classmethod
    def trace(cls, model: nn.Module, example_inputs: Tensor) -> "CostTable":
        """The table of a dense network.

        Args:
            model: any network of ``nn.Conv2d`` convolutions without parametrizations, on any device, the meta device
                included; not modified.
            example_inputs: one batch of images the network accepts, (N, c, h, w): multiply-accumulates are stated for
                one image of this size.

        Raises:
            UnsupportedNetwork: the network does not run on the inputs, or torch-pruning cannot trace it.
        """
        twin = copy.deepcopy(model)
        device = next((parameter.device for parameter in twin.parameters()), example_inputs.device)
        image = example_inputs[:1].to(device)
        widths = prunable_layers(twin, image)
        positions, macs = _positions(twin, image)
        coupled = _coupled(twin, image, widths)
        layers = [
            layer
            for name, module in twin.named_modules()
            if (layer := _row(name, module, coupled.get(name, {}), positions.get(name, 0), widths)) is not None
        ]
        return cls(widths, layers, count_parameters(model), macs)

    def parameters(self, widths: Mapping[str, int] | None = None, stripes: Mapping[str, int] | None = None) -> int:
        """Trainable parameters at these filter counts.

        Args:
            widths: filters of each layer; a layer that is not named is dense.
            stripes: where a convolution does not hold all of its weights, how many vectors of one weight for each of
                its inputs it does (:mod:`apbm_core.study.networks.stripes`).

        Raises:
            ConfigError: a name is not a prunable layer's.
        """
        at, stripes = self._complete(widths), stripes or {}
        total = self.fixed_parameters
        for layer in self.layers:
            if layer.is_trained:
                whole = layer.name not in stripes
                total += layer.weights(at) if whole else stripes[layer.name] * layer.inputs.at(at)
            total += layer.vectors * layer.outputs.at(at)
        return total

    def macs(self, widths: Mapping[str, int] | None = None) -> int:
        """Multiply-accumulates of one image at these filter counts; arguments and errors as :meth:`parameters`."""
        at = self._complete(widths)
        return self.fixed_macs + sum(layer.positions * layer.weights(at) for layer in self.layers if layer.positions)

    def size_function(self, by: By = "params") -> Callable[[Sequence[int]], int]:
        """``parameters`` or ``macs`` as a function of the filter counts in the order of ``widths``, made for searches.

        Raises:
            ConfigError: ``by`` is neither "params" nor "macs"; when called, the counts are not one a layer.
        """
        if by not in ("params", "macs"):
            raise ConfigError(f"by is {by!r}; choose 'params' or 'macs'.")
        constant, linear, pairs = self._polynomial(by)
        number = len(self.widths)

        def count(widths: Sequence[int]) -> int:
            if len(widths) != number:
                raise ConfigError(f"widths has {len(widths)} numbers; this network takes {number}.")
            total = constant
            for i, factor in linear:
                total += factor * widths[i]
            for i, j, factor in pairs:
                total += factor * widths[i] * widths[j]
            return total

        return count

    def _polynomial(self, by: By) -> tuple[int, list[tuple[int, int]], list[tuple[int, int, int]]]:
        """The cost multiplied out: its constant, its linear and its quadratic terms."""
        place = {name: i for i, name in enumerate(self.widths)}
        constant = self.fixed_parameters if by == "params" else self.fixed_macs
        linear: dict[int, int] = defaultdict(int)
        pairs: dict[tuple[int, int], int] = defaultdict(int)
        for layer in self.layers:
            weight = layer.kernel * (layer.is_trained if by == "params" else layer.positions)
            vectors = layer.vectors if by == "params" else 0
            outputs, inputs = layer.outputs, layer.inputs
            constant += weight * outputs.fixed * inputs.fixed + vectors * outputs.fixed
            for name, each in outputs.per_filter.items():
                linear[place[name]] += each * (weight * inputs.fixed + vectors)
            for name, each in inputs.per_filter.items():
                linear[place[name]] += each * weight * outputs.fixed
                for other, times in outputs.per_filter.items():
                    pairs[tuple(sorted((place[name], place[other])))] += each * times * weight
        kept = [(*where, factor) for where, factor in pairs.items() if factor]
        return constant, [(i, factor) for i, factor in linear.items() if factor], kept

    def _complete(self, widths: Mapping[str, int] | None) -> dict[str, int]:
        check_names(widths or {}, self.widths)
        return self.widths | dict(widths or {})


def _positions(model: nn.Module, image: Tensor) -> tuple[dict[str, int], int]:
    """How often each weight of a convolution or linear layer is used in one forward pass, by name; and all its MACs."""
    found: dict[str, int] = defaultdict(int)

    def count(name: str, module: nn.Module, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            found[name] += output.numel() // module.out_features
        else:
            found[name] += math.prod(output.shape[2:])

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: count(name, module, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    counter = FlopCounterMode(display=False)  # as counting.count_macs does
    try:
        with torch.no_grad(), evaluation_mode(model), counter:
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return found, counter.get_total_flops() // 2


def _coupled(
    model: nn.Module, image: Tensor, layers: Mapping[str, int]
) -> dict[str, dict[tuple[str, bool], tuple[str, int]]]:
    """Which layers' channels go with a filter: module name -> {(prunable layer, at the output): channels a filter}."""
    graph = trace_dependencies(model, image)
    found: dict[str, dict] = defaultdict(dict)
    for layer in layers:
        channels: dict[tuple[str, bool], set[int]] = defaultdict(set)
        group = graph.get_pruning_group(model.get_submodule(layer), torch_pruning.prune_conv_out_channels, [0])
        for dependency, indices in group:
            module = dependency.target.module
            name = graph._module2name.get(module)
            if isinstance(module, nn.Module) and list(module.parameters(recurse=False)):
                outputs = not isinstance(module, nn.Conv2d | nn.Linear) or graph.is_out_channel_pruning_fn(
                    dependency.handler
                )
                channels[name, outputs or _is_depthwise(module)].update(indices)
        for (name, outputs), indices in channels.items():
            found[name][layer, outputs] = len(indices)
    return found


def _row(
    name: str, module: nn.Module, coupled: Mapping[tuple[str, bool], int], positions: int, widths: Mapping[str, int]
) -> LayerCost | None:
    """The module's row, or None if its cost is the same at all filter counts."""

    def channels(count: int, outputs: bool) -> Channels:
        per_filter = {layer: each for (layer, at_output), each in coupled.items() if at_output == outputs}
        return Channels(count - sum(each * widths[layer] for layer, each in per_filter.items()), per_filter)

    if isinstance(module, nn.Linear):
        sides = channels(module.out_features, True), channels(module.in_features, False)
        bias = module.bias is not None and module.bias.requires_grad
        return LayerCost(name, *sides, 1, positions, int(bias), module.weight.requires_grad)
    if isinstance(module, nn.Conv2d):
        sides = channels(module.out_channels, True), channels(module.in_channels // module.groups, False)
        bias = module.bias is not None and module.bias.requires_grad
        kernel = math.prod(module.kernel_size)
        return LayerCost(name, *sides, kernel, positions, int(bias), module.weight.requires_grad)
    parameters = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
    if not coupled or not parameters:
        return None
    count = len(parameters[0])  # a norm's channels
    numbers = sum(parameter.numel() for parameter in parameters)
    if count == 1:  # a PReLU with one slope for all channels
        return None
    return LayerCost(name, channels(count, True), Channels(1, {}), 0, 0, numbers // count)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1
