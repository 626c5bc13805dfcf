r"""Filter fusion: the layer computes with m mixtures of its n filters, and all n of them keep learning.

This is the second idea of the paper (Qu, Zhang and Wang 2022, APBM), in DCFF's form (methods.md 1 and 2).
A fused convolution owns a *bank* ``W`` of n filters but works with m of them,

.. math:: \tilde W = P W, \qquad P_{kj} = p_{s_k j}, \qquad \partial L/\partial W = P^T \, \partial L/\partial \tilde W

where ``s_1 .. s_m`` are the filters with the largest importance (similarity.relative_entropy) and ``p_s`` is filter
s's similarity distribution over the whole bank. So an unimportant filter is not dropped: it lives on, weighted by its
resemblance, inside the important ones, gets gradients through them, and may become important later. ``P`` is a constant
between two scorings. The network around it is small from the first step: m output channels, m BatchNorm channels.

In code, :class:`FilterFusion` is a parametrization of an ordinary ``nn.Conv2d``'s weight: the leaf is ``W``, the value
is ``P W``. Deployment writes the value into the convolution and forgets the bank (surgery.compact).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from apbm_core import similarity
from apbm_core.errors import ConfigError
from apbm_core.temperature import AnnealedTau, Schedule

_ONE_HOT = 1e-6  # a row with less than this outside the kept filter is that filter, to float32's accuracy


class FusionSettings(BaseModel):
    """How the filters of a layer are scored and fused; every field is one line of the ablation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schedule: Schedule = Field(default_factory=AnnealedTau, discriminator="kind")
    metric: Literal["euclidean", "cosine"] = Field("euclidean", description="distance between two filters")
    score: Literal["relative-entropy", "entropy", "l1", "order"] = Field(
        "relative-entropy",
        description="which filters are important; 'entropy' and 'l1' are ablations, 'order' keeps the first m",
    )
    mass: Literal["all", "unimportant", "assigned"] = Field(
        "all",
        description="what a kept filter mixes in: every filter; only the unimportant ones, its row renormalised;"
        " or the unimportant ones, each of which divides its own mass among the kept ones it resembles",
    )
    rescale: bool = Field(True, description="give the fused filters the mean norm of the kept ones")
    stable_slots: bool = Field(True, description="a filter that stays kept keeps its output channel")
    fuse: bool = Field(True, description="False: select the important filters without mixing anything in")
    reselect: bool = Field(True, description="False: the filters kept at the first scoring stay kept")
    bank: float = Field(1.0, ge=1, le=8, description="filters in the bank, in multiples of the layer's own; rest fresh")
    initial: Literal["model", "orthogonal"] = Field(
        "model", description="the bank starts as the model's own filters, or orthogonal ones of the same lengths"
    )
    gain: bool = Field(False, description="use the bank's filters at unit length, each times a gain that is learned")
    learn_mixing: bool = Field(False, description="P only starts at the similarities and is then trained as a weight")


