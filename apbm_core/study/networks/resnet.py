"""ResNet20, 56 and 110, the CIFAR networks of He et al. (2016), section 4.2.

Each block's first convolution can lose filters. The second one's outputs are tied to the rest of their stage by the
residual addition.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from apbm_core.study.networks.definition import Network

STAGES = (16, 32, 64)  # filters of a stage's convolutions
SMALLEST_SIDE = 8  # the last of the three stages sees a quarter of it: more than one pixel


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
        self.conv1 = nn.Conv2d(3, STAGES[0], 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(STAGES[0])
        self.relu1 = nn.ReLU()
        blocks = len(widths) // 3
        self.layer1 = _stage(STAGES[0], STAGES[0], widths[:blocks], 1, shortcut)
        self.layer2 = _stage(STAGES[0], STAGES[1], widths[blocks : 2 * blocks], 2, shortcut)
        self.layer3 = _stage(STAGES[1], STAGES[2], widths[2 * blocks :], 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(STAGES[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.classifier(self.pool(x).flatten(1))


def _stage(in_channels: int, out_channels: int, widths: Sequence[int], stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, widths[0], stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, width, 1, shortcut) for width in widths[1:]))


def _network(blocks: int) -> Network:
    """The network with so many blocks in each of its three stages, two convolutions each."""
    return Network(
        label=f"ResNet{6 * blocks + 2}",
        module=CifarResNet,
        widths=tuple(width for width in STAGES for _ in range(blocks)),
        options={"shortcut": ("A", "B")},
        sides=(SMALLEST_SIDE, None),
        needs="its last layers see more than one pixel",
        shortcuts=True,
    )


NETWORKS = {"resnet20": _network(3), "resnet56": _network(9), "resnet110": _network(18)}
