r"""3x3 convolutions of tiny maps as matrix products, in training, where that is measured to be faster.

A padded 3x3 convolution of an H x W map is a sum of nine products, one for each offset k of the kernel,

.. math:: Y_p = \sum_k X_{p + k} W_k^T \qquad \text{over the } k \text{ for which } p + k \text{ is on the map,}

X_p and Y_p being the (N, channels) matrices of one position for the whole batch. With the positions outermost in
memory, those of a row that take part in an offset are one matrix, so nothing is gathered, and products with the
padding's zeros are left out: they are 44 of 144 for each channel on a 4x4 map, 20 of 36 on a 2x2 one. Both gradients
are sums of the same kind. VGG16's last layers have such maps; libraries for convolutions are made for larger ones.

Whether it is faster depends on the machine, so :func:`choose_lowered` times each shape once in a process.
:func:`lowered` replaces the arithmetic of the chosen layers while a training runs. Types, parameters, parametrizations
and hooks of the network stay as they are. Without gradients, as in evaluation, and in copies of the network, the
convolution is the usual one.

In bfloat16 each of the up to nine sums is rounded, so the error is up to about twice that of rounding the result once.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from apbm_core.forward import evaluation_mode
from apbm_core.study.training.device import autocast, least_seconds, random_state, restore_random_state
from apbm_core.study.training.recipes import Recipe

LARGEST_SIDE = 4  # of a map: on larger ones the padding is a small part
FEWEST_WEIGHTS = 2**16  # pairs of input and output channels: below, there is nothing to gain, or to measure
CLEARLY_FASTER = 1.25
_ROUNDS = 3


@dataclass(frozen=True)
class ConvShape:
    """What the time of a 3x3 convolution depends on."""

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ConvTimes:
    """Seconds of forward and backward of one convolution, both gradients."""

    convolution: float
    products: float

    @property
    def speedup(self) -> float:
        return self.convolution / self.products

    @property
    def is_lowered(self) -> bool:
        return self.speedup >= CLEARLY_FASTER


def choose_lowered(
    model: nn.Module,
    recipe: Recipe,
    image_size: tuple[int, int],
    device: torch.device,
    precision: str,
    channels_last: bool,
) -> tuple[str, ...]:
    """The names of the layers of ``model`` to train as matrix products: those that win by a quarter at least.

    There are none on a GPU, without channels_last, with torch.compile, or where the recipe says "off".

    Args:
        model: on ``device``; it is run once on blank images if it has a layer that could win.
        recipe: its batch size, and what it allows.
        image_size: (height, width) of the images.
        device: where the training computes.
        precision: "float32" or "bfloat16".
        channels_last: whether that is the layout of images and weights.
    """
    if recipe.lowering == "off" or recipe.compile or device.type != "cpu" or not channels_last:
        return ()
    shapes = candidates(model, (recipe.batch_size, *image_size), precision)
    return tuple(name for name, shape in shapes.items() if time_convolution(shape).is_lowered)


@contextmanager
def lowered(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside, the layers with these names compute their outputs and gradients by matrix products."""
    layers = [model.get_submodule(name) for name in names]
    for layer in layers:
        layer._conv_forward = _ProductForward(enabled=True)  # found before the class's method of this name
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("_conv_forward", None)


def candidates(model: nn.Module, batch: tuple[int, int, int], precision: str) -> dict[str, ConvShape]:
    """The layers of ``model`` that could be lowered, and their shapes in a batch of (N, height, width) images."""
    layers = {name: module for name, module in model.named_modules() if is_eligible(module)}
    if not layers:
        return {}
    count, height, width = batch
    seen: dict[str, set[tuple[int, ...]]] = {name: set() for name in layers}
    handles = [
        layer.register_forward_hook(
            lambda layer, inputs, output, name=name: seen[name].add((*inputs[0].shape[1:], output.shape[1]))
        )
        for name, layer in layers.items()
    ]
    device = torch.device("cpu")
    states = random_state(device)
    try:
        with torch.no_grad(), evaluation_mode(model), autocast(device, precision):
            model(torch.zeros(2, 3, height, width).contiguous(memory_format=torch.channels_last))
    finally:
        restore_random_state(states, device)
        for handle in handles:
            handle.remove()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    shapes = {}
    for name, of_layer in seen.items():
        if len(of_layer) == 1:  # a layer that the network calls with different maps, or never, stays as it is
            c_in, h, w, c_out = next(iter(of_layer))
            if max(h, w) <= LARGEST_SIDE:
                shapes[name] = ConvShape(count, c_in, c_out, h, w, dtype)
    return shapes


