"""Any parameters whatever are refused with a sentence that names the wrong one, or they run."""

import json
import re
import string
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from apbm_core.errors import ApbmError, ConfigError
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.grid.profiles import parse_assignments
from apbm_core.study.grid.run import execute
from apbm_core.study.methods import all_methods, get_method
from apbm_core.study.methods.variants import VariantSettings
from apbm_core.study.networks.models import all_networks
from apbm_core.study.networks.published_widths import PUBLISHED_WIDTHS
from apbm_core.study.networks.widths import SOLVERS
from apbm_core.study.records import RunConfig
from apbm_core.study.training.recipes import RECIPES, Recipe, get_recipe, learning_rate
from apbm_core.study.validation import validated
from apbm_core.temperature import AnnealedTau, DcffTemperature

FIELDS = tuple(StudyParameters.model_fields)
NAN, INFINITY = float("nan"), float("inf")
words = st.text(string.ascii_letters + string.digits + "_-. ", max_size=12)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 0.5, 2.5, 10**30, 1e308, 5e-324, NAN, INFINITY])
scalars = st.none() | st.booleans() | numbers | words
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | scalars, inner, max_size=3),
    max_leaves=6,
)


def several(valid) -> st.SearchStrategy:
    return st.lists(valid, max_size=3)


shares = st.sampled_from([0.05, 0.3, 0.5, 0.75, 0.9]) | st.floats(0, 1) | numbers
option_values = scalars | st.sampled_from(["all", "entropy", "delta", "search", "layer-by-layer", "l1"])


@st.composite
def method_options(draw, method: str):
    """Settings for a method: its own names and some that are not, with values of all kinds."""
    if method not in all_methods():
        return draw(st.dictionaries(words, scalars, max_size=2))
    own = sorted(get_method(method).Options.model_fields)
    values = draw(st.dictionaries(st.sampled_from([*own, "alhpa", "tau"]), option_values, max_size=2))
    if method == "apbm" and draw(st.booleans()):
        values["settings"] = draw(fusion_settings)
    return values


temperatures = st.fixed_dictionaries(
    {"kind": st.sampled_from(["annealed", "dcff", "anealed", None])},
    optional={name: numbers for name in ("start", "end", "freeze", "epochs", "rate", "tau")},
)
fusion_settings = st.fixed_dictionaries(
    {},
    optional={name: option_values | st.booleans() for name in (*VariantSettings.model_fields, "temprature")}
    | {"schedule": temperatures | scalars},
)
recipe_overrides = st.dictionaries(
    st.sampled_from([*Recipe.model_fields, "learning_rate", "optimizer"]),
    scalars | st.sampled_from(["steps", "cosine", "one-cycle", "float32", "auto"]) | several(st.floats(0, 1)),
    max_size=4,
)
LIKELY = {
    "dataset": st.sampled_from(["digits", "cifar10", "cifar100", "my images", "../x"]),
    "fallback": st.sampled_from([None, "digits"]),
    "models": several(st.sampled_from([*all_networks(), "resnet21"])),
    "methods": several(st.sampled_from([*all_methods(), "abpm", "own.py"])),
    "targets": st.dictionaries(st.sampled_from([*all_networks(), "resnet21"]), several(shares), max_size=2),
    "by": st.sampled_from(["params", "macs", "flops"]),
    "widths": st.sampled_from([*SOLVERS, *PUBLISHED_WIDTHS, "dcff"]),
    "epochs": st.integers(-1, 4) | numbers,
    "schedules": several(st.sampled_from(["equal", "published", "equal-time", "same"])),
    "seeds": several(st.integers(-1, 3) | numbers),
    "recipe": st.sampled_from([*RECIPES, "slow"]),
    "recipe_overrides": recipe_overrides,
    "split": st.sampled_from(["final", "tuning", "test"]),
    "options": st.sampled_from([*all_methods(), "abpm"]).flatmap(
        lambda name: st.fixed_dictionaries({name: method_options(name)})
    ),
    "device": st.sampled_from(["auto", "cpu", "tpu", "cuda:9"]),
}


@st.composite
def parameters(draw) -> dict:
    """Mostly plausible parameters of a study, with now and then an unknown name or a value of any kind at all."""
    names = draw(st.lists(st.sampled_from([*FIELDS, *LIKELY]), max_size=6, unique=True))
    values = {}
    for name in names:
        is_wild = name not in LIKELY or draw(st.integers(0, 5)) == 0
        values[name] = draw(anything if is_wild else LIKELY[name])
    if draw(st.integers(0, 7)) == 0:
        values[draw(words)] = draw(anything)
    return values


