"""What a method gets to work with: networks, data, the training loop and a memory, all of one run.

A method is ``prune(task) -> compact network``, a few phases in order. When a run was interrupted, ``prune`` is executed
again from its top: a phase that had finished hands back its result at once, the one that was under way goes on from
its checkpoint. So whatever happens between phases must be deterministic, or wrapped in :meth:`Task.remember`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from apbm_core.costs import CostTable
from apbm_core.errors import ConfigError
from apbm_core.files import sha256
from apbm_core.study.data.datasets import DataSplit
from apbm_core.study.methods.memory import remembered
from apbm_core.study.networks.models import build_model, cost_table, dense_widths, prunable_convs
from apbm_core.study.networks.widths import PUBLISHED_WIDTHS, SOLVERS, solve_model_widths
from apbm_core.study.records import PhaseRecord, ResultsFolder, RunConfig, canonical_json
from apbm_core.study.training.hooks import Context, Hook
from apbm_core.study.training.loop import TrainingResult, train
from apbm_core.study.training.recipes import Recipe
from apbm_core.study.validation import validated

Course = Literal["restart", "continue"]
"""What the learning rate does in a run of two trainings: each goes through the whole course, or both through one."""

_SHARED = {"model", "dataset", "seed", "split", "train_subset"}  # what every shared training depends on
_START = "start"

Progress = Callable[[str, Context], None]


class Task:
    """One run's networks, data and phases.

    Args:
        config: the run.
        split: its images.
        results: where records, networks and the work under way are kept.
        options: the method's settings, already validated.
        device: where to compute.
        progress: told, several times an epoch, where the run stands.
        stop: asked after each step whether to stop there, to go on another time.
    """

    def __init__(
        self,
        config: RunConfig,
        split: DataSplit,
        results: ResultsFolder,
        options: BaseModel,
        device: torch.device,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        self._stop = stop
        self.config, self.split, self.options, self.device = config, split, options, device
        self.model_name, self.num_classes = config.model, split.num_classes
        self.phases: list[PhaseRecord] = []
        self.history: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}
        self.training_facts: dict[str, Any] = {}
        self._results = results
        self._folder = results.work_folder(config.id)
        self._progress = progress

    @cached_property
    def widths(self) -> dict[str, int]:
        """How many filters each prunable convolution keeps: the same for every method that ranks filters."""
        names, config = prunable_convs(self.model_name), self.config
        if config.target == 0:
            return dict(zip(names, dense_widths(self.model_name), strict=True))
        if config.widths in SOLVERS:
            solution = solve_model_widths(self.model_name, self.num_classes, config.target, config.by, config.widths)
            return dict(zip(names, solution.widths, strict=True))
        return dict(zip(names, PUBLISHED_WIDTHS[config.widths].widths, strict=True))

    @cached_property
    def costs(self) -> CostTable:
        """What the network costs at any widths."""
        return cost_table(self.model_name, self.num_classes)

    @property
    def example_inputs(self) -> Tensor:
        """One blank image of the size that is classified, for tracing; shape (1, 3, h, w)."""
        height, width = self.split.train.images.shape[1:3]
        return torch.zeros(1, 3, height, width, device=self.device)

    @property
    def pretrain_epochs(self) -> int:
        """The dense epochs before a cut: a third of all, at least one; none of a network that is trained already. The
        rest is fine-tuning."""
        return 0 if self.config.start_epochs else max(1, round(self.config.epochs / 3))

    @property
    def finetune_epochs(self) -> int:
        return self.config.epochs - self.pretrain_epochs

    def courses(self, course: Course, first: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """The parts of the learning rate's course that the first so many epochs and the others go through."""
        if course == "restart" or not 0 < first < self.config.epochs:
            return (0.0, 1.0), (0.0, 1.0)
        return (0.0, first / self.config.epochs), (first / self.config.epochs, 1.0)

    def build(self, widths: Mapping[str, int] | None = None) -> nn.Module:
        """A network, dense or with these widths, initialised from the run's seed.

        The dense one is a trained one where the run says that it starts from such: then it was trained once for all
        runs, before any phase of theirs, and its time is noted and not charged.
        """
        if widths is None and self.config.start_epochs:
            return self._trained_already()
        return self._fresh(widths)

    def _fresh(self, widths: Mapping[str, int] | None = None) -> nn.Module:
        torch.manual_seed(self.config.seed)
        counts = None if widths is None else [widths[name] for name in prunable_convs(self.model_name)]
        return build_model(self.model_name, self.num_classes, counts).to(self.device)

    def calibration_images(self, count: int) -> Tensor:
        """Normalised training images for a criterion that looks at activations, shape (count or fewer, 3, h, w)."""
        order = torch.randperm(len(self.split.train), generator=torch.Generator().manual_seed(self.config.seed))
        images = self.split.train.images[order[:count].to(self.split.train.images.device)].to(self.device)
        mean, std = (torch.tensor(v, device=self.device) for v in (self.split.mean, self.split.std))
        return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    def pretrained(self, course: tuple[float, float] = (0.0, 1.0)) -> nn.Module:
        """The dense network after :attr:`pretrain_epochs`, trained once for all runs that share it.

        Its whole time is charged to every run that uses it. ``course`` as in :meth:`train`.

        Raises:
            ConfigError: another training came before.
        """
        if self.config.start_epochs:
            return self.build()
        what, model = {"epochs": self.pretrain_epochs}, self.build()
        self._train_shared("pretrain", model, self.pretrain_epochs, self.config.recipe, (), course, what)
        return model

    def _trained_already(self) -> nn.Module:
        """The dense network of ``start_epochs``, with the statistics that it was trained with."""
        config, model = self.config, self._fresh()
        what = config.model_dump(mode="json", include=_SHARED | {"start_epochs", "start_recipe"})
        name = f"start-{config.model}-s{config.seed}-{sha256(canonical_json(what).encode())[:10]}"
        result = self._once_for_all(name, _START, model, config.start_epochs, config.start_recipe, (), (0.0, 1.0))
        last = result.history[-1]
        judged = {key: last[key] for key in ("train_accuracy", "val_accuracy") if key in last}
        self.note(_START, {"epochs": config.start_epochs, "seconds": result.seconds} | judged)
        return model

    def train_shared(
        self,
        phase: str,
        model: nn.Module,
        epochs: int,
        hooks: Sequence[Hook] = (),
        recipe_overrides: Mapping[str, Any] | None = None,
        course: tuple[float, float] = (0.0, 1.0),
        settings: Mapping[str, Any] | None = None,
    ) -> TrainingResult:
        """:meth:`train` for a phase that does not depend on the target: trained once for all targets of a study.

        The first phase of a run, so that it sees the same batches whichever run carries it out. Its whole time is
        charged to every run that uses it.

        Args:
            settings: all that the hooks and the network's start depend on; runs share the phase that agree on them, on
                the method, and on what every training depends on.

        Raises:
            ConfigError: another training came before.
        """
        recipe = self.recipe(recipe_overrides, phase)
        what = {"epochs": epochs, "method": self.config.method, "phase": phase, "settings": dict(settings or {})}
        return self._train_shared(phase, model, epochs, recipe, hooks, course, what)

    def _train_shared(
        self,
        phase: str,
        model: nn.Module,
        epochs: int,
        recipe: Recipe,
        hooks: Sequence[Hook],
        course: tuple[float, float],
        what: Mapping[str, Any],
    ) -> TrainingResult:
        if any(record.epochs for record in self.phases):
            raise ConfigError(
                f"method {self.config.method!r} shares its phase {phase!r} between runs, so it has to come first: no "
                "training may be before it, for the shared one would not know of that."
            )
        config = self.config
        shared = config.model_dump(mode="json", include=_SHARED)
        if config.start_epochs:
            shared |= config.model_dump(mode="json", include={"start_epochs", "start_recipe"})
        shared |= {"recipe": recipe.model_dump(mode="json")} | dict(what)
        if course != (0.0, 1.0):
            shared["course"] = list(course)
        kind = phase if phase == "pretrain" else f"{phase}-{Path(config.method).stem}"
        name = f"{kind}-{config.model}-s{config.seed}-{sha256(canonical_json(shared).encode())[:10]}"
        result = self._once_for_all(name, phase, model, epochs, recipe, hooks, course)
        self._record(phase, result, epochs, shared=True)
        return result

    def _once_for_all(
        self,
        name: str,
        phase: str,
        model: nn.Module,
        epochs: int,
        recipe: Recipe,
        hooks: Sequence[Hook],
        course: tuple[float, float],
    ) -> TrainingResult:
        """Train ``model``, or take over what another run has trained under this name."""
        with self._results.exclusively(name, self._stop):
            return self._run(name, model, epochs, recipe, self._results.work_folder(name), name, hooks, course)

    def train(
        self,
        phase: str,
        model: nn.Module,
        epochs: int,
        hooks: Sequence[Hook] = (),
        recipe_overrides: Mapping[str, Any] | None = None,
        course: tuple[float, float] = (0.0, 1.0),
    ) -> TrainingResult | None:
        """Train ``model`` in place as the phase called ``phase``; nothing happens for 0 epochs.

        ``course`` is the part of the learning rate's course that the phase goes through, by default all of it.

        Raises:
            TrainingDiverged: the loss became NaN or infinite.
            CheckpointError: the phase's checkpoint is damaged or another configuration's.
        """
        if epochs == 0:
            return None
        recipe = self.recipe(recipe_overrides, phase)
        result = self._run(phase, model, epochs, recipe, self._folder, f"{self.config.id}/{phase}", hooks, course)
        self._record(phase, result, epochs)
        return result

    def recipe(self, overrides: Mapping[str, Any] | None = None, phase: str = "") -> Recipe:
        """The run's recipe with some settings replaced.

        Raises:
            ConfigError: a setting is unknown or not allowed.
        """
        values = self.config.recipe.model_dump() | dict(overrides or {})
        return validated(Recipe, values, f"the recipe of phase {phase!r}")

    def remember(self, name: str, function: Callable[[], Any]) -> Any:
        """The JSON value of ``function()``, computed once a run; its time is a phase of its own.

        Raises:
            CheckpointError: what an interrupted run left is damaged.
        """
        value, seconds = remembered(self._folder / f"{name}.json", function)
        self.phases.append(PhaseRecord(name=name, seconds=seconds))
        return value

    def choose(self, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``function`` chooses, remembered as the phase "score"; the facts it gives as ``"facts"`` are noted."""
        choice = self.remember("score", function)
        for key, value in choice["facts"].items():
            self.note(key, value)
        return choice

    def note(self, key: str, value: Any) -> None:
        """Put a fact about this run into its record."""
        self.notes[key] = value

    def _run(
        self,
        phase: str,
        model: nn.Module,
        epochs: int,
        recipe: Recipe,
        folder: Path,
        identity: str,
        hooks: Sequence[Hook],
        course: tuple[float, float] = (0.0, 1.0),
    ) -> TrainingResult:
        trained = sum(1 for record in self.phases if record.epochs)
        trained += bool(self.config.start_epochs) and not identity.startswith(_START)
        return train(
            model,
            self.split,
            recipe,
            epochs,
            seed=self.config.seed + 1_000_003 * trained,  # a later phase does not see the earlier one's batches again
            device=self.device,
            hooks=hooks,
            checkpoint=folder / f"{phase}.ckpt",
            identity=identity,
            progress=self._progress and (lambda context: self._progress(phase, context)),
            course=course,
            stop=self._stop,
        )

    def _record(self, phase: str, result: TrainingResult, epochs: int, shared: bool = False) -> None:
        self.phases.append(
            PhaseRecord(
                name=phase,
                seconds=result.seconds,
                epochs=epochs,
                images=result.images,
                images_per_second=result.images_per_second,
                shared=shared,
            )
        )
        self.history += [{"phase": phase} | row for row in result.history]
        self.training_facts = {
            "precision": result.precision,
            "channels_last": result.channels_last,
            "lowered_layers": list(result.lowered),
            "peak_memory_bytes": max(result.peak_memory_bytes, self.training_facts.get("peak_memory_bytes", 0)),
        }
