"""Fusing a network that is trained already: once, in what it answers, and with nothing left to do but fine-tune it.

Mixing weights (compress.fuse) goes on through a training, and takes what a trained network computes apart until it has
recovered. Here the important filters stay as they are, and each layer that reads the others takes them over from those
that predict them best (handover.py): the network is of use at once. Important is who stands apart, by the relative
entropy of the weights, or whom the others can speak for least, by what they answer (redundancy.py).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import gcd
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from apbm_core.anatomy import Anatomy
from apbm_core.copies import has_own_forward
from apbm_core.errors import ApbmError, ConfigError
from apbm_core.forward import call, evaluation_mode
from apbm_core.fusion import FusionSettings, choose_together
from apbm_core.groups import LAYERS, Group, outputs_of
from apbm_core.handover import Reader, input_dim
from apbm_core.normed import normed_convolutions
from apbm_core.planning import By, Rule, wanted_units
from apbm_core.redundancy import least_missed_first
from apbm_core.tracing import is_depthwise

Choose = Literal["weights", "responses"]

_WIDEST = 4096  # above this many inputs (a flattened map) the places of a channel share one prediction


def fuse_trained(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable,
    keep: float | Mapping[str, float | int] = 0.5,
    settings: FusionSettings | None = None,
    ignore: Collection[str] = (),
    groups: bool = True,
    target: float | None = None,
    by: By = "params",
    widths: Rule = "uniform",
    min_filters: int = 1,
    multiple: int = 1,
    choose: Choose = "responses",
    samples: int = 1024,
) -> nn.Module:
    """A small, plain copy of a trained ``model``, whose unimportant filters live on in those that read them.

    Fine-tune it as any network; there is nothing to rescore and nothing to compact. The statistics of its BatchNorms
    are measured anew.

    Args:
        model: any trained network of convolutions and linear layers; not modified.
        example_inputs: one batch the network accepts; its labels are not needed.
        batches: training inputs: batches like ``example_inputs``, or pairs of such a tensor and its labels, as a
            DataLoader gives. Only the first ones are looked at, and kept in memory meanwhile.
        samples: how many inputs are looked at, in whole batches.
        choose: who stays: ``"responses"``, those whose part in what the next layers answer the others could take over
            least (units nobody can take over: by weights); ``"weights"``, the filters of the largest relative entropy.
        keep, settings, ignore, groups, target, by, widths, min_filters, multiple: as in :func:`apbm_core.fuse`.

    Raises:
        ConfigError: as ``fuse``; or ``choose`` is neither, or ``samples`` is below 1; or there are no batches, or the
            network answers with values that are not finite.
        UnsupportedNetwork: as ``fuse``.
    """
    if choose not in get_args(Choose):
        raise ConfigError(f"choose is {choose!r}; who stays is chosen by {' or '.join(map(repr, get_args(Choose)))}.")
    anatomy = Anatomy(model, example_inputs, groups)
    batches = _first(batches, anatomy.inputs, model, samples)
    units = wanted_units(anatomy, keep, ignore, target, by, widths, min_filters, multiple)
    kept = most_important(anatomy, units, settings or FusionSettings())
    readers = see(anatomy, units, batches)
    if choose == "responses":
        for name, order in departures(anatomy, units, readers).items():
            kept[name] = torch.nonzero(order == len(order))[:, 0]
    return hand_over(anatomy, kept, batches, readers)


@torch.no_grad()
def most_important(anatomy: Anatomy, units: Mapping[str, int], settings: FusionSettings) -> dict[str, Tensor]:
    """The units of each named group that stay, ascending, by the score at the settings' last temperature."""
    modules, kept = dict(anatomy.model.named_modules()), {}
    for name, count in units.items():
        members = []
        for layer, filters in anatomy.groups[name].layers.items():
            weight = modules[layer].weight
            fusion = settings.fusion(outputs_of(modules[layer]), count * filters.shape[1]).to(weight.device)
            transposed = bool(getattr(modules[layer], "transposed", False))
            fusion.join(name, filters, torch.arange(count), out_dim=int(transposed))
            members.append((fusion, weight))
        kept[name] = choose_together(members, count, progress=1.0).cpu()
    return kept


