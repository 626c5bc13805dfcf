"""Temperature schedules: how strongly filters are mixed as training goes on."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AnnealedTau(BaseModel):
    """Ours: ``T = tau * ln n`` on scale-free distances, tau annealed linearly, then frozen (methods.md 1).

    For n equidistant filters a filter keeps the share ``1 / (1 + (n - 1) n**-tau)`` of its own mass, so tau means the
    same for 16 filters and for 512. After ``freeze`` of the training the fusion is never computed again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["annealed"] = "annealed"
    start: float = Field(1.0, gt=0, le=64, description="tau when training starts")
    end: float = Field(2.0, gt=0, le=64, description="tau when the fusion freezes")
    freeze: float = Field(0.6, ge=0, le=1, description="share of the training after which the fusion is fixed")

    scale_free: Literal[True] = True

    @model_validator(mode="after")
    def _sharpens(self):
        if self.end < self.start:
            raise ValueError(f"tau must not fall: end {self.end} is below start {self.start}; choose end >= start.")
        return self

    def temperature(self, progress: float, n: int) -> float:
        """The inverse temperature for a layer of ``n`` filters at ``progress`` in [0, 1] of the training."""
        share = 1.0 if progress >= self.freeze else progress / self.freeze
        return (self.start + (self.end - self.start) * share) * math.log(max(n, 2))

    def is_frozen(self, progress: float) -> bool:
        """Whether the fusion stays as it is from here on."""
        return progress >= self.freeze


class DcffTemperature(BaseModel):
    """DCFF's: ``T(e) = A / (1 + exp(-k e)) + Ts - A / 2`` on raw distances (methods.md 2; Ts=1, Te=1e4, k=1).

    With e the epoch and ``A = 2 (Te - Ts)(1 + exp(-k E)) / (1 - exp(-k E))`` it runs 1, 4622, 7616, 9052, ... 1e4: the
    fusion is an average of all filters in epoch 0 and a plain selection from epoch 1 on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["dcff"] = "dcff"
    epochs: int = Field(300, ge=1, description="E, the number of epochs of the whole training")
    start: float = Field(1.0, ge=1e-6, le=1e12, description="Ts")
    end: float = Field(1e4, ge=1e-6, le=1e12, description="Te")
    rate: float = Field(1.0, ge=1e-6, le=1e3, description="k")

    scale_free: Literal[False] = False

    def temperature(self, progress: float, n: int) -> float:
        """The inverse temperature at epoch ``progress * epochs``, the same whatever the layer's ``n``."""
        decay = math.exp(-self.rate * self.epochs)
        amplitude = 2 * (self.end - self.start) * (1 + decay) / (1 - decay)
        return amplitude / (1 + math.exp(-self.rate * progress * self.epochs)) + self.start - amplitude / 2

    def is_frozen(self, progress: float) -> bool:
        """Never: DCFF scores before every epoch."""
        return False


TemperatureSchedule = AnnealedTau | DcffTemperature
