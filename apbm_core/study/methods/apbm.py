"""APBM: fuse the unimportant filters into the important ones while training from scratch (methods.md 1)."""

from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from apbm_core.branches import add_branches, merge_branches
from apbm_core.compress import collapse, compact, fuse, rescore
from apbm_core.errors import ConfigError
from apbm_core.fusion import FusionReport, fused_layers
from apbm_core.study.methods.narrowing import choose_filters, layer_redundancy, layer_scores, narrow, stage_widths
from apbm_core.study.methods.task import Task
from apbm_core.study.methods.variants import VariantSettings
from apbm_core.study.networks.definition import Network
from apbm_core.study.networks.widths import (
    MINIMUM,
    entropy_budget_model_widths,
    marginal_utility_model_widths,
    width_problem,
)
from apbm_core.study.options import added
from apbm_core.study.training.hooks import Context, Hook

LABEL = "APBM"
SUMMARY = "unimportant filters are fused into important ones while training from scratch"
SOURCE = "Qu, Zhang, Wang, CNN Pruning Method Based on Information Fusion Strategy, 2022"
PLACE, COLOUR, MARKER = 10, "#D55E00", "o"
STARTS_FROM = "scratch"
SCHEDULES = ("equal", "equal-time")
_CALIBRATION_IMAGES = 1024