def see(anatomy: Anatomy, names: Collection[str], batches: Iterable, recalibrate: bool = True) -> dict[str, Reader]:
    """What each layer that reads channels of the named groups, and can take them over, reads of the batches.

    Args:
        anatomy: of the trained network.
        batches: as in :func:`fuse_trained`.
        recalibrate: the norms are measured anew in the end, so that a constant before them is of no account.

    Raises:
        ConfigError: there are no batches, or a layer reads values that are not finite.
    """
    model = anatomy.model
    normed = set(normed_convolutions(model, anatomy.inputs)[0]) if recalibrate else set()
    readers = {}
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS) or is_depthwise(module) or has_own_forward(module):
            continue
        read = [group for group in map(anatomy.groups.get, names) if (name, "in") in group.pairs]
        transposed, parts = getattr(module, "transposed", False), getattr(module, "groups", 1)
        places = _places(module.weight.shape[input_dim(module)] * parts, *(group.sides[name, "in"] for group in read))
        if read and places and (parts == 1 or (places == 1 and not transposed)):
            is_centred = (module.bias is not None or name in normed) and not transposed
            readers[name] = Reader(places, is_centred, parts)
    with torch.no_grad():
        _measure(model, readers, batches, anatomy.inputs)
    return {name: reader for name, reader in readers.items() if reader.count}  # else it is not called as a layer


@torch.no_grad()
def departures(anatomy: Anatomy, until: Mapping[str, int], readers: Mapping[str, Reader]) -> dict[str, Tensor]:
    """In which order the units of each named group go, those first whose part others take over best (redundancy.py).

    Args:
        anatomy: of the trained network.
        until: group -> how many of its units stay to the end.
        readers: of :func:`see`.

    Returns:
        group -> shape (units,): the step in which each goes; the number of units for all that stay. Groups whose
        channels nothing reads that could take them over are left out.
    """
    found = {}
    for name, count in until.items():
        group, readings = anatomy.groups[name], []
        for layer, reader in readers.items():
            inputs = _of_units(group, layer)
            readings += [] if inputs is None else reader.readings(anatomy.model.get_submodule(layer), inputs)
        if readings:
            found[name] = least_missed_first(readings, count)
    return found


def hand_over(
    anatomy: Anatomy,
    kept: Mapping[str, Tensor],
    batches: Iterable,
    readers: Mapping[str, Reader] | None = None,
    recalibrate: bool = True,
) -> nn.Module:
    """The network with these units of each named group only, what reads the others combining those that are left.

    Args:
        anatomy: of the trained network.
        kept: group -> the units that stay, ascending.
        batches: as in :func:`fuse_trained`.
        readers: what :func:`see` saw of these batches; None: they are gone through once more.
        recalibrate: measure the BatchNorms' statistics on the batches; else they stay those of the kept channels.

    Raises:
        ConfigError: there are no batches, or a layer reads values that are not finite.
        UnsupportedNetwork: the network cannot be cut this way.
    """
    small, cuts = anatomy.cut(kept)
    with torch.no_grad():
        readers = see(anatomy, kept, batches, recalibrate) if readers is None else readers
        for name, reader in readers.items():
            layer, cut = anatomy.model.get_submodule(name), cuts.get(f"{name}.weight")
            if cut is not None and cut[input_dim(layer)] is not None:
                reader.take_over(layer, small.get_submodule(name), cut)
        if recalibrate:
            renew_norms(small, batches, anatomy.inputs)
    return small


def _of_units(group: Group, layer: str) -> Tensor | None:
    """The inputs of a layer that belong to each of a group's units, shape (units, inputs of a unit), or None."""
    pairs = group.pairs.get((layer, "in"))
    if pairs is None:
        return None
    first = group.layers[group.name]
    unit_of = torch.empty(int(first.max()) + 1, dtype=torch.long)
    unit_of[first] = torch.arange(group.units)[:, None].expand_as(first)
    rows = torch.stack([unit_of[pairs[:, 1]], pairs[:, 0]], 1).unique(dim=0)  # sorted: by unit, then by input
    return rows[:, 1].view(group.units, -1) if (rows[:, 0].bincount() == group.sides[layer, "in"]).all() else None


