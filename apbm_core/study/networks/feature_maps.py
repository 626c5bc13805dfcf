"""The feature map that each convolution of any network turns into: what its filters look like behind the activation.

Networks reuse one ReLU module, call ``F.relu``, activate after a residual addition, or not at all; module names tell
little. So the functions a forward pass calls are watched (``TorchFunctionMode``), and each convolution's output is
followed through norms, additions, pooling and the like:

- its map is the output of the first activation function it reaches, if that has the convolution's channels, shape
  (N, n, h, w). A ResNet block's last convolution is thus seen after the residual addition;
- an output that only meets other convolutions, linear layers, matrix products, or activations with other channels
  (DenseNet concatenates before it activates) has no map of its own. Then a ReLU of the convolution's output is taken,
  or of the output of the norm behind it where there is one.

A convolution that is called several times in a pass is seen at its first call.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apbm_core.errors import UnsupportedNetwork
from apbm_core.forward import evaluation_mode
from apbm_core.study.networks.layers import named_convolutions

ACTIVATIONS = frozenset(
    [
        "relu",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "prelu",
        "rrelu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "softplus",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "threshold",
    ]
)
# Not layer_norm: it norms the last dimension, where an image network keeps channels only between two permutations.
_NORMS = frozenset(["batch_norm", "instance_norm", "group_norm", "local_response_norm"])
_MIXERS = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
        "bilinear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "einsum",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
    ]
)


class FeatureMap(NamedTuple):
    """Where a convolution's feature map appears in a forward pass."""

    call: int
    """The number of the function call that returns it, among the calls of a pass that return a tensor."""
    function: str
    """The name of that function, such as ``relu``, ``silu``, ``batch_norm`` or ``conv2d``."""
    rectify: bool
    """Whether it has met no activation and a ReLU is still to be applied."""


def find_feature_maps(model: nn.Module, layers: Sequence[str], image: Tensor) -> dict[str, FeatureMap]:
    """Where the feature map of each named convolution appears, found by one forward pass in evaluation mode.

    Args:
        model: any network; left as it was.
        layers: names of ``nn.Conv2d`` modules.
        image: a batch of one or more images, shape (N, 3, H, W).

    Raises:
        ConfigError: a name is not a convolution of the model.
        UnsupportedNetwork: a named convolution takes no part in the forward pass.
    """
    convolutions = named_convolutions(model, layers)
    tracer = _Tracer()
    with _undisturbed(model), _hooked(convolutions, tracer.opened), tracer:
        model(_on_device(image, model))
    for name in layers:
        if name not in tracer.found:
            raise UnsupportedNetwork(
                f"the convolution {name!r} is never called in a forward pass, so it has no feature map; "
                "leave it out of the layers to score."
            )
    return {name: tracer.found[name] for name in layers}


def visit_feature_maps(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Tensor], visit: Callable[[str, Tensor], None]
) -> None:
    """Calls ``visit(name, maps)`` for every named convolution and every batch, all layers in one forward pass a batch.

    ``maps`` has shape (N, n, h, w), lives on the model's device, and is only good until ``visit`` returns: what comes
    next in the network may overwrite it. The pass runs in evaluation mode, without gradients or autocast; modes, norm
    statistics and hooks of the model are afterwards as they were, whatever ``visit`` raises.

    Args:
        model: any network.
        layers: names of ``nn.Conv2d`` modules.
        batches: image batches of shape (N, 3, H, W); moved to the model's device and precision.
        visit: what to do with the maps.

    Raises:
        ConfigError: a name is not a convolution of the model.
        UnsupportedNetwork: a named convolution takes no part in the forward pass.
    """
    watcher = None
    for batch in batches:
        if watcher is None:
            watcher = _Watcher(find_feature_maps(model, layers, batch[:1]), visit)
        watcher.calls = 0
        with _undisturbed(model), watcher:
            model(_on_device(batch, model))


class _Tracer(TorchFunctionMode):
    """Follows the outputs of convolutions to where their feature maps appear."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.found: dict[str, FeatureMap] = {}
        self.channels: dict[str, int] = {}
        self.open: set[str] = set()  # the convolutions that have met no activation of theirs yet
        # Tensor id -> (the tensor, the convolutions it carries). Holding the tensor keeps its id from being reused.
        self.carried: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def opened(self, name: str, output: Tensor) -> None:
        """To be called right after the convolution ``name`` returned ``output``."""
        if name not in self.found and output.ndim == 4:
            self.found[name] = FeatureMap(self.calls - 1, "conv2d", rectify=True)
            self.channels[name] = output.shape[1]
            self.open.add(name)
            self.carried[id(output)] = (output, frozenset([name]))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        names = frozenset().union(*(self.carried[id(x)][1] for x in _tensors((args, kwargs)) if id(x) in self.carried))
        result = func(*args, **kwargs)
        call, function = self.calls, _name(func)
        self.calls += isinstance(result, Tensor)
        if function in ACTIVATIONS:
            for name in names & self.open:
                if result.ndim == 4 and result.shape[1] == self.channels[name]:
                    self.found[name] = FeatureMap(call, function, rectify=False)
                    self.open.remove(name)
            names = frozenset()
        elif function in _NORMS and isinstance(result, Tensor):
            for name in names & self.open:
                alone = self.found[name].function == "conv2d" and len(names) == 1
                if alone and result.ndim == 4 and result.shape[1] == self.channels[name]:
                    self.found[name] = FeatureMap(call, function, rectify=True)
        elif function in _MIXERS:
            names = frozenset()
        for tensor in _tensors(result):
            self.carried[id(tensor)] = (tensor, names & self.open)
        return result


class _Watcher(TorchFunctionMode):
    """Shows the feature maps, found before, while a forward pass computes them."""

    def __init__(self, found: dict[str, FeatureMap], visit: Callable[[str, Tensor], None]):
        super().__init__()
        self.calls = 0
        self.visit = visit
        self.at = defaultdict(list)
        for name, where in found.items():
            self.at[where.call].append((name, where))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result
        for name, where in self.at.get(self.calls, ()):
            if _name(func) != where.function:
                raise UnsupportedNetwork(
                    f"the feature maps of {name!r} appear at another place in every forward pass: the network's course "
                    "depends on its input, so its channels cannot be compared; leave the layer out of those to score."
                )
            self.visit(name, result.relu() if where.rectify else result)
        self.calls += 1
        return result


def _name(func: Callable) -> str:
    return getattr(func, "__name__", "").rstrip("_")  # relu_ works in place, and is relu


def _tensors(value: object) -> Iterable[Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _on_device(images: Tensor, model: nn.Module) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(like.device, like.dtype)


@contextmanager
def _hooked(convolutions: dict[str, nn.Conv2d], opened: Callable[[str, Tensor], None]):
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: opened(name, output))
        for name, module in convolutions.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _undisturbed(model: nn.Module):
    """Evaluation mode, no gradients, no autocast; afterwards every module is in the mode it was in."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    with evaluation_mode(model), torch.no_grad(), torch.autocast(device, enabled=False):
        yield
