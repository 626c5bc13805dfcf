"""Physical slimming of any network: which filters can go, why others cannot, and the network without them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apbm_core.anatomy import Anatomy, check_names
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.groups import outputs_of


def prunable_layers(model: nn.Module, example_inputs: Any, groups: bool = False) -> dict[str, int]:
    """The layers whose filters can be removed or fused, as name -> number of filters, in the model's order.

    Args:
        model: any network; not modified.
        example_inputs: one batch the network accepts, such as shape (1, 3, 32, 32); a tensor, a tuple or a dict.
        groups: False: the ``nn.Conv2d`` whose outputs are its own; True: all that can go together with others.

    Raises:
        UnsupportedNetwork: torch-pruning cannot trace the network.
    """
    reasons = why_not_prunable(model, example_inputs, groups)
    modules = dict(model.named_modules())
    return {name: outputs_of(modules[name]) for name, reason in reasons.items() if reason is None}


def why_not_prunable(model: nn.Module, example_inputs: Any, groups: bool = False) -> dict[str, str | None]:
    """For every convolution (with ``groups``: layer): None if its filters can go, else why they are left alone."""
    return Anatomy(model, example_inputs, groups).reasons


def slim(
    model: nn.Module, example_inputs: Any, keep: Mapping[str, Sequence[int] | Tensor], groups: bool = False
) -> nn.Module:
    """A physically smaller copy of ``model`` in which each named layer has only the filters listed.

    Norms, depthwise convolutions and the inputs of the layers behind follow. Parameters that stay keep their values.

    Args:
        model: any network; not modified.
        example_inputs: one batch the network accepts.
        keep: layer name -> indices of the filters that stay, any order; they end up ascending.
        groups: whether layers whose filters are tied to others' may be named; one of a group is named for all of it.

    Raises:
        ConfigError: an unknown name, an index out of range or given twice, or an empty list.
        UnsupportedNetwork: a named layer's filters cannot be removed, or the network does not run without them.
    """
    anatomy = Anatomy(model, example_inputs, groups, prove=groups)  # what is cut is proved in any case
    check_names(keep, anatomy.reasons)
    modules, units = dict(model.named_modules()), {}
    for name, indices in keep.items():
        n = outputs_of(modules[name])
        kept = _checked_indices(name, indices, n)
        if len(kept) == n:
            continue
        if (reason := anatomy.reasons[name]) is not None:
            raise UnsupportedNetwork(f"the filters of layer {name!r} cannot be removed: {reason}.")
        group = anatomy.group_of(name)
        wholly = torch.isin(group.layers[name], kept)
        if (wholly.any(1) != wholly.all(1)).any():
            together = group.layers[name]
            raise ConfigError(f"layer {name!r} keeps or loses {together.shape[1]} filters together, as in {together}.")
        units[group.name] = wholly.all(1).nonzero()[:, 0]
    return anatomy.cut(units)[0]


def _checked_indices(name: str, indices: Sequence[int] | Tensor, n: int) -> Tensor:
    kept = torch.as_tensor(indices, dtype=torch.long).flatten().sort().values.cpu()
    if len(kept) == 0:
        raise ConfigError(f"layer {name!r} would keep no filter at all; keep at least one of its {n}.")
    if kept[0] < 0 or kept[-1] >= n:
        raise ConfigError(f"layer {name!r} has filters 0..{n - 1}, but {kept.tolist()} were to be kept.")
    if len(kept.unique()) < len(kept):
        raise ConfigError(f"a filter of layer {name!r} is listed twice in {kept.tolist()}.")
    return kept
