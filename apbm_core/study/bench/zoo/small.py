"""Small networks, each of one kind of architecture or one way of reading channels, written for the zoo."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class UNet(nn.Module):
    """Down and up again, each level reading the one of its size on the way down."""

    def __init__(self, width: int = 16, classes: int = 3):
        super().__init__()
        self.enter = nn.Sequential(conv(3, width), conv(width, width))
        self.down = nn.Sequential(conv(width, 2 * width), conv(2 * width, 2 * width))
        self.bottom = nn.Sequential(conv(2 * width, 4 * width), conv(4 * width, 4 * width))
        self.up_2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join_2 = nn.Sequential(conv(4 * width, 2 * width), conv(2 * width, 2 * width))
        self.up_1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join_1 = nn.Sequential(conv(2 * width, width), conv(width, width))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x)
        second = self.down(F.max_pool2d(first, 2))
        x = self.up_2(self.bottom(F.max_pool2d(second, 2)))
        x = self.up_1(self.join_2(torch.cat([x, second], 1)))
        return self.head(self.join_1(torch.cat([x, first], 1)))


class SplitConcat(nn.Module):
    """YOLO's C2f: split in two, a chain of residual steps on the second half, everything concatenated."""

    def __init__(self, inputs: int, outputs: int, steps: int = 2):
        super().__init__()
        half = outputs // 2
        self.enter = conv(inputs, 2 * half, 1)
        self.steps = nn.ModuleList(nn.Sequential(conv(half, half), conv(half, half)) for _ in range(steps))
        self.leave = conv((2 + steps) * half, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class YoloLike(nn.Module):
    """A backbone of split/concatenate blocks, spatial pyramid pooling, an upward path and heads at two sizes."""

    def __init__(self, width: int = 16, classes: int = 3):
        super().__init__()
        self.stem = nn.Sequential(conv(3, width, 3, 2), conv(width, 2 * width, 3, 2), SplitConcat(2 * width, 2 * width))
        self.large = nn.Sequential(conv(2 * width, 4 * width, 3, 2), SplitConcat(4 * width, 4 * width))
        self.small = nn.Sequential(conv(4 * width, 8 * width, 3, 2), SplitConcat(8 * width, 8 * width, 1))
        self.squeeze, self.pooled = conv(8 * width, 4 * width, 1), conv(16 * width, 8 * width, 1)
        self.merge = SplitConcat(12 * width, 4 * width, 1)
        self.heads = nn.ModuleList(nn.Conv2d(n, 5 + classes, 1) for n in (4 * width, 8 * width))

    def forward(self, x: Tensor) -> list[Tensor]:
        large = self.large(self.stem(x))
        small = [self.squeeze(self.small(large))]
        for _ in range(3):
            small.append(F.max_pool2d(small[-1], 5, 1, 2))
        small = self.pooled(torch.cat(small, 1))
        large = self.merge(torch.cat([F.interpolate(small, scale_factor=2.0), large], 1))
        return [head(x) for head, x in zip(self.heads, (large, small), strict=True)]


class ResidualBlock(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module] = nn.Identity):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.norm_1, self.norm_2 = norm(width), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm_2(self.second(self.norm_1(self.first(x)).relu()))


