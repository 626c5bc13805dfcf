"""Benchmarks of scoring: rescoring against the literal formulas, its memory, and all criteria side by side."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from apbm_core.compress import rescore
from apbm_core.errors import DataError
from apbm_core.fusion import FusionSettings, fused_layers
from apbm_core.similarity import log_similarity, pairwise_distances, relative_entropy
from apbm_core.study.bench.measure import Measured, Settings, Table, goal, interleave
from apbm_core.study.bench.steps import TARGETS, fastest_step, fused_network, recipe_for
from apbm_core.study.data.datasets import DataSplit, load_dataset
from apbm_core.study.grid.workers import run_side_by_side
from apbm_core.study.methods import fpgm, hrank, l1, polarization, random, swp
from apbm_core.study.networks.feature_maps import visit_feature_maps
from apbm_core.study.networks.models import build_model, cost_table, prunable_convs
from apbm_core.study.networks.stripes import add_skeletons, skeleton_layers
from apbm_core.study.training.device import peak_memory_bytes
from apbm_core.study.training.evaluation import evaluation_batches
from apbm_core.study.training.loop import train
from apbm_core.temperature import AnnealedTau, DcffTemperature

EPOCH_IMAGES = 50_000  # CIFAR's training set
_PROGRESS = 0.3  # of the training: the schedule is not frozen yet
_BRIEF_STEPS = 20  # of training for the network whose activations HRank looks at
_BRIEF_BATCH = 64
_MAPS_AT_A_TIME = 128  # images whose maps are ranked in one comparison
_RANKS_GOAL = 20.0  # times as fast as the loop
_LOOP_MAPS = 256  # maps a layer that the slow loop ranks
_LOOP_PAIRS = 1000  # pairs of filters a layer that the slow loop compares
_MEMORY_SIZES = (512, 1024, 2048)
_MEMORY_INPUTS = 128  # input channels of those layers


def rescoring(settings: Settings) -> list[Table]:
    """Seconds of scoring all of VGG16 anew, beside an epoch and beside the literal loop; and its memory."""
    model = fused_network("vgg16")
    step = fastest_step(model, settings)
    banks = {name: conv.parametrizations.weight.original.detach().cpu() for name, conv, _ in fused_layers(model)}
    rows = {name: min(len(bank), math.ceil(_LOOP_PAIRS / len(bank))) for name, bank in banks.items()}
    loops = {name: partial(literal_importance, bank, rows=rows[name]) for name, bank in banks.items()}
    cases = {"step": step, "rescore": partial(rescore, model, _PROGRESS)} | loops
    seconds = interleave(cases, settings)
    steps = EPOCH_IMAGES / settings.batch_size
    scale = {name: len(bank) / rows[name] for name, bank in banks.items()}
    literal = _total([seconds[name].map(lambda s, by=by: s * by) for name, by in scale.items()])
    share = (seconds["rescore"] / seconds["step"]).map(lambda ratio: 100 * ratio / steps)
    table = Table("Rescoring all 13 layers of VGG16 (banks of dense width)", ("quantity", "value"))
    table.add(quantity="one rescoring, ms", value=seconds["rescore"].map(lambda s: 1000 * s))
    table.add(quantity="of an epoch's time, %", value=share)
    table.add(quantity="literal loop over pairs, s", value=literal)
    table.add(quantity="times as fast as that loop", value=literal / seconds["rescore"])
    gflop = sum(2e-9 * len(bank) * bank.numel() for bank in banks.values())
    rate = seconds["rescore"].map(lambda s: gflop / s).median
    profile = f"The distances' products of each bank with itself are {gflop:.1f} GFLOP: {rate:.0f} GFLOP/s in all."
    table.notes += [
        goal("one rescoring, % of an epoch's time", share, 1.0, otherwise=profile),
        goal("times as fast as the loop", literal / seconds["rescore"], 100.0, at_least=True, otherwise=profile),
        f"The epoch: {EPOCH_IMAGES:,} images in steps of {settings.batch_size} of the fused network, rescored once. "
        "The loop goes over all pairs of filters on the CPU, a distance and a divergence each, as vectors; about "
        f"{_LOOP_PAIRS:,} pairs of every layer were measured and scaled to its n^2. A loop over the n^3 single terms "
        "would be slower still.",
    ]
    return [table, _memory(settings)]


def literal_importance(weight: Tensor, temperature: float = 1.0, rows: int | None = None) -> Tensor:
    """S_i = sum_k KL(p_i || p_k) pair by pair, as the formulas are written; shape (n,).

    With ``rows``, only the pairs of so many filters with all others are visited, and the result is not complete.
    """
    w = weight.flatten(1).double()
    n = len(w)
    rows = n if rows is None else rows
    distance = torch.zeros(n, n, dtype=torch.float64)
    for i in range(rows):
        for j in range(n):
            distance[i, j] = (w[i] - w[j]).norm()
    log_p = torch.log_softmax(-temperature * distance, dim=1)
    importance = torch.zeros(n, dtype=torch.float64)
    for i in range(rows):
        for k in range(n):
            importance[i] += (log_p[i].exp() * (log_p[i] - log_p[k])).sum()
    return importance


def _memory(settings: Settings) -> Table:
    """Peak extra memory of scoring one layer of n filters, each size in a process of its own."""
    table = Table(
        "Peak extra memory of scoring one layer",
        ("n", "d", "extra MB", "n^2 doubles, MB", "n d doubles, MB", "extra beyond n d, in n^2 doubles"),
    )
    d = 9 * _MEMORY_INPUTS
    sizes = _MEMORY_SIZES[: 1 if settings.quick else None]
    jobs = [(n, d, str(settings.device)) for n in sizes]
    for index, extra, error in run_side_by_side(
        extra_memory, partial(next, iter(jobs), None), 2, settings.threads, lambda *_: None
    ):
        if error is not None:
            raise error
        n = sizes[index]
        square, bank = 8 * n * n, 8 * n * d
        table.add(
            n=n,
            d=d,
            extra_MB=extra / 1e6,
            **{
                "n^2 doubles, MB": square / 1e6,
                "n d doubles, MB": bank / 1e6,
                "extra beyond n d, in n^2 doubles": max(0.0, (extra - bank) / square),
            },
        )
    table.rows.sort(key=lambda row: row["n"])
    table.notes.append(
        "Growth of the process's peak resident memory (CUDA: of the allocator's peak) over one scoring, after a small "
        "one has loaded the libraries; the bank itself is there before. O(n^2 + n d): the last column must not grow. "
        "Differences of all pairs would take n^2 d doubles, divergences of all triples n^3."
    )
    return table


def extra_memory(n: int, d: int, device: str, report: Callable | None = None) -> int:
    """Bytes that scoring n filters of d weights takes at its peak; meant for a fresh process."""
    device = torch.device(device)
    _score(torch.randn(16, 64, device=device))
    bank = torch.randn(n, d, device=device)
    _reset_peak(device)
    before = peak_memory_bytes(device)
    _score(bank)
    return peak_memory_bytes(device) - before


def _reset_peak(device: torch.device) -> None:
    """Let the peak start at what is in use now, where the system can; else an earlier peak hides a lower one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")


