"""How long runs take, and which of them to begin in the time that is left."""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch.nn import functional as F

from apbm_core.study.grid.calibration import Calibration
from apbm_core.study.methods import get_method
from apbm_core.study.networks.models import build_model
from apbm_core.study.records import RunConfig, RunRecord
from apbm_core.study.training.device import autocast, describe_device, least_seconds, memory_format
from apbm_core.study.training.optimizer import build_optimizer
from apbm_core.study.training.precision import resolve_precision
from apbm_core.study.training.recipes import Recipe
from apbm_core.study.training.stopping import is_asked

RESERVE_SHARE, RESERVE_SECONDS = 0.1, 10.0
"""What a budget keeps back for the last step, its checkpoint and the end of the processes: a share, at most so much."""

STARTED = "APBM_STARTED"


@dataclass(frozen=True)
class Budget:
    """Until when to compute, in seconds since the epoch; without end by default."""

    end: float = math.inf
    stop_at: float = math.inf  # when runs begin to save and stop

    @classmethod
    def of(cls, minutes: float | None) -> "Budget":
        """A budget that begins now, or when ``APBM_STARTED`` says in seconds since the epoch; None is without end.

        The notebooks of one reproduction share their minutes by that variable.
        """
        if minutes is None:
            return cls()
        seconds, started = 60 * minutes, float(os.environ.get(STARTED) or time.time())
        return cls(started + seconds, started + seconds - min(RESERVE_SECONDS, RESERVE_SHARE * seconds))

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.end)

    @property
    def minutes_left(self) -> float:
        """Until the end."""
        return max(0.0, self.end - time.time()) / 60

    @property
    def seconds_left(self) -> float:
        """Until runs have to stop; 0 once the process was asked to end."""
        return 0.0 if is_asked() else max(0.0, self.stop_at - time.time())


@dataclass
class Estimates:
    """The training seconds of runs to come, from the records of runs of the same kind on this machine.

    A kind is everything but seed and length. Where it has no record yet, the machine's calibration says what its phases
    take, alone; else runs of the same network, data and recipe give the seconds of an epoch: the dense one, else the
    slowest; where there are none at all, a few steps are measured.

    Args:
        device, threads, side_by_side: under which conditions runs are carried out; records of others are passed over.
        num_images: training images of the data set.
        side: of its images, in pixels.
        calibration: of the machine; another machine's is passed over.
    """

    device: torch.device
    threads: int
    side_by_side: int
    num_images: int
    side: int
    calibration: Calibration | None = None
    _of_kind: dict[str, list[float]] = field(default_factory=dict)  # seconds of an epoch
    _of_network: dict[str, dict[bool, list[float]]] = field(default_factory=dict)  # likewise, by whether it is dense

    def learn(self, records: Iterable[RunRecord]) -> None:
        """Take the seconds of ``records`` into account, where they were measured under these conditions."""
        here = describe_device(self.device)
        for record in records:
            facts = record.environment
            same = facts.get("device") == here["device"] and facts.get("threads") == self.threads
            if same and facts.get("side_by_side") == self.side_by_side:
                seconds = record.seconds / record.config.epochs
                self._of_kind.setdefault(_kind(record.config), []).append(seconds)
                network = self._of_network.setdefault(_network(record.config), {})
                network.setdefault(record.config.method == "dense", []).append(seconds)

    def seconds(self, config: RunConfig) -> float:
        """The estimated training seconds of one run."""
        if known := self._of_kind.get(_kind(config)):
            return config.epochs * sum(known) / len(known)
        images = config.train_subset or self.num_images
        if self._is_calibrated and (seconds := self.calibration.estimate(config, images)):
            return seconds
        if similar := self._of_network.get(_network(config)):
            return config.epochs * max(similar.get(True) or similar[False])
        recipe = config.recipe
        steps = math.ceil(images / recipe.batch_size)
        step = measured_step(config.model, recipe, recipe.crop or self.side, self.device, self.threads)
        return config.epochs * steps * step

    @property
    def _is_calibrated(self) -> bool:
        known = self.calibration.environment if self.calibration else {}
        return known.get("device") == describe_device(self.device)["device"]


def choose(
    waiting: Sequence[RunConfig],
    seconds_left: float,
    estimate: Callable[[RunConfig], float],
    is_under_way: Callable[[RunConfig], bool],
) -> RunConfig | None:
    """The next of the ``waiting`` runs, in their order, to begin with ``seconds_left``; None if there is no time.

    One seed's runs come before the next seed's. Among them: what is under way, else the first that can end in time,
    else the first, which will have to stop at a checkpoint.
    """
    if not waiting or seconds_left <= 0:
        return None
    same_seed = [config for config in waiting if config.seed == waiting[0].seed]
    if math.isinf(seconds_left):
        return same_seed[0]
    if begun := [config for config in same_seed if is_under_way(config)]:
        return begun[0]
    return next((config for config in same_seed if estimate(config) <= seconds_left), same_seed[0])


def in_order(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """One seed of everything before the second; of a seed one network and data set after the other, its equal-time
    runs, which follow from records, last.

    Within such a block two workers rarely wait for each other: the first run of each shared training, of the dense
    network or of a method's own, does it; the others that need it come after the rest.
    """
    seeds = list(dict.fromkeys(config.seed for config in configs))
    blocks = list(dict.fromkeys((config.dataset, config.model) for config in configs))
    seen: set[tuple] = set()

    def place(config: RunConfig) -> tuple[int, int, bool, int]:
        block, turn, starts_from = (config.dataset, config.model), 1, get_method(config.method).starts_from
        if starts_from != "scratch":
            shared = (block, config.seed, config.method if starts_from == "sparse" else starts_from)
            turn = 2 if shared in seen else 0
            seen.add(shared)
        return seeds.index(config.seed), blocks.index(block), config.schedule == "equal-time", turn

    return [config for _, config in sorted(((place(c), c) for c in configs), key=lambda pair: pair[0])]


@cache
def measured_step(model: str, recipe: Recipe, side: int, device: torch.device, threads: int) -> float:
    """Seconds of one training step of the dense network on random images; an upper bound for most methods' steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            precision, channels_last = resolve_precision(recipe.precision, recipe.channels_last, device)
            layout = memory_format(channels_last)
            network = build_model(model).to(device, memory_format=layout)
            optimizer = build_optimizer(network, recipe)
            images = torch.randn(recipe.batch_size, 3, side, side, device=device).contiguous(memory_format=layout)
            labels = torch.zeros(recipe.batch_size, dtype=torch.int64, device=device)

            def step() -> None:
                with autocast(device, precision):
                    logits = network(images)
                optimizer.zero_grad()
                F.cross_entropy(logits.float(), labels).backward()
                optimizer.step()

            return least_seconds({"step": step}, device, rounds=2)["step"]
    finally:
        torch.set_num_threads(before)


def _kind(config: RunConfig) -> str:
    return config.model_copy(update={"seed": 0, "epochs": 1}).digest


def _network(config: RunConfig) -> str:
    """The same for all runs of the same network, data and recipe."""
    shared = {"seed": 0, "epochs": 1, "method": "", "target": 0.0, "by": "params", "widths": "", "schedule": "equal"}
    return config.model_copy(update=shared | {"options": {}}).digest
