"""Every number of the results' prose is the one that its record says."""

from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from apbm_core.study.ablation import design, tables
from apbm_core.study.report.quoted import Quote, quotes

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results"
TIED = ("README.md", "results/README.md")
"""Texts in which every number with decimals names its source."""


@cache
def recorded(bed: str) -> dict:
    return design.recorded(RESULTS / design.FOLDER, bed)


def ablation(bed: str, ours: str = "", theirs: str = "") -> pd.Series:
    """``ablation(bed, ours, theirs)``: difference, interval, uncorrected p and pairs of two variants; ``ablation(bed)``
    has the bed's sd, df and comparisons, what three pairs can detect, and how many ingredients are shown."""
    records = recorded(bed)
    noise = tables.noise(records)
    if ours:
        pair = tables.compared(records, ours, theirs)
        found = {"difference": pair.mean, "pairs": pair.n, "identical": pair.identical}
        return pd.Series(found | {"interval": noise.half_width(pair.n), "p": noise.p_value(pair.mean, pair.n)})
    pairs = tables.ingredients(records)
    count = int(pairs["p"].notna().sum())
    shown = int(pairs["verdict"].isin(["above", "below"]).sum())
    sees = {"detectable": noise.detectable(3), "detectable_corrected": noise.detectable(3, count)}
    return pd.Series({"sd": noise.sd, "df": noise.df, "comparisons": count, "shown": shown} | sees)


def found_in(text: str) -> list[Quote]:
    return list(quotes(text, RESULTS, ablation=ablation))


def problems(text: str) -> list[str]:
    return [quote.problem for quote in found_in(text) if quote.problem]


@pytest.mark.parametrize("name", TIED)
def test_the_prose_says_what_the_records_say(name):
    found = found_in((ROOT / name).read_text())
    wrong = [quote.problem for quote in found if quote.problem and (quote.source or name in TIED)]
    assert not wrong, f"{name}:\n" + "\n".join(wrong)


def test_the_results_prose_quotes_enough_to_be_checked():
    found = [quote for quote in found_in((RESULTS / "README.md").read_text()) if quote.value is not None]
    assert len(found) > 20


def test_a_wrong_number_is_found_at_the_precision_that_is_shown():
    run = '<!--= run("cpu", "vgg16", "apbm").accuracy -->'
    assert problems(f"APBM 86.19 %{run}, or 86 %{run}, or 86.2 %{run}") == []
    (wrong,) = problems(f"one\nAPBM 86.18 %{run}")
    assert wrong.startswith("line 2: 86.18, but run(") and wrong.endswith("is 86.1900")
    assert problems(f"it is -86.19{run}")  # a sign is part of the number


def test_a_number_without_a_source_is_found_but_not_in_code_or_of_the_paper():
    assert problems("The paper's 92.74 %, `0.5`, [a](b/1.5), 12 epochs, seed 0 and Python's `3.11`.") == []
    (wrong,) = problems("It gains 1.25 points.")
    assert wrong == "line 1: 1.25 names no source; put <!--= ... --> behind it"


def test_a_row_of_a_table_takes_its_values_in_order():
    row = '| SWP | 88.83 % | 73.5 % |<!--= x = run("cpu", "vgg16", "swp"); x.accuracy, x.macs_removed -->'
    assert problems(row) == []
    assert len(problems(row.replace("88.83", "73.5").replace("| 73.5 % |<", "| 88.83 % |<"))) == 2


def test_differences_cells_and_the_ablation_can_be_named():
    text = (
        'ahead by 0.26 <!--= run("cpu", "vgg16", "apbm").accuracy - run("cpu", "vgg16", "scratch").accuracy -->, '
        'by +1.49 ± 0.99<!--= x = ablation("resnet20", "base", "scratch"); x.difference, x.interval -->, '
        'up to 0.57 <!--= largest("cpu/float32/beside", "difference") -->.'
    )
    assert problems(text) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('run("cpu", "vgg16", "apbn").accuracy', "0 records of cpu"),
        ('run("cpu", "vgg16", "apbm", schedule="equal-time").speed', "a run has no 'speed'; it has drop, accuracy"),
        ("open('x')", "name 'open' is not defined"),
        ("1 +", "SyntaxError"),
    ],
)
def test_a_source_that_cannot_be_had_is_named(source, words):
    (wrong,) = problems(f"It is 1.00<!--= {source} -->.")
    assert "cannot be checked" in wrong and words in wrong
