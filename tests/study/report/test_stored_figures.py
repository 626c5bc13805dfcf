"""Stored figures: as drawn to the eye, a fraction of the size, with their title, and equal for equal figures."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from apbm_core.study.pages.index import caption
from apbm_core.study.report import style


def drawn() -> plt.Figure:
    """Lines, letters and a heat map, which has most colours."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4))
    for place in range(6):
        left.plot(np.sin(np.linspace(0, 6, 200) + place), label=f"line {place}", alpha=0.6)
    left.legend()
    right.imshow(np.add.outer(np.arange(64), np.arange(64)))
    return figure


def test_a_stored_figure_looks_as_drawn_and_is_small(tmp_path):
    style.use_style()
    figure, plain = drawn(), io.BytesIO()
    style.save(figure, "figure", tmp_path, title="a finding: τ rises")
    path = tmp_path / "figures" / "figure.png"
    figure.savefig(plain, format="png")
    with Image.open(path) as stored, Image.open(plain) as original:
        error = np.abs(np.asarray(stored.convert("RGB"), int) - np.asarray(original.convert("RGB"), int)).max(2)
        assert stored.info["dpi"] == pytest.approx((style.STYLE["savefig.dpi"],) * 2, abs=0.1)
    assert error.max() <= 20 and error.mean() < 4  # of 255
    assert path.stat().st_size < 0.6 * plain.getbuffer().nbytes
    assert caption(path) == "a finding: τ rises"
    style.save(drawn(), "again", tmp_path, title="a finding: τ rises")
    assert (tmp_path / "figures" / "again.png").read_bytes() == path.read_bytes()
    plt.close("all")
