"""The index of a profile's results: what it says of figures that are there."""

import pytest
from matplotlib.figure import Figure

from apbm_core.errors import RecordError
from apbm_core.study.pages.index import caption


def test_a_damaged_figure_is_named_with_what_to_do(tmp_path):
    picture = tmp_path / "04_curves.png"
    Figure().savefig(picture, metadata={"Title": "APBM *leads*"})
    assert caption(picture) == "APBM leads"
    picture.write_bytes(picture.read_bytes()[:20])
    with pytest.raises(RecordError, match=r"04_curves\.png is no picture that can be read .*; delete it and render"):
        caption(picture)