def _score(bank: Tensor) -> Tensor:
    return relative_entropy(log_similarity(pairwise_distances(bank), 1.0))


def criteria(settings: Settings) -> list[Table]:
    """Seconds that each criterion takes to score or cut dense VGG16, and HRank's ranks against the usual loop."""
    split, source = _images()
    model = build_model("vgg16", split.num_classes)
    batch, steps = min(_BRIEF_BATCH, settings.batch_size), 4 if settings.quick else _BRIEF_STEPS
    recipe = recipe_for(batch, schedule="one-cycle", warmup=0.5, lr=0.05)
    seen = split.train.select(torch.arange(min(steps * batch, len(split.train))))
    train(model, replace(split, train=seen), recipe, 1, seed=0, device=settings.device)
    model.to(memory_format=torch.contiguous_format)
    images, _ = next(evaluation_batches(split.train, split.mean, split.std, settings.score_images, settings.device))
    layers, target = prunable_convs("vgg16"), TARGETS["vgg16"]
    costs = cost_table("vgg16", split.num_classes)
    striped = _striped(model)
    apbm, dcff = FusionSettings(schedule=AnnealedTau()), FusionSettings(schedule=DcffTemperature())
    cases = {
        "APBM: relative entropy": partial(_choose, model, apbm),
        "DCFF: relative entropy": partial(_choose, model, dcff),
        f"HRank: ranks of {len(images)} images' maps": partial(hrank.scores, model, layers, images),
        "L1": partial(l1.scores, model, layers),
        "FPGM": partial(fpgm.scores, model, layers),
        "random": partial(random.scores, model, layers),
        "Polarization: global threshold": partial(
            polarization.cut_at_global_threshold, costs, _scales(model), target, 2
        ),
        "SWP: stripes for a target": partial(swp.stripes_for_target, striped, costs, target),
    }
    seconds = interleave(cases, settings)
    table = Table("Scoring all of dense VGG16", ("criterion", "ms", "of APBM's time"))
    for name, took in seconds.items():
        table.add(
            criterion=name, ms=took.map(lambda s: 1000 * s), **{"of APBM's time": took / seconds[next(iter(cases))]}
        )
    table.notes.append(
        f"The network was trained for {steps} steps on {source}, whose images HRank looks at. APBM and DCFF score at "
        "their schedules' start; Polarization and SWP choose what goes for the target, by exact counts."
    )
    return [table, _ranks(model, images[:_MAPS_AT_A_TIME], settings)]


