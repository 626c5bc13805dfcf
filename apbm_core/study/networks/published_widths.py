"""Filter counts with a source: DCFF's published widths, and exact-count widths for the APBM abstract's four targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

from apbm_core.errors import ConfigError
from apbm_core.study.networks.models import dense_widths


@dataclass(frozen=True)
class PublishedWidths:
    """A widths table for ``build_model(model, num_classes, widths)``.

    Attributes:
        model: Name of the network.
        num_classes: Its number of logits.
        widths: Filters of each prunable convolution, in the order of ``prunable_convs(model)``.
        parameters: Parameters of that network.
        source: Sentence that says where widths and target come from.
    """

    model: str
    num_classes: int
    widths: tuple[int, ...]
    parameters: int
    source: str


def widths_from_rates(dense: Sequence[int], rates: Sequence[float]) -> tuple[int, ...]:
    """Filters that stay at each layer's prune rate: floor(n (1 - rate)).

    A rate counts as the decimal number it prints as, so 320 filters at rate 0.9 keep 32; binary floats would give 31.

    Args:
        dense: Filters of each layer.
        rates: Fraction of them to remove, one per layer, 0 <= rate < 1.

    Raises:
        ConfigError: If the lengths differ, a rate is out of range, or a layer would keep no filter.
    """
    if len(rates) != len(dense):
        raise ConfigError(f"There are {len(rates)} prune rates for {len(dense)} layers; give one rate for each layer.")
    return tuple(_kept(i, n, rate) for i, (n, rate) in enumerate(zip(dense, rates, strict=True), start=1))


def _kept(layer: int, n: int, rate: float) -> int:
    if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 <= rate < 1:
        raise ConfigError(f"The prune rate of layer {layer} is {rate!r}; it must be a number from 0 to below 1.")
    kept = int(n * (1 - Fraction(str(rate))))
    if kept == 0:
        raise ConfigError(
            f"Prune rate {rate!r} leaves none of layer {layer}'s {n} filters; use at most {1 - 1 / n:.4g}."
        )
    return kept


def _dcff(model: str, num_classes: int, parameters: int, rates: Sequence[float]) -> PublishedWidths:
    source = "Prune rates published with DCFF (Lin et al., Dynamic-coded Filter Fusion) for this network on CIFAR-10."
    return PublishedWidths(model, num_classes, widths_from_rates(dense_widths(model), rates), parameters, source)


def _apbm(model: str, num_classes: int, parameters: int, target: str, widths: Sequence[int]) -> PublishedWidths:
    source = (
        f"Chosen by this project to remove the {target} of parameters that the APBM abstract (Qu et al., 2022) "
        f"gives for CIFAR-{num_classes}; the abstract does not give widths."
    )
    return PublishedWidths(model, num_classes, tuple(widths), parameters, source)


_DCFF_VGG16 = [0.5] * 2 + [0.4] * 2 + [0.35] * 3 + [0.85] * 6
_DCFF_RESNET56 = [
    *(0.7, 0.7, 0.5, 0.5, 0.5, 0.3, 0.3, 0.4, 0.8),
    *(0.7, 0.7, 0.8, 0.8, 0.8, 0.8, 0.4, 0.2, 0.2),
    *(0.7, 0.3, 0.8, 0.4, 0.4, 0.7, 0.3, 0.4, 0.8),
]
_APBM_VGG16_CIFAR10 = widths_from_rates(dense_widths("vgg16"), [0.6] * 4 + [0.65] * 3 + [0.75] * 6)
_APBM_VGG16_CIFAR100 = widths_from_rates(dense_widths("vgg16"), [0.1] * 4 + [0.2] * 3 + [0.55] * 6)

PUBLISHED_WIDTHS: dict[str, PublishedWidths] = {
    "dcff-vgg16-cifar10": _dcff("vgg16", 10, 1_071_248, _DCFF_VGG16),
    "dcff-resnet56-cifar10": _dcff("resnet56", 10, 384_316, _DCFF_RESNET56),
    "apbm-vgg16-cifar10": _apbm("vgg16", 10, 1_069_272, "92.74 %", _APBM_VGG16_CIFAR10),
    "apbm-vgg16-cifar100": _apbm("vgg16", 100, 4_001_916, "72.91 %", _APBM_VGG16_CIFAR100),
    "apbm-resnet56-cifar10": _apbm("resnet56", 10, 436_372, "48.84 %", [15] * 9 + [30] * 9 + [24] * 9),
    "apbm-resnet56-cifar100": _apbm("resnet56", 100, 479_392, "44.18 %", [8] * 9 + [19] * 9 + [35] * 9),
}
