"""Copies of a network: of one that deepcopy alone cannot copy, and of one whose computed weights become ordinary."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

_REWRITERS = (prune.BasePruningMethod, spectral_norm.__globals__["SpectralNorm"], weight_norm.__globals__["WeightNorm"])


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, of networks too that keep tensors of the last forward pass, as weight norms and masks do."""
    memo = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def is_parametrized_by(module: nn.Module, kinds: type | tuple[type, ...]) -> bool:
    """Whether parameters of this very module are parametrised, and by nothing but ``kinds``."""
    if not parametrize.is_parametrized(module):
        return False
    return all(isinstance(step, kinds) for tensor in module.parametrizations.values() for step in tensor)


def plain_copy(model: nn.Module, kinds: type | tuple[type, ...] = nn.Module) -> nn.Module:
    """A copy of ``model`` whose layers parametrised by ``kinds`` alone have ordinary weights of the same values.

    Parameters that were trained still are; the original stays as it is. (``remove_parametrizations`` would break it: it
    edits a class of the layer's own that deepcopy shares.)
    """
    plain = copy_of(model)
    for module in plain.modules():
        if not is_parametrized_by(module, kinds):
            continue
        values = {}
        for name, tensor in module.parametrizations.items():
            trained = any(original.requires_grad for original in tensor.parameters(recurse=False))
            values[name] = nn.Parameter(getattr(module, name).detach().clone(), requires_grad=trained)
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, value)
    return plain


def computes_its_weights(module: nn.Module) -> bool:
    """Whether parameters of this very module come from others in each forward pass: a norm, a mask, a fusion."""
    return parametrize.is_parametrized(module) or bool(_rewriters(module))


def ordinary_copy(model: nn.Module) -> nn.Module:
    """A copy in which every weight is an ordinary parameter of the value it has in evaluation mode."""
    plain = plain_copy(model)
    plain.eval()
    for module in plain.modules():
        for key, hook in _rewriters(module).items():
            name = getattr(hook, "name", None) or hook._tensor_name
            with torch.no_grad():
                hook(module, ())
            value = getattr(module, name).detach().clone()
            del module._forward_pre_hooks[key]
            for part in (name, f"{name}_orig", f"{name}_g", f"{name}_v", f"{name}_u", f"{name}_mask"):
                module.__dict__.pop(part, None), module._parameters.pop(part, None), module._buffers.pop(part, None)
            module.register_parameter(name, nn.Parameter(value))
    for copied, module in zip(plain.modules(), model.modules(), strict=False):
        copied.training = module.training
    return plain


def _rewriters(module: nn.Module) -> dict:
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _REWRITERS)}


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer computes by code of its own, or is prepared by a hook, and not as torch's layer does."""
    methods = [getattr(type(layer), name, None) for name in ("forward", "_conv_forward")]
    foreign = any(method is not None and not method.__module__.startswith("torch.nn.modules") for method in methods)
    return foreign or bool(layer._forward_pre_hooks)


class _Computed(nn.Module):
    """The same values in another tensor, as of a fusion."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.clone()


def takes_computed_weight(layer: nn.Module, inputs: tuple) -> bool:
    """Whether a layer does with a weight that is computed for each pass what it does with an ordinary parameter.

    One that renormalises or masks ``self.weight.data`` in its forward pass does not.
    """
    for scale in (1.0, 30.0):
        ordinary = copy_of(layer).eval()
        ordinary.weight.data.mul_(scale)
        computed = copy_of(ordinary)
        parametrize.register_parametrization(computed, "weight", _Computed())
        with torch.no_grad():
            if not torch.allclose(computed(*inputs), ordinary(*inputs), rtol=1e-4):
                return False
    return True
