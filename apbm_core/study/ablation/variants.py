"""The variants of the ablation, APBM with one ingredient changed each, and the pairs that differ by one ingredient."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASE: dict[str, Any] = {
    "settings": {
        "schedule": {"kind": "annealed", "start": 1.0, "end": 2.0, "freeze": 0.6, "scale_free": True},
        "metric": "euclidean",
        "score": "relative-entropy",
        "mass": "all",
        "amount": "whole",
        "rescale": True,
        "stable_slots": True,
        "fuse": True,
        "reselect": True,
        "bank": 1.0,
        "initial": "model",
        "gain": False,
        "learn_mixing": False,
    },
    "rescores_per_epoch": 4,
    "collapse": False,
    "bank_lr": 1.0,
    "bank_decay": 1.0,
    "wide": 0.0,
    "stages": 1,
    "merge": "activations",
    "widths": "shared",
    "budget_tau": 1.0,
    "mac_weight": 0.0,
    "passing": False,
    "branches": [],
}
"""What the variants start from, spelt out, so that it stays what it was when APBM's defaults change."""


@dataclass(frozen=True)
class Variant:
    """One line of the ablation: what differs from BASE, or a rival for comparison."""

    name: str
    group: str  # the ingredient it is about
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = "apbm"
    filters: str = "uniform"  # the rule that divides the target among the layers
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def all_options(self) -> dict[str, Any]:
        """The method's options: APBM's in full, a rival's as far as they differ from its defaults."""
        if self.method != "apbm":
            return dict(self.options)
        return {**BASE, **self.options, "settings": {**BASE["settings"], **self.settings}}


def _tau(start: float, end: float, freeze: float) -> dict[str, Any]:
    return {"schedule": {"kind": "annealed", "start": start, "end": end, "freeze": freeze, "scale_free": True}}


_SLICE = {"fuse": False, "score": "order", "reselect": False}


def _at_rates(rates: tuple[float, ...], name: str, label: str, **variant: Any) -> tuple[Variant, ...]:
    """A variant at other peak rates of the whole network; 0.2 is the recipe's, whose runs stand among the others."""
    return tuple(
        Variant(f"{name}-rate-{rate}", "rate", f"{label}, rate {rate}", recipe={"lr": rate}, **variant)
        for rate in rates
    )


_PASS = {"passing": True}
_RATES = (
    *_at_rates((0.05, 0.1, 0.8), "scratch", "slim from scratch", method="scratch"),
    *_at_rates(
        (0.1, 0.2, 0.4, 0.8),
        "fan-in",
        "slim from scratch, drawn at the dense fan-in",
        options={"fan_in": "dense"},
        method="scratch",
    ),
    *_at_rates((0.1, 0.4, 0.8), "slice", "the slice", settings=_SLICE),
    *_at_rates((0.1, 0.4, 0.8), "base", "base"),
    *_at_rates((0.1, 0.4, 0.8), "passing", "passing and fused", options=_PASS),
    *_at_rates((0.1, 0.4, 0.8), "passing-alone", "passing, no fusion", settings=_SLICE, options=_PASS),
    *_at_rates((0.05, 0.1, 0.4, 0.8), "dirac", "slim from scratch, identity start", method="dirac"),
)

# The rivals as the profile `curves` has them; L1 and the branches stand among the others.
_CONTINUED = {"course": "continue"}
_RIVALS = (
    Variant("swp", "rival", "SWP", options=_CONTINUED, method="swp"),
    Variant("polarization", "rival", "Polarization", options=_CONTINUED, method="polarization"),
    Variant("dcff-compressed", "rival", "DCFF in these epochs", options={"compress": True}, method="dcff"),
    Variant("hrank", "rival", "2 epochs dense, cut by HRank", method="hrank"),
)
_RIVAL_RATES = tuple(
    variant
    for rival in (
        *_RIVALS,
        Variant("l1", "rival", "L1", method="l1"),
        Variant("reparam", "rival", "branches with norms of their own", method="reparam"),
    )
    for variant in _at_rates((0.05, 0.1, 0.4, 0.8), rival.name, rival.label, options=rival.options, method=rival.method)
)

# Averaged weights, for everybody alike: airbench's decay.
_AVERAGED = {"lookahead": 0.95}
_LOOKAHEAD = (
    Variant("scratch-lookahead", "average", "slim from scratch, averaged weights", method="scratch", recipe=_AVERAGED),
    Variant(
        "dirac-lookahead",
        "average",
        "slim from scratch, identity start, averaged weights",
        method="dirac",
        recipe=_AVERAGED,
    ),
    Variant(
        "passing-lookahead",
        "average",
        "passing and fused, averaged weights",
        options=_PASS,
        recipe=_AVERAGED,
    ),
)

