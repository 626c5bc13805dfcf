"""Benchmarks of deployed networks: latency and throughput of dense against compact, beside what the MACs promise."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apbm_core.counting import count_macs, count_parameters
from apbm_core.export import onnx_bytes, onnx_call, why_no_onnx
from apbm_core.study.bench.measure import Settings, Table, goal, interleave
from apbm_core.study.bench.steps import TARGETS, network
from apbm_core.study.networks.models import prunable_convs
from apbm_core.study.training.device import CompiledForward

NETWORKS = {
    "vgg16": ("dense", "slim", "slim/8", "slim/16"),
    "resnet56": ("dense", "slim"),
}
_REALISED_GOAL = 75.0  # percent, with widths that are multiples of what the hardware likes
_LATENCY_CALLS = 100  # single calls at batch 1 that a latency is made of; 10 when quick


def deployment(settings: Settings, networks: Mapping[str, tuple[str, ...]] = NETWORKS) -> list[Table]:
    """Latency at batch 1 and throughput, eager and in other runtimes, and the share of the MAC ratio realised."""
    batch = settings.throughput_batch
    table = Table(
        f"Deployed networks, float32: batch 1 and batch {batch}",
        ("network", "runtime", "latency, ms", "p95, ms", "images/s", "GFLOP/s", "MACs, dense / this",
         "latency, dense / this", "images/s, this / dense", "realised %"),
    )  # fmt: skip
    rounding = Table(
        "What rounding the widths costs",
        ("network", "parameters", "removed %", "MACs, M", "parameters, of slim", "widths of the prunable layers"),
    )
    for name, kinds in networks.items():
        models = {kind: network(name, kind).to(settings.device).eval() for kind in kinds}
        macs = {kind: count_macs(model) for kind, model in models.items()}
        parameters = {kind: count_parameters(model) for kind, model in models.items()}
        _add_speed(table, name, models, macs, settings)
        for kind, model in models.items():
            rounding.add(
                network=f"{name} {kind}",
                parameters=parameters[kind],
                widths_of_the_prunable_layers=_widths(name, model),
                **{
                    "removed %": 100 * (1 - parameters[kind] / parameters["dense"]),
                    "MACs, M": macs[kind] / 1e6,
                    "parameters, of slim": None if kind == "dense" else parameters[kind] / parameters["slim"],
                },
            )
    table.notes += [
        f"Latency: of {10 if settings.quick else _LATENCY_CALLS} single calls. realised: the gain in images/s over the "
        "ratio of the MACs.",
        *_goals(table, networks),
        *_missing_runtimes(settings),
        *([] if settings.compile else ["torch.compile was left out, for compiling takes minutes: add --compile."]),
    ]
    shares = " and ".join(f"{TARGETS[name]:.2%} of {name}'s" for name in networks)
    rounding.notes.append(f"Target: {shares} parameters removed; with multiples of 8 or 16 the nearest that exists.")
    return [table, rounding]


def _goals(table: Table, networks: Mapping[str, tuple[str, ...]]) -> list[str]:
    """How much of the MACs' ratio each network realises at its best, and what was tried where that is too little."""
    sentences = []
    for name, kinds in networks.items():
        rows = [row for row in table.rows if row["network"] in {f"{name} {kind}" for kind in kinds if kind != "dense"}]
        rows.sort(key=lambda row: -row["realised %"].median)
        rates = {row["runtime"]: row["GFLOP/s"].median for row in table.rows if row["network"] == f"{name} dense"}
        tried = [
            f"{row['network']} in {row['runtime']} {row['realised %'].median:.0f} % "
            f"({row['GFLOP/s'].median:.0f} GFLOP/s, dense {rates[row['runtime']]:.0f})"
            for row in rows
        ]
        what = f"{name}, {rows[0]['network'].split()[-1]} in {rows[0]['runtime']}: of the MACs' ratio realised, %"
        sentences.append(
            goal(what, rows[0]["realised %"], _REALISED_GOAL, at_least=True, otherwise=f"Tried: {'; '.join(tried)}.")
        )
    return sentences


def _add_speed(
    table: Table, name: str, models: Mapping[str, nn.Module], macs: Mapping[str, int], settings: Settings
) -> None:
    one = torch.randn(1, 3, 32, 32, device=settings.device)
    many = torch.randn(settings.throughput_batch, 3, 32, 32, device=settings.device)
    for runtime, prepare in _runtimes(settings).items():
        calls = {kind: prepare(model, many) for kind, model in models.items()}
        calls_of_one = replace(settings, rounds=(_LATENCY_CALLS, _LATENCY_CALLS), shortest=0.0)
        if settings.quick:
            calls_of_one = replace(calls_of_one, rounds=(10, 10))
        latency = interleave({kind: partial(call, one) for kind, call in calls.items()}, calls_of_one)
        took = interleave({kind: partial(call, many) for kind, call in calls.items()}, settings)
        for kind in calls:
            gain = took["dense"] / took[kind]
            promised = macs["dense"] / macs[kind]
            is_dense = kind == "dense"
            table.add(
                network=f"{name} {kind}",
                runtime=runtime,
                **{
                    "latency, ms": latency[kind].map(lambda s: 1000 * s),
                    "p95, ms": 1000 * float(np.percentile(latency[kind].values, 95)),
                    "images/s": took[kind].map(lambda s: len(many) / s),
                    "GFLOP/s": took[kind].map(lambda s, m=macs[kind]: 2e-9 * m * len(many) / s),
                    "MACs, dense / this": promised,
                    "latency, dense / this": None if is_dense else latency["dense"] / latency[kind],
                    "images/s, this / dense": None if is_dense else gain,
                    "realised %": None if is_dense else gain.map(lambda g, p=promised: 100 * g / p),
                },
            )


def _runtimes(settings: Settings) -> dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Any]]]:
    """Name -> a function that makes a call of a network."""
    runtimes: dict[str, Callable] = {"eager": _eager}
    if settings.compile:
        runtimes["torch.compile"] = _compiled
    if not _missing_runtimes(settings):
        runtimes["ONNX Runtime"] = partial(_onnx, threads=settings.threads)
    return runtimes


def _missing_runtimes(settings: Settings) -> list[str]:
    if settings.device.type != "cpu":
        return ["ONNX Runtime is measured on CPUs only."]
    reason = why_no_onnx()
    return [reason] if reason else []


def _eager(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    model.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def call(images: Tensor) -> Tensor:
        return model(images.contiguous(memory_format=torch.channels_last))

    return call


def _compiled(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    forward = CompiledForward(model)

    @torch.inference_mode()
    def call(images: Tensor) -> Tensor:
        return forward(images)

    return call


def _onnx(model: nn.Module, example: Tensor, threads: int) -> Callable[[Tensor], Any]:
    return onnx_call(onnx_bytes(model, example), threads)


def _widths(name: str, model: nn.Module) -> str:
    """Filters of the prunable convolutions, runs of equal ones as ``width x count``."""
    widths = [model.get_submodule(layer).out_channels for layer in prunable_convs(name)]
    runs = [(width, len(list(run))) for width, run in groupby(widths)]
    return ", ".join(f"{width}x{count}" if count > 1 else str(width) for width, count in runs)
