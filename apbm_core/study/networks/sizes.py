"""The size of a network of models.py as a function of its widths."""

from collections.abc import Callable, Sequence

from apbm_core.errors import ConfigError
from apbm_core.study.networks.models import check_model, dense_widths
from apbm_core.study.networks.resnet import STAGES as RESNET_STAGES
from apbm_core.study.networks.vgg import POOLS as VGG16_POOLS

SizeFunction = Callable[[Sequence[int]], int]


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
        blocks = len(layers) // len(RESNET_STAGES)
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
