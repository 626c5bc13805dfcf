"""CIFAR networks, dense or with the filter counts of a widths table.

VGG16 is the CIFAR variant of Simonyan & Zisserman (2015) that pruning papers use: 13 convolutions with BatchNorm and a
single linear layer. ResNet20/56/110 are the CIFAR networks of He et al. (2016), section 4.2.

A *widths* table holds one filter count for each prunable convolution: all 13 of VGG16; in a ResNet each block's first
convolution, because the second one's outputs are tied to the rest of their stage by the residual addition.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apbm_core.errors import ConfigError

VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG16_POOLS = (2, 4, 7, 10, 13)  # a 2x2 max-pool follows these convolutions, counted from 1
RESNET_STAGES = (16, 32, 64)
RESNET_BLOCKS = {"resnet20": 3, "resnet56": 9, "resnet110": 18}  # blocks in each stage; depth = 6 * blocks + 2

MODELS = ("vgg16", *RESNET_BLOCKS)

VGG16_SIDES = (32, 63)  # sides of an image, in pixels, that five poolings bring to 1
SMALLEST_RESNET_SIDE = 8  # the last of its three stages sees a quarter of it: more than one pixel


class VGG16(nn.Module):
    """VGG16 for CIFAR: (N, 3, 32, 32) images to (N, num_classes) logits; sides up to 63 also end in 1x1 maps.

    Args:
        num_classes: Number of logits.
        widths: Filters of the 13 convolutions.
        conv_bias: Whether convolutions have a bias. BatchNorm cancels it, but the published parameter count
            of 14,728,266 (methods.md 2) includes it.

    Raises:
        ConfigError: On the forward pass, if the images' sides are outside 32..63 pixels.
    """

    def __init__(self, num_classes: int, widths: Sequence[int], conv_bias: bool = True):
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = 3
        for i, width in enumerate(widths, start=1):
            layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1, bias=conv_bias)
            layers[f"norm{i}"] = nn.BatchNorm2d(width)
            layers[f"relu{i}"] = nn.ReLU()
            if i in VGG16_POOLS:
                layers[f"pool{i}"] = nn.MaxPool2d(2)
            channels = width
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        least, most = VGG16_SIDES
        if not (least <= height <= most and least <= width <= most):
            raise ConfigError(
                f"VGG16 got images of {height}x{width} pixels; five poolings reach 1x1 only from sides of 32 to 63. "
                "Resize the images, or use a ResNet."
            )
        return self.classifier(self.features(images).flatten(1))


class PadShortcut(nn.Module):
    """Option A of He et al. (2016): every second pixel, and zero channels on both sides up to ``out_channels``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual addition; ``width`` is the first one's filter count."""

    def __init__(self, in_channels: int, out_channels: int, width: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        if in_channels == out_channels and stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=nn.BatchNorm2d(out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """CIFAR ResNet of three stages: (N, 3, H, W) images to (N, num_classes) logits, any H and W.

    Args:
        num_classes: Number of logits.
        widths: Filters of each block's first convolution, three stages of equally many blocks.
        shortcut: Where a stage changes the shape, "A" subsamples and pads with zeros (no parameters), "B" is a
            1x1 convolution with BatchNorm.
    """

    def __init__(self, num_classes: int, widths: Sequence[int], shortcut: str = "A"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, RESNET_STAGES[0], 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(RESNET_STAGES[0])
        self.relu1 = nn.ReLU()
        blocks = len(widths) // 3
        self.layer1 = _stage(RESNET_STAGES[0], RESNET_STAGES[0], widths[:blocks], 1, shortcut)
        self.layer2 = _stage(RESNET_STAGES[0], RESNET_STAGES[1], widths[blocks : 2 * blocks], 2, shortcut)
        self.layer3 = _stage(RESNET_STAGES[1], RESNET_STAGES[2], widths[2 * blocks :], 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(RESNET_STAGES[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.classifier(self.pool(x).flatten(1))


def _stage(in_channels: int, out_channels: int, widths: Sequence[int], stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, widths[0], stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, width, 1, shortcut) for width in widths[1:]))


def build_model(name: str, num_classes: int = 10, widths: Sequence[int] | None = None, **options) -> nn.Module:
    """Build a network with fresh weights drawn from torch's global random generator (seed it with ``manual_seed``).

    Convolutions start Kaiming-normal for ReLU in fan-in mode, std sqrt(2 / (c_in k^2)) (He et al., 2015, eq. 10); the
    linear layer normal with std 1 / sqrt(inputs); biases 0; BatchNorm scales 1. Under ``torch.device("meta")`` nothing
    is allocated.

    Args:
        name: One of ``MODELS``.
        num_classes: Number of logits.
        widths: Filter counts in the order of ``prunable_convs(name)``; ``None`` is the dense network.
        **options: VGG16: ``conv_bias`` (bool, default True). ResNets: ``shortcut`` ("A", the default, or "B").

    Raises:
        ConfigError: On an unknown name or option, or a value out of range.
    """
    check_model(name, num_classes, options)
    widths = dense_widths(name) if widths is None else _checked_widths(name, widths)
    network = VGG16 if name == "vgg16" else CifarResNet
    model = network(int(num_classes), widths, **options)
    _initialise(model)
    return model


def check_model(name: str, num_classes: int, options: Mapping[str, object]) -> None:
    """Raise ConfigError unless ``build_model(name, num_classes, **options)`` describes a network."""
    allowed = {"conv_bias": (True, False)} if _known(name) == "vgg16" else {"shortcut": ("A", "B")}
    if not _is_positive_int(num_classes):
        raise ConfigError(f"num_classes is {num_classes!r}; it must be a whole number of at least 1.")
    for option, value in options.items():
        if option not in allowed:
            raise ConfigError(f"{name} has no option {option!r}; its only option is {next(iter(allowed))!r}.")
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed[option]):
            raise ConfigError(f"{name}'s {option} is {value!r}; choose one of {', '.join(map(repr, allowed[option]))}.")


def check_training_side(name: str, side: int) -> None:
    """Raise ConfigError unless the network can be trained on square images of this side, in pixels."""
    if _known(name) == "vgg16" and not VGG16_SIDES[0] <= side <= VGG16_SIDES[1]:
        raise ConfigError(
            f"vgg16 cannot train on crops of {side} pixels: its five poolings need 32 to 63. Set crop to one of these, "
            "or to None for whole images of 32, or use a ResNet."
        )
    if side < SMALLEST_RESNET_SIDE:
        raise ConfigError(
            f"{name} cannot train on crops of {side} pixels: too little of the image would reach its last layers. Set "
            f"crop to at least {SMALLEST_RESNET_SIDE}, or to None for whole images."
        )


def prunable_convs(name: str) -> tuple[str, ...]:
    """Module names of the convolutions that a widths table sizes, from input to output."""
    if _known(name) == "vgg16":
        return tuple(f"features.conv{i}" for i in range(1, len(VGG16_WIDTHS) + 1))
    return tuple(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(RESNET_BLOCKS[name]))


def dense_widths(name: str) -> tuple[int, ...]:
    """Filter counts of ``prunable_convs(name)`` in the dense network."""
    if _known(name) == "vgg16":
        return VGG16_WIDTHS
    return tuple(width for width in RESNET_STAGES for _ in range(RESNET_BLOCKS[name]))


def _known(name: str) -> str:
    if name not in MODELS:
        raise ConfigError(f"Unknown model {name!r}; choose one of {', '.join(MODELS)}.")
    return name


def _is_positive_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def _checked_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    dense = dense_widths(name)
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise ConfigError(f"widths is {widths!r}; {name} takes a list of {len(dense)} filter counts.")
    if len(widths) != len(dense):
        raise ConfigError(f"widths has {len(widths)} numbers; {name} takes {len(dense)}, one for each prunable layer.")
    for layer, width, most in zip(prunable_convs(name), widths, dense, strict=True):
        if not _is_positive_int(width) or width > most:
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
