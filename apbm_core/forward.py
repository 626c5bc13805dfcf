"""Whether a network can be worked on at all, and whether it still runs after surgery: asked by calling it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

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


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on one batch: a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and data classes."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def ordinary_inputs(inputs: Any) -> Any:
    """Copies that autograd can follow, whatever mode the tensors were made in; a list of arguments becomes a tuple."""
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)


def describe(inputs: Any) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs)) or "none"


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


def count_calls(model: nn.Module, inputs: Any) -> dict[str, int]:
    """How often one forward pass in evaluation mode calls each module, by name; those never called are absent.

    Raises:
        UnsupportedNetwork: the network does not run.
    """
    calls: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():

        def count(_module, _inputs, _output, name=name):
            calls[name] = calls.get(name, 0) + 1

        handles.append(module.register_forward_hook(count))
    try:
        with torch.no_grad(), evaluation_mode(model):
            call(model, inputs)
    except Exception as error:
        raise UnsupportedNetwork(
            f"this {type(model).__name__} does not run on inputs of shape {describe(inputs)}: {error}. "
            "Pass one batch that model(example_inputs) accepts, on the model's device."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def trained_shapes(model: nn.Module, inputs: Any) -> list[tuple[int, ...]]:
    """The shapes returned in training mode; norm statistics and random state stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    with evaluation_mode(model):  # and back into each module's own mode
        model.train()
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            outputs = torch.func.functional_call(model, buffers, args, kwargs)
    return [tuple(tensor.shape) for tensor in tensors_in(outputs)]
