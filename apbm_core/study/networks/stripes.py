r"""Stripe-wise sparsity (SWP): learn the shape of every filter, then store and compute only what is left of it.

Meng et al., "Pruning Filter in Filter", NeurIPS 2020 (methods.md 5). A *stripe* is the vector of c_in weights that
a filter holds at one position of its k x k kernel. Two forms of the same layer live here:

- while training, :class:`FilterSkeleton`, a parametrization of an ordinary convolution's weight,

  .. math:: \tilde W_{ocij} = W_{ocij} \, F_{oij} \, M_{oij}

  with the learnt skeleton F and the 0/1 mask M of the stripes that are alive;
- for deployment, :class:`StripeConv2d`, which has no other weights than those of the stripes that are alive.

:func:`to_stripes` goes from the first to the second, dead filters removed as a whole where nothing else needs their
channel; :func:`stripe_description` is what has to be stored beside a state dict to build the network again.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from apbm_core.copies import plain_copy
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.surgery import prunable_layers, slim


class FilterSkeleton(nn.Module):
    """The parametrization ``weight (n, c_in, k, k) -> weight * (skeleton * mask)``, both of the latter (n, k, k).

    The skeleton starts at 1, so registering it changes nothing. The mask is a buffer: it is saved, loaded and resumed
    with the network.
    """

    def __init__(self, n: int, kernel_size: tuple[int, int]):
        super().__init__()
        self.skeleton = nn.Parameter(torch.ones(n, *kernel_size))
        self.register_buffer("mask", torch.ones(n, *kernel_size, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.skeleton * self.mask).unsqueeze(1)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Kill the stripes that ``mask`` (n, k, k) leaves out; their skeleton entries become 0."""
        self.mask.copy_(mask)
        self.skeleton.mul_(self.mask)


def add_skeletons(model: nn.Module) -> nn.Module:
    """Give every ungrouped convolution with a kernel larger than 1x1 a filter skeleton, in place; returns ``model``."""
    for module in list(model.modules()):
        if type(module) is nn.Conv2d and module.groups == 1 and max(module.kernel_size) > 1:
            skeleton = FilterSkeleton(module.out_channels, module.kernel_size).to(module.weight.device)
            parametrize.register_parametrization(module, "weight", skeleton)
    return model


def skeleton_layers(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d, FilterSkeleton]]:
    """Every convolution that has a skeleton, as (name, convolution, its skeleton), in the model's order."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for parametrization in module.parametrizations.weight:
                if isinstance(parametrization, FilterSkeleton):
                    yield name, module, parametrization


def without_skeletons(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose convolutions are plain and hold the masked weight: same outputs, zeros still stored."""
    return plain_copy(model, FilterSkeleton)


