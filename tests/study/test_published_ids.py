"""The committed records must stay readable, and their runs must keep their names, whatever settings are added."""

from pathlib import Path

import pytest

from apbm_core.errors import ConfigError
from apbm_core.study.methods import get_method
from apbm_core.study.options import completed, stated
from apbm_core.study.records import read_record
from apbm_core.study.validation import validated

ROOT = Path(__file__).parents[2]
PATHS = sorted(path for path in (ROOT / "results").rglob("*.json") if "-s" in path.stem and "own" not in path.parts)


def test_there_are_at_least_the_records_of_the_first_study():
    assert len(PATHS) >= 212


@pytest.mark.parametrize("folder", sorted({path.parent.relative_to(ROOT).as_posix() for path in PATHS}))
def test_ids_are_recomputed_from_the_configurations(folder):
    for path in PATHS:
        if path.parent != ROOT / folder:
            continue
        record = read_record(path)  # checks the checksum, the format and the file's name
        assert record.config.id == record.id == path.stem
        config = record.config
        options = get_method(config.method).Options
        parsed = validated(options, completed(options, config.options), path.stem)
        again = config.model_copy(update={"options": stated(parsed)})
        assert again == config and again.id == record.id, "a setting added later changes what the record states"


def test_what_an_old_record_does_not_state_means_what_was_done_then():
    options = get_method("scratch").Options
    assert validated(options, completed(options, {}), "old").fan_in == "own"
    assert stated(options()) == {} and stated(options(fan_in="dense")) == {"fan_in": "dense"}
    with pytest.raises(ConfigError, match="fan_in"):
        validated(options, completed(options, {"fan_in": "narrow"}), "new")
