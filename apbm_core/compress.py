"""The verbs, for any network: fuse before training, rescore and collapse during it, compact after it."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from apbm_core.anatomy import Anatomy
from apbm_core.copies import is_parametrized_by, plain_copy
from apbm_core.cuts import kept_of
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.forward import refuse_wrapped
from apbm_core.fusion import (
    FilterFusion,
    FusionReport,
    FusionSettings,
    choose_together,
    fused_layers,
    rescore_together,
)
from apbm_core.fusion_state import fit_saved_shape
from apbm_core.groups import outputs_of
from apbm_core.passing import InputPassing, pass_inputs, why_not_passing
from apbm_core.planning import By, Rule, parse_keep, wanted_units

__all__ = ["collapse", "compact", "fuse", "parse_keep", "rescore"]

_OURS = (FilterFusion, InputPassing)
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta")  # what optimizers call second moments


def fuse(
    model: nn.Module,
    example_inputs: Any,
    keep: float | Mapping[str, float | int] = 0.5,
    settings: FusionSettings | None = None,
    ignore: Collection[str] = (),
    groups: bool = True,
    target: float | None = None,
    by: By = "params",
    widths: Rule = "uniform",
    min_filters: int = 1,
    multiple: int = 1,
    passing: bool = False,
) -> nn.Module:
    """A physically small copy of ``model`` whose layers fuse banks of the dense width (APBM, methods.md 1).

    Train it with your own loop, calling :func:`apbm_core.rescore` once an epoch, then :func:`compact` it. The bank of a
    layer holds the model's own n filters on the inputs that are left, so a pre-trained model's knowledge stays. Layers
    whose outputs are added, gated or normed together are fused as one: the same filters kept, and mixed by the same P.
    What cannot be fused, or not be proved right, is as it was (:func:`apbm_core.why_not_prunable` says why).

    Args:
        model: any network of convolutions (1-d to 3-d, transposed) and linear layers; not modified.
        example_inputs: one batch the network accepts, on the model's device: a tensor, a tuple of arguments or a dict.
        keep: the share of filters each group of layers keeps, in (0, 1]; or layer -> share or number of filters, and
            then only those layers, with those they are tied to, are fused.
        settings: how to score and fuse; APBM's defaults if None.
        ignore: names of layers to leave as they are, with those they are tied to.
        groups: False: fuse the ``nn.Conv2d`` whose outputs are their own, and nothing else.
        target: the share of the size to remove, in (0, 1), in place of ``keep``.
        by: the size that is meant: parameters, MACs, or the latency of the example inputs on their device.
        widths: how the target is divided among the layers (see :func:`apbm_core.planning.units_for_target`).
        min_filters: no layer keeps fewer, unless it has fewer.
        multiple: round numbers of filters up to a multiple of this, which hardware may like (8, 16).
        passing: every fused filter is its own input channel plus what is fused, both in learned amounts (see
            :mod:`apbm_core.passing`). For a training from scratch: it would bury what a trained network has learnt.

    Raises:
        ConfigError: a share outside (0, 1], a number of filters outside 1..n, or an unknown layer name.
        UnsupportedNetwork: a named layer cannot be fused, or none can; the message says why.
    """
    anatomy = Anatomy(model, example_inputs, groups)
    units = wanted_units(anatomy, keep, ignore, target, by, widths, min_filters, multiple)
    small = fuse_anatomy(anatomy, units, settings or FusionSettings())
    if passing:
        fused = {name: module for name, module, _ in fused_layers(small) if isinstance(module, nn.Conv2d)}
        pass_inputs(small, [name for name, conv in fused.items() if why_not_passing(conv) is None])
    return small


def fuse_anatomy(anatomy: Anatomy, units: Mapping[str, int], settings: FusionSettings) -> nn.Module:
    """The fused network in which each named group keeps so many units, the most important ones."""
    modules = dict(anatomy.model.named_modules())
    fusions: dict[str, FilterFusion] = {}
    kept: dict[str, Tensor] = {}
    for name, count in units.items():
        group, members = anatomy.groups[name], []
        for layer, filters in group.layers.items():
            weight, n = modules[layer].weight, outputs_of(modules[layer])
            fusion = settings.fusion(n, count * filters.shape[1])
            fusion.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            fusion.join(name, filters, torch.arange(count), out_dim=int(getattr(modules[layer], "transposed", False)))
            fusions[layer] = fusion
            members.append((fusion, weight))
        kept[name] = choose_together(members, count, progress=0.0).cpu()
    small, cuts = anatomy.cut(kept)
    for name in units:
        members = []
        for layer, filters in anatomy.groups[name].layers.items():
            module, dense, fusion = small.get_submodule(layer), modules[layer].weight, fusions[layer]
            fusion.join(name, filters, kept[name], fusion.out_dim)
            fusion.select_units(kept[name].to(dense.device))
            cut = list(cuts.get(f"{layer}.weight", [None] * dense.dim()))
            cut[fusion.out_dim] = None  # all filters, on the inputs that are left
            bank = fusion.initial_bank(kept_of(dense.detach(), cut))
            module.weight = nn.Parameter(bank, requires_grad=dense.requires_grad)
            members.append((fusion, bank))
        rescore_together(members, progress=0.0, reselect=False)
        for layer in anatomy.groups[name].layers:
            module = small.get_submodule(layer)
            parametrize.register_parametrization(module, "weight", fusions[layer], unsafe=True)  # the shape changes
            module.parametrizations.weight.register_load_state_dict_pre_hook(fit_saved_shape)
            type(module).__getstate__ = _cannot_be_pickled
    return small


def rescore(model: nn.Module, progress: float) -> FusionReport:
    """Score all filters again and renew every fusion; call it before each epoch (or every few steps).

    A layer whose schedule is frozen is scored once more and then left as it is, at no cost.

    Args:
        model: a network made by :func:`apbm_core.fuse`.
        progress: the share of the training that is done, in [0, 1].

    Raises:
        ConfigError: ``progress`` is outside [0, 1], the network has no fused layer, or a bank is not finite.
    """
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress {progress} is outside [0, 1]; pass epoch / epochs.")
    together: dict[str, dict[str, tuple[FilterFusion, Tensor]]] = {}
    for name, module, fusion in fused_layers(model):
        together.setdefault(fusion.group or name, {})[name] = (fusion, module.parametrizations.weight.original)
    if not together:
        raise ConfigError("the network has no fused layer; make one with apbm_core.fuse(model, example_inputs, keep).")
    report = FusionReport(progress)
    for members in together.values():
        last = rescore_together(list(members.values()), progress)
        report.layers.update(dict.fromkeys(members, last))
    return report


@torch.no_grad()
def collapse(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, averaged: nn.Module | None = None
) -> None:
    """Where P is frozen for good, make the fused filters the weight, in place: what trains on is the slim network.

    The forward pass stays the same to rounding, and so does the optimizer's momentum, which is fused alike (second
    moments through their roots, so that steps keep their size); banks and P cost nothing from then on. What differs is
    the course of the training: a bank spreads a gradient over all the filters that are mixed, a weight keeps it. Call
    it after :func:`rescore`; layers that still change are left alone.

    Args:
        model: a network made by :func:`apbm_core.fuse`.
        optimizer: the one that holds the banks, if it has taken a step.
        averaged: a running average of ``model`` (``torch.optim.swa_utils.AveragedModel``, or a copy that a loop of
            yours averages), whose banks are dropped with the model's: their shapes have to stay the same.

    Raises:
        ConfigError: the optimizer keeps state of another shape than the parameters', as LBFGS does.
        UnsupportedNetwork: the network is wrapped for DDP, which would go on with the old shapes.
    """
    refuse_wrapped(model)
    layers = [(name, module, fusion) for name, module, fusion in fused_layers(model) if fusion.can_collapse]
    if not layers:
        return
    if optimizer is not None:
        _refuse_other_state(optimizer, [module.parametrizations.weight.original for _, module, _ in layers])
    twins = {}
    if averaged is not None:
        inner = averaged.module if isinstance(averaged, torch.optim.swa_utils.AveragedModel) else averaged
        twins = {name: (module, fusion) for name, module, fusion in fused_layers(inner)}
    for name, module, fusion in layers:
        bank = module.parametrizations.weight.original
        state = optimizer.state.get(bank, {}) if optimizer is not None else {}
        fused = {
            key: fusion(value.sqrt()).square() if key in _SQUARES else fusion(value).clone()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.shape == bank.shape
        }
        _drop_bank(module, fusion)
        state.update(fused)
        if name in twins and not twins[name][1].is_collapsed:
            twins[name][1].is_frozen = True
            _drop_bank(*twins[name])


def _drop_bank(module: nn.Module, fusion: FilterFusion) -> None:
    bank = module.parametrizations.weight.original
    # A graph that is still alive, by the last loss, remembers the shape; the swap leaves it with the old bank.
    try:
        torch.utils.swap_tensors(bank, nn.Parameter(fusion(bank).clone(), requires_grad=bank.requires_grad))
    except RuntimeError as error:
        raise UnsupportedNetwork(
            f"something else holds on to a bank, so that its shape cannot change ({error}). A DistributedDataParallel "
            "wrapper does: take its .module, delete the wrapper, collapse, and wrap the network anew."
        ) from error
    fusion.shrink()


def _refuse_other_state(optimizer: torch.optim.Optimizer, banks: list[Tensor]) -> None:
    keys = [
        key
        for bank in banks
        for key, value in optimizer.state.get(bank, {}).items()
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != bank.shape
    ]
    if keys or isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            f"{type(optimizer).__name__} keeps {keys[0] if keys else 'its history'}, which is not one number for each "
            "parameter and cannot be fused; call collapse(model) without it, and make a new optimizer afterwards."
        )


def compact(model: nn.Module) -> nn.Module:
    """A copy of a fused network in which every fused weight is an ordinary one: same logits, plain layers.

    Raises:
        ConfigError: the network has no fused layer.
        UnsupportedNetwork: it is wrapped, for DDP or by torch.compile; unwrap it first.
    """
    refuse_wrapped(model)
    if not any(is_parametrized_by(module, _OURS) for module in model.modules()):
        raise ConfigError("the network has no fused layer, so there is nothing to compact; use it as it is.")
    with torch.inference_mode(False):  # parameters made in inference mode could never be trained
        return plain_copy(model, _OURS)


def _cannot_be_pickled(_module: nn.Module) -> None:
    raise UnsupportedNetwork(
        "a fused network cannot be pickled, as torch.save(model) does; save model.state_dict() and load it into one "
        "made by the same apbm_core.fuse(...), or save apbm_core.compact(model), which is an ordinary network."
    )