# Filters that are their own input channel plus what is learned or fused, and the controls of the same start.
_PASSING = (
    Variant("dirac", "passing", "slim from scratch, identity start", method="dirac"),
    Variant("reparam", "passing", "slim from scratch, branches with norms of their own", method="reparam"),
    Variant("passing", "passing", "the slice, passing its input on; no fusion, no score", _SLICE, _PASS),
    Variant("passing-selected", "passing", "passing, the KL score selects", {"fuse": False}, _PASS),
    Variant("passing-fused", "passing", "passing and fused: base's fusion", options=_PASS),
    Variant(
        "passing-assigned",
        "passing",
        "passing and fused: unimportant filters divide themselves",
        {"mass": "assigned"},
        _PASS,
    ),
    *(
        Variant(
            f"passing-{name}",
            "passing",
            f"passing and fused in learned amounts: {label}",
            {"mass": mass, "amount": "learned"},
            _PASS,
        )
        for name, mass, label in (
            ("gated", "all", "base's fusion"),
            ("gated-assigned", "assigned", "unimportant filters divide themselves"),
            ("gated-shuffled", "shuffled", "among kept ones at random"),
        )
    ),
)

# Unimportant filters that answer in a branch with a norm of its own, and the controls with the same branches.
_RESPONSES = tuple(
    Variant(name, "responses", label, settings, {"branches": list(branches), **more})
    for name, label, settings, branches, more in (
        ("responses", "responses of unimportant filters fused", {}, ["fused"], {}),
        ("responses-shuffled", "responses fused at random", {"mass": "shuffled"}, ["fused"], {}),
        ("branch-identity", "a slice with an identity branch; no fusion, no score", _SLICE, ["identity"], {}),
        ("responses-identity", "responses fused, and an identity branch", {}, ["fused", "identity"], {}),
        (
            "responses-identity-shuffled",
            "responses fused at random, and an identity branch",
            {"mass": "shuffled"},
            ["fused", "identity"],
            {},
        ),
        ("responses-passing", "responses fused, passing the input on", {}, ["fused"], _PASS),
        (
            "responses-passing-shuffled",
            "responses fused at random, passing the input on",
            {"mass": "shuffled"},
            ["fused"],
            _PASS,
        ),
    )
)

# The unimportant filters in a wide pass of their own, beside filters that pass their input on.
_HELPED = tuple(
    Variant(name, "helped", label, options={"passing": True, **options}, method="helped")
    for name, label, options in (
        ("helped", "passing, helped by a wide pass; no score", {"select": "never"}),
        ("helped-untaught", "passing, helped by a wide pass that does not teach", {"select": "never", "distill": 0.0}),
        ("helped-selected", "passing, helped by a wide pass, the KL score selects", {"select": "relative-entropy"}),
        ("helped-random", "passing, helped by a wide pass, as many selected by lot", {"select": "random"}),
    )
)

_SIXTH = 1 / 6  # one epoch of the beds' six