class SuperResolution(nn.Module):
    """EDSR: residual blocks without norms, then a PixelShuffle to twice the size."""

    def __init__(self, width: int = 32, blocks: int = 4):
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, 1, 1)
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, 1, 1))
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2), nn.Conv2d(width, 3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.up(x + self.body(x))


class Siamese(nn.Module):
    """One encoder for two images, and a head that compares."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.encoder = nn.Sequential(conv(3, width), conv(width, 2 * width, 3, 2), conv(2 * width, 4 * width, 3, 2))
        self.project, self.head = nn.Linear(4 * width, 32), nn.Linear(32, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = (self.project(self.encoder(x).mean((2, 3))) for x in (left, right))
        return self.head((left - right).abs())


class Attention(nn.Module):
    """Self-attention of several heads, its queries, keys and values from one layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.leave(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, pre-norm blocks of attention and a perceptron."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4, patch: int = 8, size: int = 32):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width), perceptron(width, 4 * width, width)]
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for norm_1, attention, norm_2, mlp in self.blocks:
            x = x + attention(norm_1(x))
            x = x + mlp(norm_2(x))
        return self.head(self.norm(x)[:, 0])


def perceptron(*widths: int) -> nn.Sequential:
    layers = [nn.Linear(widths[0], widths[1])]
    for inputs, outputs in zip(widths[1:], widths[2:], strict=False):
        layers += [nn.GELU(), nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


class ShuffleUnit(nn.Module):
    """ShuffleNet's unit: grouped pointwise convolutions with a channel shuffle in between."""

    def __init__(self, width: int, groups: int = 4):
        super().__init__()
        self.groups = groups
        self.first = nn.Sequential(nn.Conv2d(width, width, 1, groups=groups, bias=False), nn.BatchNorm2d(width))
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False), nn.BatchNorm2d(width)
        )
        self.second = nn.Sequential(nn.Conv2d(width, width, 1, groups=groups, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return (x + self.second(self.depthwise(y))).relu()


class Gated(nn.Module):
    """Convolutions whose outputs are halved by a gated linear unit."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else width, 2 * width, 3, 1, 1) for i in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.glu(layer(x), 1)
        return self.head(x.mean((2, 3)))


class Strided(nn.Module):
    """A layer of which every second channel is read."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.first, self.second = conv(3, width), nn.Conv2d(width, 2 * width, 3, 1, 1)
        self.third, self.head = conv(width, 2 * width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x))[:, ::2]).mean((2, 3)))


def _pooled(dims: int, norm: Callable[[int], nn.Module], width: int = 16) -> nn.Sequential:
    layer, pool = getattr(nn, f"Conv{dims}d"), getattr(nn, f"AdaptiveAvgPool{dims}d")
    body, widths = [], (3, width, 2 * width, 4 * width)
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        body += [layer(inputs, outputs, 3, 2, 1), norm(outputs), nn.ReLU()]
    return nn.Sequential(*body, pool(1), nn.Flatten(), nn.Linear(4 * width, 10))


def _autoencoder(width: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1),
    )  # fmt: skip


def _group_norms(width: int = 32) -> nn.Sequential:
    blocks = (ResidualBlock(width, lambda n: nn.GroupNorm(8, n)) for _ in range(3))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.GroupNorm(8, width), nn.ReLU(), *blocks, *head)


def _shuffle_net(width: int = 48) -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(conv(3, width), *(ShuffleUnit(width) for _ in range(3)), *head)


def _images(*shape: int) -> Tensor:
    return torch.randn(*shape)


SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "U-Net": (UNet, lambda: _images(2, 3, 32, 32)),
    "YOLO-like": (YoloLike, lambda: _images(2, 3, 64, 64)),
    "super-resolution": (SuperResolution, lambda: _images(2, 3, 16, 16)),
    "autoencoder": (_autoencoder, lambda: _images(2, 3, 32, 32)),
    "1-d": (lambda: _pooled(1, nn.BatchNorm1d), lambda: _images(2, 3, 64)),
    "3-d": (lambda: _pooled(3, nn.BatchNorm3d), lambda: _images(2, 3, 16, 16, 16)),
    "siamese": (Siamese, lambda: (_images(2, 3, 32, 32), _images(2, 3, 32, 32))),
    "perceptron": (lambda: perceptron(64, 128, 128, 128, 10), lambda: _images(2, 64)),
    "ViT": (VisionTransformer, lambda: _images(2, 3, 32, 32)),
    "ShuffleNet-like": (_shuffle_net, lambda: _images(2, 3, 32, 32)),
    "GroupNorm ResNet": (_group_norms, lambda: _images(2, 3, 32, 32)),
    "gated linear units": (Gated, lambda: _images(2, 3, 32, 32)),
    "strided channels": (Strided, lambda: _images(2, 3, 32, 32)),
}
"""Name -> what makes the network, and what makes a batch for it."""
