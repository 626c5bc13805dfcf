"""Physical slimming of any network, and the verbs built on it: fuse before training, compact after it.

Which channels hang together is torch-pruning's business (``DependencyGraph``): it follows a convolution's output
channels through norms, activations, pooling, concatenations, depthwise convolutions and flattening to the layers that
read them. We add two things. A convolution is only touched when its outputs are its own: filters whose outputs are
added to another layer's (a residual stage), gated by one, or returned by the network are left alone. And every
surgery is checked by a forward pass, so that a network is either changed rightly or refused.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.forward import check_still_runs, count_calls, refuse_parametrized, refuse_wrapped

_OUT = torch_pruning.prune_conv_out_channels
_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.PReLU)


def prunable_layers(model: nn.Module, example_inputs: Tensor) -> dict[str, int]:
    """The convolutions whose filters can be removed or fused, as name -> number of filters, in the model's order.

    Args:
        model: any network of ``nn.Conv2d`` convolutions; not modified.
        example_inputs: one batch the network accepts, such as shape (1, 3, 32, 32).

    Raises:
        UnsupportedNetwork: torch-pruning cannot trace the network.
    """
    reasons = why_not_prunable(model, example_inputs)
    modules = dict(model.named_modules())
    return {name: modules[name].out_channels for name, reason in reasons.items() if reason is None}


def why_not_prunable(model: nn.Module, example_inputs: Tensor) -> dict[str, str | None]:
    """For every convolution by name: None if its filters can go, else the reason why they are left alone."""
    refuse_wrapped(model)
    refuse_parametrized(model)
    calls = count_calls(model, example_inputs)
    twin = copy.deepcopy(model)
    graph = trace_dependencies(twin, example_inputs)
    return {
        name: _reason(graph, module, calls.get(name, 0))
        for name, module in twin.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def slim(model: nn.Module, example_inputs: Tensor, keep: Mapping[str, Sequence[int] | Tensor]) -> nn.Module:
    """A physically smaller copy of ``model`` in which each named convolution has only the filters listed.

    Norms, depthwise convolutions and the inputs of the layers behind follow. Parameters that stay keep their values.

    Args:
        model: any network; not modified.
        example_inputs: one batch the network accepts.
        keep: convolution name -> indices of the filters that stay, any order; they end up ascending.

    Raises:
        ConfigError: an unknown name, an index out of range or given twice, or an empty list.
        UnsupportedNetwork: a named convolution's filters cannot be removed alone, or the network does not run without.
    """
    return slim_with_inputs(model, example_inputs, keep, why_not_prunable(model, example_inputs))[0]


def slim_with_inputs(
    model: nn.Module, example_inputs: Tensor, keep: Mapping, reasons: Mapping[str, str | None]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The slim copy, and for every convolution by name which of its input channels are left."""
    check_names(keep, reasons)
    small = copy.deepcopy(model)
    modules = dict(small.named_modules())
    kept = {name: _checked_indices(name, indices, modules[name].out_channels) for name, indices in keep.items()}
    for name in kept:
        if reasons[name] is not None and len(kept[name]) < modules[name].out_channels:
            raise UnsupportedNetwork(f"the filters of layer {name!r} cannot be removed: {reasons[name]}.")

    graph = trace_dependencies(small, example_inputs)
    # torch-pruning works through the groups one by one; tags in place of the weights remember what came from where.
    dense = {name: module.weight for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    for name, weight in dense.items():
        o, i = weight.shape[:2]
        tags = torch.arange(o * i, dtype=torch.float64, device=weight.device).view(o, i, 1, 1)
        modules[name].weight = nn.Parameter(tags, requires_grad=False)
    for name, indices in kept.items():
        remaining = set(indices.tolist())
        gone = [index for index in range(modules[name].out_channels) if index not in remaining]
        if gone:
            _remove(graph, modules[name], name, gone)
    inputs = {}
    for name, weight in dense.items():
        tags = modules[name].weight.view(modules[name].weight.shape[:2]).long()
        outputs, inputs[name] = tags[:, 0] // weight.shape[1], tags[0] % weight.shape[1]
        left = weight.detach()[outputs][:, inputs[name]].clone()
        modules[name].weight = nn.Parameter(left, requires_grad=weight.requires_grad)
    for copied, module in zip(small.modules(), model.modules(), strict=True):
        copied.training = module.training  # a frozen norm is in evaluation mode when its network is not
    check_still_runs(model, small, example_inputs)
    return small, inputs


def _remove(graph: torch_pruning.DependencyGraph, conv: nn.Conv2d, name: str, filters: list[int]) -> None:
    try:
        graph.get_pruning_group(conv, _OUT, filters).prune()
    except Exception as error:
        raise UnsupportedNetwork(
            f"torch-pruning fails to remove filters of layer {name!r} ({type(error).__name__}: {error}); name it in "
            "`ignore`."
        ) from error


def trace_dependencies(model: nn.Module, example_inputs: Tensor) -> torch_pruning.DependencyGraph:
    """torch-pruning's graph of a network, which it is left in evaluation mode by.

    Raises:
        UnsupportedNetwork: torch-pruning cannot trace it.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:  # torch-pruning follows gradients
            parameter.requires_grad_(True)
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(model.eval(), example_inputs=example_inputs)
    except Exception as error:
        raise UnsupportedNetwork(
            f"torch-pruning cannot trace this {type(model).__name__} on inputs of shape "
            f"{tuple(example_inputs.shape)}: {error}. Check that model(example_inputs) runs and is plain PyTorch."
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _reason(graph: torch_pruning.DependencyGraph, conv: nn.Conv2d, calls: int) -> str | None:
    if conv.groups > 1:
        return "it is a grouped or depthwise convolution, which follows the layer that feeds it"
    if calls != 1:
        return f"the forward pass calls it {calls} times"
    if conv not in graph.module2node:
        return "torch-pruning does not see it in the computation"
    if conv.out_channels < 2:
        return "it has a single filter"
    is_read = False
    for dependency, _ in graph.get_pruning_group(conv, _OUT, [0]):
        module, name = dependency.target.module, graph._module2name.get(dependency.target.module, "another layer")
        if module is conv:
            continue
        if dependency.target.type == OPTYPE.OUTPUT:
            return "the network returns its outputs"
        if dependency.target.type == OPTYPE.PARAMETER:
            names = [name for name, parameter in graph.model.named_parameters() if parameter is module]
            return f"its outputs are combined with the parameter {names[0] if names else name}"
        removes_outputs = graph.is_out_channel_pruning_fn(dependency.handler)
        if isinstance(module, nn.Conv2d):
            is_depthwise = module.groups == module.in_channels == module.out_channels
            if module.groups > 1 and not is_depthwise:
                return f"its outputs feed the grouped convolution {name}"
            if removes_outputs and not is_depthwise:
                return f"its outputs are coupled with those of {name} (a sum or a gate)"
            is_read |= not removes_outputs
        elif isinstance(module, nn.Linear):
            if removes_outputs:
                return f"its outputs are coupled with those of {name} (a sum or a gate)"
            is_read = True
        elif list(module.parameters(recurse=False)) and not isinstance(module, _CHANNELWISE):
            return f"its outputs go through {name}, a {type(module).__name__}"
    return None if is_read else "no layer reads its outputs, so they are the network's own output"


def _checked_indices(name: str, indices: Sequence[int] | Tensor, n: int) -> Tensor:
    kept = torch.as_tensor(indices, dtype=torch.long).flatten().sort().values.cpu()
    if len(kept) == 0:
        raise ConfigError(f"layer {name!r} would keep no filter at all; keep at least one of its {n}.")
    if kept[0] < 0 or kept[-1] >= n:
        raise ConfigError(f"layer {name!r} has filters 0..{n - 1}, but {kept.tolist()} were to be kept.")
    if len(kept.unique()) < len(kept):
        raise ConfigError(f"a filter of layer {name!r} is listed twice in {kept.tolist()}.")
    return kept


def check_names(names: Iterable[str], known: Mapping[str, str | None]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no convolution is called {unknown[0]!r}; the network has {', '.join(known)}.")