def _ranks(model: nn.Module, images: Tensor, settings: Settings) -> Table:
    """``hrank.matrix_ranks`` against ``matrix_rank`` map by map, layer by layer on the same activations."""
    table = Table(
        "HRank's batched ranks against torch.linalg.matrix_rank on one map at a time",
        ("layer", "map", "maps", "mean rank", "batched, ms", "loop, ms", "times as fast"),
    )
    loops, batched = [], []

    def visit(name: str, maps: Tensor) -> None:
        maps = maps.flatten(0, 1).clone()
        subset = maps[:: max(1, len(maps) // _LOOP_MAPS)][:_LOOP_MAPS]
        cases = {
            "batched": partial(hrank.matrix_ranks, maps),
            "loop": lambda: [torch.linalg.matrix_rank(one) for one in subset],
        }
        seconds = interleave(cases, settings_of_layer)
        loop = seconds["loop"].map(lambda s: s * len(maps) / len(subset))
        ranks = hrank.matrix_ranks(subset)
        differing = int((ranks != torch.stack(cases["loop"]())).sum())
        if differing:
            table.notes.append(f"{name}: {differing} of {len(subset)} ranks differ from the loop's.")
        loops.append(loop)
        batched.append(seconds["batched"])
        table.add(
            layer=name, map=f"{maps.shape[1]}x{maps.shape[2]}", maps=len(maps), mean_rank=ranks.double().mean().item(),
            **{"batched, ms": seconds["batched"].map(_ms), "loop, ms": loop.map(_ms),
               "times as fast": loop / seconds["batched"]},
        )  # fmt: skip

    fewest = settings.rounds[0]  # the same number for every layer, so that rounds add up
    settings_of_layer = replace(settings, rounds=(fewest, fewest))
    visit_feature_maps(model, prunable_convs("vgg16"), [images], visit)
    loop, batch = _total(loops), _total(batched)
    table.add(
        layer="all", maps=sum(row["maps"] for row in table.rows),
        **{"batched, ms": batch.map(_ms), "loop, ms": loop.map(_ms), "times as fast": loop / batch},
    )  # fmt: skip
    slowest = min((row for row in table.rows if row["layer"] != "all"), key=lambda row: row["times as fast"].median)
    table.notes += [
        f"Maps of {len(images)} images; the loop ranked {_LOOP_MAPS} evenly spaced ones of each layer, its time is "
        "scaled to all. The ranks of those are compared, too.",
        goal(
            "times as fast over all layers", loop / batch, _RANKS_GOAL, at_least=True,
            otherwise=f"The least is gained in {slowest['layer']}, on maps of {slowest['map']}: "
            f"{slowest['times as fast'].median:.1f} times, {slowest['batched, ms'].median:.0f} of "
            f"{batch.map(_ms).median:.0f} ms.",
        ),
    ]  # fmt: skip
    return table


def _images() -> tuple[DataSplit, str]:
    """CIFAR-10 if it is on this machine, else the digits; with its name."""
    try:
        dataset, name = load_dataset("cifar10", download=False), "CIFAR-10"
    except DataError:
        dataset, name = load_dataset("digits"), "scikit-learn's digits"
    return dataset.split("final"), name


def _choose(model: nn.Module, settings: FusionSettings) -> None:
    for name in prunable_convs("vgg16"):
        weight = model.get_submodule(name).weight
        n = len(weight)
        settings.fusion(n, max(1, n // 4)).to(weight).choose(weight, progress=0.0)


def _scales(model: nn.Module) -> dict[str, Tensor]:
    chains = polarization.followers(model, prunable_convs("vgg16"))
    return {name: model.get_submodule(chain.norm).weight for name, chain in chains.items()}


@torch.no_grad()
def _striped(model: nn.Module) -> nn.Module:
    """With skeletons that have spread, so that no two stripes score the same."""
    striped = add_skeletons(copy.deepcopy(model))
    for _, _, layer in skeleton_layers(striped):
        layer.skeleton.uniform_()
    return striped


def _total(parts: list[Measured]) -> Measured:
    return Measured(tuple(map(math.fsum, zip(*(part.values for part in parts), strict=True))))


def _ms(seconds: float) -> float:
    return 1000 * seconds
