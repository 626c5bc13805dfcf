"""APBM: fuse the unimportant filters into the important ones while training from scratch (METHODS section 1)."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from apbm_core.fusion import FusionReport, FusionSettings, rescore
from apbm_core.hooks import Context, Hook
from apbm_core.surgery import compact, fuse
from apbm_core.task import Task

LABEL = "APBM"
STARTS_FROM = "scratch"
SCHEDULES = ("equal", "equal-time")


class Options(BaseModel):
    """What is fused how, and how often the filters are scored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: FusionSettings = Field(default_factory=FusionSettings)
    rescores_per_epoch: int = Field(4, ge=1, description="scorings an epoch, evenly spread over its steps")


class FusionHook(Hook):
    """Score and fuse again as the training goes on, and put what was found into the history."""

    def __init__(self, model: nn.Module, rescores_per_epoch: int = 1):
        self.model, self.rescores_per_epoch = model, rescores_per_epoch
        self.report: FusionReport | None = None
        self.churn: list[float] = []

    def before_epoch(self, context: Context) -> None:
        self.churn = []
        self._rescore(context.progress)

    def after_step(self, context: Context) -> None:
        done, of = (context.step + 1) * self.rescores_per_epoch, context.steps_per_epoch
        if done // of > context.step * self.rescores_per_epoch // of and context.step + 1 < of:
            self._rescore((context.epoch + (context.step + 1) / of) / context.epochs)

    def after_epoch(self, context: Context) -> dict[str, Any]:
        """Means over the layers: how much a filter keeps of itself, how mixed the fused ones are, who came and went."""
        row = {name: self.report.mean(name) for name in ("temperature", "entropy", "self_mass", "own_share")}
        return {"fusion": row | {"churn": sum(self.churn), "progress": self.report.progress}}

    def state_dict(self) -> dict[str, Any]:
        return {"churn": self.churn, "progress": self.report.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.churn, self.report = state["churn"], FusionReport.of(self.model, state["progress"])

    def _rescore(self, progress: float) -> None:
        self.report = rescore(self.model, progress)
        self.churn.append(self.report.mean("churn"))


def prune(task: Task) -> nn.Module:
    """Train the slim network with its banks, then write the fused filters into plain convolutions."""
    return train_fused(task, task.options.settings, task.options.rescores_per_epoch)


def train_fused(task: Task, settings: FusionSettings, rescores_per_epoch: int) -> nn.Module:
    """The one phase that APBM and DCFF share: fuse, train with rescoring, compact."""
    model = fuse(task.build(), task.example_inputs, task.widths, settings)
    task.train("train", model, task.config.epochs, hooks=[FusionHook(model, rescores_per_epoch)])
    return compact(model)
