"""How a network is trained: the optimizer's settings, the learning rate's course, augmentation and arithmetic."""

import bisect
import math
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from apbm_core.errors import ConfigError
from apbm_core.study.validation import closest, validated

# torch.optim.lr_scheduler.OneCycleLR's defaults: it starts at lr / 25 and ends at lr / 25 / 10,000
_START_DIVISOR = 25.0
_FINAL_DIVISOR = 1e4
_WARMUP_DIVISOR = 10.0  # where the linear warm-up of the other schedules starts: Polarization's 0.01 of 0.1

Fraction = Annotated[float, Field(gt=0, lt=1)]
Fractions = Annotated[tuple[Fraction, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class Recipe(BaseModel):
    """Everything about a training except the network, the data, the number of epochs and the seed.

    Types are strict: ``"1e-3"`` is text, not a number. Lists are taken for tuples, so a recipe survives JSON and YAML.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(description="which recipe this is, or was before a field was overridden")
    default_epochs: int = Field(ge=1, description="how long the recipe is meant to train")
    batch_size: int = Field(ge=2, description="at least 2, which batch normalisation needs")
    lr: float = Field(gt=0, description="the peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty, added to the gradient")
    decay_norms: bool = Field(True, description="decay BatchNorm's parameters and the biases too, as the references do")
    schedule: Literal["one-cycle", "steps", "cosine", "constant"]
    warmup: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training in which the rate rises to lr: one-cycle from lr / 25 along"
        " a cosine, the others from lr / 10 along a line",
    )
    milestones: Fractions = Field((), description="steps: shares of the training after which the rate is cut")
    gamma: float = Field(0.1, gt=0, le=1, description="steps: what the rate is multiplied by at each milestone")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    padding: int = Field(4, ge=0, description="pixels added at each side before the random crop")
    crop: int | None = Field(None, ge=1, description="side of the random crop; None is the image's own size")
    flip: bool = Field(True, description="mirror each image with probability 1/2")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16 is autocast: weights and optimizer stay float32"
    )
    channels_last: Literal["auto", True, False] = Field("auto", description="NHWC memory layout")
    lowering: Literal["auto", "off"] = Field(
        "auto", description="on a CPU, compute 3x3 convolutions of tiny maps as matrix products where that is faster"
    )
    lookahead: float = Field(
        0.0, ge=0, lt=1, description="decay of the running average that the weights return to; 0: none"
    )
    compile: bool | Literal["reduce-overhead"] = Field(
        False,
        description="torch.compile the forward pass; falls back to eager with a warning. 'reduce-overhead' records it"
        " as CUDA graphs, for small networks on a GPU, whose time is that of launching kernels; no card has confirmed"
        " it yet",
    )

    @model_validator(mode="after")
    def _fits_together(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = True needs momentum > 0; set momentum = 0.9 or nesterov = False.")
        if self.schedule == "one-cycle" and self.warmup == 0:
            raise ValueError("the one-cycle schedule needs 0 < warmup < 1, the share of the training that it rises.")
        if self.schedule == "steps" and not self.milestones:
            raise ValueError("the steps schedule needs milestones, for example (0.5, 0.75).")
        if self.schedule != "steps" and self.milestones:
            raise ValueError(
                f"milestones belong to the steps schedule; remove them or set schedule = 'steps', not "
                f"{self.schedule!r}."
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise: {self.milestones}; order them and drop repeated ones.")
        if self.schedule == "steps" and self.warmup > self.milestones[0]:
            raise ValueError(
                f"warmup = {self.warmup} ends after the first milestone, {self.milestones[0]}; shorten it."
            )
        return self


RECIPES = MappingProxyType(
    {
        # A few epochs: one cycle with a high peak (Smith and Topin 2018; methods.md 7)
        "fast": Recipe(
            name="fast",
            default_epochs=30,
            batch_size=128,
            lr=0.2,
            nesterov=True,
            schedule="one-cycle",
            warmup=0.25,
            label_smoothing=0.1,
        ),
        # DCFF's published schedule (methods.md 2)
        "paper": Recipe(
            name="paper",
            default_epochs=300,
            batch_size=256,
            lr=0.1,
            schedule="steps",
            milestones=(0.5, 0.75),
        ),
    }
)


def get_recipe(name: str, **overrides: Any) -> Recipe:
    """The recipe called ``name``, with the fields in ``overrides`` replaced.

    Raises:
        ConfigError: there is no such recipe or field, or a value is not allowed.
    """
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}{closest(name, RECIPES)} Allowed: {', '.join(RECIPES)}.")
    return validated(Recipe, RECIPES[name].model_dump() | overrides, f"recipe {name!r}")


def learning_rate(recipe: Recipe, progress: float) -> float:
    """The learning rate when the share ``progress``, in [0, 1], of all steps is done.

    A pure function, so that resuming needs no scheduler's state. Step i of N is taken at ``progress = i / N``.

    Raises:
        ConfigError: ``progress`` is outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress {progress} is outside [0, 1]; pass steps done / steps in all.")
    peak, warmup = recipe.lr, recipe.warmup
    start = peak / _START_DIVISOR
    if recipe.schedule == "one-cycle":
        if progress < warmup:
            return _cosine(start, peak, progress / warmup)
        return _cosine(peak, start / _FINAL_DIVISOR, (progress - warmup) / (1 - warmup))
    if progress < warmup:
        return peak / _WARMUP_DIVISOR + (peak - peak / _WARMUP_DIVISOR) * progress / warmup
    if recipe.schedule == "steps":
        return peak * recipe.gamma ** bisect.bisect_right(recipe.milestones, progress)
    if recipe.schedule == "cosine":
        return _cosine(peak, 0.0, (progress - warmup) / (1 - warmup))
    return peak


def _cosine(start: float, end: float, share: float) -> float:
    """From ``start`` to ``end`` along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
