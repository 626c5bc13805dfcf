"""Exact parameter and multiply-accumulate counts, the two sizes that every result is reported against."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apbm_core.copies import plain_copy
from apbm_core.errors import ConfigError


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars, each shared parameter once.

    BatchNorm, bias and linear parameters count; buffers and frozen parameters do not. A fused network counts its
    filter banks, which is what is being trained; call ``compact`` first for the size that is deployed.
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(model: nn.Module, input_shape: Sequence[int] = (3, 32, 32)) -> int:
    """Multiply-accumulates of the convolutions and matrix products in the forward pass of one image.

    Counted in evaluation mode by torch's ``FlopCounterMode`` (two operations each) on a copy without memory, so the
    model's mode, device, gradients and statistics stay as they are. Parametrised weights are evaluated beforehand: a
    fused network counts as the small network it deploys as. Forward hooks run once, on tensors without values.

    Args:
        model: A network that takes a (1, *input_shape) tensor.
        input_shape: Channels, height and width of one image.

    Raises:
        ConfigError: If ``input_shape`` is not made of positive whole numbers.
    """
    shape = tuple(input_shape)
    if not shape or not all(isinstance(side, Integral) and side >= 1 for side in shape):
        raise ConfigError(f"input_shape is {input_shape!r}; give channels, height and width, such as (3, 32, 32).")
    replica = plain_copy(getattr(model, "_orig_mod", model)).eval().to("meta")  # torch.compile keeps it in _orig_mod
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        replica(torch.empty(1, *shape, dtype=dtype, device="meta"))
    return counter.get_total_flops() // 2
