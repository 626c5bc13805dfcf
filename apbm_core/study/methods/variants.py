"""What APBM is compared with in the ablation: each ingredient of the fusion left out, or done in another way.

:class:`VariantSettings` are the method's own settings (:class:`apbm_core.fusion.FusionSettings`) and one field for each
ingredient, all of them by default as in the method; :class:`VariantFusion` acts on them.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from apbm_core import similarity
from apbm_core.fusion import FilterFusion, FusionSettings
from apbm_core.study.options import added

Metric = Literal["euclidean", "cosine"]


class VariantSettings(FusionSettings):
    """The fusion's settings, every field one line of the ablation."""

    metric: Metric = Field("euclidean", description="distance between two filters")
    score: Literal["relative-entropy", "entropy", "l1", "order"] = Field(
        "relative-entropy",
        description="which filters are important; 'entropy' and 'l1' are ablations, 'order' keeps the first m",
    )
    mass: Literal["all", "unimportant", "assigned", "shuffled"] = Field(
        "all",
        description="what a kept filter mixes in: every filter; only the unimportant ones, its row renormalised;"
        " or the unimportant ones, each of which divides its own mass among the kept ones it resembles; or, a control,"
        " among kept ones drawn at random, in equally large shares",
    )
    amount: Literal["whole", "learned"] = added(
        "whole",
        if_absent="whole",
        description="'learned': own + g (fused - own), where every kept filter learns its g, from 0 on",
    )
    stable_slots: bool = Field(True, description="a filter that stays kept keeps its output channel")
    fuse: bool = Field(True, description="False: select the important filters without mixing anything in")
    reselect: bool = Field(True, description="False: the filters kept at the first scoring stay kept")
    bank: float = Field(1.0, ge=1, le=8, description="filters in the bank, in multiples of the layer's own; rest fresh")
    initial: Literal["model", "orthogonal"] = Field(
        "model", description="the bank starts as the model's own filters, or orthogonal ones of the same lengths"
    )
    gain: bool = Field(False, description="use the bank's filters at unit length, each times a gain that is learned")
    learn_mixing: bool = Field(False, description="P only starts at the similarities and is then trained as a weight")

    def fusion(self, n: int, m: int) -> "VariantFusion":
        return VariantFusion(round(self.bank * n), m, self)


class VariantFusion(FilterFusion):
    """A :class:`FilterFusion` with some of its steps done otherwise.

    In the state dict, where they are learned: ``matrix``, P itself; ``gain`` of shape (n,); ``amount`` of shape (m,).
    """

    no_weight_decay = ("matrix", "gain", "amount")
    settings: VariantSettings

    def __init__(self, n: int, m: int, settings: VariantSettings):
        super().__init__(n, m, settings)
        if settings.learn_mixing:
            matrix = self.matrix
            del self.matrix
            self.matrix = nn.Parameter(matrix)
            self.is_selection = False
        self.gain = nn.Parameter(torch.ones(n)) if settings.gain else None
        self.amount = nn.Parameter(torch.zeros(m)) if settings.amount == "learned" else None

    def forward(self, bank: Tensor) -> Tensor:
        fused = super().forward(bank)
        if self.amount is None or self.is_selection:
            return fused
        own = self.filters(bank).index_select(0, self.selected)
        return own + self.amount.view(-1, *[1] * (bank.dim() - 1)) * (fused - own)

    @property
    def can_collapse(self) -> bool:
        return super().can_collapse and self.gain is None  # lengths that are parameters of their own need the bank

    @property
    def _is_learning(self) -> bool:
        return self.settings.learn_mixing and self.last is not None  # P is a weight by now: look, do not touch

    @torch.no_grad()
    def initial_bank(self, weight: Tensor) -> Tensor:
        """The layer's filters (n, c_in, k, k), made orthogonal and more of them as is set."""
        bank = weight.clone()
        n, lengths = self.matrix.shape[1], weight.flatten(1).norm(dim=1)
        if n > len(bank):
            fresh = torch.randn(n - len(bank), *bank.shape[1:], dtype=bank.dtype).to(bank.device) * bank.std()
            bank = torch.cat([bank, fresh])
            lengths = torch.cat([lengths, fresh.flatten(1).norm(dim=1)])
        if self.settings.initial == "orthogonal":
            flat = nn.init.orthogonal_(torch.empty(n, bank[0].numel())).to(bank)
            bank = (flat / flat.norm(dim=1, keepdim=True) * lengths[:, None]).view_as(bank)
        if self.gain is not None:
            self.gain.copy_(lengths)
        return bank

    @property
    def reselects(self) -> bool:
        return self.settings.reselect and not self._is_learning

    def filters(self, bank: Tensor) -> Tensor:
        if self.gain is None:
            return bank
        return bank * (self.gain / bank.flatten(1).norm(dim=1).clamp_min(1e-12)).view(-1, *[1] * (bank.dim() - 1))

    def distances(self, bank: Tensor) -> Tensor:
        return distances(bank, self.settings.metric)

    def importance(self, log_p: Tensor, bank: Tensor) -> Tensor:
        score = self.settings.score
        if score == "relative-entropy":
            return similarity.relative_entropy(log_p)
        if score == "entropy":
            return -similarity.entropy(log_p)  # a sharp distribution: no other filter stands in for this one
        if score == "l1":
            return bank.abs().flatten(1).sum(1)
        return -torch.arange(len(bank), device=bank.device, dtype=torch.float64)

    def slots(self, before: Tensor, selected: Tensor) -> Tensor:
        return super().slots(before, selected) if self.settings.stable_slots else selected

    def mixture(self, log_p: Tensor, selected: Tensor) -> Tensor:
        n, mass = len(log_p), self.settings.mass
        identity = torch.eye(n, dtype=log_p.dtype, device=log_p.device)[selected]
        if not self.settings.fuse or self.responses is not None:
            return identity
        if mass == "all":
            return super().mixture(log_p, selected)
        unimportant = torch.ones(n, dtype=torch.bool, device=log_p.device)
        unimportant[selected] = False
        if mass in ("assigned", "shuffled"):
            matrix = identity + self.division(log_p, selected)
        else:
            matrix = log_p[selected].exp() * (unimportant | identity.bool())
        return matrix / matrix.sum(1, keepdim=True)

    def division(self, log_p: Tensor, selected: Tensor) -> Tensor:
        shares = super().division(log_p, selected)
        if self.settings.mass == "shuffled":  # equally large shares, each filter's among kept ones at random
            rows = shares[:, shares.any(0)].T
            draw = torch.rand(rows.shape, generator=torch.Generator().manual_seed(len(log_p)))
            shares[:, shares.any(0)] = rows.gather(1, draw.argsort(1).to(rows.device)).T
        return shares

    def set_matrix(self, matrix: Tensor, bank: Tensor) -> None:
        if not self._is_learning:
            super().set_matrix(matrix, bank)

    def freezes_at(self, progress: float) -> bool:
        return super().freezes_at(progress) and not self.settings.learn_mixing

    def is_one_hot(self, matrix: Tensor) -> bool:
        return super().is_one_hot(matrix) and not self.settings.learn_mixing


def distances(weight: Tensor, metric: Metric = "euclidean") -> Tensor:
    """The distance of every filter (n, ...) to every other, shape (n, n).

    ``cosine`` is the Euclidean distance of the filters scaled to unit length, sqrt(2 - 2 cos). A filter of zeros keeps
    its zeros.
    """
    if metric == "cosine":
        w = weight.detach().flatten(1)
        weight = nn.functional.normalize(w.float() if w.device.type == "mps" else w.double(), dim=1)
    return similarity.pairwise_distances(weight)