class FilterFusion(nn.Module):
    """The parametrization ``bank (n, c_in, k, k) -> P @ bank (m, c_in, k, k)`` of one convolution's weight.

    In the state dict: ``matrix``, P of shape (m, n), a buffer unless it is learned; ``selected``, the m kept filters in
    slot order; and ``gain`` of shape (n,), if there is one.

    Args:
        n: number of filters in the bank.
        m: number of output channels, 1 <= m <= n.
        settings: how to score and fuse.
    """

    no_weight_decay = ("matrix", "gain")

    def __init__(self, n: int, m: int, settings: FusionSettings):
        super().__init__()
        if not 1 <= m <= n:
            raise ConfigError(f"a bank of {n} filters cannot be fused into {m}; keep between 1 and {n}.")
        self.settings = settings
        self.is_selection = not settings.learn_mixing  # P is the identity's rows: index_select does what P would
        self.is_frozen = False
        self.is_collapsed = False  # the fused filters are the weight itself; the bank is gone
        self.last: LayerFusion | None = None
        self.register_buffer("selected", torch.arange(m))
        matrix = torch.eye(n)[:m].contiguous()
        if settings.learn_mixing:
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("matrix", matrix)
        self.gain = nn.Parameter(torch.ones(n)) if settings.gain else None

    def forward(self, bank: Tensor) -> Tensor:
        if self.is_collapsed:
            return bank
        bank = self.filters(bank)
        if not self.is_selection:
            return mix(self.matrix, bank)
        if bank.is_contiguous(memory_format=torch.channels_last):  # index_select alone would lose the layout
            return bank.permute(0, 2, 3, 1).index_select(0, self.selected).permute(0, 3, 1, 2)
        return bank.index_select(0, self.selected)

    def filters(self, bank: Tensor) -> Tensor:
        """The bank's filters as they are mixed and scored: the bank itself, or at unit length times the gains."""
        if self.gain is None:
            return bank
        return bank * (self.gain / bank.flatten(1).norm(dim=1).clamp_min(1e-12)).view(-1, 1, 1, 1)

    @torch.no_grad()
    def initial_bank(self, weight: Tensor) -> Tensor:
        """The bank to start from: a layer's filters (n, c_in, k, k), made orthogonal and more of them as is set."""
        bank = weight.clone()
        n, lengths = len(self.matrix[0]), weight.flatten(1).norm(dim=1)
        if n > len(bank):
            fresh = torch.randn(n - len(bank), *bank.shape[1:], dtype=bank.dtype).to(bank.device) * bank.std()
            bank = torch.cat([bank, fresh])
            lengths = torch.cat([lengths, fresh.flatten(1).norm(dim=1)])
        if self.settings.initial == "orthogonal":
            flat = nn.init.orthogonal_(torch.empty(n, bank[0].numel())).to(bank)
            bank = (flat / flat.norm(dim=1, keepdim=True) * lengths[:, None]).view_as(bank)
        if self.gain is not None:
            self.gain.copy_(lengths)
        return bank.contiguous(memory_format=torch.preserve_format)

    @torch.no_grad()
    def choose(self, bank: Tensor, progress: float) -> Tensor:
        """Select the m most important filters of the bank, shape (m,), without fusing anything yet."""
        self.selected.copy_(self._most_important(self.log_similarity(bank, progress)[0], bank))
        return self.selected

    @torch.no_grad()
    def rescore(self, bank: Tensor, progress: float, reselect: bool = True) -> "LayerFusion":
        """Score the bank's filters at ``progress`` in [0, 1] of the training and set P for the steps to come.

        Once the schedule freezes, the layer is scored one last time and P never changes again.
        """
        if self.is_frozen:
            return self.last
        settings, before, bank = self.settings, self.selected.clone(), self.filters(bank)
        log_p, temperature = self.log_similarity(bank, progress)
        is_learning = settings.learn_mixing and self.last is not None  # P is a weight by now: look, do not touch
        if reselect and settings.reselect and not is_learning:
            selected = self._most_important(log_p, bank)
            self.selected.copy_(stable_slots(before, selected) if settings.stable_slots else selected)
        if not is_learning:
            self._set_matrix(_fusion_matrix(log_p, self.selected, settings), bank)
        self.is_frozen = settings.schedule.is_frozen(progress) and not settings.learn_mixing
        shares = self.matrix.detach().abs()
        own_share = shares.gather(1, self.selected[:, None])[:, 0] / shares.sum(1)
        self.last = LayerFusion(
            temperature=temperature,
            entropy=similarity.entropy(log_p).mean().item(),
            self_mass=log_p.diagonal().exp().mean().item(),
            own_share=own_share.mean().item(),
            churn=1 - torch.isin(self.selected, before).double().mean().item(),
        )
        return self.last

    def _set_matrix(self, matrix: Tensor, bank: Tensor) -> None:
        own_share = matrix.gather(1, self.selected[:, None])
        self.is_selection = own_share.min().item() > 1 - _ONE_HOT and not self.settings.learn_mixing
        if self.settings.rescale and not self.is_selection:
            matrix *= _mean_norm(bank[self.selected]) / _mean_norm(mix(matrix.to(bank), bank)).clamp_min(1e-12)
        self.matrix.copy_(matrix)

    def log_similarity(self, bank: Tensor, progress: float) -> tuple[Tensor, float]:
        """The bank's log-similarities, shape (n, n), at ``progress`` in [0, 1], and the temperature they are for."""
        schedule = self.settings.schedule
        temperature = schedule.temperature(progress, len(bank))
        distance = similarity.pairwise_distances(bank, self.settings.metric)
        if schedule.scale_free:
            distance = similarity.scale_free(distance)
        return similarity.log_similarity(distance, temperature), temperature

    def _most_important(self, log_p: Tensor, bank: Tensor) -> Tensor:
        return _importance(self.settings.score, log_p, bank).topk(len(self.selected)).indices.sort().values

    def shrink(self) -> None:
        """Become the identity of the m fused filters."""
        m = len(self.selected)
        self.selected = torch.arange(m, device=self.selected.device)
        self.matrix = torch.eye(m, dtype=self.matrix.dtype, device=self.matrix.device)
        self.is_selection = self.is_collapsed = True

    def get_extra_state(self) -> dict:
        last = asdict(self.last) if self.last else None
        flags = {"is_selection": self.is_selection, "is_frozen": self.is_frozen, "is_collapsed": self.is_collapsed}
        return flags | {"last": last}

    def set_extra_state(self, state: dict) -> None:
        self.is_selection, self.is_frozen = state["is_selection"], state["is_frozen"]
        self.is_collapsed = state.get("is_collapsed", False)  # earlier versions had no such state
        self.last = LayerFusion(**state["last"]) if state["last"] else None


