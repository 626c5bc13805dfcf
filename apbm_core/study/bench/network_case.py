"""One network of the zoo: what fusing it at a keep ratio comes to, and torch-pruning's own pruner at the same ratio.

    python -m apbm_core.study.bench.network_case NAME [KEEP]

prints a line of JSON for ours, and one that has both. In the benchmark it is a process of its own (networks.py) because
a network may crash, hang, or take all memory.
"""

import json
import math
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from apbm_core.anatomy import Anatomy
from apbm_core.compress import compact, fuse_anatomy, rescore
from apbm_core.copies import copy_of
from apbm_core.forward import call, evaluation_mode, tensors_in
from apbm_core.fusion import FusionSettings, fused_layers
from apbm_core.groups import LAYERS
from apbm_core.planning import wanted_units
from apbm_core.study.bench.zoo.members import build

IDLE = 75  # the status that a process ends with which has computed nothing for too long
_PROGRESS = 0.3  # of the training: filters are still mixed, so that fused and compact have something to disagree on


def measure(name: str, keep: float = 0.5, theirs: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """A row of the table, as far as it is known: after ours, and after torch-pruning's. Plain values.

    Args:
        name: of the network.
        keep: the share of filters to keep.
        theirs: torch-pruning's part of the row, where it is known already.

    Raises:
        ConfigError: the zoo has no such network, or it needs a package that is not installed.
    """
    torch.manual_seed(0)
    model, inputs = build(name)
    row: dict[str, Any] = {"network": name, "parameters": parameters_of(model)}
    for ask, prefix in ((_ours, "ours"), (_theirs, "torch-pruning")):
        if prefix == "torch-pruning" and theirs is not None:
            yield row | theirs
            return
        started = time.process_time()
        try:
            row |= ask(model, inputs, keep)
        except Exception as error:
            row[f"{prefix} says"] = f"{type(error).__name__}: {_line(error)}"
        row[f"{prefix} seconds"] = round(time.process_time() - started, 1)
        yield row


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _ours(model: nn.Module, inputs: Any, keep: float) -> dict[str, Any]:
    """Fuse, train a step, score again, compact; and whether the compact network computes what the fused one does."""
    anatomy = Anatomy(model, inputs, True)  # what fuse() begins with; it knows the reasons as well
    fused = fuse_anatomy(anatomy, wanted_units(anatomy, keep), FusionSettings())
    names = [name for name, _, _ in fused_layers(fused)]
    fused.train()
    loss = sum(tensor.float().square().mean() for tensor in tensors_in(call(fused, inputs)) if tensor.requires_grad)
    loss.backward()
    banks = [module.parametrizations.weight.original for _, module, _ in fused_layers(fused)]
    untrained = [n for n, bank in zip(names, banks, strict=True) if bank.requires_grad and bank.grad is None]
    if untrained:
        raise RuntimeError(f"no gradient reaches {untrained[0]}")
    rescore(fused, _PROGRESS)
    net = compact(fused.eval())
    with torch.no_grad():
        wanted, found = tensors_in(call(fused, inputs)), tensors_in(call(net, inputs))
    dense, slim = parameters_of(model), parameters_of(net)
    left = {layer: reason for layer, reason in anatomy.reasons.items() if reason is not None}
    return {
        "ours": 1 - slim / dense,
        "difference": _difference(wanted, found),
        "layers": len(anatomy.reasons),
        "left alone": len(left),
        "ours says": _why(model, left) if left else None,
    }


def _theirs(model: nn.Module, inputs: Any, keep: float) -> dict[str, Any]:
    """torch-pruning's pruner by the magnitudes of groups, told which layers make the network's outputs."""
    pruned = copy_of(model).eval()
    for parameter in pruned.parameters():
        parameter.requires_grad_(True)
    pruner = torch_pruning.BasePruner(
        pruned,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - keep,
        ignored_layers=output_layers(pruned, inputs),
        forward_fn=call,
        output_transform=lambda out: [tensor for tensor in tensors_in(out) if tensor.grad_fn is not None],
    )
    pruner.step()
    with torch.no_grad():
        call(pruned, inputs)
    return {"torch-pruning": 1 - parameters_of(pruned) / parameters_of(model)}


def output_layers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers whose results become the network's outputs with no layer in between, found along the gradients."""
    makers: dict[Any, nn.Module] = {}

    def remember(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        makers[output.grad_fn] = module

    handles = [m.register_forward_hook(remember) for m in model.modules() if isinstance(m, LAYERS)]
    try:
        with evaluation_mode(model), torch.enable_grad():
            waiting = [tensor.grad_fn for tensor in tensors_in(call(model, inputs)) if tensor.grad_fn is not None]
    finally:
        for handle in handles:
            handle.remove()
    found, seen = [], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in makers:
            found.append(makers[node])
        else:
            waiting += [before for before, _ in node.next_functions]
    return found


def _difference(wanted: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference over the largest output; infinite where the shapes are not the same."""
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in found]:
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        if a.is_floating_point() and a.numel():
            off = ((a - b).abs().amax() / a.abs().amax().clamp_min(1e-30)).item()
            worst = max(worst, off) if off == off else float("inf")
    return worst


def _why(model: nn.Module, left: dict[str, str]) -> str:
    """The reason that leaves most parameters alone, as one line."""
    modules, weight, example = dict(model.named_modules()), Counter(), {}
    for layer, reason in left.items():
        kind = reason.partition("(")[0]
        weight[kind] += parameters_of(modules[layer])
        example.setdefault(kind, f"{layer}: {reason}")
    return _line(example[weight.most_common(1)[0][0]])


def _line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else line[:197] + "..."


def run(connection: Connection, limits: Mapping[str, float], threads: int, measure: Callable, *arguments: Any) -> None:
    """What a process of the benchmark does: send what ``measure`` yields, within the limits (see networks.py)."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    _limit(limits["gigabytes"], limits["seconds"])
    threading.Thread(target=_end_when_idle, args=(limits["idle seconds"],), daemon=True).start()
    for known in measure(*arguments):
        connection.send(known)


def _limit(gigabytes: float, seconds: float) -> None:
    """Let allocations of this process fail beyond so much, and end it after so much computing, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 10))
    except (ImportError, ValueError, OSError):
        return


def _end_when_idle(seconds: float) -> None:
    """End the process once it has waited for so long and computed nothing: it hangs, however busy the machine is."""
    computed = -1.0
    while time.process_time() - computed > 1e-4 * seconds:
        computed = time.process_time()
        time.sleep(seconds)
    os._exit(IDLE)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for known in measure(sys.argv[1], *map(float, sys.argv[2:3])):
        print(json.dumps(known), flush=True)
