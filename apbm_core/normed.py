"""Which convolution feeds which BatchNorm, and nothing else: found by watching one forward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apbm_core.errors import UnsupportedNetwork
from apbm_core.forward import call, describe, evaluation_mode

_LOOK_ONLY = frozenset(["__get__", "size", "dim", "numel"])  # asking for a shape is not reading the values


def normed_convolutions(model: nn.Module, example_inputs: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Which convolution feeds which BatchNorm alone: {convolution: norm}, and {convolution: why not} of the others.

    Raises:
        UnsupportedNetwork: the network does not run.
    """
    watch = _Watch()
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: watch.made(name, output))
        for name, module in convs.items()
    ]
    for name, module in norms.items():
        handles.append(module.register_forward_pre_hook(lambda _m, inputs, name=name: watch.read(name, inputs[0])))
        handles.append(module.register_forward_hook(lambda *_: watch.leave()))
    try:
        with torch.no_grad(), evaluation_mode(model), watch:
            outputs = call(model, example_inputs)
    except Exception as error:
        raise UnsupportedNetwork(
            f"this {type(model).__name__} does not run on inputs of shape {describe(example_inputs)}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    watch.returned(outputs)
    found, left = {}, {}
    for name in convs:
        norm = watch.norm_of.get(name)
        if watch.calls.get(name, 0) != 1:
            left[name] = f"the forward pass calls it {watch.calls.get(name, 0)} times"
        elif norm is None:
            left[name] = "no BatchNorm reads its output"
        elif watch.norm_calls[norm] != 1:
            left[name] = f"the forward pass calls its norm, {norm}, {watch.norm_calls[norm]} times"
        elif name in watch.shared:
            left[name] = "more than the BatchNorm reads its output"
        else:
            found[name] = norm
    return found, left


class _Watch(TorchFunctionMode):
    """Sees who reads the outputs of the convolutions in one forward pass."""

    def __init__(self):
        super().__init__()
        self.outputs: dict[int, tuple[Tensor, str]] = {}  # holding the tensor keeps its id from being reused
        self.calls: dict[str, int] = {}
        self.norm_of: dict[str, str] = {}
        self.norm_calls: dict[str, int] = {}
        self.shared: set[str] = set()
        self.inside: str | None = None  # the convolution whose norm is being computed

    def made(self, name: str, output: Tensor) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.outputs[id(output)] = (output, name)

    def read(self, norm: str, value: Tensor) -> None:
        self.norm_calls[norm] = self.norm_calls.get(norm, 0) + 1
        if id(value) in self.outputs:
            name = self.outputs[id(value)][1]
            if name in self.norm_of:
                self.shared.add(name)
            self.norm_of[name] = norm
            self.inside = name

    def leave(self) -> None:
        self.inside = None

    def returned(self, outputs: object) -> None:
        self._note(outputs)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _LOOK_ONLY:
            self._note((args, kwargs))
        return result

    def _note(self, values: object) -> None:
        for value in torch.utils._pytree.tree_leaves(values):
            if isinstance(value, Tensor) and id(value) in self.outputs:
                name = self.outputs[id(value)][1]
                if name != self.inside:
                    self.shared.add(name)