class StripeConv2d(nn.Module):
    """A convolution that stores and computes only its surviving stripes; (N, c_in, H, W) to (N, n, H', W').

    A stripe is a 1x1 filter with a spatial shift: its product with the shifted input is added to its filter's output.
    Stripes are sorted by kernel position, then by filter. Where the output is as large as the input, all stripes are
    applied in one 1x1 convolution whose outputs are then shifted, the faster order on CPUs; else the shifted input is
    subsampled first. Either way a stripe costs exactly c_in multiply-accumulates for each of the H' x W' outputs, zero
    padding included: the usual convention for dense convolutions, times the share of stripes that survive.

    A filter without stripes outputs its bias (zeros without one); so does a layer without any.

    ``torch.onnx.export(..., dynamo=True)`` takes it; pass ``optimize=False`` for a whole network, whose many slices the
    exporter's optimiser goes through in quadratic time. ONNX Runtime optimises on loading in any case.

    Attributes:
        weight: (stripes, c_in), the surviving weights.
        bias: (n,) or None.
        filters: int64 buffer (stripes,), the filter each stripe belongs to.
        stripes_at: number of stripes at each of the k * k kernel positions, row by row.

    Args:
        conv: the convolution to replace; its weights are taken over.
        mask: (n, k, k), True where a stripe survives.

    Raises:
        ConfigError: the mask's shape is not (n, k, k).
        UnsupportedNetwork: the convolution is grouped, or pads with anything but zeros.
    """

    def __init__(self, conv: nn.Conv2d, mask: Tensor):
        super().__init__()
        expected = (conv.out_channels, *conv.kernel_size)
        if tuple(mask.shape) != expected:
            raise ConfigError(f"the stripe mask has shape {tuple(mask.shape)}; this convolution's is {expected}.")
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise UnsupportedNetwork(
                f"a convolution with groups={conv.groups}, padding_mode={conv.padding_mode!r} has no stripe form; "
                "only groups=1 with zero padding has."
            )
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding = _padding(conv)
        positions = mask.to(conv.weight.device, torch.bool).flatten(1).t()  # (k * k, n)
        self.stripes_at = tuple(positions.sum(1).tolist())
        self.register_buffer("filters", positions.nonzero()[:, 1].contiguous())
        stripes = conv.weight.detach().flatten(2).permute(2, 0, 1)[positions]  # (k * k, n, c_in) -> (stripes, c_in)
        self.weight = nn.Parameter(stripes.contiguous(), requires_grad=conv.weight.requires_grad)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())

    @property
    def mask(self) -> Tensor:
        """Which stripes survive, bool of shape (n, k, k)."""
        positions = torch.zeros(len(self.stripes_at), self.out_channels, dtype=torch.bool, device=self.filters.device)
        where = torch.repeat_interleave(torch.tensor(self.stripes_at, device=self.filters.device))
        positions[where, self.filters] = True
        return positions.t().reshape(self.out_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.padding
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        height = (x.shape[2] + top + bottom - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] + left + right - dw * (kw - 1) - 1) // sw + 1
        rows = [slice(i * dh, i * dh + (height - 1) * sh + 1, sh) for i in range(kh)]
        columns = [slice(j * dw, j * dw + (width - 1) * sw + 1, sw) for j in range(kw)]
        windows = [window for window, count in zip(product(rows, columns), self.stripes_at, strict=True) if count]
        counts = [count for count in self.stripes_at if count]
        weight = self.weight[:, :, None, None]
        if not counts:
            out = x.new_zeros(x.shape[0], self.out_channels, height, width)
        else:
            if (sh, sw) == (1, 1) and (height, width) == tuple(x.shape[2:]):
                products = F.pad(F.conv2d(x, weight), self.padding).split(counts, 1)
                parts = [part[:, :, i, j] for part, (i, j) in zip(products, windows, strict=True)]
            else:
                padded = F.pad(x, self.padding)
                weights = weight.split(counts)
                parts = [F.conv2d(padded[:, :, i, j], part) for part, (i, j) in zip(weights, windows, strict=True)]
            # The outputs have the products' type, which under autocast is narrower than the input's. One sum for each
            # position, not one for all: there no filter occurs twice, or ONNX Runtime's threads would lose sums.
            out = parts[0].new_zeros(x.shape[0], self.out_channels, height, width)
            for part, filters in zip(parts, self.filters.split(counts), strict=True):
                out.index_add_(1, filters, part)
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]

    def extra_repr(self) -> str:
        total = self.out_channels * math.prod(self.kernel_size)
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, stripes={len(self.filters)} of {total}"
        )


