"""A study: parameters -> a grid of runs -> their records; what is recorded is not run again.

study = Study.of(dataset="digits", models=["resnet20"], methods=["apbm", "scratch"], targets={"resnet20": [0.5]})
records = study.run()
"""

import itertools
import os
import time
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from tqdm.auto import tqdm

from apbm_core.augment import Augmentation
from apbm_core.data import DataSplit, ImageDataset, known_side, load_dataset
from apbm_core.device import DEVICES, pick_device
from apbm_core.errors import ApbmError, ConfigError, DataError
from apbm_core.methods import NAMES, Method, get_method
from apbm_core.models import MODELS, check_training_side
from apbm_core.recipes import Recipe, get_recipe
from apbm_core.records import OWN, ResultsFolder, RunConfig, RunRecord
from apbm_core.runs import execute
from apbm_core.validation import closest, validated
from apbm_core.widths import PUBLISHED_WIDTHS, SOLVERS, check_published_target, solve_model_widths
from apbm_core.workers import plan_workers, run_side_by_side

RECORDS_ONLY = "APBM_RECORDS_ONLY"
_LARGEST_SEED = 2**32 - 1  # NumPy's limit; torch takes what the phases of a run add to it


class StudyParameters(BaseModel):
    """The knobs of the notebooks, checked all at once; a profile is a file that sets them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    dataset: str = Field("cifar10", description="cifar10, cifar100, digits, or a folder of images under $APBM_DATA")
    fallback: str | None = Field(None, description="the data set to take, and say so, if the first cannot be had")
    models: list[str] = Field(["resnet20"], min_length=1, description=f"networks: {', '.join(MODELS)}")
    methods: list[str] = Field(list(NAMES), min_length=1, description=f"methods: {', '.join(NAMES)}")
    targets: dict[str, list[float]] = Field(
        {"resnet20": [0.5]}, description="for each network the shares to remove, each above 0 and below 1"
    )
    by: Literal["params", "macs"] = Field("params", description="what the targets are shares of")
    widths: str = Field("uniform", description="'uniform' keep ratio, 'balanced', or a published vector's name")
    own_widths: dict[str, str] = Field(
        default_factory=dict, description="methods that run with a rule of their own, too: {'apbm': 'balanced'}"
    )
    epochs: int = Field(3, ge=1, le=100_000, description="total epochs of every run, pre-training counted")
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
    method_images: int = Field(12_800, ge=64, description="01_method: training images its example network sees")
    workers: int = Field(0, ge=0, le=64, description="runs side by side; 0: one a core, at most four; one on a GPU")
    device: str = Field("auto", description=f"where to compute: {', '.join(DEVICES)}")

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "StudyParameters":
        """The checked parameters, every run they ask for included.

        Raises:
            ConfigError: naming each value that is unknown, of the wrong type or impossible.
        """
        parameters = validated(cls, values, "the study's parameters")
        pick_device(parameters.device)
        if not parameters.run_configs(parameters.dataset) and "equal-time" not in parameters.schedules:
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
        for name in (*self.models, *self.targets):
            if name not in MODELS:
                raise ValueError(f"there is no network {name!r}{closest(name, MODELS)} Allowed: {', '.join(MODELS)}.")
        for name in (*self.methods, *self.options):
            get_method(name)
        missing = [model for model in self.models if not self.targets.get(model)]
        if missing and set(self.methods) != {"dense"}:
            raise ValueError(f"no target is given for {missing[0]}; set targets = {{{missing[0]!r}: [0.5]}}.")
        known = [*SOLVERS, *PUBLISHED_WIDTHS]
        if self.widths not in known:
            raise ValueError(
                f"there are no widths {self.widths!r}{closest(self.widths, known)} Allowed: {', '.join(known)}."
            )
        for name, rule in self.own_widths.items():
            if name not in self.methods or get_method(name).starts_from == "sparse" or name == "dense":
                able = [m for m in self.methods if get_method(m).starts_from != "sparse" and m != "dense"]
                raise ValueError(
                    f"own_widths names {name!r}{closest(name, able)} Allowed: {', '.join(able) or 'none'}, the methods "
                    "of this study that are given their widths."
                )
            if rule not in SOLVERS or rule == self.widths:
                raise ValueError(
                    f"own_widths gives {name} the rule {rule!r}{closest(rule, SOLVERS)} Allowed: "
                    f"{', '.join(other for other in SOLVERS if other != self.widths)}."
                )
        for model in self.models if self.widths not in SOLVERS else ():
            if len(self.targets.get(model, [])) > 1:
                raise ValueError(
                    f"the widths {self.widths!r} are one network, so give one target for {model}, not "
                    f"{self.targets[model]}."
                )
        return self

    def run_configs(self, dataset: str, methods: Iterable[str] | None = None) -> list[RunConfig]:
        """Every run of the grid on ``dataset``, the equal-time ones aside: their length follows from records."""
        recipe = get_recipe(self.recipe, **self.recipe_overrides)
        configs = []
        self._check_crops(dataset, recipe)
        for model in self.models:
            for seed in self.seeds:
                for method in map(get_method, methods or self.methods):
                    shares = [0.0] if method.name == "dense" else self.targets[model]
                    for schedule in self.schedules:
                        if schedule == "equal-time" or schedule not in method.schedules:
                            continue
                        rules = [self.widths, *([own] if (own := self.own_widths.get(method.name)) else [])]
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
                                    schedule=schedule,
                                    recipe=recipe,
                                    seed=seed,
                                    split=self.split,
                                    train_subset=self.train_subset,
                                    test_subset=self.test_subset,
                                    options=self._options(method),
                                )
                            )
        return configs

    def _options(self, method: Method) -> dict[str, Any]:
        given = validated(method.Options, self.options.get(method.name, {}), f"the options of {method.name}")
        return given.model_dump(mode="json")

    def _check_crops(self, dataset: str, recipe: Recipe) -> None:
        side = known_side(dataset)
        if side is not None:
            side, _ = Augmentation(padding=recipe.padding, crop=recipe.crop).output_size(side, side)
        for model in self.models if side or recipe.crop else ():
            check_training_side(model, side or recipe.crop)

    def _check_target(self, model: str, dataset: str, share: float, rule: str) -> None:
        num_classes = 100 if dataset == "cifar100" else 10
        if share and rule in SOLVERS:
            solve_model_widths(model, num_classes, share, self.by, rule)
        elif share:
            check_published_target(rule, model, num_classes, share, self.by)


class Study:
    """The runs that some parameters ask for, and the folder where their records are."""

    def __init__(self, parameters: StudyParameters, folder: str | Path, records_only: bool | None = None):
        self.parameters = parameters
        self.results = ResultsFolder(folder)
        self.records_only = os.environ.get(RECORDS_ONLY) == "1" if records_only is None else records_only

    @classmethod
    def of(cls, folder: str | Path = f"{OWN}/mine", **values: Any) -> "Study":
        """A study from parameters by name.

        Raises:
            ConfigError: naming each value that is unknown, of the wrong type or impossible.
        """
        return cls(StudyParameters.parse(values), folder)

    @cached_property
    def dataset(self) -> str:
        """The data set that is used: the one asked for, else the fallback.

        Raises:
            DataError: the first cannot be had and there is no fallback.
        """
        wanted, fallback = self.parameters.dataset, self.parameters.fallback
        if fallback is None:
            return wanted
        if self.records_only:
            recorded = {record.config.dataset for record in self.results.read_all()}
            return wanted if wanted in recorded or fallback not in recorded else fallback
        try:
            _load(wanted)
            return wanted
        except DataError as error:
            print(f"{error}\nUsing {fallback} instead.")
            return fallback

    @property
    def banner(self) -> str:
        """A warning to put above every figure when the study runs on its fallback data; empty otherwise."""
        if self.dataset == self.parameters.dataset:
            return ""
        return f"NOT {self.parameters.dataset}: it could not be found, so these runs are on {self.dataset}."

    @property
    def source(self) -> str:
        """Where the images came from, as a sentence; from the records when nothing else is read."""
        if self.records_only:
            return next((record.data_source for record in self.records()), "")
        return self.data().source

    @property
    def device(self) -> torch.device:
        return pick_device(self.parameters.device)

    def data(self) -> ImageDataset:
        """The data set itself."""
        return _load(self.dataset)

    def example_split(self, images: int) -> DataSplit:
        """A part of the data, for an example in passing; the digits, if a report is made where the data are not."""
        try:
            data = self.data()
        except DataError:
            if not self.records_only:
                raise
            data = _load("digits")
            print(f"{self.dataset} is not here; this example uses the digits.")
        most = min(len(data.train_images), self.parameters.train_subset or len(data.train_images))
        return data.split("final", train_subset=min(images, most), test_subset=self.parameters.test_subset)

    def configs(self, starts_from: Sequence[str] | None = None) -> list[RunConfig]:
        """The grid's runs; only those whose method starts from one of ``starts_from``, if that is given."""
        methods = self.parameters.methods
        if starts_from is not None:
            methods = [name for name in methods if get_method(name).starts_from in starts_from]
        return self.parameters.run_configs(self.dataset, methods) if methods else []

    def records(self, configs: Iterable[RunConfig] | None = None) -> list[RunRecord]:
        """The records there are of ``configs``, by default of the whole grid and its equal-time runs."""
        if configs is None:
            configs = [*self.configs(), *self.equal_time_configs()]
        return [record for record in map(self.results.read, configs) if record is not None]

    def equal_time_configs(self) -> list[RunConfig]:
        """Runs from scratch with as many epochs as fit into the training time of l1's record, pre-training counted."""
        if "equal-time" not in self.parameters.schedules:
            return []
        records = self.records(self.configs())
        shared = self.parameters.widths
        references = {
            (r.config.model, r.config.target, r.config.seed): r
            for r in records
            if (r.config.method, r.config.widths) == ("l1", shared)
        }
        configs = []
        for record in records:
            reference = references.get((record.config.model, record.config.target, record.config.seed))
            if reference is not None and "equal-time" in get_method(record.config.method).schedules:
                epochs = max(1, int(reference.seconds / (record.seconds / record.config.epochs)))
                configs.append(record.config.model_copy(update={"schedule": "equal-time", "epochs": epochs}))
        return configs

    def run(self, configs: Sequence[RunConfig] | None = None) -> list[RunRecord]:
        """Execute what is not recorded yet, side by side, and return the records of ``configs`` (default: everything).

        Raises:
            ApbmError: runs failed (the others are finished and recorded first), or one is missing when only records
                are to be read.
        """
        if configs is None:
            self.run(self.configs())
            configs = [*self.configs(), *self.equal_time_configs()]
        missing = [config for config in configs if self.results.read(config) is None]
        if missing and self.records_only:
            raise ApbmError(
                f"{len(missing)} of {len(configs)} runs are not recorded in {self.results.path}, {missing[0].id} "
                f"first. Run them before you render: make reproduce PROFILE={self.results.path.name} "
                f"RESULTS={self.results.path.parent}"
            )
        if missing:
            self._execute(_spread(missing))
        for config in configs if not self.records_only else ():
            self.results.remove_work(config)
        return self.records(configs)

    def _execute(self, configs: list[RunConfig]) -> None:
        device = self.device
        workers, threads = plan_workers(self.parameters.workers, len(configs), device)
        jobs = [(config, str(self.results.path), str(device), workers) for config in configs]
        failed: dict[str, BaseException] = {}
        started = time.perf_counter()
        with tqdm(total=len(jobs), unit="run", leave=False) as bar:
            for index, record, error in run_side_by_side(
                execute, jobs, workers, threads, lambda i, said: bar.set_postfix_str(f"{configs[i].id}: {said}")
            ):
                bar.update()
                if error is not None:
                    failed[configs[index].id] = error
                else:
                    accuracy = record.test_accuracy if record.test_accuracy is not None else record.val_accuracy
                    print(f"{record.id:<46} accuracy {100 * accuracy:5.2f} %   {record.seconds:7.1f} s of training")
        print(f"{len(jobs) - len(failed)} runs in {time.perf_counter() - started:.0f} s, {workers} at a time.")
        if failed:
            bug = next((error for error in failed.values() if not isinstance(error, ApbmError)), None)
            reasons = "\n".join(f"  {name}: {type(error).__name__}: {error}" for name, error in failed.items())
            raise ApbmError(f"{len(failed)} of {len(jobs)} runs failed; the others are recorded.\n{reasons}") from bug


def _spread(configs: list[RunConfig]) -> list[RunConfig]:
    """An order in which two workers rarely wait for each other.

    The first run of each shared pre-training does it; the others that need it come last.
    """
    seen: set[tuple] = set()
    first, others, waiting = [], [], []
    for config in configs:
        if get_method(config.method).starts_from != "pretrained":
            others.append(config)
        elif (config.model, config.seed) in seen:
            waiting.append(config)
        else:
            seen.add((config.model, config.seed))
            first.append(config)
    return [*first, *others, *waiting]


@lru_cache(maxsize=2)
def _load(name: str) -> ImageDataset:
    return load_dataset(name)
