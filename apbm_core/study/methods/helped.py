r"""APBM with a helping hand: the unimportant filters join a wide forward pass that shares the kept filters' weights.

Another reading of the paper's "fuse the unimportant kernels' information with the important kernels' in the forward
propagation of training": nothing is mixed into a weight. Each layer has ``M`` filters, of which the first ``m`` are the
slim network, and

.. math:: \mathcal{L} = (1 - d) \, \mathrm{CE}(f_m, y) + d \, \mathrm{KL}(f_M \Vert f_m) + \mathrm{CE}(f_M, y)

in every second step of the first half, else ``CE(f_m, y)`` alone. ``f_m`` is the slim network, whose weights are the
leading block of the wide one's, with BatchNorms of its own; ``f_M`` the wide one, whose answer teaches the slim one and
whose gradient reaches the kept filters, too (Cai et al., *Network Augmentation for Tiny Deep Learning*, 2022; Yu and
Huang, *Universally Slimmable Networks*, 2019, for the norms and the distillation in place). Relative entropy decides
which filters are the first m: before each epoch of that half the most important change places with the least, with all
that belongs to them.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.fusion import FusionSettings
from apbm_core.passing import pass_inputs
from apbm_core.study.methods.task import Task
from apbm_core.study.networks.chains import Followers, followers
from apbm_core.study.networks.definition import Network
from apbm_core.study.networks.models import dense_widths
from apbm_core.study.training.hooks import Context, Hook

LABEL = "APBM, helped by a wide pass"
SUMMARY = "unimportant filters take part in a wide pass that shares the kept ones' weights and teaches them"
SOURCE = "the abstract of Qu, Zhang, Wang, 2022, in the form of Cai et al., NetAug, 2022"
PLACE, COLOUR, MARKER = 35, "#CC6677", "H"
DEFAULT = False
STARTS_FROM = "scratch"
STARTS_SLIM = True
SCHEDULES = ("equal",)


class Options(BaseModel):
    """How wide the help is, how often and how long it is given, and who decides whom to keep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: float = Field(1.5, gt=1, le=16, description="M / m: how many times as wide the other pass is, up to dense")
    every: int = Field(2, ge=1, description="every so many steps the wide pass is taken")
    until: float = Field(0.5, ge=0, le=1, description="the share of the training in which it is taken at all")
    distill: float = Field(0.5, ge=0, le=1, description="d: the share of the wide pass's answer in what is learnt")
    select: Literal["relative-entropy", "random", "never"] = Field(
        "relative-entropy", description="who is kept, before each epoch; 'random' exchanges as many, drawn by lot"
    )
    passing: bool | None = Field(
        None,
        description="each filter is its own input channel plus what it learns; null: in networks without shortcuts",
    )

    def for_network(self, network: Network, is_trained: bool = False) -> "Options":
        """These options with what depends on the network decided, as a run's configuration states them."""
        return self if self.passing is not None else self.model_copy(update={"passing": not network.shortcuts})


