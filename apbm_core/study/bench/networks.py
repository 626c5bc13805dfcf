"""Benchmark on the networks of others: how much of each goes at keep = 0.5, and whether what is left is right.

Every network of the zoo has a process of its own with limits (network_case.py). They count what it computes and not
how long it waits, so that a busy machine makes nothing fail. What is found is kept in ``networks.csv`` at once, so
that a run which was stopped goes on where it stood, on another machine as well: shares do not depend on it. Ours is
done again when the library has changed, torch-pruning's when the zoo, the way of asking or a package has.
"""

import csv
import hashlib
import io
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

import apbm_core
from apbm_core.errors import RecordError
from apbm_core.files import write_atomically
from apbm_core.study.bench import network_case
from apbm_core.study.bench.measure import Settings, Table
from apbm_core.study.bench.zoo.members import ZOO

KEEP = 0.5
LIMITS = {"seconds": 120, "idle seconds": 600, "gigabytes": 10}
GOALS = {"removed": 0.70, "difference": 1e-4}
QUICK = ("perceptron", "1-d", "strided channels")
COLUMNS = (
    "network", "parameters", "ours", "torch-pruning", "difference", "layers", "left alone", "ours says",
    "torch-pruning says", "ours seconds", "torch-pruning seconds", "code", "zoo",
)  # fmt: skip
_NUMBERS = {"parameters": int, "layers": int, "left alone": int} | dict.fromkeys(
    ("ours", "torch-pruning", "difference", "ours seconds", "torch-pruning seconds"), float
)

Row = dict[str, Any]
Measure = Callable[[str, float, Mapping[str, Any] | None], Iterator[Row]]


def networks(settings: Settings) -> list[Table]:
    """Share of the parameters removed from each network, by ours and by torch-pruning's pruner, and why not."""
    names = [name for name in (QUICK if settings.quick else ZOO) if _is_installed(name)]
    file = settings.folder / f"networks{'-quick' * settings.quick}.csv"
    rows, code, zoo = read(file), code_digest(), zoo_digest()
    by_time = sorted(names, key=lambda name: rows.get(name, {}).get("ours seconds", math.inf))  # the quickest first
    try:
        for number, name in enumerate(by_time, start=1):
            before = rows.get(name, {})
            is_same = before.get("zoo") == zoo
            if is_same and before.get("code") == code:
                continue
            known = {key: value for key, value in before.items() if key.startswith("torch-pruning")}
            rows[name] = run_case(name, theirs=known if is_same else None) | {"code": code, "zoo": zoo}
            rows = {key: rows[key] for key in ZOO if key in rows}
            write(file, rows)
            print(f"{number}/{len(names)} {_sentence(rows[name])}", flush=True)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", flush=True)
    done = [name for name in names if (rows.get(name, {}).get("code"), rows.get(name, {}).get("zoo")) == (code, zoo)]
    return [table_of([rows[name] for name in done], [name for name in names if name not in done])]


def run_case(
    name: str,
    limits: Mapping[str, float] = LIMITS,
    measure: Measure = network_case.measure,
    theirs: Mapping[str, Any] | None = None,
) -> Row:
    """The row of one network; where its process does not end well, the reason is what ours says.

    Args:
        name: of the network.
        limits: of the process's memory, of the seconds that it computes, and of those in a row that it does not.
        measure: yields the row as far as it is known; a function of a module.
        theirs: torch-pruning's part of the row, where it is known already.
    """
    context = _processes()
    ours, its = context.Pipe(duplex=False)
    arguments = its, limits, torch.get_num_threads(), measure, name, KEEP, theirs
    process = context.Process(target=network_case.run, args=arguments, daemon=True)
    process.start()
    its.close()
    found: list[Row] = []
    try:
        while True:
            found.append(ours.recv())
    except EOFError:  # it ended, or was ended
        process.join()
    finally:
        process.kill()  # where it is this one that is stopped
    why = {
        -signal.SIGXCPU: f"not done within {limits['seconds']:g} s of computing",
        network_case.IDLE: f"it computed nothing for {limits['idle seconds']:g} s",
    }.get(process.exitcode, f"its process ended with status {process.exitcode}")
    row = found[-1] if found else {"network": name, "ours says": why}
    return row if len(found) != 1 else row | {"torch-pruning says": why}


