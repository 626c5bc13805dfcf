"""``make bench``: what the study's claims on speed are worth on the machine in front of you.

    python -m apbm_core.study.bench [--only SECTION ...] [--quick] [--compile] [--device cpu] [--threads 2]

Every number that matters is a ratio of things that took turns within this run (measure.py says how). Each section
prints its tables and is kept in ``results/bench/<device>.json`` and ``.md`` at once. Measured again, it replaces its
old self and the others stay. A quick run has files of its own. The section "networks", which measures no speed, is run
if it is asked for; it goes on where it was stopped.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from apbm_core.errors import ApbmError, ConfigError, RecordError
from apbm_core.files import write_atomically
from apbm_core.study.bench.deployment import deployment
from apbm_core.study.bench.measure import Settings, Table, render_markdown, render_text
from apbm_core.study.bench.networks import networks
from apbm_core.study.bench.processes import side_by_side
from apbm_core.study.bench.profile import step_profile
from apbm_core.study.bench.scoring import criteria, rescoring
from apbm_core.study.bench.throughput import throughput
from apbm_core.study.bench.training import fusion_cost, input_pipeline
from apbm_core.study.grid.run import environment
from apbm_core.study.training.device import DEVICES, cpu_bfloat16, pick_device

SECTIONS: dict[str, Callable[[Settings], list[Table]]] = {
    "training": throughput,
    "fusion": fusion_cost,
    "rescoring": rescoring,
    "criteria": criteria,
    "input": input_pipeline,
    "profile": step_profile,
    "deployment": deployment,
    "side-by-side": side_by_side,
    "networks": networks,
}
ONLY_IF_ASKED = ("networks",)  # an hour or so, and no speeds
QUICK = "A quick run: few rounds, rough ratios."
_FORMAT = 1


class BenchFile:
    """``<device>.json`` with every section's latest tables, and the same as ``.md``.

    Raises:
        RecordError: the file is there but is not one of ours.
    """

    def __init__(self, folder: str | Path, name: str):
        self.path = Path(folder) / f"{name}.json"
        self.sections: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text())
                if content["format"] != _FORMAT:
                    raise ValueError(f"format {content['format']}")
                self.sections = dict(content["sections"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RecordError(
                    f"{self.path} is not a complete benchmark file ({error}); restore it from version control or "
                    "delete it, and measure again."
                ) from None

    def put(self, name: str, section: dict[str, Any]) -> None:
        """Replace one section and write both files."""
        merged = self.sections | {name: section}
        self.sections = {key: merged[key] for key in SECTIONS if key in merged}
        content = {"format": _FORMAT, "sections": self.sections}
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")
        write_atomically(self.path.with_suffix(".md"), self._markdown())

    def _markdown(self) -> str:
        lines = ["# Benchmarks", "", "Cells read: median (quartiles over the rounds)."]
        for name, section in self.sections.items():
            facts = section["environment"]
            versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
            lines += ["", f"## {name}", ""]
            lines += [f"{QUICK}", ""] if section["quick"] else []
            lines.append(
                f"{facts['device']} ({_instructions(facts)}), {facts['threads']} threads; Python {facts['python']}, "
                f"{versions}; commit {facts['commit'][:12]}{'+changes' * facts['commit'].endswith('+changes')}; "
                f"{section['measured']}, {section['seconds']:.0f} s; load before: {facts['load_before']}."
            )
            for table in section["tables"]:
                lines += ["", render_markdown(table)]
        return "\n".join(lines) + "\n"


def run_sections(names: Sequence[str], settings: Settings, folder: str | Path) -> BenchFile:
    """Measure these sections, print their tables and keep them.

    Raises:
        ApbmError: the files cannot be read or written, or a section cannot be measured; those before it are kept.
    """
    facts = environment(settings.device) | {"load_before": _load()}
    facts["versions"] = facts["versions"] | _optional_versions()
    settings = replace(settings, folder=Path(folder))
    file = BenchFile(folder, file_name(settings, facts["device"]))
    print(f"{facts['device']} ({_instructions(facts)}), {settings.threads} threads, torch {facts['torch']}")
    print(f"Cells read: median (quartiles over the rounds).{' ' + QUICK if settings.quick else ''}")
    for name in names:
        started = time.perf_counter()
        tables = [table.to_json() for table in SECTIONS[name](settings)]
        seconds = time.perf_counter() - started
        for table in tables:
            if settings.quick:
                table["notes"].append(QUICK)
            print(f"\n{render_text(table)}", flush=True)
        print(f"[{name}: {seconds:.0f} s]", flush=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        section = {"measured": now, "seconds": seconds, "quick": settings.quick, "environment": facts, "tables": tables}
        file.put(name, section)
    return file


def file_name(settings: Settings, device: str) -> str:
    """Such as ``amd-epyc-2-threads`` or ``intel-xeon-amx-bf16-2-threads``: ratios change with the threads, and with
    instructions that processors of one name may or may not have, so each has its file."""
    chip = " ".join([device, *cpu_bfloat16()[:1]]) if settings.device.type == "cpu" else device
    slug = re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-") or settings.device.type
    threads = f"-{settings.threads}-threads" if settings.device.type == "cpu" else ""
    return f"{slug}{threads}{'-quick' if settings.quick else ''}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m apbm_core.study.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="measure this section; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a rough look; kept in files of its own")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well (minutes of compiling)")
    parser.add_argument("--device", default="auto", help=f"where to compute: {', '.join(DEVICES)}")
    parser.add_argument("--threads", type=int, help="threads to compute with; torch's own choice by default")
    parser.add_argument("--results", default="results/bench", help="folder of the files")
    options = parser.parse_args(arguments)
    try:
        if options.threads is not None:
            if options.threads < 1:
                raise ConfigError(f"--threads {options.threads} must be at least 1.")
            torch.set_num_threads(options.threads)
        make = Settings.rough if options.quick else Settings
        settings = make(pick_device(options.device), torch.get_num_threads(), compile=options.compile)
        file = run_sections(
            options.only or [name for name in SECTIONS if name not in ONLY_IF_ASKED], settings, options.results
        )
    except ApbmError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(f"\nWritten: {file.path} and {file.path.with_suffix('.md').name}")
    return 0


def _instructions(facts: Mapping[str, Any]) -> str:
    return ", ".join([facts["cpu_capability"], *facts.get("cpu_bfloat16", ())])


def _load() -> str:
    """The load average of the minute before, which tells of neighbours; "unknown" where the system has none."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def _optional_versions() -> dict[str, str]:
    versions = {}
    for name in ("onnx", "onnxruntime", "timm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    sys.exit(main())