class HelpedNetwork(nn.Module):
    """A slim network whose weights are the leading block of a wide one's: ``weight[:m_out, :m_in]`` in each layer.

    It answers as the slim network. What it trains are the wide network and the slim one's norms.

    Args:
        slim: the network to deploy; only its norms are its own until :meth:`finish`.
        wide: the same network with at least as many channels everywhere; its weights may be parametrised.

    Raises:
        UnsupportedNetwork: a weight of the slim network is no leading block of the wide one's.
    """

    def __init__(self, slim: nn.Module, wide: nn.Module):
        super().__init__()
        self.slim, self.wide = slim, wide
        self.wide_pass = False
        self.answers: tuple[Tensor, Tensor] | None = None  # of the last step with a wide pass: slim's and wide's logits
        self._shared = [
            (f"{layer}.{name}", layer, name, tuple(slice(size) for size in parameter.shape))
            for layer, module in slim.named_modules()
            if not isinstance(module, _BatchNorm)
            for name, parameter in module.named_parameters(recurse=False)
        ]
        for full, layer, name, block in self._shared:
            theirs = getattr(wide.get_submodule(layer), name)
            if theirs.dim() != len(block) or any(s.stop > n for s, n in zip(block, theirs.shape, strict=True)):
                raise UnsupportedNetwork(
                    f"{full} of the slim network, {[s.stop for s in block]}, is no leading block of the wide one's, "
                    f"{list(theirs.shape)}; give a wide network with at least as many channels in every layer."
                )
            slim.get_parameter(full).requires_grad_(False)

    def blocks(self) -> dict[str, Tensor]:
        """The slim network's weights by name, as they follow from the wide network's."""
        with parametrize.cached():
            return {
                full: getattr(self.wide.get_submodule(layer), name)[block] for full, layer, name, block in self._shared
            }

    def forward(self, images: Tensor) -> Tensor:
        with parametrize.cached():  # both passes read one weight
            logits = functional_call(self.slim, self.blocks(), (images,))
            self.answers = (logits, self.wide(images)) if self.training and self.wide_pass else None
        return logits

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The slim network by itself, with weights of its own."""
        for full, value in self.blocks().items():
            self.slim.get_parameter(full).copy_(value).requires_grad_(True)
        return self.slim


class HelpHook(Hook):
    """Takes the wide pass when it is due, learns from it, and lets relative entropy say who is kept."""

    def __init__(self, network: HelpedNetwork, options: Options, widths: Mapping[str, int], label_smoothing: float = 0):
        self.network, self.options, self.widths = network, options, dict(widths)
        self.label_smoothing = label_smoothing
        self.chains = followers(network.wide, widths)
        self.selector = FusionSettings()
        self.churn, self.wide_loss, self.wide_steps = 0.0, 0.0, 0

    def before_epoch(self, context: Context) -> None:
        self.churn, self.wide_loss, self.wide_steps = 0.0, 0.0, 0
        if context.epoch and context.progress < self.options.until and self.options.select != "never":
            self.churn = self._select(context)
        self._decide(context, context.step)

    def on_loss(self, context: Context, loss: Tensor) -> Tensor:
        if self.network.answers is None:
            return loss
        slim, wide = (logits.float() for logits in self.network.answers)
        wide_loss = F.cross_entropy(wide, context.labels, label_smoothing=self.label_smoothing)
        self.wide_loss, self.wide_steps = self.wide_loss + wide_loss.detach(), self.wide_steps + 1
        taught = F.kl_div(slim.log_softmax(1), wide.detach().log_softmax(1), log_target=True, reduction="batchmean")
        return (1 - self.options.distill) * loss + self.options.distill * taught + wide_loss

    def after_step(self, context: Context) -> None:
        self._decide(context, context.step + 1)

    def after_epoch(self, context: Context) -> dict[str, Any]:
        """The share of the kept filters that were replaced before the epoch, and the wide pass's mean loss."""
        row: dict[str, Any] = {"churn": self.churn}
        if self.wide_steps:
            row["wide_loss"] = float(self.wide_loss) / self.wide_steps
        return {"help": row}

    def state_dict(self) -> dict[str, Any]:
        return {
            "wide_pass": self.network.wide_pass,
            "churn": self.churn,
            "wide_loss": float(self.wide_loss),
            "wide_steps": self.wide_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.wide_pass = state["wide_pass"]
        self.churn, self.wide_loss, self.wide_steps = state["churn"], state["wide_loss"], state["wide_steps"]

    def _decide(self, context: Context, step: int) -> None:
        """Whether the wide pass is taken in the step after ``step`` steps of this epoch."""
        done = context.epoch * context.steps_per_epoch + step
        self.network.wide_pass = context.progress_after(step) < self.options.until and done % self.options.every == 0

    @torch.no_grad()
    def _select(self, context: Context) -> float:
        """Let the most important filters of each layer be the first; the mean share of them that is new."""
        shares = []
        for name, m in self.widths.items():
            conv = self.network.wide.get_submodule(name)
            n = conv.out_channels
            weight = (
                conv.parametrizations.weight.original if parametrize.is_parametrized(conv, "weight") else conv.weight
            )
            fusion = self.selector.fusion(n, m).to(weight.device)
            chosen = set(fusion.choose(weight, context.progress).tolist())
            leaving, entering = [k for k in range(m) if k not in chosen], sorted(k for k in chosen if k >= m)
            if self.options.select == "random":
                leaving = torch.randperm(m)[: len(leaving)].tolist()
                entering = (m + torch.randperm(n - m)[: len(entering)]).tolist()
            exchange(self.network, name, self.chains[name], leaving, entering, context.optimizer)
            shares.append(len(leaving) / m)
        return math.fsum(shares) / len(shares)


@torch.no_grad()
def exchange(
    network: HelpedNetwork,
    name: str,
    chain: Followers,
    leaving: list[int],
    entering: list[int],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Let filters of a layer change places, in place: the kept ``leaving`` with the ``entering`` of the wide network.

    A filter takes along what was learned for it, its norm, the next layer's weights on it and all their momentum. The
    wide network's function stays what it was, but for the input channel that a place passes on, which is the place's.
    In the slim network the norm of a filter that enters is the one it had in the wide one.
    """
    if not leaving:
        return
    wide, norm_of_slim = network.wide, network.slim.get_submodule(chain.norm)
    norm, reader = wide.get_submodule(chain.norm), wide.get_submodule(chain.reader)
    conv = wide.get_submodule(name)
    order = torch.arange(conv.out_channels)
    order[leaving], order[entering] = torch.tensor(entering), torch.tensor(leaving)
    order = order.to(norm.weight.device)
    for part in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm_of_slim, part)[leaving] = getattr(norm, part)[entering]
        for tensor in _with_momentum(getattr(norm_of_slim, part), optimizer)[1:]:
            tensor[leaving] = 0
    rows = [*_learned(conv), norm.weight, norm.bias, norm.running_mean, norm.running_var]
    for parameter in rows:
        for tensor in _with_momentum(parameter, optimizer):
            tensor.copy_(tensor[order])
    places = reader.weight.shape[1] // len(order)  # a linear layer reads each channel at so many places
    columns = (order[:, None] * places + torch.arange(places, device=order.device)).flatten()
    (weight, *_) = _learned(reader)
    for tensor in _with_momentum(weight, optimizer):
        tensor.copy_(tensor[:, columns])


def _learned(layer: nn.Module) -> list[Tensor]:
    """What a layer has learned of each filter: its weight, its bias, and how much of it counts if it passes on."""
    if not parametrize.is_parametrized(layer, "weight"):
        found = [layer.weight]
    else:
        found = [layer.parametrizations.weight.original, *(step.b for step in layer.parametrizations.weight)]
    return found if layer.bias is None else [*found, layer.bias]


def _with_momentum(tensor: Tensor, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    state = {} if optimizer is None else optimizer.state.get(tensor, {})
    return [tensor, *(value for value in state.values() if torch.is_tensor(value) and value.shape == tensor.shape)]


def prune(task: Task) -> nn.Module:
    """Train the slim network, in the first half beside a wider one that shares its weights, and give it its own.

    Raises:
        ConfigError: the target leaves no filters that could help.
        UnsupportedNetwork: a convolution is not followed by its norm and one layer that reads it.
    """
    options, dense = task.options, dense_widths(task.model_name)
    wide_widths = {
        name: min(n, math.ceil(options.width * m)) for (name, m), n in zip(task.widths.items(), dense, strict=True)
    }
    if wide_widths == dict(task.widths):
        raise ConfigError(
            f"at target = {task.config.target:g} no layer has filters left that could help; choose a higher target."
        )
    wide = task.build(wide_widths)
    if options.passing:
        pass_inputs(wide)
    network = HelpedNetwork(task.build(task.widths), wide)
    hook = HelpHook(network, options, task.widths, task.recipe().label_smoothing)
    task.train("train", network, task.config.epochs, hooks=[hook])
    return network.finish()