class Options(BaseModel):
    """What is fused how, and how often the filters are scored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: VariantSettings = Field(default_factory=VariantSettings)
    rescores_per_epoch: int = Field(4, ge=1, description="scorings an epoch, evenly spread over its steps")
    collapse: bool = Field(True, description="once P is frozen, train the fused filters themselves; the banks go")
    bank_lr: float = Field(1.0, gt=0, le=100, description="the banks' learning rate, in multiples of the recipe's")
    bank_decay: float = Field(1.0, ge=0, le=100, description="the banks' weight decay, in multiples of the recipe's")
    wide: float = Field(
        0.0, ge=0, lt=1, description="share of the epochs in which the network narrows from its dense widths"
    )
    stages: int = Field(1, ge=1, le=20, description="how many times it narrows in these epochs")
    merge: Literal["none", "similarity", "activations"] = Field(
        "activations",
        description="what becomes of a filter that goes: nothing; it is averaged into those it resembles, in the norm"
        " and in the next layer, too; or the next layer takes it over from those whose activations predict its own",
    )
    widths: Literal["shared", "entropy", "marginal", "marginal-tied"] = Field(
        "shared",
        description="what of the wide network distributes the target over the layers: nothing, the run's rule does;"
        " 'entropy', its redundancy; 'marginal', which layer's next filter has the largest score for its price; 'tied',"
        " layers of a stage equally wide",
    )
    budget_tau: float = Field(1.0, gt=0, le=64, description="tau at which redundancy or score is measured for widths")
    mac_weight: float = added(
        0.0,
        if_absent=0.0,
        ge=0,
        le=1,
        description="lambda of the marginal widths: how much is added to a filter's score per parameter for each of its"
        " multiply-accumulates, which favours large maps",
    )
    passing: bool | None = added(
        None,
        if_absent=False,
        description="each filter is its own input channel plus what is fused, in learned amounts; null: in networks"
        " without shortcuts of their own",
    )
    branches: tuple[Literal["fused", "pointwise", "identity"], ...] = added(
        (),
        if_absent=[],  # as JSON has it
        description="branches with norms of their own beside each fused convolution, merged at the end: 'fused' is what"
        " the unimportant filters answer, which is then not mixed into the weights as well",
    )

    @model_validator(mode="after")
    def _narrowing_is_whole(self):
        if self.widths != "shared" and self.wide == 0:
            raise ValueError(
                f"widths = {self.widths!r} looks at the wide network: set wide, the share of epochs it trains."
            )
        if self.mac_weight and not self.widths.startswith("marginal"):
            raise ValueError(f"mac_weight belongs to the marginal widths, not to widths = {self.widths!r}; leave it 0.")
        if self.wide and self.passing:
            raise ValueError("a network that starts wide cannot pass its input on as well: set passing = False.")
        if self.wide and self.branches:
            raise ValueError("a network that starts wide cannot have branches as well: set branches = ().")
        return self

    def for_network(self, network: Network, is_trained: bool = False) -> "Options":
        """These options with what depends on the network decided, as a run's configuration states them.

        Raises:
            ConfigError: the network is trained already, and passing its input on would bury what it has learnt.
        """
        if self.passing and is_trained:
            raise ConfigError("apbm's passing = True would bury what a trained network has learnt: leave it out.")
        if self.passing is not None:
            return self
        return self.model_copy(update={"passing": not (network.shortcuts or self.wide or is_trained)})


class FusionHook(Hook):
    """Score and fuse again as the training goes on, and put what was found into the history."""

    def __init__(self, model: nn.Module, options: Options):
        self.model, self.options = model, options
        self.report: FusionReport | None = None
        self.churn: list[float] = []

    def start(self, context: Context) -> None:
        if (self.options.bank_lr, self.options.bank_decay) != (1.0, 1.0):
            self._separate_banks(context.optimizer)

    def before_epoch(self, context: Context) -> None:
        self.churn = []
        self._rescore(context, context.progress)

    def after_step(self, context: Context) -> None:
        done, of = (context.step + 1) * self.options.rescores_per_epoch, context.steps_per_epoch
        if done // of > context.step * self.options.rescores_per_epoch // of and context.step + 1 < of:
            self._rescore(context, context.progress_after(context.step + 1))

    def after_epoch(self, context: Context) -> dict[str, Any]:
        """Means over the layers: how much a filter keeps of itself, how mixed the fused ones are, who came and went."""
        row = {name: self.report.mean(name) for name in ("temperature", "entropy", "self_mass", "own_share")}
        amounts = [
            fusion.amount for _, _, fusion in fused_layers(self.model) if getattr(fusion, "amount", None) is not None
        ]
        if amounts:
            row["amount"] = torch.cat([amount.detach().abs().flatten() for amount in amounts]).mean().item()
        return {"fusion": row | {"churn": sum(self.churn), "progress": self.report.progress}}

    def state_dict(self) -> dict[str, Any]:
        return {"churn": self.churn, "progress": self.report.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.churn, self.report = state["churn"], FusionReport.of(self.model, state["progress"])

    def _rescore(self, context: Context, progress: float) -> None:
        self.report = rescore(self.model, progress)
        self.churn.append(self.report.mean("churn"))
        if self.options.collapse:
            collapse(self.model, context.optimizer)

    def _separate_banks(self, optimizer) -> None:
        """Put the banks into a parameter group of their own, with their own learning rate and weight decay."""
        banks = {id(conv.parametrizations.weight.original) for _, conv, _ in fused_layers(self.model)}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in banks]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in banks]
                decay = group["weight_decay"] * self.options.bank_decay
                kept = {name: value for name, value in group.items() if name not in ("params", "weight_decay")}
                scale = {"lr_scale": self.options.bank_lr}
                optimizer.add_param_group(kept | {"params": own, "weight_decay": decay} | scale)


def prune(task: Task) -> nn.Module:
    """Train the slim network with its banks, then write the fused filters into plain convolutions.

    With ``wide`` it starts as the dense network, which narrows by fusing the filters that go into those that stay.
    """
    if task.options.wide:
        return train_narrowing(task)
    return train_fused(task, task.options)


def train_fused(task: Task, options: Options) -> nn.Module:
    """The one phase that APBM and DCFF share: fuse, train with rescoring, compact."""
    model = fuse(
        task.build(), task.example_inputs, task.widths, options.settings, groups=False, passing=bool(options.passing)
    )
    if options.branches:
        model, report = add_branches(model, task.example_inputs, options.branches, task.widths)
        task.note("branches", {"branched": list(report.branched), "left": report.left})
    task.train("train", model, task.config.epochs, hooks=[FusionHook(model, options)])
    return merge_branches(compact(model)) if options.branches else compact(model)


def train_narrowing(task: Task) -> nn.Module:
    """Train from the dense network on, fusing filters into others until the target is met; one course in all."""
    options, epochs = task.options, task.config.epochs
    wide_epochs = max(options.stages, round(options.wide * epochs))
    if wide_epochs >= epochs:
        raise ConfigError(
            f"narrowing in {options.stages} stages (wide = {options.wide:g}) takes {wide_epochs} epochs, and one more "
            f"has to be left for the slim network, but there are {epochs}. Make wide, stages or the epochs fit."
        )
    if options.widths != "shared":  # whether the target can be met does not depend on where
        width_problem(task.config.model, task.num_classes, task.config.target, task.config.by, minimum=MINIMUM)
    model, target, done = task.build(), task.widths, 0
    dense = {name: model.get_submodule(name).out_channels for name in target}
    for stage in range(1, options.stages + 1):
        end = wide_epochs * stage // options.stages
        task.train(f"wide-{stage}", model, end - done, course=(done / epochs, end / epochs))
        done = end
        if stage == 1 and options.widths != "shared":
            target = _own_widths(task, model)
        widths = stage_widths(dense, target, stage / options.stages)
        keep = task.remember(f"choose-{stage}", partial(choose_filters, model, widths, options.settings))
        images = task.calibration_images(_CALIBRATION_IMAGES) if options.merge == "activations" else None
        model = narrow(model, task.example_inputs, keep, options.settings, options.merge, images)
    task.train("slim", model, epochs - done, course=(done / epochs, 1.0))
    return model


def _own_widths(task: Task, model: nn.Module) -> dict[str, int]:
    """The run's target, spent where the wide network's filters differ most, or matter most for their price."""
    options, config, layers = task.options, task.config, list(task.widths)
    tau, metric = options.budget_tau, options.settings.metric
    problem = config.model, task.num_classes
    if options.widths == "entropy":
        redundancy = task.remember("redundancy", partial(layer_redundancy, model, layers, tau, metric))
        task.note("redundancy", dict(zip(layers, redundancy, strict=True)))
        solution = entropy_budget_model_widths(*problem, redundancy, config.target, config.by)
    else:
        scores = task.remember("width-scores", partial(layer_scores, model, layers, tau, metric))
        tied = options.widths == "marginal-tied"
        given = {"by": config.by, "mac_weight": options.mac_weight, "tied": tied}
        solution = marginal_utility_model_widths(*problem, scores, config.target, **given)
        last = [sorted(found)[-width] for found, width in zip(scores, solution.widths, strict=True)]
        task.note("marginal_scores", dict(zip(layers, last, strict=True)))
    return dict(zip(layers, solution.widths, strict=True))
