"""The verbs, for any network: fuse before training, rescore and collapse during it, compact after it."""

from collections.abc import Collection, Mapping
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.forward import is_parametrized_by, plain_copy, refuse_wrapped
from apbm_core.fusion import FilterFusion, FusionReport, FusionSettings, fit_saved_shape, fused_layers
from apbm_core.passing import InputPassing, pass_inputs, why_not_passing
from apbm_core.surgery import check_names, slim_with_inputs, why_not_prunable

_OURS = (FilterFusion, InputPassing)


def fuse(
    model: nn.Module,
    example_inputs: Tensor,
    keep: float | Mapping[str, float | int] = 0.5,
    settings: FusionSettings | None = None,
    ignore: Collection[str] = (),
    passing: bool = False,
) -> nn.Module:
    """A physically small copy of ``model`` whose convolutions fuse banks of the dense width (APBM, methods.md 1).

    Train it with your own loop, calling :func:`apbm_core.rescore` once an epoch, then :func:`compact` it. The bank of a
    layer holds the model's own n filters on the inputs that are left, so a pre-trained model's knowledge stays.

    Args:
        model: any network of ``nn.Conv2d`` convolutions; not modified.
        example_inputs: one batch the network accepts, on the model's device.
        keep: the share of filters each prunable convolution keeps, in (0, 1]; or name -> share or number of filters,
            and then only those layers are fused.
        settings: how to score and fuse; APBM's defaults if None.
        ignore: names of convolutions to leave as they are.
        passing: every fused filter is its own input channel plus what is fused, both in learned amounts (see
            :mod:`apbm_core.passing`). For a training from scratch: it would bury what a trained network has learnt.

    Returns:
        The slim network. The layers that are not prunable (see :func:`why_not_prunable`) are as they were.

    Raises:
        ConfigError: a share outside (0, 1], a number of filters outside 1..n, or an unknown layer name.
        UnsupportedNetwork: a named layer cannot be fused, or none can; the message says why.
    """
    settings = settings or FusionSettings()
    reasons = why_not_prunable(model, example_inputs)
    modules = dict(model.named_modules())
    check_names(ignore, reasons)
    if isinstance(keep, Mapping):
        check_names(keep, reasons)
        wanted = {name: keep[name] for name in reasons if name in keep and name not in ignore}
    else:
        wanted = {name: keep for name, reason in reasons.items() if reason is None and name not in ignore}
    for name in wanted:
        if reasons[name] is not None:
            raise UnsupportedNetwork(f"layer {name!r} cannot be fused: {reasons[name]}.")
    if not wanted:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4] if reason)
        raise UnsupportedNetwork(
            f"no convolution of this {type(model).__name__} can be fused on its own ({why or 'it has no nn.Conv2d'}). "
            "Networks whose blocks have inner convolutions, such as VGG, ResNet or DenseNet, can."
        )

    fusions = {}
    for name, share in wanted.items():
        weight = modules[name].weight
        kept = parse_keep(share, len(weight), name)
        fusions[name] = settings.fusion(len(weight), kept).to(weight)
        fusions[name].choose(weight, progress=0.0)
    small, inputs = slim_with_inputs(
        model, example_inputs, {name: fusion.selected for name, fusion in fusions.items()}, reasons
    )
    for name, fusion in fusions.items():
        conv = small.get_submodule(name)
        bank = fusion.initial_bank(modules[name].weight.detach()[:, inputs[name]])
        conv.weight = nn.Parameter(bank, requires_grad=modules[name].weight.requires_grad)
        fusion.rescore(bank, progress=0.0, reselect=False)
        parametrize.register_parametrization(conv, "weight", fusion, unsafe=True)  # unsafe: the shape changes
        conv.parametrizations.weight.register_load_state_dict_pre_hook(fit_saved_shape)
    if passing:
        pass_inputs(small, [name for name in fusions if why_not_passing(small.get_submodule(name)) is None])
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
    layers = list(fused_layers(model))
    if not layers:
        raise ConfigError("the network has no fused layer; make one with apbm_core.fuse(model, example_inputs, keep).")
    return FusionReport(
        progress,
        {name: fusion.rescore(conv.parametrizations.weight.original, progress) for name, conv, fusion in layers},
    )


@torch.no_grad()
def collapse(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Where P is frozen for good, make the fused filters the weight, in place: what trains on is the slim network.

    The forward pass stays the same to rounding, and so does the optimizer's momentum, which is fused alike; banks and
    P cost nothing from then on. What differs is the course of the training: a bank spreads a gradient over all the
    filters that are mixed, a weight keeps it. Call it after :func:`rescore`; layers that still change are left alone.

    Args:
        model: a network made by :func:`apbm_core.fuse`.
        optimizer: the one that holds the banks, if it has taken a step.
    """
    for _, conv, fusion in fused_layers(model):
        if not fusion.can_collapse:
            continue
        bank = conv.parametrizations.weight.original
        state = optimizer.state.get(bank, {}) if optimizer else {}
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == bank.shape:
                state[name] = fusion(value).clone()
        # A graph that is still alive, by the last loss, remembers the shape; the swap leaves it with the old bank.
        torch.utils.swap_tensors(bank, nn.Parameter(fusion(bank).clone(), requires_grad=bank.requires_grad))
        fusion.shrink()


def compact(model: nn.Module) -> nn.Module:
    """A copy of a fused network in which every fused weight is an ordinary one: same logits, plain ``nn.Conv2d``.

    Raises:
        ConfigError: the network has no fused layer.
        UnsupportedNetwork: it is wrapped, for DDP or by torch.compile; unwrap it first.
    """
    refuse_wrapped(model)
    if not any(is_parametrized_by(module, _OURS) for module in model.modules()):
        raise ConfigError("the network has no fused layer, so there is nothing to compact; use it as it is.")
    return plain_copy(model, _OURS)


def parse_keep(value: int | float, n: int, name: str) -> int:
    """Number of filters that ``keep`` asks for in a layer of n: a ratio in (0, 1] as a float, or an int from 1 to n.

    A ratio keeps round(ratio * n) filters, at least one. The type decides: ``1`` is one filter, ``1.0`` is all of them.

    Raises:
        ConfigError: If ``value`` is neither; the message names the layer ``name``.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and 1 <= value <= n:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < value <= 1:
        return max(1, round(float(value) * n))
    raise ConfigError(
        f"keep for layer {name!r} is {value!r}; give a ratio above 0 and up to 1.0 (a float), "
        f"or a whole number of filters from 1 to {n} (an int)."
    )
