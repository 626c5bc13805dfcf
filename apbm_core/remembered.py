"""Sizes that a network's own code remembers: those into which a module splits or reshapes its channels.

``torch.split(x, [self.part, self.rest], 1)`` fails once some channels are gone, and ``x.view(n, self.heads, -1)`` once
some heads are, unless the attributes are written anew. Which module it is is found while the network runs; whether what
was written is right, the proof says (proof.py).
"""

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ONE_THREAD = threading.Lock()
_WATCHED = ("split", "split_with_sizes", "view", "reshape", "unflatten")


class SizeWatch(TorchFunctionMode):
    """Sees which module splits or reshapes tensors into sizes that are given, while a network runs.

    Attributes:
        owners: what autograd calls the result -> the name of the module whose code it is in.
        read: name of a module -> those of its attributes that its own code read and that may be sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[Any, str] = {}
        self.read: dict[str, set[str]] = {}
        self._inside = [""]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _WATCHED:
            made = result if isinstance(result, (tuple, list)) else [result]
            self.owners.update({part.grad_fn: self._inside[-1] for part in made if part.grad_fn is not None})
        return result

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follow which module of the network runs, and what it reads of itself."""

        def leave(*_: Any) -> None:
            self._inside.pop()

        def get(module: nn.Module, key: str) -> Any:
            value = object.__getattribute__(module, key)
            if type(value) in (int, list, tuple) and names.get(id(module)) == self._inside[-1]:
                self.read.setdefault(self._inside[-1], set()).add(key)
            return value

        handles, names = [], {id(module): name for name, module in model.named_modules()}
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda _m, _i, name=name: self._inside.append(name)))
            handles.append(module.register_forward_hook(leave))
        with _ONE_THREAD:  # for as long as all modules are asked in this way
            nn.Module.__getattribute__ = get  # they inherit object's; a subclass's own ends here too
            try:
                with self:
                    yield
            finally:
                del nn.Module.__getattribute__
                for handle in handles:
                    handle.remove()


@dataclass(frozen=True)
class Split:
    """A split of channels by the code of module ``owner`` into parts of these sizes; or of heads, of so many channels.

    Where ``width`` is given, the sizes are the number of heads alone.
    """

    owner: str
    sizes: tuple[int, ...]
    width: int | None = None

    def sizes_without(self, gone: Tensor) -> list[tuple[int, int]]:
        """What its sizes, and their sum, were and are now."""
        stays = torch.ones(sum(self.sizes), dtype=torch.bool)
        stays[gone[gone < len(stays)]] = False
        if self.width is not None:
            return [(len(stays) * self.width, int(stays.sum()) * self.width)]
        parts = [*zip(self.sizes, stays.split(self.sizes), strict=True), (len(stays), stays)]
        return [(before, int(part.sum())) for before, part in parts]


def write_sizes(
    model: nn.Module, splits: Mapping[str, Split], gone: Mapping[str, Tensor], read: Mapping[str, Collection[str]]
) -> None:
    """Where modules remember into which sizes they split their channels, write down what is left of each.

    What a module does not read while it runs stays as it is: a number of epochs may happen to be that of some channels,
    and no proof would see that it had changed.

    Args:
        model: a network whose channels were cut.
        splits: of the network as it was, by names of their own.
        gone: name of a split -> which of the channels, or heads, that come to it were cut.
        read: of the network as it ran, see :class:`SizeWatch`.
    """
    left: dict[str, dict[int, set[int]]] = {}
    heads: dict[str, dict[int, int]] = {}
    for name, split in splits.items():
        cut = gone.get(name, torch.tensor([], dtype=torch.long))
        for before, after in split.sizes_without(cut):
            left.setdefault(split.owner, {}).setdefault(before, set()).add(after)
        if split.width is not None:
            heads.setdefault(split.owner, {})[split.sizes[0]] = split.sizes[0] - len(cut)
    for owner, now in left.items():
        certain = {before: after.pop() for before, after in now.items() if len(after) == 1}
        module = model.get_submodule(owner)
        for key, value in vars(module).items():
            if key not in read.get(owner, ()):
                continue
            if type(value) is int and "head" in key and "dim" not in key and value in heads.get(owner, ()):
                setattr(module, key, heads[owner][value])
            elif type(value) is int and value in certain:
                setattr(module, key, certain[value])
            elif type(value) in (tuple, list) and all(type(item) is int for item in value):
                setattr(module, key, type(value)(certain.get(item, item) for item in value))
