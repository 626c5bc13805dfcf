"""Exact parameter and multiply-accumulate counts, the two sizes that every result is reported against."""

import copy
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from apbm_core.errors import ConfigError
from apbm_core.models import RESNET_BLOCKS, RESNET_STAGES, VGG16_POOLS, check_model, dense_widths

SizeFunction = Callable[[Sequence[int]], int]


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
    replica = _plain_copy(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        replica(torch.empty(1, *shape, dtype=dtype, device="meta"))
    return counter.get_total_flops() // 2


def size_function(name: str, num_classes: int, by: str = "params", **options) -> SizeFunction:
    """The size of a network of ``models.py`` as a function of its widths, in closed form: no network is built.

    Args:
        name, num_classes, **options: As in ``build_model``.
        by: "params" for trainable parameters, "macs" for multiply-accumulates of one 3x32x32 image.

    Raises:
        ConfigError: On an unknown name, option or ``by``.
    """
    if by not in ("params", "macs"):
        raise ConfigError(f"by is {by!r}; choose 'params' or 'macs'.")
    check_model(name, num_classes, options)
    params = by == "params"
    layers = dense_widths(name)

    def conv(c_in: int, c_out: int, side: int, kernel: int = 3, bias: bool = False) -> int:
        """One convolution; its BatchNorm's scale and shift count as parameters only."""
        weights = kernel * kernel * c_in * c_out
        return weights + (2 + bias) * c_out if params else weights * side * side

    def linear(c_in: int) -> int:
        return (c_in + params) * num_classes

    def vgg16(widths: Sequence[int]) -> int:
        bias = options.get("conv_bias", True)
        inputs = (3, *widths[:-1])
        sides = [32 >> sum(pool < i for pool in VGG16_POOLS) for i in range(1, len(widths) + 1)]
        return sum(conv(*layer, bias=bias) for layer in zip(inputs, widths, sides, strict=True)) + linear(widths[-1])

    def resnet(widths: Sequence[int]) -> int:
        stem = RESNET_STAGES[0]
        total = conv(3, stem, 32) + linear(RESNET_STAGES[-1])
        blocks = RESNET_BLOCKS[name]
        for stage, c_out in enumerate(RESNET_STAGES):
            c_in, side = RESNET_STAGES[max(stage - 1, 0)], 32 >> stage
            if options.get("shortcut", "A") == "B" and stage > 0:
                total += conv(c_in, c_out, side, kernel=1)
            for width in widths[stage * blocks : (stage + 1) * blocks]:
                total += conv(c_in, width, side) + conv(width, c_out, side)
                c_in = c_out
        return total

    formula = vgg16 if name == "vgg16" else resnet

    def count(widths: Sequence[int]) -> int:
        if len(widths) != len(layers):
            raise ConfigError(f"widths has {len(widths)} numbers; {name} takes {len(layers)}.")
        return formula(widths)

    return count


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode, its parametrised weights replaced by their values."""
    replica = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()  # torch.compile keeps the network in _orig_mod
    for module in list(replica.modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach() for name in module.parametrizations}
            # remove_parametrizations would break the original: it edits the class, which deepcopy shares.
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, value in values.items():
                module.register_buffer(name, value)
    return replica.to("meta")
