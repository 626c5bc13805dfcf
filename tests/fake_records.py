"""Records of runs that never were: published ones with other seeds, targets and accuracies."""

from functools import cache
from pathlib import Path

from apbm_core.study.records import ResultsFolder, RunRecord

_QUICK = Path(__file__).parents[1] / "results" / "quick"
CONDITIONS = {"device": "Some CPU", "precision": "float32", "threads": 1, "side_by_side": 2, "load": 2.0}


@cache
def _published() -> dict[str, RunRecord]:
    return {record.config.method: record for record in ResultsFolder(_QUICK).read_all()}


def fake_record(method: str, accuracy: float, seed: int = 0, seconds: float | None = None, **config) -> RunRecord:
    """``method``'s published run as if it had ended with ``accuracy`` (a share), under equal conditions; that of slim
    from scratch, renamed, where there is none.

    Args:
        seconds: of its first phase, which is then its only one.
        config: what differs in the configuration, such as target or model.
    """
    record = _published().get(method) or _published()["scratch"]
    changed = record.config.model_copy(update={"method": method, "seed": seed} | config)
    first, *rest = record.phases
    phases = [first, *rest] if seconds is None else [first.model_copy(update={"seconds": seconds})]
    share = record.dense_parameters * (1 - changed.target)
    return record.model_copy(
        update={
            "config": changed,
            "id": changed.id,
            "test_accuracy": accuracy,
            "network_sha256": f"of {changed.id}",
            "phases": phases,
            "parameters": round(share),
            "environment": record.environment | CONDITIONS,
        }
    )
