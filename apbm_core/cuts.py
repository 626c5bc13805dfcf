"""What a surgery left of a network's parameters, found by tags: positions that stand in for the values."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Cuts = Mapping[str, tuple[Tensor | None, ...]]
"""Name of a parameter or buffer -> for each of its dimensions the indices that are left; None where all are."""


def tag(model: nn.Module) -> dict[str, torch.Size]:
    """Give each floating-point value of a network its own place in its tensor as its value; return the shapes."""
    shapes = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        shapes[name] = tensor.shape
        if tensor.is_floating_point():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
    return shapes


def cuts_of(model: nn.Module, shapes: Mapping[str, torch.Size]) -> Cuts:
    """What is left of a tagged network that has been cut since, whose tensors had these shapes."""
    return {
        name: _left(tensor.detach(), shapes[name])
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.shape != shapes[name]
    }


def _left(tags: Tensor, shape: Sequence[int]) -> tuple[Tensor | None, ...]:
    """For each dimension of a tagged tensor that was cut from ``shape``: the indices left; None where all are."""
    left = []
    strides = torch.empty(tuple(shape), device="meta").stride()
    for dim, size in enumerate(shape):
        if tags.shape[dim] == size:
            left.append(None)
            continue
        line = tags[tuple(slice(None) if d == dim else 0 for d in range(len(shape)))]
        left.append((line.long() // strides[dim]) % size)
    return tuple(left)


def kept_of(value: Tensor, cut: Sequence[Tensor | None]) -> Tensor:
    """The part of a parameter that a surgery left."""
    for dim, indices in enumerate(cut):
        if indices is not None:
            value = value[(slice(None),) * dim + (indices.to(value.device),)]
    return value


def fill(small: nn.Module, dense: nn.Module, cuts: Cuts) -> None:
    """Give a cut network the values that are left of the dense one's."""
    values = dict(dense.named_parameters(remove_duplicate=False)) | dict(dense.named_buffers(remove_duplicate=False))
    made: dict[int, Tensor] = {}  # what is shared stays shared
    for name, module in small.named_modules():
        prefix = f"{name}." if name else ""
        for kind in (module._parameters, module._buffers):
            for key, old in kind.items():
                value = values.get(prefix + key)
                if old is None or value is None:
                    continue
                cut = cuts.get(prefix + key)
                if id(value) not in made:
                    new = value.detach().clone() if cut is None else kept_of(value.detach(), cut)
                    is_parameter = isinstance(old, nn.Parameter)
                    made[id(value)] = nn.Parameter(new, requires_grad=value.requires_grad) if is_parameter else new
                kind[key] = made[id(value)]
