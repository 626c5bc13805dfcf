r"""DepGraph: sparse training by groups of coupled parameters, then one threshold for all (Fang et al., CVPR 2023).

As torch-pruning's ``GroupNormPruner`` with the settings of its CIFAR benchmark, to which the tests hold it equal; that
walks through lists of indices, which for VGG16 takes as long as the training step itself. A group is what one filter's
removal takes along: the filter, its norm's scale, and the next layer's weights that read it. Its importance is the
squared norm of all of these,

.. math:: I_k = \sum_{w \in g} \lVert w_k \rVert_2^2,

divided by the largest of its layer. After every backward pass each group's parameters get the gradient
:math:`\lambda \gamma_k w_k`, where :math:`\gamma_k = 2^{4 (s_{max} - s_k) / (s_{max} - s_{min})}` and
:math:`s = \sqrt{I}`, so that the least important shrink sixteen times as fast as the most important; weight decay
rests meanwhile, as in the benchmark.

The published course is 200 epochs of pre-training, 100 of sparse training and 100 of fine-tuning. Here the sparse
training starts from scratch and takes two thirds of the epochs, as Polarization's does.
"""

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from apbm_core.study.methods.ranking import cut_globally
from apbm_core.study.methods.target import needed_parameter_target
from apbm_core.study.methods.task import Course, Task
from apbm_core.study.networks.chains import followers
from apbm_core.study.networks.models import prunable_convs
from apbm_core.study.training.hooks import Context, Hook

LABEL = "DepGraph"
SUMMARY = "torch-pruning's group-norm pruner with its own sparse training; its widths are its own"
SOURCE = "Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023"
PLACE, COLOUR, MARKER, DEFAULT = 65, "#882255", "<", False
STARTS_FROM = "sparse"

_SPARSE_SHARE = 2 / 3  # of the epochs; the rest is fine-tuning
_RANGE = 2.0**4  # how much harder the least important are pulled than the most important
_TINY = torch.finfo(torch.float32).tiny


class Options(BaseModel):
    """The sparse training's strength, and how the training goes on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    strength: float = Field(5e-4, ge=0, description="lambda; the benchmark's")
    minimum: int = Field(2, ge=1, description="filters that a layer keeps, whatever their importance")
    course: Course = Field("restart", description="whether fine-tuning starts the learning rate's course anew")


class GroupSparsity(Hook):
    """Pulls the groups' parameters towards zero, the less important the harder."""

    def __init__(self, layers: Sequence[str], strength: float):
        self.layers, self.strength = tuple(layers), strength

    @torch.no_grad()
    def after_backward(self, context: Context) -> None:
        members = group_members(context.model, self.layers)
        for name, values in importances(context.model, self.layers).items():
            size = values.sqrt()
            pull = _RANGE ** ((size.max() - size) / (size.max() - size.min()).clamp_min(_TINY)) * self.strength
            for weight, axis, repeats in members[name]:
                shape = [-1 if dimension == axis else 1 for dimension in range(weight.ndim)]
                weight.grad.addcmul_(weight, pull.repeat_interleave(repeats).view(shape).to(weight.dtype))

    @torch.no_grad()
    def after_epoch(self, context: Context) -> dict[str, float]:
        found = torch.cat(list(importances(context.model, self.layers).values()))
        return {"importance_mean": found.mean().item(), "importance_std": found.std(correction=0).item()}


def group_members(model: nn.Module, layers: Sequence[str]) -> dict[str, list[tuple[nn.Parameter, int, int]]]:
    """What belongs to the filters of each named convolution: (parameter, the axis its filters lie along, how many
    entries along it a filter has: those of a flattened map in a linear layer)."""
    found = {}
    for name, chain in followers(model, layers).items():
        conv, norm, reader = (model.get_submodule(part) for part in (name, chain.norm, chain.reader))
        found[name] = [(conv.weight, 0, 1), (norm.weight, 0, 1)]
        found[name].append((reader.weight, 1, reader.weight.shape[1] // conv.out_channels))
    return found


@torch.no_grad()
def importances(model: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
    """The groups' squared norms by the filter they belong to, over the largest of the layer: name -> (n,), float32."""
    found = {}
    for name, members in group_members(model, layers).items():
        total = 0
        for weight, axis, repeats in members:
            squares = weight.float().square().transpose(0, axis).flatten(1) if weight.ndim > 1 else weight.square()
            squares = squares.sum(1) if squares.ndim > 1 else squares
            total = total + squares.unflatten(0, (-1, repeats)).sum(1)
        found[name] = total / total.max().clamp_min(_TINY)
    return found


def prune(task: Task) -> nn.Module:
    """Sparse training, which all targets share, the cut at one threshold over all groups, fine-tuning."""
    needed_parameter_target(task.config)  # before anything is trained
    options, epochs = task.options, task.config.epochs
    layers, sparse_epochs = prunable_convs(task.model_name), max(1, round(_SPARSE_SHARE * epochs))
    before, after = task.courses(options.course, sparse_epochs)
    model = task.build()
    hook = GroupSparsity(layers, options.strength)
    settings = {"strength": options.strength}
    task.train_shared("sparse", model, sparse_epochs, [hook], {"weight_decay": 0.0}, before, settings)
    small = cut_globally(task, model, lambda: importances(model, layers), options.minimum)
    task.train("finetune", small, epochs - sparse_epochs, course=after)
    return small
