"""The layers that a convolution's channels pass through next, and what a channel hands on to them when it goes.

Which norm and which layer follow a convolution is read off the order in which the network registers its modules, as
in every network of ``apbm_core.study.networks.models``: convolution, norm, then the next convolution or linear layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apbm_core.errors import UnsupportedNetwork
from apbm_core.forward import evaluation_mode


@dataclass(frozen=True)
class Followers:
    """The names of the layers that a convolution's channels pass through next."""

    norm: str
    reader: str  # the convolution or linear layer that takes the channels in
    reader_norm: str | None


def followers(model: nn.Module, convs: Iterable[str]) -> dict[str, Followers]:
    """For each named convolution, the norm behind it and the layer that reads it.

    Raises:
        UnsupportedNetwork: a named layer is not followed by a BatchNorm and a reader of matching channels.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    layers += [("", None)] * 4
    place = {name: i for i, (name, _) in enumerate(layers)}
    found = {}
    for name in convs:
        start = place.get(name, len(layers) - 4)  # an unknown name lands on the fillers, and is refused
        (_, conv), (norm_name, norm), (reader_name, reader), (next_name, after) = layers[start : start + 4]
        inputs = getattr(reader, "in_channels", getattr(reader, "in_features", None))
        width = getattr(conv, "out_channels", 0)
        is_chain = isinstance(norm, nn.BatchNorm2d) and norm.num_features == width and inputs and inputs % width == 0
        if not is_chain or (isinstance(reader, nn.Conv2d) and inputs != width):
            raise UnsupportedNetwork(
                f"layer {name!r} of this {type(model).__name__} is not a convolution that is followed by its BatchNorm "
                "and one layer that reads it; use a network of the study, or a method that ranks filters."
            )
        is_normed = isinstance(reader, nn.Conv2d) and isinstance(after, nn.BatchNorm2d)
        found[name] = Followers(norm_name, reader_name, next_name if is_normed else None)
    return found


def norms_behind(model: nn.Module, convs: Iterable[str]) -> dict[str, nn.BatchNorm2d]:
    """The norm behind each named convolution; errors as those of :func:`followers`."""
    return {name: model.get_submodule(chain.norm) for name, chain in followers(model, convs).items()}


@torch.no_grad()
def fold_constants(model: nn.Module, example_inputs: Tensor, constants: Mapping[str, Tensor]) -> None:
    """Hand the constant that a channel contributes on to the next layer, in place, so that the channel can go.

    A channel of constant value a adds a * (sum of the reader's weights on it) to each of the reader's outputs. It is
    taken off the running mean of the reader's norm, or else added to the reader's bias. Without zero padding, and
    through max-pooling, this is exact in evaluation; where the reader pads, pixels near the border saw less of the
    constant, and the mean over the map is taken, the best single value. In training mode a BatchNorm finds its
    own mean, so the fold then changes nothing but the statistics that training starts from.

    Args:
        model: the network that still has all its channels.
        example_inputs: one batch the network accepts; tells the size of the maps.
        constants: convolution -> (n,), what each of its channels is after the activation; 0 for channels that stay.

    Raises:
        UnsupportedNetwork: the layer that reads a channel has neither a norm nor a bias.
    """
    chains = followers(model, constants)
    sides = _input_sides(model, example_inputs, {chain.reader for chain in chains.values()})
    for name, values in constants.items():
        chain = chains[name]
        reader = model.get_submodule(chain.reader)
        values = values.to(reader.weight)
        if isinstance(reader, nn.Linear):
            contribution = reader.weight.unflatten(1, (len(values), -1)).sum(2) @ values
        else:
            maps = values.view(1, -1, 1, 1).expand(1, -1, *sides[chain.reader])
            outputs = F.conv2d(maps, reader.weight, None, reader.stride, reader.padding, reader.dilation)
            contribution = outputs.mean((0, 2, 3))
        if chain.reader_norm is not None:
            model.get_submodule(chain.reader_norm).running_mean -= contribution
        elif reader.bias is not None:
            reader.bias += contribution
        else:
            raise UnsupportedNetwork(f"layer {chain.reader!r} has neither a BatchNorm nor a bias to fold into.")


def _input_sides(model: nn.Module, example_inputs: Tensor, names: set[str]) -> dict[str, tuple[int, ...]]:
    sides = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: sides.update({name: tuple(inputs[0].shape[2:])})
        )
        for name in names
    ]
    try:
        with evaluation_mode(model):
            model(example_inputs[:1].to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return sides
