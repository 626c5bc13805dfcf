"""Parameters and multiply-accumulates of VGG16 and the ResNets written out by hand, to hold the cost table against."""

from collections.abc import Callable, Sequence

BLOCKS = {"resnet20": 3, "resnet56": 9, "resnet110": 18}


def closed_form(
    name: str, num_classes: int, by: str = "params", conv_bias: bool = True, shortcut: str = "A"
) -> Callable[[Sequence[int]], int]:
    """The size of the network at the widths of its prunable convolutions; MACs of one 3x32x32 image."""
    params = by == "params"

    def conv(c_in: int, c_out: int, side: int, kernel: int = 3, bias: bool = False) -> int:
        """One convolution; its BatchNorm's scale and shift count as parameters only."""
        weights = kernel * kernel * c_in * c_out
        return weights + (2 + bias) * c_out if params else weights * side * side

    def linear(c_in: int) -> int:
        return (c_in + params) * num_classes

    def vgg16(widths: Sequence[int]) -> int:
        sides = [32] * 2 + [16] * 2 + [8] * 3 + [4] * 3 + [2] * 3
        layers = zip((3, *widths[:-1]), widths, sides, strict=True)
        return sum(conv(*layer, bias=conv_bias) for layer in layers) + linear(widths[-1])

    def resnet(widths: Sequence[int]) -> int:
        total, c_in, blocks = conv(3, 16, 32) + linear(64), 16, BLOCKS[name]
        for stage, (c_out, side) in enumerate([(16, 32), (32, 16), (64, 8)]):
            if shortcut == "B" and stage > 0:
                total += conv(c_in, c_out, side, kernel=1)
            for width in widths[stage * blocks : (stage + 1) * blocks]:
                total += conv(c_in, width, side) + conv(width, c_out, side)
                c_in = c_out
        return total

    return vgg16 if name == "vgg16" else resnet
