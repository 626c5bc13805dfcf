"""Proof by numbers that a surgery is right: the slim network is the dense one with the removed channels silenced.

Both compute on random weights (at the real ones a scale may be zero, and hide a mistake), in float64, on the example
inputs and on noise of their shapes. In the dense network, each layer that the surgery touched computes as its slim
counterpart does, on the channels it kept, and puts zeros where the others were; everything between the layers runs as
written, on the dense network's channels. If the surgery followed a channel wrongly, the two networks disagree.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apbm_core.copies import copy_of
from apbm_core.cuts import Cuts
from apbm_core.forward import call, evaluation_mode, tensors_in
from apbm_core.groups import LAYERS

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
_LARGE = 20_000_000  # parameters; networks of more are compared in float32, which takes half the memory

_WITH_CHANNELS = (
    *LAYERS,
    nn.Embedding,
    nn.PReLU,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def with_random_weights(model: nn.Module, inputs: Any) -> tuple[nn.Module, list[Any]]:
    """A copy with weights of ordinary size and unordinary values, and inputs for it: those given, and noise.

    In float64 where the network runs in it, and is not too large.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return (torch.randn(tensor.shape, generator=generator) * std + mean).to(tensor)

    noise = pytree.tree_map(lambda leaf: draw(leaf) if _is_float(leaf) else leaf, inputs)
    is_large = sum(parameter.numel() for parameter in model.parameters()) > _LARGE
    for dtype in (torch.float32,) if is_large else (torch.float64, torch.float32):
        dense = copy_of(model).eval().to(dtype)
        tried = [inputs, noise]
        tried = pytree.tree_map(lambda leaf, dtype=dtype: leaf.to(dtype) if _is_float(leaf) else leaf, tried)
        with torch.no_grad():
            for module in dense.modules():
                for name, value in (*module._parameters.items(), *module._buffers.items()):
                    if value is None or not _is_float(value):
                        continue
                    if name == "running_var":
                        value.copy_(draw(value).abs() + 0.5)
                    elif name == "running_mean" or (value.dim() < 2 and name != "weight"):
                        value.copy_(draw(value, std=0.3))
                    elif name in module._parameters and value.dim() < 2:
                        value.copy_(draw(value, 1.0, 0.2))
                    elif name in module._parameters:
                        value.copy_(draw(value, std=(value.numel() / len(value)) ** -0.5))
            try:
                for batch in tried:
                    call(dense, batch)
                return dense, tried
            except Exception:  # such as a layer that insists on the type it was made for
                continue
    return copy_of(model).eval(), [inputs, noise]


@torch.no_grad()
def difference(dense: nn.Module, slim: nn.Module, cuts: Cuts, inputs: list[Any]) -> float:
    """The largest difference between the slim network's outputs and the silenced dense one's, over the largest output.

    Args:
        dense: all the channels; comes back as it was.
        slim: what is left of it, with the weights that are left.
        cuts: what is left.
        inputs: batches for both.

    Raises:
        Exception: whatever the slim network raises.
    """
    worst = 0.0
    slim_modules = dict(slim.named_modules())
    changed = {name.rpartition(".")[0] for name in cuts}
    silenced = []
    try:
        for name, module in dense.named_modules():
            if name in changed and isinstance(module, _WITH_CHANNELS):
                module.forward = _Silenced(name, module, slim_modules[name], cuts)
                silenced.append(module)
        with evaluation_mode(slim):
            for batch in inputs:
                found = tensors_in(call(slim, batch))  # first: most that is wrong does not run at all
                wanted = tensors_in(call(dense, batch))
                if [a.shape for a in wanted] != [b.shape for b in found]:
                    return float("inf")
                for a, b in zip(wanted, found, strict=True):
                    if _is_float(a):
                        scale = a.abs().amax().clamp_min(1e-30) if a.numel() else 1.0
                        worst = max(worst, ((a - b).abs().amax() / scale).item() if a.numel() else 0.0)
                    elif not torch.equal(a, b):
                        return float("inf")
                    if worst != worst:
                        return float("inf")
    finally:
        for module in silenced:
            del module.forward
    return worst


class _Silenced:
    """The forward pass of a slim layer on dense channels: reads those that are left, writes zeros for the others."""

    def __init__(self, name: str, dense: nn.Module, slim: nn.Module, cuts: Cuts):
        self.dense, self.slim = dense, slim
        weight = cuts.get(f"{name}.weight") or cuts.get(f"{name}.running_mean") or (None, None)
        self.reads, self.writes, self.width = weight[0], weight[0], None
        if isinstance(dense, nn.Linear):
            self.writes, self.reads = weight
        elif isinstance(dense, nn.Embedding):
            self.reads, self.writes = None, weight[1]
        elif isinstance(dense, nn.modules.conv._ConvTransposeNd):
            self.reads, self.writes = weight[:2]
        elif isinstance(dense, nn.modules.conv._ConvNd) and not dense.groups == dense.in_channels > 1:
            self.writes, self.reads = weight[:2]
            if self.reads is not None and dense.groups > 1:
                step = dense.in_channels // dense.groups
                self.reads = torch.cat([self.reads + step * part for part in range(dense.groups)])
        shape = dense.weight.shape if getattr(dense, "weight", None) is not None else dense.running_mean.shape
        transposed = isinstance(dense, nn.modules.conv._ConvTransposeNd)
        self.width = shape[1] if transposed or isinstance(dense, nn.Embedding) else shape[0]

    def __call__(self, *arguments: Any, **more: Any) -> Tensor:
        x, *arguments = arguments or (more.pop("input"),)
        dim = self._dim(x)
        if self.reads is not None:
            x = x.index_select(dim, self.reads.to(x.device))
        y = self.slim.forward(x, *arguments, **more)  # hooks are the dense layer's, which run as well
        if self.writes is None:
            return y
        dim = dim if not isinstance(self.dense, nn.Embedding) else y.dim() - 1
        out = y.new_zeros(*y.shape[:dim], self.width, *y.shape[dim + 1 :])
        return out.index_copy_(dim, self.writes.to(y.device), y)

    def _dim(self, x: Tensor) -> int:
        if isinstance(self.dense, nn.modules.conv._ConvNd):
            return x.dim() - len(self.dense.kernel_size) - 1
        last = isinstance(self.dense, nn.Linear) or (
            isinstance(self.dense, nn.LayerNorm)
            and (type(self.dense).__module__.startswith("torch.") or x.shape[1] != self.width)
        )
        return x.dim() - 1 if last else 1


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
