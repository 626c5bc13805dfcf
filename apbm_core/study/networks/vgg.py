"""VGG16 for CIFAR: the variant of Simonyan & Zisserman (2015) that pruning papers use.

13 convolutions with BatchNorm and a single linear layer; every convolution can lose filters.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from apbm_core.errors import ConfigError
from apbm_core.study.networks.definition import Network

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOLS = (2, 4, 7, 10, 13)  # a 2x2 max-pool follows these convolutions, counted from 1
SIDES = (32, 63)  # sides of an image, in pixels, that five poolings bring to 1


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
            if i in POOLS:
                layers[f"pool{i}"] = nn.MaxPool2d(2)
            channels = width
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        least, most = SIDES
        if not (least <= height <= most and least <= width <= most):
            raise ConfigError(
                f"VGG16 got images of {height}x{width} pixels; five poolings reach 1x1 only from sides of 32 to 63. "
                "Resize the images, or use a ResNet."
            )
        return self.classifier(self.features(images).flatten(1))


NETWORKS = {
    "vgg16": Network(
        label="VGG16",
        module=VGG16,
        widths=WIDTHS,
        options={"conv_bias": (True, False)},
        sides=SIDES,
        needs="its five poolings end in one pixel",
    )
}