_ALL = (
    Variant("scratch", "reference", "slim from scratch", method="scratch"),
    Variant("scratch-lr-2", "reference", "slim from scratch, twice the rate", method="scratch", recipe={"lr": 0.4}),
    Variant("l1", "reference", "2 epochs dense, cut by L1", method="l1"),
    Variant("dense", "reference", "dense", method="dense"),
    Variant("dcff", "reference", "DCFF's schedule", method="dcff"),
    Variant("base", "reference", "base: tau 1 to 2, all mass, rescaled"),
    Variant("no-fusion", "fusion", "nothing mixed in: the KL score selects", {"fuse": False}),
    Variant(
        "slice",
        "fusion",
        "no fusion, no score: a slice of the dense initialisation",
        _SLICE,
    ),
    Variant(
        "slice-lr-2",
        "fusion",
        "the slice, learning twice as fast",
        _SLICE,
        {"bank_lr": 2.0},
    ),
    Variant("no-reselection", "fusion", "the first selection stays", {"reselect": False}),
    Variant("shuffled-slots", "fusion", "slots not stable", {"stable_slots": False}),
    Variant("no-rescale", "fusion", "not rescaled", {"rescale": False}),
    Variant("mass-unimportant", "mass", "mass of unimportant filters only", {"mass": "unimportant"}),
    Variant("mass-assigned", "mass", "unimportant filters divide themselves", {"mass": "assigned"}),
    Variant("tau-low", "tau", "tau 0.5 to 2", _tau(0.5, 2.0, 0.6)),
    Variant("tau-high", "tau", "tau 1.5 to 3", _tau(1.5, 3.0, 0.6)),
    Variant("tau-short", "tau", "frozen after 1/3", _tau(1.0, 2.0, 1 / 3)),
    Variant("tau-long", "tau", "never frozen", _tau(1.0, 2.0, 1.0)),
    Variant("tau-constant", "tau", "tau 1 throughout", _tau(1.0, 1.0, 1.0)),
    Variant("score-entropy", "score", "score: entropy", {"score": "entropy"}),
    Variant("score-l1", "score", "score: L1", {"score": "l1"}),
    Variant("score-order", "score", "score: none, the first m", {"score": "order"}),
    Variant("cosine", "score", "cosine distance", {"metric": "cosine"}),
    Variant("gain", "bank", "unit filters with learned gains", {"gain": True}),
    Variant("learned-mixing", "bank", "P is trained", {"learn_mixing": True}),
    Variant("bank-2", "bank", "bank twice the layer", {"bank": 2.0}),
    Variant("orthogonal", "bank", "orthogonal initial bank", {"initial": "orthogonal"}),
    Variant("bank-lr-2", "bank", "banks learn twice as fast", options={"bank_lr": 2.0}),
    Variant("bank-lr-4", "bank", "banks learn four times as fast", options={"bank_lr": 4.0}),
    Variant("bank-lr-half", "bank", "banks learn half as fast", options={"bank_lr": 0.5}),
    Variant("bank-no-decay", "bank", "banks without weight decay", options={"bank_decay": 0.0}),
    Variant("collapse", "bank", "banks dropped once P is frozen", options={"collapse": True}),
    Variant("wide-1", "narrowing", "1 epoch wide, then merged", options={"wide": _SIXTH}),
    Variant("wide-1-cut", "narrowing", "1 epoch wide, then cut", options={"wide": _SIXTH, "merge": "none"}),
    Variant(
        "wide-1-similarity", "narrowing", "1 epoch wide, averaged", options={"wide": _SIXTH, "merge": "similarity"}
    ),
    Variant("wide-2", "narrowing", "2 epochs wide, then merged", options={"wide": 2 * _SIXTH}),
    Variant("wide-2-stages", "narrowing", "2 stages in 2 epochs", options={"wide": 2 * _SIXTH, "stages": 2}),
    Variant("wide-3-stages", "narrowing", "3 stages in 3 epochs", options={"wide": 3 * _SIXTH, "stages": 3}),
    Variant("scratch-balanced", "widths", "slim from scratch, balanced widths", method="scratch", filters="balanced"),
    Variant("base-balanced", "widths", "base, balanced widths", filters="balanced"),
    Variant("wide-1-budget", "widths", "1 epoch wide, entropy widths", options={"wide": _SIXTH, "widths": "entropy"}),
    Variant(
        "wide-2-stages-budget",
        "widths",
        "2 stages, entropy widths",
        options={"wide": 2 * _SIXTH, "stages": 2, "widths": "entropy"},
    ),
    Variant("dirac-balanced", "passing", "identity start, balanced widths", method="dirac", filters="balanced"),
    Variant("passing-balanced", "passing", "passing and fused, balanced widths", options=_PASS, filters="balanced"),
    Variant("passing-alone-balanced", "passing", "passing, balanced widths", _SLICE, _PASS, filters="balanced"),
    *_PASSING,
    *_RESPONSES,
    *_HELPED,
    *_LOOKAHEAD,
    *_RATES,
    *_RIVALS,
    *_RIVAL_RATES,
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}

