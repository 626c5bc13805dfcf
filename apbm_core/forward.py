"""Whether a network can be worked on at all, and whether it still runs after surgery: asked by calling it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from apbm_core.errors import UnsupportedNetwork


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and outside again each module's own mode, which need not be the model's."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
    plain = copy.deepcopy(model)
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


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse the wrappers that hold on to parameters or code which surgery replaces.

    DistributedDataParallel would go on synchronising the old parameters, and say nothing.

    Raises:
        UnsupportedNetwork: naming the wrapper, and what to do in which order.
    """
    for name, module in model.named_modules():
        where = f"the module {name!r}" if name else "the network"
        if isinstance(module, DistributedDataParallel):
            raise UnsupportedNetwork(
                f"{where} is wrapped in DistributedDataParallel, which keeps to the parameters it was made with; pass "
                "its .module, and wrap what comes back."
            )
        if hasattr(module, "_orig_mod"):  # where torch.compile keeps the network
            raise UnsupportedNetwork(
                f"{where} is compiled; pass the network that was given to torch.compile, and compile what comes back."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedNetwork(
                f"{where} is a TorchScript module, whose layers cannot be changed; pass the nn.Module it was made from."
            )


def refuse_parametrized(model: nn.Module) -> None:
    """Raise UnsupportedNetwork if a layer's weight is parametrised, which cannot be traced."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            raise UnsupportedNetwork(
                f"layer {name!r} is parametrised (fused already?), which cannot be traced; compact() the network first."
            )


def count_calls(model: nn.Module, example_inputs: Tensor) -> dict[str, int]:
    """How often one forward pass in evaluation mode calls each ``nn.Conv2d``, by name; those never called are absent.

    Raises:
        UnsupportedNetwork: the network does not run.
    """
    calls: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def count(_module, _inputs, _output, name=name):
                calls[name] = calls.get(name, 0) + 1

            handles.append(module.register_forward_hook(count))
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(example_inputs)
    except Exception as error:
        raise UnsupportedNetwork(
            f"this {type(model).__name__} does not run on inputs of shape {tuple(example_inputs.shape)}: {error}. "
            "Pass one batch that model(example_inputs) accepts, on the model's device."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def check_still_runs(model: nn.Module, small: nn.Module, example_inputs: Tensor) -> None:
    """Compare what both return; a network with channel numbers written into its code, or several heads, shows here.

    In training mode too, where the network runs in it: auxiliary classifiers take part in nothing else, so the trace,
    made in evaluation mode, cannot know what they read.

    Raises:
        UnsupportedNetwork: the small network fails, or returns other shapes.
    """
    try:
        before, after = _evaluated(model, example_inputs), _evaluated(small, example_inputs)
    except Exception as error:
        raise UnsupportedNetwork(
            f"this {type(model).__name__} does not run any more with fewer filters: {error}. Numbers of channels may "
            "be written into its forward(); name the layers in question in `ignore`."
        ) from error
    if before != after:
        raise UnsupportedNetwork(
            f"removing filters changed what this {type(model).__name__} returns, from shapes {before} to {after}: some "
            "of the layers feed its output; name them in `ignore`."
        )
    try:
        before = _trained(model, example_inputs)
    except Exception:  # such as BatchNorm on a single value: that says nothing about the surgery
        return
    try:
        after = _trained(small, example_inputs)
    except Exception as error:
        raise UnsupportedNetwork(
            f"with fewer filters this {type(model).__name__} runs in evaluation mode, but not in training mode: "
            f"{error}. Layers that take part in training alone read some of them; name in `ignore` the layers that "
            "feed those, or build the network without auxiliary heads."
        ) from error
    if before != after:
        raise UnsupportedNetwork(
            f"removing filters changed what this {type(model).__name__} returns in training, from shapes {before} to "
            f"{after}; name the layers that feed this output in `ignore`."
        )


def _evaluated(model: nn.Module, example_inputs: Tensor) -> list[tuple[int, ...]]:
    with torch.no_grad(), evaluation_mode(model):
        return _shapes(model(example_inputs))


def _trained(model: nn.Module, example_inputs: Tensor) -> list[tuple[int, ...]]:
    """The shapes returned in training mode; norm statistics and random state stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with evaluation_mode(model):  # and back into each module's own mode
        model.train()
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            return _shapes(torch.func.functional_call(model, buffers, example_inputs))


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