def names_one_of(error: ConfigError, values: dict, *others: str) -> bool:
    """Whether the message, apart from its lists of what is allowed, mentions a name or value of ``values``."""
    said = re.sub(r"Allowed: .*", "", str(error))
    return any(name in said for name in [*names_in(values), *others])


def names_in(values: dict) -> set[str]:
    """Every name and short value that a message about ``values`` may mention."""
    found = set()
    for name, value in values.items():
        found.add(str(name) or "''")
        if isinstance(value, dict):
            found |= names_in(value)
        elif isinstance(value, list):
            found |= {str(item) for item in value}
        else:
            found.add(str(value))
    return found - {""}


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(parameters())
@example({"recipe_overrides": {"name": "mine"}})
@example({"seeds": [2**70]})
@example({"models": ["resnet20", "resnet20"]})
@example({"methods": ["l1", "l1"]})
@example({"targets": {"resnet20": [0.5, 0.5]}})
@example({"targets": {"resnet20": [0.5], "resnet21": [0.5]}})
@example({"methods": ["l1"], "schedules": ["published"]})
@example({"options": {"apbm": {"settings": {"schedule": {"kind": "annealed", "start": NAN}}}}})
@example({"options": {"apbm": {"settings": {"schedule": {"kind": "dcff", "rate": 5e-324}}}}})
@example({1: 2})
def test_parameters_are_refused_by_name_or_give_runs_with_ids_of_their_own(values):
    try:
        checked = StudyParameters.parse(values)
    except ConfigError as error:
        assert names_one_of(error, values), f"{values}: {error}"
        return
    configs = checked.run_configs(checked.dataset)
    assert configs
    assert len({config.id for config in configs}) == len(configs)
    for config in configs:
        again = RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"), allow_nan=False)))
        assert again == config and again.id == config.id


@settings(max_examples=150)
@given(recipe_overrides)
def test_a_recipe_is_refused_by_name_or_gives_a_finite_rate_throughout(values):
    values.pop("name", None)
    try:
        recipe = get_recipe("paper", **values)
    except ConfigError as error:
        assert names_one_of(error, values, "milestones", "warmup"), error
        return
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    for step in range(11):
        assert 0 <= learning_rate(recipe, step / 10) <= recipe.lr


@settings(max_examples=150)
@given(fusion_settings)
@example({"schedule": {"kind": "annealed", "end": NAN}})
def test_fusion_settings_are_refused_by_name_or_survive_json(values):
    try:
        checked = validated(VariantSettings, values, "the settings")
    except ConfigError as error:
        assert names_one_of(error, values, "schedule", "kind"), error
        return
    content = json.dumps(checked.model_dump(mode="json"), allow_nan=False)
    assert VariantSettings.model_validate(json.loads(content)) == checked


@settings(max_examples=150)
@given(st.fixed_dictionaries({}, optional={"start": numbers, "end": numbers, "freeze": numbers}), st.integers(1, 512))
@example({"start": NAN}, 16)
@example({"freeze": 0}, 1)
@example({"freeze": 5e-324}, 16)
def test_an_annealed_temperature_is_refused_or_rises_and_freezes(values, n):
    try:
        tau = validated(AnnealedTau, values, "the temperature")
    except ConfigError as error:
        assert names_one_of(error, values), error
        return
    course = [tau.temperature(step / 20, n) for step in range(21)]
    assert course == sorted(course) and course[0] > 0 and course[-1] <= 64 * 10
    assert tau.is_frozen(1.0)


@settings(max_examples=150)
@given(st.fixed_dictionaries({}, optional={name: numbers for name in ("start", "end", "rate", "epochs")}))
@example({"rate": 5e-324})
@example({"end": 1e308, "start": 1e-300})
def test_dcffs_temperature_is_refused_or_finite(values):
    try:
        course = validated(DcffTemperature, values, "the temperature")
    except ConfigError as error:
        assert names_one_of(error, values), error
        return
    for step in range(6):
        assert torch.isfinite(torch.tensor(course.temperature(step / 5, 16), dtype=torch.float64))