def _places(inputs: int, *of_unit: int) -> int:
    """How many inputs are treated as places of one channel, that few enough channels remain; 0 if none are."""
    if inputs <= _WIDEST:
        return 1
    common = gcd(*of_unit)
    return next((n for n in range(2, common + 1) if common % n == inputs % n == 0 and inputs // n <= _WIDEST), 0)


def _measure(model: nn.Module, readers: Mapping[str, Reader], batches: Iterable, example_inputs: Any) -> None:
    """Let every reader see what it reads of the batches in the trained network."""
    with ExitStack() as stack:
        for name, reader in readers.items():
            module = model.get_submodule(name)
            dim = -1 if isinstance(module, nn.Linear) else -module.weight.dim() + 1

            def read(_module, given, named, reader=reader, dim=dim):
                reader.read(given[0] if given else named["input"], dim)

            stack.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
        stack.enter_context(evaluation_mode(model))
        for batch in inputs_of(batches, example_inputs, model):
            call(model, batch)
    for name, reader in readers.items():
        if reader.count and not reader.moments.isfinite().all():
            raise ConfigError(
                f"layer {name!r} reads values that are not finite, so that no channel can be predicted by others; give "
                "batches on which the network works."
            )


@torch.no_grad()
def renew_norms(model: nn.Module, batches: Iterable, example_inputs: Any) -> None:
    """Measure the statistics of a network's BatchNorms anew, in place, as plain means over the batches.

    ``torch.optim.swa_utils.update_bn`` does the same, but lets dropout act, and takes tensors alone.

    Args:
        model: any network.
        batches, example_inputs: as in :func:`fuse_trained`.

    Raises:
        ConfigError: there are no batches, or they are too small for a norm.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with evaluation_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.train()
        try:
            for batch in inputs_of(batches, example_inputs, model):
                call(model, batch)
        except ValueError as error:
            if isinstance(error, ApbmError):
                raise
            raise ConfigError(f"the norms cannot be measured on these batches ({error}); give larger ones.") from error
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def inputs_of(batches: Iterable, example_inputs: Any, model: nn.Module) -> Iterator[Any]:
    """The inputs in each batch, in the form of ``example_inputs``, on the model's device: labels are left out.

    Raises:
        ConfigError: there are no batches, or one has another form.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found = False
    for batch in batches:
        found = True
        if isinstance(example_inputs, Mapping):
            missing = set(example_inputs) - set(batch if isinstance(batch, Mapping) else ())
            if missing:
                raise ConfigError(f"a batch lacks {', '.join(sorted(missing))}, which the example inputs have.")
            batch = {name: batch[name] for name in example_inputs}
        elif isinstance(example_inputs, tuple):
            batch = tuple(batch)[: len(example_inputs)] if isinstance(batch, (tuple, list)) else (batch,)
            if len(batch) < len(example_inputs):
                raise ConfigError(f"a batch has {len(batch)} parts; the example inputs have {len(example_inputs)}.")
        elif isinstance(batch, (tuple, list)):
            batch = batch[0]
        yield pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    if not found:
        raise ConfigError("there are no batches to see on how the channels move together; give some training inputs.")


def _first(batches: Iterable, example_inputs: Any, model: nn.Module, samples: int) -> list[Any]:
    """The inputs of the first batches, as many as hold so many samples."""
    if samples < 1:
        raise ConfigError(f"samples is {samples}; look at one at least, better at about a thousand.")
    found, count = [], 0
    for inputs in inputs_of(batches, example_inputs, model):
        found.append(inputs)
        tensors = [value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor) and value.dim()]
        count += len(tensors[0]) if tensors else 1
        if count >= samples:
            break
    return found
