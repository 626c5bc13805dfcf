"""The command lines: parameters may stand anywhere, what is unknown ends the program and is named."""

import itertools

import pytest

from apbm_core.study.grid import __main__ as grid
from apbm_core.study.pages import runner

PARTS = ("epochs=30", "--profile length", "seeds=[0]", "--results out")


@pytest.mark.parametrize("parse", [grid.parse, runner.parse], ids=["grid", "pages"])
@pytest.mark.parametrize("order", list(itertools.permutations(PARTS)))
def test_parameters_may_stand_before_between_and_behind_options(parse, order):
    options = parse(["run", *" ".join(order).split()])
    assert (options.profile, options.results) == ("length", "out")
    assert sorted(options.more) == ["epochs=30", "seeds=[0]"]


def test_an_assignment_whose_value_has_spaces_stays_one():
    options = grid.parse(["--profile", "x", "seeds=[0]", "--minutes", "5", "targets={vgg16: [0.9]}"])
    assert options.more == ["seeds=[0]", "targets={vgg16: [0.9]}"] and options.minutes == 5


@pytest.mark.parametrize("parse", [grid.parse, runner.parse], ids=["grid", "pages"])
def test_an_unknown_option_is_named_wherever_it_stands(parse, capsys):
    with pytest.raises(SystemExit):
        parse(["run", "epochs=3", "--profiel", "x", "--profile", "quick", "seeds=[0]"])
    assert "unrecognized arguments: --profiel" in capsys.readouterr().err


def test_a_folder_too_many_is_not_lost():
    assert grid.parse(["merge", "into", "a", "b"]).sources == ["a", "b"]


def test_a_parameter_said_twice_is_refused_across_options(capsys):
    assert grid.main(["plan", "epochs=3", "--profile", "quick", "epochs=4"]) == 1
    assert "epochs is given twice" in capsys.readouterr().err
