"""Records of several folders in one: a grid that several machines have computed parts of."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apbm_core.errors import RecordError
from apbm_core.files import sha256, write_atomically
from apbm_core.study.records import ResultsFolder, RunRecord, read_record

_MAY_DIFFER = {"started", "finished", "environment", "data_source", "network", "network_sha256"}
_TIMES = ("seconds", "images_per_second")


def merge(into: str | Path, sources: Sequence[str | Path]) -> list[RunRecord]:
    """Add the records of ``sources``, and their stored networks, to the folder ``into``.

    Where two folders hold a record of the same run, what came of it must be the same, times and machines aside; the one
    that is in ``into``, or in the earlier source, stays.

    Args:
        into: a folder ``results/<profile>``; made if it is not there.
        sources: others of its kind. They are only read.

    Returns:
        The records that were added.

    Raises:
        RecordError: a record is damaged, or records of the same run disagree, which are named; nothing is added then.
        ApbmError: a file cannot be written; what was added before is whole.
    """
    target = ResultsFolder(into)
    known = {record.id: (record, target.path) for record in target.read_all()}
    new: dict[str, tuple[RunRecord, Path]] = {}
    disagreements = []
    for source in map(ResultsFolder, sources):
        if not source.runs.is_dir():
            raise RecordError(f"{source.path} holds no records: there is no folder {source.runs}.")
        for record in source.read_all():
            _check_id(record, source)
            earlier, where = known.get(record.id) or new.get(record.id) or (None, None)
            if earlier is None:
                new[record.id] = record, source.path
            elif differing := _differences(earlier, record):
                disagreements.append(f"  {record.id}: {', '.join(differing)}; in {where} and in {source.path}")
    if disagreements:
        raise RecordError(
            f"{len(disagreements)} runs have records that disagree, so nothing was merged:\n"
            + "\n".join(disagreements)
            + "\nRuns made on different processors differ by rounding; keep one of each pair, and delete the other."
        )
    for record, place in new.values():
        _add(record, ResultsFolder(place), target)
    return [record for record, _ in new.values()]


def _add(record: RunRecord, source: ResultsFolder, target: ResultsFolder) -> None:
    """The network first: a record says that the run is done."""
    with target.exclusively(record.id):
        stored = source.networks / record.network if record.network else None
        if stored is not None and stored.exists():
            content = stored.read_bytes()
            if sha256(content) != record.network_sha256:
                raise RecordError(f"{stored} is not the network that its record describes; delete it, and merge again.")
            write_atomically(target.networks / record.network, content)
        path = source.record_path(record.config)
        write_atomically(target.record_path(record.config), path.read_bytes())
        shutil.rmtree(target.work_folder(record.id), ignore_errors=True)


def _check_id(record: RunRecord, source: ResultsFolder) -> None:
    if record.config.id != record.id:
        path = source.runs / f"{record.id}.json"
        raise RecordError(f"{path} holds the configuration of {record.config.id}; restore it or delete it.")
    read_record(source.record_path(record.config))


def _differences(one: RunRecord, other: RunRecord) -> list[str]:
    """The fields in which two records of a run differ, but for those that may."""
    first, second = _outcome(one), _outcome(other)
    return [name for name in first if first[name] != second[name]]


def _outcome(record: RunRecord) -> dict[str, Any]:
    content = record.model_dump(mode="json", exclude=_MAY_DIFFER)
    for row in [*content["phases"], *content["history"]]:
        for name in _TIMES:
            row.pop(name, None)
    return content
