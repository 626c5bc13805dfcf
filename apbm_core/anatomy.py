"""How a network's layers hang together, and what is left of it when some of their filters go.

Which channels hang together is found by torch-pruning (groups.py), and every surgery is proved by numbers (proof.py):
what cannot be shown to be right is left alone, and the reason kept.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apbm_core import proof
from apbm_core.copies import computes_its_weights, copy_of, has_own_forward, ordinary_copy, takes_computed_weight
from apbm_core.cuts import Cuts, cuts_of, fill, tag
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.forward import (
    call,
    count_calls,
    evaluation_mode,
    ordinary_inputs,
    refuse_wrapped,
    trained_shapes,
)
from apbm_core.fusion import fused_layers
from apbm_core.groups import LAYERS, Group, find_groups
from apbm_core.tracing import Trace


class Anatomy:
    """How a network's layers hang together, and what can be cut out of it.

    Attributes:
        groups: name of the first layer -> the layers whose filters go together, where they can.
        reasons: layer -> None if its filters can go, else why not.

    Args:
        model: any network; not modified.
        example_inputs: one batch the network accepts.
        coupled: False: only ``nn.Conv2d`` whose outputs are their own.
        prove: find out now which groups can go without harm, and not for each cut alone.

    Raises:
        UnsupportedNetwork: the network is wrapped, or fused already, or does not run, or cannot be traced.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, coupled: bool, prove: bool = True):
        refuse_wrapped(model)
        for name, _, _ in fused_layers(model):
            raise UnsupportedNetwork(f"layer {name!r} is fused already; compact() the network first.")
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            self.model, self.inputs = model, ordinary_inputs(example_inputs)
            self._plain = ordinary_copy(model)
            calls = count_calls(self._plain, self.inputs)
            self._trace = Trace(copy_of(self._plain), self.inputs)
            found = find_groups(self._trace, calls, self._untouchable(), self._unfusable(), coupled)
            self.reasons = {name: group.reason for name, group in found.items()}
            right = [group for group in found.values() if group.reason is None]
            if not any(parameter.is_meta for parameter in model.parameters()):  # which hold nothing to compute with
                self._dense, self._batches = proof.with_random_weights(self._plain, self.inputs)
                try:
                    self._trained = trained_shapes(model, self.inputs)
                except Exception:  # such as BatchNorm on a single value: that says nothing about a surgery
                    self._trained = None
                right = self._proved(right) if prove else right
        self.groups = {group.name: group for group in right}
        for group in right:
            self.reasons |= dict.fromkeys(group.layers)
        self.reasons = {name: self.reasons[name] for name, _ in model.named_modules() if name in self.reasons}

    def group_of(self, layer: str) -> Group:
        return next(group for group in self.groups.values() if layer in group.layers)

    def cut(self, keep: Mapping[str, Tensor]) -> tuple[nn.Module, Cuts]:
        """The network with these units of these groups only, and what is left of its parameters.

        Raises:
            UnsupportedNetwork: it does not compute what the network without them should.
        """
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            chosen = {self.groups[name]: kept for name, kept in keep.items() if len(kept) < self.groups[name].units}
            small, cuts = self._cut(chosen)
            if reason := self._mistake(small, cuts):
                raise UnsupportedNetwork(f"this {type(self.model).__name__} cannot be cut this way: {reason}.")
        return small, cuts

    def _proved(self, groups: list[Group]) -> list[Group]:
        self._wrong: dict[tuple, list[str]] = {}
        self._put_back: list[Group] = []
        right = self._provable(groups)
        if not self._put_back or self._try(self._put_back) is not None:
            return right
        return self._joined(right, self._put_back)

    def _provable(self, groups: list[Group]) -> list[Group]:
        """Those of the groups that can be cut together and proved right; of the others, the reason is kept.

        Halves are tried apart, kind by kind: the blocks of a network repeat each other. Where two groups of a kind are
        wrong, each by itself, the others of it are tried together once more, and else left alone for the same reason.
        """
        groups = [group for group in groups if not self._is_doubtful(group)]
        if not groups:
            return []
        reason = self._try(groups)
        if reason is None:
            return groups
        if len(groups) == 1:
            for larger in groups[0].in_larger_units():
                if self._try([larger]) is None:
                    return [larger]
            self.reasons |= dict.fromkeys(groups[0].layers, reason)
            self._wrong.setdefault(groups[0].kind, []).append(reason)
            return []
        kinds: dict[tuple, list[Group]] = {}
        for group in groups:
            kinds.setdefault(group.kind, []).append(group)
        parts = list(kinds.values()) if len(kinds) > 1 else [[group] for group in groups]
        half = len(parts) // 2
        first = self._provable(sum(parts[:half], []))
        return self._joined(first, self._provable(sum(parts[half:], [])))

    def _joined(self, first: list[Group], second: list[Group]) -> list[Group]:
        """What of two sets of groups, each right by itself, is right together: all of the first in any case."""
        if not first or not second or self._try(first + second) is None:
            return first + second
        for group in second:
            if (reason := self._try([*first, group])) is None:
                first = [*first, group]
            else:
                self.reasons |= dict.fromkeys(group.layers, reason)
        return first

    def _is_doubtful(self, group: Group) -> bool:
        """Whether two groups of its kind were wrong, so that it is put back."""
        wrong = self._wrong.get(group.kind, ())
        if len(wrong) < 2:
            return False
        self._put_back.append(group)
        self.reasons |= dict.fromkeys(group.layers, wrong[0])
        return True

    def _try(self, groups: list[Group]) -> str | None:
        """What goes wrong when every third unit or so of these groups is removed, in no order; or None."""
        keep, generator = {}, torch.Generator().manual_seed(0)
        for group in groups:
            count = min(-(-2 * group.units // 3), group.units - 1)
            keep[group] = torch.randperm(group.units, generator=generator)[:count].sort().values
        try:
            return self._mistake(*self._cut(keep))
        except UnsupportedNetwork as error:
            return str(error)

    def _cut(self, keep: Mapping[Group, Tensor]) -> tuple[nn.Module, Cuts]:
        gone: dict[tuple[str, str], list[Tensor]] = {}
        for group, kept in keep.items():
            for side, channels in group.without(kept).items():
                gone.setdefault(side, []).append(channels)
        small = copy_of(self._plain)
        shapes = tag(small)  # tags in place of the values remember what came from where
        try:
            self._trace.remove(small, {side: torch.cat(channels).unique() for side, channels in gone.items()})
        except Exception as error:
            raise UnsupportedNetwork(f"its filters cannot be removed ({type(error).__name__}: {error})") from error
        return small, cuts_of(small, shapes)

    def _mistake(self, small: nn.Module, cuts: Cuts) -> str | None:
        """What is wrong with a cut network, or None; it is given the network's own weights in the end."""
        try:
            fill(small, self._dense, cuts)
            off = proof.difference(self._dense, small, cuts, self._batches)
        except Exception as error:
            return (
                f"the network does not run any more with fewer filters ({type(error).__name__}: {_first_line(error)})"
            )
        dtype = next((t.dtype for t in self._dense.parameters() if t.is_floating_point()), torch.float32)
        if off == float("inf"):
            return "without some filters the network returns other shapes, or nothing finite"
        if off > proof.TOLERANCE.get(dtype, 1e-2):
            return f"without some filters the network computes something else (difference {off:.1e})"
        fill(small, self._plain, cuts)
        own = dict(self.model.named_modules())
        for name, module in small.named_modules():
            module.training = own[name].training if name in own else module.training
        for name in self._computed:  # norms and masks of weights were taken away for the tracing
            small.set_submodule(name, copy_of(own[name]))
        if self._trained is None:
            return None
        try:
            after = trained_shapes(small, self.inputs)
        except Exception as error:
            return f"with fewer filters the network does not run in training mode ({_first_line(error)})"
        if after != self._trained:
            return f"in training the network returns other shapes, {after} for {self._trained}"
        return None

    @property
    def _computed(self) -> list[str]:
        return [name for name, module in self.model.named_modules() if computes_its_weights(module)]

    def _unfusable(self) -> dict[str, str]:
        """Layer -> why its weight cannot be computed, as a fusion does."""
        inputs: dict[str, tuple] = {}
        own = {n: m for n, m in self._plain.named_modules() if isinstance(m, LAYERS) and has_own_forward(m)}
        handles = [
            module.register_forward_pre_hook(lambda _m, given, name=name: inputs.update({name: given}))
            for name, module in own.items()
        ]
        try:
            with torch.no_grad(), evaluation_mode(self._plain):
                call(self._plain, self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return {
            name: "its own forward pass changes its weight"
            for name, given in inputs.items()
            if not takes_computed_weight(own[name], given)
        }

    def _untouchable(self) -> dict[str, str]:
        """Module -> why nothing of it may go."""
        reasons = {
            name: f"{name} computes its weight from other parameters (a norm, a mask)" for name in self._computed
        }
        owners: dict[int, str] = {}
        for name, module in self.model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                other = owners.setdefault(id(parameter), name)
                if other != name:
                    reasons |= {
                        name: f"{name} shares its {key} with {other}",
                        other: f"{other} shares its {key} with {name}",
                    }
        return reasons


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_names(names: Iterable[str], known: Mapping[str, str | None]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no layer is called {unknown[0]!r}; the network has {', '.join(known)}.")