def _processes() -> multiprocessing.context.BaseContext:
    """What starts processes: copies of one that has imported what takes longer than a small network, where it can."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([network_case.__name__, "torchvision.models.detection", "timm"])
    return context


def table_of(rows: list[Row], missing: Sequence[str] = ()) -> Table:
    """The rows that matter to a reader, and whether the goals are met; ``missing`` are the networks not done yet."""
    table = Table(
        f"Networks of others: share of the parameters removed at keep = {KEEP:g}",
        ("network", "parameters", "ours", "torch-pruning", "fused against compact", "left alone", "why not more"),
    )
    for row in rows:
        why = [row.get("ours says")] if row.get("ours says") and not _is_enough(row) else []
        why += [f"(torch-pruning: {row['torch-pruning says']})"] if row.get("torch-pruning says") else []
        table.add(
            network=row["network"],
            parameters=row.get("parameters"),
            ours=_rounded(row.get("ours")),
            **{"torch-pruning": _rounded(row.get("torch-pruning"))},
            **{"fused against compact": f"{row['difference']:.0e}" if row.get("difference") is not None else None},
            left_alone=f"{row['left alone']} of {row['layers']}" if row.get("layers") is not None else None,
            why_not_more=" ".join(why) or None,
        )
    ours = [row for row in rows if row.get("ours") is not None]
    theirs = [row for row in rows if row.get("torch-pruning") is not None]
    named = [row for row in rows if row.get("ours") is not None or row.get("ours says")]
    unequal = [row["network"] for row in ours if not row["difference"] <= GOALS["difference"]]
    share = median([row.get("ours") or 0.0 for row in rows] or [0.0])
    table.notes += [
        f"Random weights, small images. Ours runs on {len(ours)} of {len(rows)} networks, torch-pruning's pruner on "
        f"{len(theirs)} (magnitudes of groups, the same ratio, the layers of the outputs left out; what it returns is "
        "not checked).",
        "Ours: fused, trained a step, scored again, compacted. Fused against compact: the largest difference of their "
        "outputs over the largest output. Left alone: layers that keep all of their filters, those of the outputs "
        "among them.",
        f"Goal: runs, or names the reason, on all. {_met(len(named) == len(rows))}: {len(named)} of {len(rows)}.",
        f"Goal: median share removed, what does not run counted as 0: at least {GOALS['removed']:g}. "
        f"{_met(share >= GOALS['removed'])}: {share:.3f}"
        + (f" (torch-pruning's: {median([r.get('torch-pruning') or 0.0 for r in rows]):.3f})." if rows else "."),
        f"Goal: fused and compact agree to {GOALS['difference']:g} on all. {_met(not unequal)}"
        + (f": {', '.join(unequal)} do not." if unequal else f": {len(ours)} of {len(ours)}."),
    ]
    if missing:
        table.notes.insert(
            0,
            f"Not through: {len(missing)} networks are missing. What is said of goals holds for the {len(rows)} that "
            f"are there, which need not be like them: the quick ones come first. Missing: {', '.join(missing)}.",
        )
    if left_out := [name for name in ZOO if not _is_installed(name)]:
        table.notes.append(f"Without timm, {len(left_out)} networks are left out: pip install 'apbm-core[bench]'.")
    return table


def read(file: Path) -> dict[str, Row]:
    """The rows that a file holds, by network.

    Raises:
        RecordError: it is not such a file.
    """
    if not file.exists():
        return {}
    try:
        with file.open(newline="") as stream:
            reader = csv.DictReader(stream)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are {reader.fieldnames}")
            found = {}
            for row in reader:
                found[row["network"]] = {k: _NUMBERS.get(k, str)(v) for k, v in row.items() if v not in ("", None)}
            return found
    except (OSError, ValueError, csv.Error) as error:
        raise RecordError(f"{file} is not a table of networks ({error}); delete it, and measure again.") from None


def write(file: Path, rows: Mapping[str, Row]) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, stream.getvalue())


def code_digest() -> str:
    """Changes with the library's own code."""
    return _digest(sorted(Path(apbm_core.__file__).parent.glob("*.py")))


def zoo_digest() -> str:
    """Changes with the networks, with what they are asked, and with the packages that both stand on."""
    folder = Path(network_case.__file__)
    return _digest([folder, *sorted(folder.parent.glob("zoo/*.py"))], "torch", "torchvision", "torch-pruning", "timm")


def _digest(files: list[Path], *packages: str) -> str:
    content = hashlib.sha256()
    for path in files:
        content.update(path.read_bytes())
    for package in packages:
        content.update(_version(package).encode())
    return content.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _is_installed(name: str) -> bool:
    return not name.startswith("timm ") or bool(_version("timm"))


def _is_enough(row: Mapping[str, Any]) -> bool:
    return (row.get("ours") or 0.0) >= GOALS["removed"]


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 3)


def _met(is_met: bool) -> str:
    return "Met" if is_met else "Missed"


def _sentence(row: Mapping[str, Any]) -> str:
    share = f"{row['ours']:.3f} removed" if row.get("ours") is not None else "not fused"
    return f"{row['network']}: {share}{'; ' + row['ours says'] if row.get('ours says') else ''}"
