"""The recipe's optimizer over a model's parameters: which of them decay and which do not."""

from typing import Any

import torch
from torch import nn

from apbm_core.errors import ConfigError
from apbm_core.study.training.recipes import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD over :func:`parameter_groups`; the training loop sets its learning rate before each step."""
    return torch.optim.SGD(
        parameter_groups(model, recipe),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        foreach=True,
    )


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The trainable parameters in one group that decays and one that does not; an empty group is left out.

    Spared from weight decay are parameters marked ``parameter.no_weight_decay = True`` or listed by the module that
    owns them, ``no_weight_decay = ("scale",)``; prefer the list, for ``copy.deepcopy`` forgets the mark. With
    ``recipe.decay_norms = False`` so are vectors: BatchNorm's parameters and biases.

    Raises:
        ConfigError: nothing is trainable.
    """
    spared = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in getattr(module, "no_weight_decay", ()) or getattr(parameter, "no_weight_decay", False)
    }
    decaying, others = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = id(parameter) not in spared and (recipe.decay_norms or parameter.dim() > 1)
            (decaying if decays else others).append(parameter)
    if not decaying and not others:
        raise ConfigError("the model has no trainable parameter; set requires_grad on those that are to learn.")
    groups = [(decaying, recipe.weight_decay), (others, 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
