"""Recipes: the settings of training that ``training.recipe`` fills into a new spec, where they are visible.

``minimind`` fills in nothing: the defaults of the spec are MiniMind's. The values of ``fast`` are the best ones of
docs/experiments.md. They are filled in once, when a spec is submitted. So a stored spec keeps them if a recipe changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe. It is left out if ``applies`` is False for the settings known so far, by group."""

    field: str
    value: Any
    applies: Callable[[Mapping[str, Any], Mapping[str, Any]], bool] = lambda _training, _model: True


def _has_muon(training: Mapping[str, Any], _model: Mapping[str, Any]) -> bool:
    return bool(training.get("optimizer") == "muon")


RECIPES: dict[str, tuple[Setting, ...]] = {
    "minimind": (),
    "fast": (
        Setting("optimizer", "muon"),
        Setting("learning_rate", 0.01, _has_muon),
        Setting("lr_scheduler", "wsd"),
    ),
}


def fill_recipe(spec: dict[str, Any]) -> dict[str, Any]:
    """Return ``spec``, a JSON object under the spec's own names, with the settings of its recipe that it does not give.

    A value that is not valid is left for the validation to report.
    """
    training, model = spec.get("training"), spec.get("model", {})
    if not isinstance(training, dict) or not isinstance(model, dict):
        return spec
    filled = dict(training)
    recipe = training.get("recipe")
    for setting in RECIPES.get(recipe, ()) if isinstance(recipe, str) else ():
        if setting.field not in filled and setting.applies(filled, model):
            filled[setting.field] = setting.value
    return {**spec, "training": filled}