def to_stripes(model: nn.Module, example_inputs: Tensor, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` without its dead filters and dead stripes.

    A filter that lost all its stripes goes whole, with its channel in the norm and in the next layer, if its
    convolution is prunable on its own (:func:`apbm_core.surgery.prunable_layers`); what the norm made of its constant
    output is lost unless it was zero or folded forward before. A dead filter whose output is added to another layer's
    stays as an output without stripes, and so does filter 0 of a prunable layer in which nothing survived. A layer
    with no dead stripe left stays an ``nn.Conv2d``.

    Args:
        model: a network without parametrizations (see :func:`without_skeletons`); not modified.
        example_inputs: one batch the network accepts.
        masks: convolution name -> (n, k, k), True where a stripe survives.

    Raises:
        ConfigError: an unknown layer or a mask of the wrong shape.
        UnsupportedNetwork: a named layer has no stripe form, or the network cannot be traced.
    """
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        _check_target(name, modules.get(name))
        if mask.shape[0] != modules[name].out_channels:
            raise ConfigError(f"the mask of layer {name!r} has {mask.shape[0]} filters; it has {modules[name]}.")
    alive = {name: mask.flatten(1).any(1).nonzero().flatten() for name, mask in masks.items()}
    keep = {
        name: alive[name] if len(alive[name]) else torch.tensor([0])
        for name in prunable_layers(model, example_inputs)
        if name in masks
    }
    small = slim(model, example_inputs, keep)
    for name, mask in masks.items():
        left = mask[keep[name].to(mask.device)] if name in keep else mask
        if not left.all():
            small.set_submodule(name, StripeConv2d(small.get_submodule(name), left))
    return small


def stripe_description(model: nn.Module) -> dict[str, str]:
    """The stripe masks of a network, JSON-able: layer name -> its (n, k, k) mask as hexadecimal bits, row by row."""
    return {name: pack_mask(module.mask) for name, module in model.named_modules() if isinstance(module, StripeConv2d)}


def apply_stripe_description(model: nn.Module, description: Mapping[str, str]) -> nn.Module:
    """Replace the described convolutions of ``model`` by stripe convolutions, in place, so that a stored state fits.

    Args:
        model: a network of the stored one's widths, its convolutions plain.
        description: what :func:`stripe_description` returned.

    Returns:
        ``model``; load the stored state dict next.

    Raises:
        ConfigError: an unknown layer, or a mask that does not fit its layer.
    """
    modules = dict(model.named_modules())
    for name, bits in description.items():
        conv = modules.get(name)
        _check_target(name, conv)
        try:
            mask = unpack_mask(bits, (conv.out_channels, *conv.kernel_size))
        except ConfigError as error:
            raise ConfigError(f"layer {name!r}: {error}") from error
        model.set_submodule(name, StripeConv2d(conv, mask))
    return model


def pack_mask(mask: Tensor) -> str:
    """A boolean tensor as hexadecimal digits, first element first, filled up with zeros to whole digits."""
    bits = "".join("1" if bit else "0" for bit in mask.flatten().tolist())
    digits = -(-len(bits) // 4)
    return f"{int(bits.ljust(4 * digits, '0') or '0', 2):0{digits}x}"


def unpack_mask(digits: str, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_mask`.

    Raises:
        ConfigError: not hexadecimal, or too many or too few digits for ``shape``.
    """
    size = math.prod(shape)
    try:
        value = int(digits, 16)
    except ValueError:
        raise ConfigError(f"{digits[:20]!r} is not a stripe mask in hexadecimal digits; use pack_mask().") from None
    if len(digits) != -(-size // 4):
        raise ConfigError(f"a stripe mask of shape {shape} has {-(-size // 4)} hexadecimal digits, not {len(digits)}.")
    bits = f"{value:0{4 * len(digits)}b}"[:size]
    return torch.tensor([bit == "1" for bit in bits]).reshape(shape)


def _check_target(name: str, module: nn.Module | None) -> None:
    if type(module) is not nn.Conv2d:
        found = "does not exist" if module is None else f"is a {type(module).__name__}"
        raise ConfigError(f"layer {name!r} {found}; stripe masks name plain nn.Conv2d layers of the network.")


def _padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """(left, right, top, bottom), as ``F.pad`` takes it."""
    if conv.padding == "same":
        sides = []
        for size, dilation in zip(conv.kernel_size[::-1], conv.dilation[::-1], strict=True):
            total = dilation * (size - 1)
            sides += [total // 2, total - total // 2]
        return tuple(sides)
    rows, columns = (0, 0) if conv.padding == "valid" else conv.padding
    return columns, columns, rows, rows
