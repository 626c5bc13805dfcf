"""One layer under sliders, in a browser: what its filters' distances and lengths say, and the scripts that redraw it.

The scripts repeat :mod:`apbm_core.similarity` and the choice and mixing of :mod:`apbm_core.fusion` on matrices of at
most a few dozen filters, so that a slider answers at once and a page needs no kernel. Nothing is asked of a network.
"""

import base64
import copy
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apbm_core import similarity
from apbm_core.errors import ConfigError
from apbm_core.study.data.datasets import DataSplit, load_dataset
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.profiles import repository
from apbm_core.study.networks.models import build_model
from apbm_core.study.networks.storage import load_compact
from apbm_core.study.pages.html_page import TEMPLATES
from apbm_core.study.records import PUBLISHED_RESULTS, TRAINED, RunRecord, read_record
from apbm_core.study.report.frames import label_dataset, label_model
from apbm_core.study.report.kernel import epochs_bar
from apbm_core.study.training.loop import train
from apbm_core.study.training.recipes import get_recipe

MOST_FILTERS = 64
"""In a layer that is shown: the scripts redraw that many within a frame."""


def layer_data(weight: Tensor) -> dict[str, Any]:
    """What the scripts need of a layer's filters, shape (n, ...): distances (float32, packed), lengths, L1 norms."""
    flat = weight.detach().double().flatten(1)
    rows, columns = np.triu_indices(len(flat), 1)
    triangle = similarity.pairwise_distances(flat).numpy()[rows, columns].astype("<f4")
    return {
        "n": len(flat),
        "triangle": base64.b64encode(triangle.tobytes()).decode(),
        "norm": [round(value, 7) for value in flat.norm(dim=1).tolist()],
        "l1": [round(value, 6) for value in flat.abs().sum(1).tolist()],
    }


def network_layers(moments: Mapping[str, nn.Module], names: list[str]) -> list[dict[str, Any]]:
    """The layers ``names`` at each moment, such as initial and trained, as the scripts take them.

    Raises:
        ConfigError: no layer, a name that is none, or one of more than 64 filters.
    """
    if not names or not moments:
        raise ConfigError("there is no layer to explore; name at least one convolution.")
    layers = []
    for name in names:
        found = {}
        for moment, network in moments.items():
            try:
                weight = network.get_submodule(name).weight
            except AttributeError as error:
                raise ConfigError(f"there is no layer {name!r} in the network {moment}; it has others.") from error
            if len(weight) > MOST_FILTERS:
                raise ConfigError(f"{name} has {len(weight)} filters; at most {MOST_FILTERS} can be explored.")
            found[moment] = layer_data(weight)
        layers.append({"name": name, "moments": found})
    return layers


def recorded_moments(record: RunRecord, folder: Path) -> dict[str, nn.Module] | None:
    """The network of a record as it was initialised and as it was trained; None where its file is not there.

    The initial one is drawn again from the run's seed, as the run itself drew it.
    """
    path = folder / "networks" / (record.network or "missing")
    if record.config.method != "dense" or not path.is_file():
        return None
    trained = load_compact(path)
    with torch.random.fork_rng():
        torch.manual_seed(record.config.seed)
        initial = build_model(record.config.model, classes_of(trained))
    return {"at initialisation": initial, "trained": trained}