@dataclass(frozen=True)
class LayerFusion:
    """What one scoring of one layer found; masses are shares in [0, 1], entropies in nats."""

    temperature: float
    entropy: float  # mean over the bank's filters
    self_mass: float  # mean p_ii over the bank: what a filter's own distribution leaves to itself
    own_share: float  # mean share of a kept filter in its fused one: 1 means that nothing is fused
    churn: float  # share of the kept filters that were not kept before


@dataclass(frozen=True)
class FusionReport:
    """One scoring of a whole network, layer by layer."""

    progress: float
    layers: dict[str, LayerFusion] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, progress: float = 0.0) -> "FusionReport":
        """What the last scoring of each layer of ``model`` found."""
        return cls(progress, {name: fusion.last for name, _, fusion in fused_layers(model) if fusion.last})

    def mean(self, quantity: str) -> float:
        """The mean of one of :class:`LayerFusion`'s numbers over the layers."""
        return sum(getattr(layer, quantity) for layer in self.layers.values()) / max(len(self.layers), 1)


def fused_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, FilterFusion]]:
    """Every fused convolution of ``model`` as (name, convolution, its FilterFusion)."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for parametrization in module.parametrizations.weight:
                if isinstance(parametrization, FilterFusion):
                    yield name, module, parametrization


def fit_saved_shape(weight: parametrize.ParametrizationList, state: dict, prefix: str, *_) -> None:
    """Before a state dict is loaded: collapse a layer that was saved after its collapse."""
    saved, fusion = state.get(f"{prefix}original"), weight[0]
    if saved is not None and not fusion.is_collapsed and len(saved) == len(fusion.selected) < len(weight.original):
        weight.original.data = weight.original.data[: len(saved)].clone()
        fusion.shrink()


def stable_slots(before: Tensor, selected: Tensor) -> Tensor:
    """Order the ``selected`` filters so that whoever was in ``before`` keeps its slot; newcomers fill the gaps.

    BatchNorm and the next layer know an output channel by its slot, so a filter must not change its own for nothing.

    Args:
        before: the kept filters in slot order until now, shape (m,).
        selected: the filters to keep from now on, ascending, shape (m,).
    """
    stays = torch.isin(before, selected)
    slots = before.clone()
    slots[~stays] = selected[~torch.isin(selected, before)]
    return slots


def mix(matrix: Tensor, bank: Tensor) -> Tensor:
    """``P W``: matrix (m, n) times bank (n, c_in, k, k), in float32 at least even where the layer computes in less.

    A bank laid out channels-last is multiplied as it lies in memory, so nothing is copied.
    """
    dtype = torch.promote_types(bank.dtype, torch.float32)
    with torch.autocast(bank.device.type, enabled=False):
        if bank.is_contiguous(memory_format=torch.channels_last):
            rows = bank.permute(0, 2, 3, 1)
            mixed = (matrix.to(dtype) @ rows.flatten(1).to(dtype)).view(-1, *rows.shape[1:]).permute(0, 3, 1, 2)
        else:
            mixed = (matrix.to(dtype) @ bank.flatten(1).to(dtype)).view(-1, *bank.shape[1:])
    return mixed.to(bank.dtype)


def _importance(score: str, log_p: Tensor, bank: Tensor) -> Tensor:
    if score == "relative-entropy":
        return similarity.relative_entropy(log_p)
    if score == "entropy":
        return -similarity.entropy(log_p)  # a sharp distribution: no other filter stands in for this one
    if score == "l1":
        return bank.abs().flatten(1).sum(1)
    return -torch.arange(len(bank), device=bank.device, dtype=torch.float64)


def _fusion_matrix(log_p: Tensor, selected: Tensor, settings: FusionSettings) -> Tensor:
    """P of shape (m, n), rows summing to 1: row k says what the filter in slot k is made of."""
    n = log_p.shape[0]
    identity = torch.eye(n, dtype=log_p.dtype, device=log_p.device)[selected]
    if not settings.fuse:
        return identity
    unimportant = torch.ones(n, dtype=torch.bool, device=log_p.device)
    unimportant[selected] = False
    if settings.mass == "assigned":
        shares = torch.softmax(log_p[unimportant][:, selected], dim=1)  # each row: one filter divided among the kept
        matrix = identity.clone()
        matrix[:, unimportant] = shares.T
    elif settings.mass == "unimportant":
        matrix = log_p[selected].exp() * (unimportant | identity.bool())
    else:
        matrix = log_p[selected].exp()
    return matrix / matrix.sum(1, keepdim=True)


def _mean_norm(filters: Tensor) -> Tensor:
    return filters.flatten(1).norm(dim=1).mean()
