"""The parameters of a study, which the notebooks and profiles set, and the grid of runs that they ask for."""

import itertools
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from apbm_core.errors import ConfigError
from apbm_core.study.data.batches import Augmentation
from apbm_core.study.data.datasets import class_count, known_side
from apbm_core.study.methods import Method, all_methods, default_methods, get_method
from apbm_core.study.networks.models import all_networks, check_training_side, get_network
from apbm_core.study.networks.widths import PUBLISHED_WIDTHS, SOLVERS, check_published_target, solve_model_widths
from apbm_core.study.options import stated
from apbm_core.study.records import RunConfig
from apbm_core.study.training.device import DEVICES, pick_device
from apbm_core.study.training.recipes import Recipe, get_recipe
from apbm_core.study.validation import closest, validated

_LARGEST_SEED = 2**32 - 1  # NumPy's limit; torch takes what the phases of a run add to it


class StudyParameters(BaseModel):
    """The knobs of the notebooks, checked all at once; a profile is a file that sets them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    dataset: str = Field("cifar10", description="cifar10, cifar100, digits, or a folder of images under $APBM_DATA")
    fallback: str | None = Field(None, description="the data set to take, and say so, if the first cannot be had")
    models: list[str] = Field(["resnet20"], min_length=1, description=f"networks: {', '.join(all_networks())}")
    methods: list[str] = Field(
        default_factory=default_methods, min_length=1, description=f"methods: {', '.join(all_methods())}"
    )
    targets: dict[str, list[float]] = Field(
        {"resnet20": [0.5]}, description="for each network the shares to remove, each above 0 and below 1"
    )
    by: Literal["params", "macs"] = Field("params", description="what the targets are shares of")
    widths: str = Field("uniform", description="'uniform' keep ratio, 'balanced', or a published vector's name")
    own_widths: dict[str, dict[str, str]] = Field(
        default_factory=dict,
        description="for each network the methods that run with a rule of their own, too: "
        "{'vgg16': {'apbm': 'balanced'}}",
    )
    epochs: int = Field(3, ge=1, le=100_000, description="total epochs of every run, pre-training counted")
    start_epochs: int = Field(
        0,
        ge=0,
        le=100_000,
        description="a network that is trained already: so long a dense one was trained, once a seed, that all methods "
        "start from but those that start slim (scratch, dirac, reparam, passing); its time is told and not charged",
    )
    start_recipe: dict[str, Any] = Field(
        default_factory=dict, description="what differs from the recipe in that training, such as {lr: 0.2}"
    )
    schedules: list[Literal["equal", "published", "equal-time"]] = Field(
        ["equal"], min_length=1, description="equal epochs for all; each method's published course; equal time"
    )
    seeds: list[int] = Field([0], min_length=1, description="one repetition of everything for each")
    recipe: str = Field("fast", description="how to train: fast or paper")
    recipe_overrides: dict[str, Any] = Field(default_factory=dict, description="single settings of the recipe")
    split: Literal["final", "tuning"] = Field("final", description="tuning holds out 10 %, the test set stays unseen")
    train_subset: int | None = Field(None, ge=1, description="only so many training images, for quick trials")
    test_subset: int | None = Field(None, ge=1, description="only so many test images, for quick trials")
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="settings of single methods")
    rates: dict[str, float] = Field(
        default_factory=dict, description="peak learning rates of single methods, where they were tuned apart"
    )
    blocks: list[dict[str, Any]] = Field(
        default_factory=list,
        description="parts of the grid in the order in which they run, one seed of all before the next: each a set of "
        "parameters laid over the study's own, such as {dataset: cifar100, models: [vgg16]}",
    )
    method_images: int = Field(12_800, ge=64, description="01_method: training images its example network sees")
    workers: int = Field(0, ge=0, le=64, description="runs side by side; 0: one a core, at most four; one on a GPU")
    engine: Literal["processes", "ray"] = Field("processes", description="what carries out the runs: docs/clusters.md")
    address: str | None = Field(
        None, description="engine ray: the cluster's address, 'auto' for the one around; None: here"
    )
    minutes: float | None = Field(
        None, gt=0, description="stop where it can go on after so long; the same command goes on. None: run to the end"
    )
    device: str = Field("auto", description=f"where to compute: {', '.join(DEVICES)}")

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "StudyParameters":
        """The checked parameters, every run they ask for included.

        Raises:
            ConfigError: naming each value that is unknown, of the wrong type or impossible.
        """
        parameters = validated(cls, values, "the study's parameters")
        pick_device(parameters.device)
        if not parameters.run_configs(parameters.dataset):
            raise ConfigError(
                f"schedules = {parameters.schedules}: none of {', '.join(parameters.methods)} has such a schedule, so "
                "there is nothing to run; add 'equal'."
            )
        return parameters

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, seeds: list[int]) -> list[int]:
        if min(seeds) < 0 or max(seeds) > _LARGEST_SEED or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds are different whole numbers from 0 to {_LARGEST_SEED}.")
        return seeds

    @field_validator("targets")
    @classmethod
    def _are_shares(cls, targets: dict[str, list[float]]) -> dict[str, list[float]]:
        for model, shares in targets.items():
            for share in shares:
                if not 0 < share < 1:
                    raise ValueError(
                        f"{share} is no share of {model} that could be removed; give numbers above 0 and below 1, such "
                        "as 0.5 for half of it."
                    )
        return targets

    @field_validator("models", "methods", "schedules", "targets")
    @classmethod
    def _differ(cls, values: Any) -> Any:
        for several in values.values() if isinstance(values, dict) else [values]:
            if twice := [value for value in several if several.count(value) > 1]:
                raise ValueError(f"{twice[0]!r} is given twice; give it once, for a run is carried out once.")
        return values

    @field_validator("recipe_overrides")
    @classmethod
    def _keep_the_name(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        if "name" in overrides:
            raise ValueError("the recipe's name cannot be overridden; choose one with recipe = 'fast' or 'paper'.")
        return overrides

    @model_validator(mode="after")
    def _names_are_known(self):
        for name in (*self.models, *self.targets, *self.own_widths):
            get_network(name)
        for name in (*self.methods, *self.options):
            get_method(name)
        missing = [model for model in self.models if not self.targets.get(model)]
        if missing and set(self.methods) != {"dense"}:
            raise ValueError(f"no target is given for {missing[0]}; set targets = {{{missing[0]!r}: [0.5]}}.")
        if "equal-time" in self.schedules and not ("equal" in self.schedules and "l1" in self.methods):
            raise ValueError(
                "the schedule 'equal-time' gives the time that l1 takes at equal epochs, so it needs 'equal' among the "
                f"schedules, which are {self.schedules}, and 'l1' among the methods, which are {self.methods}."
            )
        known = [*SOLVERS, *PUBLISHED_WIDTHS]
        if self.widths not in known:
            raise ValueError(
                f"there are no widths {self.widths!r}{closest(self.widths, known)} Allowed: {', '.join(known)}."
            )
        self._check_own_widths()
        for name in self.rates:
            get_method(name)
            validated(Recipe, self._recipe_of(name).model_dump(), f"the recipe of {name}")
        if self.start_recipe and not self.start_epochs:
            raise ValueError("start_recipe is of a network that is trained already; set start_epochs, or leave it out.")
        self._start()
        for block in self.blocks:
            if "blocks" in block or "seeds" in block:
                raise ValueError("a block has no blocks or seeds of its own; the study's seeds are every block's.")
            self._block(block)
        for model in self.models if self.widths not in SOLVERS else ():
            if len(self.targets.get(model, [])) > 1:
                raise ValueError(
                    f"the widths {self.widths!r} are one network, so give one target for {model}, not "
                    f"{self.targets[model]}."
                )
        return self

    def _check_own_widths(self) -> None:
        for model in self.own_widths:
            if model not in self.models:
                raise ValueError(
                    f"own_widths names {model!r}, which is not among the networks of this study: "
                    f"{', '.join(self.models)}. Add it to models or leave it out."
                )
        for name, rule in ((name, rule) for own in self.own_widths.values() for name, rule in own.items()):
            able = [m for m in self.methods if not get_method(m).chooses_widths and m != "dense"]
            if name not in able:
                raise ValueError(
                    f"own_widths names {name!r}{closest(name, able)} Allowed: {', '.join(able) or 'none'}, the methods "
                    "of this study that are given their widths."
                )
            if rule not in SOLVERS or rule == self.widths:
                raise ValueError(
                    f"own_widths gives {name} the rule {rule!r}{closest(rule, SOLVERS)} Allowed: "
                    f"{', '.join(other for other in SOLVERS if other != self.widths)}."
                )

    def run_configs(self, dataset: str) -> list[RunConfig]:
        """Every run of the grid on ``dataset``, the equal-time ones aside: their length follows from records.

        With ``blocks`` it is theirs, those that name no data set on ``dataset``; a run of several is listed once.
        """
        recipe, configs = get_recipe(self.recipe, **self.recipe_overrides), []
        if self.blocks:
            for seed, block in itertools.product(self.seeds, self.blocks):
                configs += self._block(block | {"seeds": [seed]}).run_configs(block.get("dataset", dataset))
            return list({config.id: config for config in configs}.values())
        self._check_crops(dataset, recipe)
        for model in self.models:
            for seed in self.seeds:
                for method in map(get_method, self.methods):
                    shares = [0.0] if method.name == "dense" else self.targets[model]
                    for schedule in self.schedules:
                        if schedule == "equal-time" or schedule not in method.schedules:
                            continue
                        own = self.own_widths.get(model, {}).get(method.name)
                        rules = [self.widths, *([own] if own else [])]
                        for share, rule in itertools.product(shares, rules):
                            self._check_target(model, dataset, share, rule)
                            configs.append(
                                RunConfig(
                                    method=method.name,
                                    model=model,
                                    dataset=dataset,
                                    target=share,
                                    by=self.by,
                                    widths=rule,
                                    epochs=self.epochs,
                                    **({} if method.starts_slim else self._start()),
                                    schedule=schedule,
                                    recipe=self._recipe_of(method.name),
                                    seed=seed,
                                    split=self.split,
                                    train_subset=self.train_subset,
                                    test_subset=self.test_subset,
                                    options=self._options(method, model),
                                )
                            )
        return configs

    def _block(self, block: dict[str, Any]) -> "StudyParameters":
        """The study with a block's parameters laid over its own; what is none of its networks' is left out."""
        values = self.model_dump(exclude_unset=True) | {"blocks": []} | block
        own = {model: rules for model, rules in values.get("own_widths", {}).items() if model in values["models"]}
        methods = values.get("methods", self.methods)
        values["own_widths"] = {m: {n: rule for n, rule in rules.items() if n in methods} for m, rules in own.items()}
        return validated(StudyParameters, values, f"the block {block}")

    def _recipe_of(self, method: str) -> Recipe:
        rate = {"lr": self.rates[method]} if method in self.rates else {}
        return get_recipe(self.recipe, **self.recipe_overrides | rate)

    def _start(self) -> dict[str, Any]:
        if not self.start_epochs:
            return {}
        recipe = get_recipe(self.recipe, **self.recipe_overrides | self.start_recipe)
        return {"start_epochs": self.start_epochs, "start_recipe": recipe}

    def _options(self, method: Method, model: str) -> dict[str, Any]:
        given = validated(method.Options, self.options.get(method.name, {}), f"the options of {method.name}")
        if hasattr(given, "for_network"):
            given = given.for_network(get_network(model), is_trained=self.start_epochs > 0)
        return stated(given)

    def _check_crops(self, dataset: str, recipe: Recipe) -> None:
        side = known_side(dataset)
        if side is not None:
            side, _ = Augmentation(padding=recipe.padding, crop=recipe.crop).output_size(side, side)
        for model in self.models if side or recipe.crop else ():
            check_training_side(model, side or recipe.crop)

    def _check_target(self, model: str, dataset: str, share: float, rule: str) -> None:
        num_classes = class_count(dataset)
        if num_classes is None:  # not to be had here: loading it says so, or the fallback is taken
            return
        if share and rule in SOLVERS:
            solve_model_widths(model, num_classes, share, self.by, rule)
        elif share:
            check_published_target(rule, model, num_classes, share, self.by)
