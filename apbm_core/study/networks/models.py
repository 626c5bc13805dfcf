"""The networks under comparison by name: a file of this folder that defines ``NETWORKS`` adds its own, as vgg.py does.

A *widths* table holds one filter count for each prunable convolution: all 13 of VGG16; in a ResNet each block's first
convolution, because the second one's outputs are tied to the rest of their stage by the residual addition.
"""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from numbers import Integral
from types import MappingProxyType

import torch
from torch import nn

from apbm_core.costs import CostTable
from apbm_core.errors import ConfigError
from apbm_core.study import networks
from apbm_core.study.discovery import modules_defining
from apbm_core.study.networks.definition import Network
from apbm_core.study.validation import closest


def all_networks() -> Mapping[str, Network]:
    """The networks by name."""
    return _found(tuple(networks.__path__))


@lru_cache(maxsize=8)
def _found(folders: tuple[str, ...]) -> Mapping[str, Network]:
    found: dict[str, Network] = {}
    for module in modules_defining("NETWORKS", networks.__name__, folders):
        twice = sorted(found.keys() & module.NETWORKS.keys())
        if twice:
            raise ConfigError(f"{module.__file__} names a network {twice[0]!r}, which another file has; rename one.")
        found |= module.NETWORKS
    return MappingProxyType(found)


def get_network(name: str) -> Network:
    """The network called ``name``.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    known = all_networks()
    if name not in known:
        raise ConfigError(f"there is no network {name!r}{closest(name, known)} Allowed: {', '.join(known)}.")
    return known[name]


def network_label(name: str) -> str:
    """How tables and plots call a network; one that is gone since it was recorded goes by its name."""
    known = all_networks()
    return known[name].label if name in known else name


def build_model(name: str, num_classes: int = 10, widths: Sequence[int] | None = None, **options) -> nn.Module:
    """Build a network with fresh weights drawn from torch's global random generator (seed it with ``manual_seed``).

    Convolutions start Kaiming-normal for ReLU in fan-in mode, std sqrt(2 / (c_in k^2)) (He et al., 2015, eq. 10); the
    linear layer normal with std 1 / sqrt(inputs); biases 0; BatchNorm scales 1. Under ``torch.device("meta")`` nothing
    is allocated.

    Args:
        name: One of ``all_networks()``.
        num_classes: Number of logits.
        widths: Filter counts in the order of ``prunable_convs(name)``; ``None`` is the dense network.
        **options: Those of the network: VGG16's ``conv_bias``, the ResNets' ``shortcut``.

    Raises:
        ConfigError: On an unknown name or option, or a value out of range.
    """
    check_model(name, num_classes, options)
    widths = dense_widths(name) if widths is None else _checked_widths(name, widths)
    model = get_network(name).module(int(num_classes), widths, **options)
    _initialise(model)
    return model


def check_model(name: str, num_classes: int, options: Mapping[str, object]) -> None:
    """Raise ConfigError unless ``build_model(name, num_classes, **options)`` describes a network."""
    allowed = get_network(name).options
    if not _is_positive_int(num_classes):
        raise ConfigError(f"num_classes is {num_classes!r}; it must be a whole number of at least 1.")
    for option, value in options.items():
        if option not in allowed:
            raise ConfigError(f"{name} has no option {option!r}; allowed: {', '.join(map(repr, allowed)) or 'none'}.")
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed[option]):
            raise ConfigError(f"{name}'s {option} is {value!r}; choose one of {', '.join(map(repr, allowed[option]))}.")


def check_training_side(name: str, side: int) -> None:
    """Raise ConfigError unless the network can be trained on square images of this side, in pixels."""
    network = get_network(name)
    least, most = network.sides
    if side < least or (most is not None and side > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(
            f"{name} cannot train on crops of {side} pixels: so that {network.needs}, it takes {allowed}. Set crop to "
            f"{allowed}, or to None for whole images, or use another network."
        )


def dense_widths(name: str) -> tuple[int, ...]:
    """Filter counts of ``prunable_convs(name)`` in the dense network."""
    return get_network(name).widths


def prunable_convs(name: str) -> tuple[str, ...]:
    """Module names of the convolutions that a widths table sizes, from input to output.

    Raises:
        ConfigError: The network's file states other dense widths than those of its prunable convolutions.
    """
    return tuple(cost_table(name).widths)


def cost_table(name: str, num_classes: int = 10, **options) -> CostTable:
    """What the network costs at any widths; MACs of one image of 32 x 32 pixels, or of the nearest size it takes.

    Args:
        name, num_classes, **options: As in ``build_model``.

    Raises:
        ConfigError: As in ``build_model``, or the network's file states other dense widths than those of its prunable
            convolutions.
    """
    check_model(name, num_classes, options)
    return _traced(get_network(name), int(num_classes), tuple(sorted(options.items())))


@cache
def _traced(network: Network, num_classes: int, options: tuple[tuple[str, object], ...]) -> CostTable:
    least, most = network.sides
    side = max(least, 32 if most is None else min(32, most))
    with torch.random.fork_rng(devices=[]):  # who asks for a size does not expect other random numbers afterwards
        model = network.module(num_classes, network.widths, **dict(options))
    costs = CostTable.trace(model, torch.zeros(1, 3, side, side))
    if tuple(costs.widths.values()) != network.widths:
        raise ConfigError(
            f"{network.label} states the dense widths {network.widths}, but its prunable convolutions have "
            f"{costs.widths}; state these."
        )
    return costs


def _is_positive_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def _checked_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    dense = dense_widths(name)
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise ConfigError(f"widths is {widths!r}; {name} takes a list of {len(dense)} filter counts.")
    if len(widths) != len(dense):
        raise ConfigError(f"widths has {len(widths)} numbers; {name} takes {len(dense)}, one for each prunable layer.")
    for place, (width, most) in enumerate(zip(widths, dense, strict=True)):
        if not _is_positive_int(width) or width > most:
            layer = prunable_convs(name)[place]
            raise ConfigError(
                f"The width of {name}'s {layer} is {width!r}; it must be a whole number from 1 to {most}."
            )
    return tuple(int(width) for width in widths)


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
