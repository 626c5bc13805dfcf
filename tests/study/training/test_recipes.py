"""Recipes against torch's own schedulers, and what a user reads when a value is wrong."""

import json
import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from apbm_core.errors import ConfigError
from apbm_core.study.training.optimizer import parameter_groups
from apbm_core.study.training.recipes import RECIPES, Recipe, get_recipe, learning_rate
from apbm_core.study.validation import validated


def torch_curve(scheduler_type, steps: int, lr: float, **settings) -> list[float]:
    """The rates of ``steps`` optimizer steps under one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = scheduler_type(optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_curve(recipe: Recipe, steps: int) -> list[float]:
    return [learning_rate(recipe, i / steps) for i in range(steps)]


@pytest.mark.parametrize("warmup", [0.1, 0.25, 0.5])
def test_one_cycle_is_torchs(warmup):
    steps = 40  # torch puts its peak at pct_start * total - 1 and its end at total - 1
    expected = torch_curve(
        torch.optim.lr_scheduler.OneCycleLR,
        steps,
        lr=0.3,
        max_lr=0.3,
        total_steps=steps + 1,
        pct_start=(warmup * steps + 1) / (steps + 1),
        cycle_momentum=False,
    )
    assert our_curve(get_recipe("fast", lr=0.3, warmup=warmup), steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epochs", [4, 8, 40, 300])
def test_the_papers_steps_are_torchs_multistep(epochs):
    steps_per_epoch = 3
    steps = epochs * steps_per_epoch
    expected = torch_curve(
        torch.optim.lr_scheduler.MultiStepLR, steps, lr=0.1, milestones=[steps // 2, steps * 3 // 4], gamma=0.1
    )
    assert our_curve(get_recipe("paper"), steps) == pytest.approx(expected, rel=1e-12)


def test_polarizations_milestones_fall_on_epochs_although_thirds_are_not_binary_fractions():
    recipe = get_recipe("paper", milestones=(0.3, 0.6, 0.8), gamma=0.2)
    rates = our_curve(recipe, 200 * 391)
    for epoch, before, after in [(60, 0.1, 0.02), (120, 0.02, 0.004), (160, 0.004, 0.0008)]:
        assert rates[epoch * 391 - 1] == pytest.approx(before)
        assert rates[epoch * 391] == pytest.approx(after)


def test_cosine_is_torchs():
    recipe = get_recipe("paper", schedule="cosine", milestones=(), lr=0.4)
    expected = torch_curve(torch.optim.lr_scheduler.CosineAnnealingLR, 25, lr=0.4, T_max=25)
    assert our_curve(recipe, 25) == pytest.approx(expected, rel=1e-9)


def test_warmup_of_the_other_schedules_is_torchs_linear_one():
    recipe = get_recipe("paper", schedule="constant", milestones=(), warmup=0.4)
    expected = torch_curve(torch.optim.lr_scheduler.LinearLR, 20, lr=0.1, start_factor=0.1, total_iters=8)
    assert our_curve(recipe, 20) == pytest.approx(expected, rel=1e-9)


@given(name=st.sampled_from(sorted(RECIPES)), progress=st.floats(0, 1))
def test_rate_is_finite_and_never_above_the_peak(name, progress):
    recipe = get_recipe(name)
    assert 0 <= learning_rate(recipe, progress) <= recipe.lr * (1 + 1e-12)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_outside_the_training_is_refused(progress):
    with pytest.raises(ConfigError, match="outside"):
        learning_rate(get_recipe("fast"), progress)


def test_the_papers_recipe_is_the_published_one():
    recipe = get_recipe("paper")  # methods.md 2
    assert (recipe.default_epochs, recipe.batch_size, recipe.lr, recipe.momentum) == (300, 256, 0.1, 0.9)
    assert (recipe.weight_decay, recipe.milestones, recipe.gamma, recipe.nesterov) == (5e-4, (0.5, 0.75), 0.1, False)
    assert (recipe.label_smoothing, recipe.padding, recipe.flip) == (0, 4, True)


def test_a_recipe_survives_json():
    recipe = get_recipe("paper", lr=0.05)
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"lrr": 0.1}, ["'lrr'", "did you mean 'lr'", "batch_size"]),
        ({"lr": "1e-3"}, ["lr = '1e-3'", "valid number", "without quotes", "1.0e-3"]),
        ({"lr": 0.0}, ["lr = 0.0", "greater than 0"]),
        ({"lr": math.inf}, ["lr = inf", "finite"]),
        ({"batch_size": 128.5}, ["batch_size = 128.5", "integer"]),
        ({"flip": "yes"}, ["flip = 'yes'", "boolean"]),
        ({"momentum": 0.0}, ["nesterov", "momentum > 0"]),
        ({"schedule": "onecycle"}, ["schedule = 'onecycle'", "'steps'", "did you mean 'one-cycle'"]),
        ({"warmup": 0.0}, ["one-cycle", "0 < warmup < 1"]),
        ({"milestones": (0.5,)}, ["milestones belong to the steps schedule"]),
        ({"schedule": "steps"}, ["needs milestones"]),
        ({"schedule": "steps", "milestones": (0.7, 0.5), "warmup": 0.0}, ["must rise", "(0.7, 0.5)"]),
        ({"schedule": "steps", "milestones": (0.5, 1.5)}, ["milestones.1 = 1.5", "less than 1"]),
        ({"schedule": "steps", "milestones": (0.1,), "warmup": 0.2}, ["warmup = 0.2", "first milestone"]),
        ({"precision": "float16"}, ["precision = 'float16'", "'bfloat16'"]),
        ({"lr": -1.0, "gamma": 2.0}, ["2 parameters are wrong", "lr = -1.0", "gamma = 2.0"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(overrides, says):
    with pytest.raises(ConfigError) as error:
        get_recipe("fast", **overrides)
    for part in ["recipe 'fast'", *says]:
        assert part in str(error.value)
    assert "pydantic" not in str(error.value)
    assert "\n\n" not in str(error.value)
    assert ".." not in str(error.value)


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'papr'; did you mean 'paper'\? Allowed: fast, paper\."):
        get_recipe("papr")


def test_recipes_cannot_be_changed():
    with pytest.raises(TypeError):
        RECIPES["fast"] = RECIPES["paper"]


class Knife(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["knife"] = "knife"
    length: int


class Spoon(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["spoon"] = "spoon"
    volume: int


class Drawer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tool: Knife | Spoon = Field(discriminator="kind")
    label: str


def test_errors_in_a_nested_model_name_the_path_and_that_models_fields():
    with pytest.raises(ConfigError) as error:
        validated(Drawer, {"tool": {"kind": "spoon", "volum": 3, "volume": 3}}, "drawer")
    text = str(error.value)
    assert "tool.spoon.volum'" in text
    assert "did you mean 'volume'? Allowed: kind, volume." in text
    assert "'label' is missing" in text
    assert "length" not in text


class Scaled(torch.nn.Module):
    no_weight_decay = ("scale",)

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.scale = torch.nn.Parameter(torch.ones(4, 3, 3))
        self.mark = torch.nn.Parameter(torch.ones(4, 2))
        self.mark.no_weight_decay = True
        self.frozen = torch.nn.Parameter(torch.ones(4, 2), requires_grad=False)


@pytest.mark.parametrize(
    ("decay_norms", "decaying"),
    [(True, {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}), (False, {"conv.weight"})],
)
def test_which_parameters_decay(decay_norms, decaying):
    model = Scaled()
    groups = parameter_groups(model, get_recipe("fast", decay_norms=decay_norms))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    everything = set(names.values()) - {"frozen"}
    assert found == {5e-4: decaying, 0.0: everything - decaying}


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        parameter_groups(torch.nn.ReLU(), get_recipe("fast"))