def classes_of(network: nn.Module) -> int:
    """The number of outputs of a classifier's last linear layer."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1].out_features


def explorable(network: nn.Module, count: int = 3) -> list[str]:
    """The first, the last and, between them, further convolutions of 2 to 64 filters: at most ``count`` names."""
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and 2 <= module.out_channels <= MOST_FILTERS
    ]
    places = [round(i * (len(names) - 1) / (count - 1)) for i in range(count)] if names else []
    return [names[place] for place in dict.fromkeys(places)]


def network_to_explore(file: str | Path | None = None, results: Path | None = None) -> tuple[dict[str, nn.Module], str]:
    """The networks to put under the sliders, by moment, and a sentence that says what they are.

    Args:
        file: a ``.safetensors`` file of this study; None for the trained network that is kept in ``results/trained``,
            or, where there is none, one that is trained on scikit-learn's digits within a minute.
        results: where the trained one is looked for; the repository's by default.

    Raises:
        CheckpointError: the file is missing, damaged, or not of this package.
    """
    if file is not None:
        return {"as stored": load_compact(file)}, f"The network in {file}."
    root = repository()
    results = results or (root or Path()) / PUBLISHED_RESULTS
    for path in sorted((results / TRAINED / "runs").glob("*.json")):
        record = read_record(path)
        if moments := recorded_moments(record, results / TRAINED):
            return moments, describe(record)
    epochs = 4
    moments, accuracy = _train_shortly("resnet20", load_dataset("digits").split("final", 0), epochs)
    words = f"No trained network is kept here: this is ResNet20 after {epochs} epochs of scikit-learn's digits, "
    return moments, f"{words}{accuracy:.0f} % right on the way."


def example_network(study: Study) -> tuple[str, dict[str, nn.Module], str]:
    """A dense network as initialised and as trained: its name, the two by moment, and a sentence on its training.

    Taken is one that this study has recorded and kept; else a published one of ``results/trained``, of the study's
    networks if there is one; else the study's first network is trained for one epoch of its ``method_images``, and the
    moment after it is called that, not trained.
    """
    own, published = study.results.path, (repository() or Path()) / PUBLISHED_RESULTS / TRAINED
    for folder, is_wanted in (
        (own, study.parameters.models.__contains__),
        (published, study.parameters.models.__contains__),
        (published, lambda _name: True),
    ):
        for path in sorted((folder / "runs").glob("*.json")):
            record = read_record(path)
            if is_wanted(record.config.model) and (moments := recorded_moments(record, folder)):
                return record.config.model, moments, describe(record, folder.name)
    name, split = study.parameters.models[0], study.example_split(study.parameters.method_images)
    networks, accuracy = _train_shortly(name, split, 1, study.parameters.seeds[0], study.device)
    before, after = networks.items()
    moments = dict([before, (f"after {len(split.train.labels):,} images", after[1])])
    words = f"No trained {label_model(name)} is kept here: this one saw {len(split.train.labels):,} images once, "
    return name, moments, f"{words}{accuracy:.0f} % right on the way."


def describe(record: RunRecord, folder: str = TRAINED) -> str:
    """A sentence on the network of a record that is kept in a folder of results."""
    return (
        f"{label_model(record.config.model)}, {100 * record.test_accuracy:.2f} % right on the test images of "
        f"{label_dataset(record.config.dataset)} after {record.config.epochs} epochs "
        f"(record {folder}/runs/{record.id}.json)."
    )


def _train_shortly(
    name: str, split: DataSplit, epochs: int, seed: int = 0, device: str | torch.device = "cpu"
) -> tuple[dict[str, nn.Module], float]:
    """A network before and after a few epochs, and how many per cent of the last one's images it had right."""
    torch.manual_seed(seed)
    network = build_model(name, split.num_classes)
    initial = copy.deepcopy(network)
    with epochs_bar(epochs, label_model(name)) as show:
        trained = train(network, split, get_recipe("fast"), epochs=epochs, seed=seed, device=device, progress=show)
    return {"at initialisation": initial, "trained": network.cpu()}, 100 * trained.history[-1]["train_accuracy"]


def box(layers: list[dict[str, Any]], words: str = "") -> str:
    """The explorer's element: the data in it, the scripts beside it (:func:`scripts`)."""
    data = json.dumps({"layers": layers}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="explorer"><p>{html.escape(words)}</p><script type="application/json">{data}</script>'
        "<noscript>The sliders need JavaScript.</noscript></div>"
    )


def scripts() -> str:
    """The two scripts, which start every explorer on the page."""
    return "".join(f"<script>{asset(name)}</script>" for name in ("fusion.js", "explorer.js"))


def asset(name: str) -> str:
    """A file beside the templates, its indentation and comments of a line left out."""
    lines = (TEMPLATES / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def in_a_notebook(layers: list[dict[str, Any]], words: str = "") -> str:
    """The explorer as one HTML output, with the style that it needs."""
    return f"<style>{asset('explorer.css')}</style>{box(layers, words)}{scripts()}"
