"""Recipes: the settings of training that ``training.recipe`` fills into a new spec, where they are visible.

``minimind`` fills in nothing: the defaults of the spec are MiniMind's. The values of ``fast`` are the best ones of
docs/experiments.md. They are filled in once, when a spec is submitted. So a stored spec keeps them if a recipe changes.
"""

import math
from collections.abc import Mapping
from typing import Any

MEASURED_WIDTH, MEASURED_RATE = 128, 0.01
"""A width, and Muon's best learning rate for it in docs/experiments.md."""

DEFAULT_WIDTH = 512


def fast(training: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``fast`` for the given groups of a spec, without those that do not apply to it."""
    settings: dict[str, Any] = {"optimizer": "muon", "lr_scheduler": "wsd", "min_lr_ratio": 0.0}
    if training.get("optimizer", "muon") == "muon":
        settings["learning_rate"] = muon_rate(model.get("hidden_size"))
    if training.get("lr_scheduler", "wsd") == "wsd":
        settings["decay_shape"] = "linear"
        if training.get("decay_steps") is None:
            settings["decay_fraction"] = 0.5
    return settings


RECIPES = {"minimind": lambda _training, _model: {}, "fast": fast}
"""Name of a recipe -> its settings for the groups ``training`` and ``model`` of a spec."""


def muon_rate(hidden_size: object) -> float:
    """Return Muon's learning rate for a model of this width; the default width if it is no valid one.

    An update of a matrix has a spectral norm of about rate * sqrt(width), which is to be the same at any width (Yang et
    al. 2023, arXiv 2310.17813).
    """
    width = hidden_size if type(hidden_size) is int and hidden_size > 0 else DEFAULT_WIDTH
    return float(f"{MEASURED_RATE * math.sqrt(MEASURED_WIDTH / width):.2g}")


def fill_recipe(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``spec``, a JSON object under the spec's own names, with the settings of its recipe that it does not give.

    A value that is not valid is left for the validation to report.
    """
    training, model = spec.get("training"), spec.get("model", {})
    if not isinstance(training, Mapping) or not isinstance(model, Mapping):
        return dict(spec)
    recipe = training.get("recipe")
    settings = RECIPES[recipe](training, model) if isinstance(recipe, str) and recipe in RECIPES else {}
    return {**spec, "training": {**settings, **training}}
