"""Compact networks as files: safetensors, and beside the weights what it takes to build the network again."""

from pathlib import Path
from typing import Any

from torch import nn

from apbm_core.study.networks.models import build_model, prunable_convs
from apbm_core.study.networks.stripes import StripeConv2d, apply_stripe_description, stripe_description
from apbm_core.study.training.checkpoint import load_network, save_network


def widths_of(model: nn.Module) -> dict[str, int]:
    """The number of filters of every convolution of a compact network, by name."""
    kinds = (nn.Conv2d, StripeConv2d)
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, kinds)}


def save_compact(path: str | Path, model: nn.Module, name: str, num_classes: int) -> Path:
    """Store a compact network of models.py: tensors, filter counts, and the surviving stripes where it has them.

    Raises:
        ApbmError: the file cannot be written.
    """
    modules = dict(model.named_modules())
    metadata: dict[str, Any] = {
        "model": name,
        "num_classes": num_classes,
        "widths": [modules[conv].out_channels for conv in prunable_convs(name)],
        "stripes": stripe_description(model),
    }
    return save_network(path, model.state_dict(), metadata)


def load_compact(path: str | Path) -> nn.Module:
    """Build the network that :func:`save_compact` stored, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, or not of this package.
    """
    return load_network(path, _build).eval()


def _build(metadata: dict[str, Any]) -> nn.Module:
    model = build_model(metadata["model"], metadata["num_classes"], metadata["widths"])
    return apply_stripe_description(model, metadata["stripes"]) if metadata["stripes"] else model
