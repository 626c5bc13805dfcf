r"""Passing the input on: a filter is its own input channel plus what it learns, with a learned amount of each.

A deep network without shortcuts learns slowly from random filters, for each layer scrambles what the one before it
found. With

.. math:: \tilde W_k = a_k \, \delta_k + b_k \, V_k

the k-th filter starts as the k-th input channel, seen through its middle tap, plus half of an ordinary random start
``V_k``, so the image reaches the last layer from the first step on. ``a`` and ``b`` are learned and not decayed:
training decides how much of the input goes on being passed (Zagoruyko and Komodakis, *DiracNets*, 2017). ``V`` may
itself be a fusion, the ``P W`` of :mod:`apbm_core.fusion`.

In code it is a parametrization of an ordinary convolution's weight, behind the fusion's if there is one. It costs one
addition of the size of the weight, and deployment writes the sum into the convolution.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from apbm_core.branches import own_tap, passed_channels
from apbm_core.errors import ConfigError, UnsupportedNetwork


class InputPassing(nn.Module):
    """The parametrization ``V (m, c_in / groups, k, k) -> a delta + b V`` of one convolution's weight.

    Args:
        conv: the convolution, of any kernel, stride, padding, dilation and number of groups.
        amount: what ``a`` starts at.
        share: what ``b`` starts at.

    Raises:
        UnsupportedNetwork: no tap of its kernel meets the output's own place, or it has no channel to pass on.
    """

    no_weight_decay = ("a", "b")

    def __init__(self, conv: nn.Conv2d, amount: float = 1.0, share: float = 0.5):
        super().__init__()
        if reason := why_not_passing(conv):
            raise UnsupportedNetwork(f"this convolution cannot pass its input on: {reason}.")
        weight = conv.weight
        shape = (conv.out_channels, 1, 1, 1)
        self.register_buffer("delta", identity_kernel(conv).to(weight))
        self.a = nn.Parameter(torch.full(shape, float(amount), dtype=weight.dtype, device=weight.device))
        self.b = nn.Parameter(torch.full(shape, float(share), dtype=weight.dtype, device=weight.device))

    def forward(self, filters: Tensor) -> Tensor:
        if len(filters) == len(self.a):
            return self.a * self.delta + self.b * filters
        own, responses = filters.tensor_split([len(self.a)])  # unimportant filters that answer in a branch pass nothing
        return torch.cat([self.a * self.delta + self.b * own, responses])


def identity_kernel(conv: nn.Conv2d) -> Tensor:
    """``delta``: the kernel (m, c_in / groups, k, k) that passes input channel k on to output k, as far as both go."""
    kernel = torch.zeros(conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    row, column = own_tap(conv)
    out = torch.arange(passed_channels(conv))
    kernel[out, out % kernel.shape[1], row, column] = 1
    return kernel


def why_not_passing(conv: nn.Conv2d) -> str | None:
    """None if the convolution can pass its input on, else the reason."""
    if isinstance(conv.padding, str):
        return f"its padding is {conv.padding!r}; give it as numbers"
    if own_tap(conv) is None:
        return f"none of its {conv.kernel_size} taps meets the output's own place"
    if not passed_channels(conv):
        return "its groups read other channels than those of their outputs' numbers"
    return None


def pass_inputs(
    model: nn.Module, layers: Collection[str] | None = None, amount: float = 1.0, share: float = 0.5
) -> dict[str, str]:
    """Let convolutions of ``model`` pass their inputs on, in place: all that can, or those named.

    Call it before the optimizer is made, and after :func:`apbm_core.fuse`, if that is called.

    Returns:
        Convolution -> why it does not pass its input on; empty if all do.

    Raises:
        ConfigError: an unknown name, or a layer that passes its input on already.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if unknown := [name for name in layers or () if name not in convs]:
        raise ConfigError(f"no convolution is called {unknown[0]!r}; the network has {', '.join(convs)}.")
    left = {}
    for name, conv in convs.items():
        if layers is not None and name not in layers:
            continue
        if reason := why_not_passing(conv):
            left[name] = reason
            continue
        if any(isinstance(step, InputPassing) for step in conv.modules()):
            raise ConfigError(f"layer {name!r} passes its input on already; call pass_inputs once.")
        parametrize.register_parametrization(conv, "weight", InputPassing(conv, amount, share))
    return left


@torch.no_grad()
def start_as_identity(conv: nn.Conv2d, start: str = "replace", amount: float = 1.0) -> None:
    """Let the first filters of a convolution start as the identity, in place; nothing is learned in another way.

    Args:
        conv: see :func:`why_not_passing`.
        start: "replace" the filters that pass a channel on (airbench), or "add" the identity to their random start.
        amount: how much of the input they pass on.
    """
    delta = identity_kernel(conv).to(conv.weight)
    if start == "replace":
        conv.weight[delta.flatten(1).any(1)] = 0
    conv.weight.add_(amount * delta)