def is_eligible(module: nn.Module) -> bool:
    """Whether a layer is a 3x3 convolution that could be lowered, if its map is small; a parametrised one, too."""
    kind = type(module)
    return (
        isinstance(module, nn.Conv2d)
        and (kind.forward, kind._conv_forward) == (nn.Conv2d.forward, nn.Conv2d._conv_forward)
        and (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (module.groups, module.padding_mode) == (1, "zeros")
        and module.in_channels * module.out_channels >= FEWEST_WEIGHTS
    )


def time_convolution(shape: ConvShape) -> ConvTimes:
    """Time one shape both ways with as many threads as torch has now; the second time, the answer is remembered."""
    return _time(shape, torch.get_num_threads())


@cache
def _time(shape: ConvShape, threads: int) -> ConvTimes:
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float32).to(shape.dtype)
        return values.contiguous(memory_format=torch.channels_last)

    images = noise(shape.batch, shape.in_channels, shape.height, shape.width).requires_grad_()
    weight = noise(shape.out_channels, shape.in_channels, 3, 3).requires_grad_()
    gradient = noise(shape.batch, shape.out_channels, shape.height, shape.width)
    cases = {
        "convolution": lambda: torch.autograd.grad(F.conv2d(images, weight, padding=1), (images, weight), gradient),
        "products": lambda: torch.autograd.grad(product_conv2d(images, weight), (images, weight), gradient),
    }
    return ConvTimes(**least_seconds(cases, torch.device("cpu"), _ROUNDS))


def product_conv2d(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv2d(images, weight, bias, padding=1)`` for 3x3 kernels by matrix products, with first derivatives.

    Under autocast the arguments are cast as F.conv2d casts them. Any layout is taken; channels_last is fastest, and
    is the result's.

    Args:
        images: (N, c_in, H, W).
        weight: (c_out, c_in, 3, 3).
        bias: (c_out,) or None.
    """
    device = images.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        images, weight, bias = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (images, weight, bias)
        )
    with torch.autocast(device, enabled=False):
        return ProductConvolution.apply(images, weight, bias)


class ProductConvolution(torch.autograd.Function):
    """The sums of the module's docstring; X, Y and their gradients have the shape (H W, N, channels)."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        size = images.shape[2:]
        x, w = _by_position(images), _by_offset(weight)
        y = F.linear(x, w[1, 1], bias)  # the middle of the kernel meets every position
        for ky, kx, out, source, count in _spans(*size):
            y[out : out + count].flatten(0, 1).addmm_(x[source : source + count].flatten(0, 1), w[ky, kx].t())
        ctx.save_for_backward(x, weight)
        ctx.size = size
        return _as_images(y, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), spans = ctx.saved_tensors, _spans(*ctx.size)
        w, dy = _by_offset(weight), _by_position(gradient)
        dx = d_weight = None
        if ctx.needs_input_grad[0]:
            dx = dy @ w[1, 1]
            for ky, kx, out, source, count in spans:
                dx[source : source + count].flatten(0, 1).addmm_(dy[out : out + count].flatten(0, 1), w[ky, kx])
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, memory_format=torch.channels_last)
            dw = _by_offset(d_weight)
            dw[1, 1].addmm_(dy.flatten(0, 1).t(), x.flatten(0, 1))
            for ky, kx, out, source, count in spans:
                dw[ky, kx].addmm_(dy[out : out + count].flatten(0, 1).t(), x[source : source + count].flatten(0, 1))
        d_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return None if dx is None else _as_images(dx, ctx.size), d_weight, d_bias


@cache
def _spans(height: int, width: int) -> tuple[tuple[int, int, int, int, int], ...]:
    """For each offset of the kernel but the middle one, the runs of positions that it connects.

    Each is (ky, kx, first output position, first input position, number of positions): as long as both run on in
    memory, a row of the map or, where the offset is vertical, all of its rows.
    """
    spans = []
    for ky in range(3):
        for kx in range(3):
            top, bottom = max(0, 1 - ky), min(height, height + 1 - ky)
            left, right = max(0, 1 - kx), min(width, width + 1 - kx)
            shift = (ky - 1) * width + kx - 1
            if (ky, kx) == (1, 1) or top >= bottom or left >= right:
                continue
            if kx == 1:
                spans.append((ky, kx, top * width, top * width + shift, (bottom - top) * width))
            else:
                starts = (row * width + left for row in range(top, bottom))
                spans += [(ky, kx, start, start + shift, right - left) for start in starts]
    return tuple(spans)


def _by_position(images: Tensor) -> Tensor:
    """(N, C, H, W) to a contiguous (H W, N, C)."""
    return images.permute(2, 3, 0, 1).flatten(0, 1).contiguous()


def _as_images(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """(H W, N, C) to (N, C, H, W) in channels_last."""
    return positions.unflatten(0, size).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def _by_offset(weight: Tensor) -> Tensor:
    """(c_out, c_in, 3, 3) to a view (3, 3, c_out, c_in), of a copy if the weight is not channels_last."""
    return weight.contiguous(memory_format=torch.channels_last).permute(2, 3, 0, 1)


class _ProductForward:
    """Stands in for ``_conv_forward`` of one layer. What is copied or pickled is the usual convolution again."""

    def __init__(self, enabled: bool = False):
        self.enabled = enabled

    def __call__(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.enabled and torch.is_grad_enabled() and images.dim() == 4 and max(images.shape[2:]) <= LARGEST_SIDE:
            return product_conv2d(images, weight, bias)
        return F.conv2d(images, weight, bias, padding=1)

    def __reduce__(self) -> tuple[type, tuple]:
        return _ProductForward, ()