@settings(max_examples=200)
@given(
    st.text(max_size=20) | st.sampled_from(["!!int x", "!!float x", "!!bool x", "!!timestamp x", "[" * 2000, "&a [*a]"])
)
def test_an_assignment_is_refused_by_name_or_read(text):
    try:
        assert set(parse_assignments([f"epochs={text}"])) == {"epochs"}
    except ConfigError as error:
        assert "epochs" in str(error)


TINY = {
    "dataset": "digits", "models": ["resnet20"], "epochs": 1, "train_subset": 48, "test_subset": 20, "device": "cpu",
    "recipe_overrides": {"batch_size": 32, "lr": 0.01},
}  # fmt: skip


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(
    method=st.sampled_from(list(all_methods())),
    share=st.floats(0.05, 0.95),
    by=st.sampled_from(["params", "macs"]),
    split=st.sampled_from(["final", "tuning"]),
    seed=st.integers(0, 2**32 - 1),
    epochs=st.integers(1, 2),
)
@pytest.mark.slow
@example(method="apbm", share=0.5, by="macs", split="tuning", seed=2**32 - 1, epochs=1)
@example(method="l1", share=0.95, by="params", split="final", seed=0, epochs=1)
@example(method="polarization", share=0.5, by="macs", split="final", seed=0, epochs=1)
@example(method="swp", share=0.9, by="params", split="final", seed=0, epochs=1)
def test_a_configuration_runs_or_is_refused_before_it_trains(method, share, by, split, seed, epochs):
    torch.set_num_threads(1)
    values = TINY | {"methods": [method], "targets": {"resnet20": [share]}, "by": by, "split": split, "seeds": [seed]}
    (config,) = StudyParameters.parse(values | {"epochs": epochs}).run_configs("digits")
    said = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            record = execute(config, folder, "cpu", 1, report=said.append)
        except ApbmError as error:
            assert not said and isinstance(error, ConfigError), f"refused after training began: {error}"
            return
    assert sum(phase.epochs for phase in record.phases) == epochs == len(record.history)
    assert record.parameters <= record.dense_parameters


apbm_options = st.fixed_dictionaries(
    {},
    optional={
        "settings": st.fixed_dictionaries(
            {},
            optional={
                "mass": st.sampled_from(["all", "unimportant", "assigned"]),
                "bank": st.floats(1, 3),
                "initial": st.sampled_from(["model", "orthogonal"]),
                "gain": st.booleans(),
                "learn_mixing": st.booleans(),
            },
        ),
        "collapse": st.booleans(),
        "bank_lr": st.floats(0.1, 2),
        "bank_decay": st.floats(0, 2),
        "wide": st.floats(0, 1, exclude_max=True),
        "stages": st.integers(1, 3),
        "merge": st.sampled_from(["none", "similarity", "activations"]),
        "widths": st.sampled_from(["shared", "entropy", "marginal", "marginal-tied"]),
    },
)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(options=apbm_options, share=st.sampled_from([0.3, 0.75, 0.97]), epochs=st.integers(1, 3))
@example(options={"wide": 0.5, "stages": 2}, share=0.5, epochs=2)
@example(options={"wide": 0.5, "widths": "entropy"}, share=0.97, epochs=2)
@example(options={"collapse": True, "settings": {"gain": True}, "bank_lr": 2.0}, share=0.5, epochs=2)
def test_apbms_options_run_or_are_refused_before_it_trains(options, share, epochs):
    torch.set_num_threads(1)
    values = TINY | {"methods": ["apbm"], "targets": {"resnet20": [share]}, "epochs": epochs}
    said = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            (config,) = StudyParameters.parse(values | {"options": {"apbm": options}}).run_configs("digits")
            record = execute(config, folder, "cpu", 1, report=said.append)
        except ApbmError as error:
            assert not said and isinstance(error, ConfigError), f"refused after training began: {error}"
            return
    assert sum(phase.epochs for phase in record.phases) == epochs == len(record.history)
    assert record.parameters_removed == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("name", list(all_methods()))
def test_every_methods_options_refuse_nan_and_the_unknown_by_name(name):
    options = get_method(name).Options
    with pytest.raises(ConfigError, match="'unknwon' is not a parameter"):
        validated(options, {"unknwon": 1}, name)
    for field, info in options.model_fields.items():
        if info.annotation in (float, float | None):
            with pytest.raises(ConfigError, match=field):
                validated(options, {field: NAN}, name)
