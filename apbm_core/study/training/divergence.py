"""Noticing that a training diverged, at no cost to one that does not, and saying where."""

import torch
from torch import Tensor, nn


class LossGuard:
    """Remembers the step of the first loss that was NaN or infinite.

    The loss is looked at where it is; only every ``interval`` steps does the processor wait for the answer, because
    waiting for a GPU in each step would leave it idle in between.
    """

    def __init__(self, device: torch.device, interval: int):
        self.interval = interval
        self._first = torch.tensor(-1, device=device)

    def saw_non_finite(self, loss: Tensor, step: int) -> bool:
        """Look at the ``loss`` of ``step``; whether any was bad so far, asked every ``interval`` steps."""
        ok = torch.isfinite(loss.detach()) | (self._first >= 0)
        self._first = torch.where(ok, self._first, step)
        return step % self.interval == self.interval - 1 and self.first_bad_step() is not None

    def first_bad_step(self) -> int | None:
        """The first bad step, if any, waiting for the device if need be."""
        step = int(self._first)
        return step if step >= 0 else None


def non_finite_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter that holds a NaN or an infinity."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    if not named:
        return None
    finite = torch.stack([torch.isfinite(parameter.detach()).all() for _, parameter in named]).tolist()
    return next((name for (name, _), ok in zip(named, finite, strict=True) if not ok), None)


@torch.no_grad()
def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """Where the first NaN or infinity appears in a forward pass of ``images``, in words.

    Modules are looked at in the order in which they run: their own parameters before, their output after.
    """
    if not _is_finite(images):
        return "the input images"
    found: list[str] = []
    handles = []

    def before(name: str):
        def hook(module: nn.Module, _) -> None:
            for label, parameter in module.named_parameters(recurse=False):
                if not _is_finite(parameter):
                    found.append(f"parameter {label!r} of layer {name!r}")

        return hook

    def after(name: str):
        def hook(module: nn.Module, _, output) -> None:
            if isinstance(output, Tensor) and not _is_finite(output):
                found.append(f"the output of layer {name!r}")

        return hook

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after(name)))
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself; every layer's output is finite"


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
