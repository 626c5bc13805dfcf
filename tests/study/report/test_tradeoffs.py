"""The curves: a panel a network and data set, few colours, names that do not cover each other, bands that are right."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fake_records import fake_record
from matplotlib.text import Text
from test_claims import LEVELS, grid

from apbm_core.study.methods import label
from apbm_core.study.report import curves
from apbm_core.study.report.curve_titles import in_accuracy
from apbm_core.study.report.frames import of_shared_seeds, points, runs_frame
from apbm_core.study.report.statistics import ABOVE, BELOW
from apbm_core.study.report.tradeoffs import _spread

TARGETS = (0.25, 0.4884, 0.7, 0.85)
MANY = LEVELS | {"fpgm": 0.869, "random": 0.868, "dcff": 0.8995}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def grey(colour: str) -> bool:
    return colour[1:3] == colour[3:5] == colour[5:7]


@pytest.mark.parametrize("name", ["accuracy_curves", "accuracy_against_macs", "accuracy_against_time"])
def test_a_panel_a_network_and_data_set_with_at_most_five_coloured_lines_all_named(name):
    records = [r for dataset in ("cifar10", "cifar100") for r in grid(TARGETS, levels=MANY, dataset=dataset)]
    figure = getattr(curves, name)(records)
    beds = [axis.get_title(loc="left").split(":")[0] for axis in figure.axes]
    assert beds == ["ResNet56, CIFAR-10", "ResNet56, CIFAR-100"]
    for axis in figure.axes:
        colours = {container.lines[0].get_color() for container in axis.containers}
        assert len({colour for colour in colours if not grey(colour)}) == 4
        figure.draw_without_rendering()
        names = [text for text in axis.texts if text.get_text()]
        assert {label(method) for method in MANY} == {text.get_text() for text in names}
        boxes = [Text.get_window_extent(text) for text in names if text.get_text() != "dense"]  # without its leader
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_the_title_says_whom_apbm_is_above_and_below():
    (axis,) = curves.accuracy_curves(grid(TARGETS)).axes
    title = axis.get_title(loc="left").replace("\n", " ")
    assert title == "ResNet56, CIFAR-10: over 4 targets x 3 seeds APBM is above HRank, L1 and below Polarization"


def test_a_title_counts_the_targets_of_each_rival_and_its_commas_part_methods():
    means = pd.DataFrame(
        [
            ("HRank", 4, 3, ABOVE),
            ("L1", 4, 3, ABOVE),
            ("SWP", 4, 3, "-"),
            (label("dirac"), 3, 5, ABOVE),
            ("DCFF", 3, 5, BELOW),
        ],
        columns=["rival", "points", "n", "verdict"],
    )
    said = "over 4 targets x 3 seeds APBM is above HRank, L1; over 3 x 5, above slim from scratch with identity start"
    assert in_accuracy(pd.DataFrame(), means) == f"{said} and below DCFF"


def test_of_targets_that_all_have_the_title_names_the_papers():
    (axis,) = curves.accuracy_curves([record for record in grid(TARGETS) if record.config.seed == 0]).axes
    assert "at 48.84 % removed" in axis.get_title(loc="left").replace("\n", " ")


def test_the_title_over_macs_says_how_many_the_methods_keep():
    def title(**macs):
        records = [fake_record(method, 0.9, target=0.5) for method in macs]
        kept = [record.model_copy(update={"macs": int(1e6 * macs[record.config.method])}) for record in records]
        (axis,) = curves.accuracy_against_macs(kept).axes
        return axis.get_title(loc="left").replace("\n", " ").partition(": ")[2]

    assert title(apbm=4, swp=10, polarization=4, l1=9) == "at 50 % removed, MACs kept as a multiple of APBM's: SWP 2.5"
    assert title(apbm=4, swp=4.1) == "at 50 % removed, all keep about as many MACs as APBM"
    assert title(swp=4).startswith("at 50 % removed, SWP leads")


def test_a_short_axis_of_time_has_more_than_one_number():
    records = [fake_record(method, 0.9, seconds=60.0 * minutes) for method, minutes in {"apbm": 45, "swp": 58}.items()]
    (axis,) = curves.accuracy_against_time(records).axes
    low, high = axis.get_xlim()
    assert len([tick for tick in axis.get_xticks() if low <= tick <= high]) >= 3


def test_bands_are_the_pooled_intervals():
    records = grid(TARGETS)
    (axis,) = curves.accuracy_curves(records).axes
    apbm = points(runs_frame(records)).query("method == 'apbm'")
    spans = [path.get_extents() for band in axis.collections for path in band.get_paths()]
    low, high = (apbm["accuracy"] - apbm["interval"]).min(), (apbm["accuracy"] + apbm["interval"]).max()
    assert any(span.y0 == pytest.approx(low) and span.y1 == pytest.approx(high) for span in spans)


def test_names_are_spread_in_order_and_stay_inside_if_they_fit():
    assert _spread([0, 1, 2, 50], 10, 0, 100) == [0, 10, 20, 50]
    assert _spread([95, 96, 97], 10, 0, 100) == [80, 90, 100]
    crowded = _spread([5.0] * 8, 10, 0, 40)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(crowded))


def test_one_run_of_one_method_is_drawn():
    for plot in (curves.accuracy_curves, curves.accuracy_against_macs, curves.accuracy_against_time):
        (axis,) = plot([fake_record("apbm", 0.9)]).axes
        assert axis.get_title(loc="left").startswith("ResNet20, CIFAR-10: ")


def test_a_method_with_few_seeds_takes_none_from_those_with_many():
    runs = [
        fake_record(name, 0.5 + 0.1 * seed, seed) for name in ("apbm", "swp") for seed in range(3 + (name == "swp"))
    ]
    runs += [fake_record("hrank", 0.9, 1), fake_record("l1", 0.8, 7)]
    table = points(of_shared_seeds(runs_frame(runs))).set_index("method")
    assert table["n"].to_dict() == {"apbm": 3, "swp": 3, "hrank": 1, "l1": 1}
    assert table.loc["swp", "accuracy"] == pytest.approx(60)


def test_a_method_that_is_hardly_known_has_bars_that_leave_the_picture_and_the_lines_fill_it():
    accuracies = {"apbm": [0.8, 0.81, 0.8], "scratch": [0.78, 0.77, 0.78], "dcff": [0.76, 0.77, 0.76]}
    accuracies |= {"hrank": [0.72, 0.73, 0.72], "l1": [0.7, 0.71, 0.7], "swp": [0.8, 0.1, 0.79]}
    runs = [
        fake_record(method, level - target / 100, seed, target=target)
        for target in (0.5, 0.75)
        for method, levels in accuracies.items()
        for seed, level in enumerate(levels)
    ]
    assert points(runs_frame(runs)).set_index("method").loc["swp", "interval"].min() > 30
    (axis,) = curves.accuracy_curves(runs).axes
    low, high = axis.get_ylim()
    assert 50 < low < 56.1 and 79.6 < high < 85
    heights = [np.ptp(band.get_paths()[0].vertices[:, 1]) for band in axis.collections if band.get_paths()]
    assert sum(height > 60 for height in heights) == 1 and len(heights) == 4  # SWP's bars; bands of the coloured others


def test_methods_are_compared_by_the_seeds_that_all_of_them_have():
    """A study under way: APBM has a second seed, which lies higher, and SWP does not have it yet."""
    runs = [
        fake_record("dense", 0.9, 1, target=0.0),
        fake_record("apbm", 0.5, 0),
        fake_record("apbm", 0.9, 1),
        fake_record("swp", 0.6, 0),
        fake_record("apbm", 0.3, 1, target=0.9),
        fake_record("swp", 0.4, 2, target=0.9),
    ]
    table = points(of_shared_seeds(runs_frame(runs))).set_index(["method", "target"])["accuracy"]
    assert table.to_dict() == pytest.approx(
        {("dense", 0.0): 90, ("apbm", 75.0): 50, ("swp", 75.0): 60, ("apbm", 90.0): 30, ("swp", 90.0): 40}
    ), "where no seed is shared, there is what there is"
    figure = curves.accuracy_curves(runs[:4])
    titles = [axis.get_title(loc="left").replace("\n", " ") for axis in figure.axes]
    assert any("SWP leads with 60.0 %" in title for title in titles), titles