INGREDIENTS: tuple[tuple[str, str, str], ...] = (
    ("starting as a slice of the dense network", "slice", "scratch"),
    ("scoring the filters, instead of the first m", "no-fusion", "slice"),
    ("mixing the others in", "base", "no-fusion"),
    ("choosing anew as training goes on", "base", "no-reselection"),
    ("relative entropy as the score, instead of the first m", "base", "score-order"),
    ("relative entropy, instead of L1", "base", "score-l1"),
    ("annealing tau, instead of a constant one", "base", "tau-constant"),
    ("a lower tau, 0.5 to 2", "tau-low", "base"),
    ("a higher tau, 1.5 to 3", "tau-high", "base"),
    ("freezing P", "base", "tau-long"),
    ("freezing P after a third, instead of 60 %", "tau-short", "base"),
    ("cosine distance, instead of Euclidean", "cosine", "base"),
    ("entropy as the score, instead of relative entropy", "score-entropy", "base"),
    ("mass of unimportant filters only", "mass-unimportant", "base"),
    ("unimportant filters divide themselves", "mass-assigned", "base"),
    ("rescaling to the kept filters' norm", "base", "no-rescale"),
    ("stable slots", "base", "shuffled-slots"),
    ("training P", "learned-mixing", "base"),
    ("learned gains", "gain", "base"),
    ("a bank twice the layer", "bank-2", "base"),
    ("an orthogonal initial bank", "orthogonal", "base"),
    ("banks that learn twice as fast", "bank-lr-2", "base"),
    ("banks that learn four times as fast", "bank-lr-4", "base"),
    ("banks that learn half as fast", "bank-lr-half", "base"),
    ("twice the learning rate, for the slice alone", "slice-lr-2", "slice"),
    ("twice the learning rate, for slim from scratch", "scratch-lr-2", "scratch"),
    ("starting as identities", "dirac", "scratch"),
    ("branches with norms of their own", "reparam", "scratch"),
    ("passing the input on, without fusion", "passing", "slice"),
    ("learned amounts, instead of an identity start alone", "passing", "dirac"),
    ("passing the input on, with fusion", "passing-fused", "base"),
    ("choosing by relative entropy, while passing", "passing-selected", "passing"),
    ("mixing the others in, while passing", "passing-fused", "passing-selected"),
    ("fusing what is unimportant, while passing", "passing-assigned", "passing-selected"),
    ("mixing the others in, in learned amounts, while passing", "passing-gated", "passing-selected"),
    ("fusing by resemblance, instead of at random", "passing-gated-assigned", "passing-gated-shuffled"),
    ("fusing, while passing the input on", "passing-fused", "passing"),
    ("all of it, passing: APBM against slim from scratch", "passing-fused", "scratch"),
    ("all of it, passing, each at its best rate so far", "passing-rate-0.4", "scratch-rate-0.1"),
    (
        "fusion and learned amounts against an identity start, best rates",
        "passing-rate-0.4",
        "dirac-rate-0.1",
    ),
    ("fusing, while passing the input on, at twice the rate", "passing-rate-0.4", "passing-alone-rate-0.4"),
    ("fusing responses", "responses", "slice"),
    ("responses by resemblance, instead of at random", "responses", "responses-shuffled"),
    ("fusing responses, beside an identity branch", "responses-identity", "branch-identity"),
    (
        "responses by resemblance, beside an identity branch",
        "responses-identity",
        "responses-identity-shuffled",
    ),
    ("fusing responses, while passing the input on", "responses-passing", "passing"),
    (
        "responses by resemblance, while passing the input on",
        "responses-passing",
        "responses-passing-shuffled",
    ),
    ("an identity branch, without fusion", "branch-identity", "slice"),
    ("a wide pass that helps, while passing the input on", "helped", "passing"),
    ("a wide pass that helps and does not teach, while passing", "helped-untaught", "passing"),
    ("choosing by relative entropy beside a wide pass", "helped-selected", "helped"),
    ("choosing by relative entropy beside a wide pass, instead of by lot", "helped-selected", "helped-random"),
    ("averaged weights, from scratch", "scratch-lookahead", "scratch"),
    ("averaged weights, starting as identities", "dirac-lookahead", "dirac"),
    ("averaged weights, passing and fused", "passing-lookahead", "passing-fused"),
    ("all of it with averaged weights, both", "passing-lookahead", "scratch-lookahead"),
    ("banks without weight decay", "bank-no-decay", "base"),
    ("dropping the banks once P is frozen", "collapse", "base"),
    ("starting wide, for one epoch", "wide-1", "slice"),
    ("merging what goes, instead of cutting it", "wide-1", "wide-1-cut"),
    ("merging by least squares, instead of by similarity", "wide-1", "wide-1-similarity"),
    ("two stages in two epochs, instead of one in one", "wide-2-stages", "wide-1"),
    ("widths from the entropy budget, one stage", "wide-1-budget", "wide-1"),
    ("widths from the entropy budget, two stages", "wide-2-stages-budget", "wide-2-stages"),
    ("balanced widths, with fusion", "base-balanced", "base"),
    ("balanced widths, from scratch", "scratch-balanced", "scratch"),
    ("all of it: APBM against slim from scratch", "base", "scratch"),
    ("all of it, both learning twice as fast", "bank-lr-2", "scratch-lr-2"),
    ("all of it, at balanced widths", "base-balanced", "scratch-balanced"),
    ("all of it, passing, at balanced widths", "passing-balanced", "scratch-balanced"),
    ("fusing, while passing the input on, at balanced widths", "passing-balanced", "passing-alone-balanced"),
    ("balanced widths, passing and fused", "passing-balanced", "passing-fused"),
)
"""Each ingredient as a pair of variants that differ by it: (what, with it, without it)."""
