"""Recipes: what is filled in, what a given field keeps, and what a stored spec keeps."""

import json
from typing import Any

import pytest

from trainyard.contract.parsing import parse_spec
from trainyard.contract.recipes import RECIPES, muon_rate
from trainyard.contract.spec import TrainingSpec

DATA = {"data": {"data_path": "/data/pretrain.jsonl"}}
FAST = RECIPES["fast"]({}, {})


def training_of(model: dict[str, Any] | None = None, **training: Any) -> TrainingSpec:
    parsed = parse_spec({**DATA, "training": training, "model": model or {}})
    assert parsed.problems == ()
    return parsed.spec.training


def changed(training: TrainingSpec) -> dict[str, Any]:
    """Fields that are not the default."""
    return {name: value for name, value in training.model_dump().items() if value != getattr(TrainingSpec(), name)}


def test_the_default_recipe_changes_nothing() -> None:
    assert training_of() == training_of(recipe="minimind") == TrainingSpec()


def test_fast_fills_in_visible_values() -> None:
    found = changed(training_of(recipe="fast"))
    assert found.pop("recipe") == "fast"
    assert found == {name: FAST[name] for name in found}
    assert {"optimizer", "learning_rate", "lr_scheduler"} <= found.keys()


@pytest.mark.parametrize(
    "given",
    [{"learning_rate": 0.003}, {"min_lr_ratio": 0.1}, {"lr_scheduler": "cosine"}, {"zero_init_projections": False}],
)
def test_a_given_field_wins_even_with_its_default(given: dict[str, Any]) -> None:
    training = training_of(recipe="fast", **given)
    assert {name: getattr(training, name) for name in given} == given
    assert training.optimizer == "muon"


def test_the_rate_falls_with_the_root_of_the_width() -> None:
    assert training_of({"hidden_size": 64}, recipe="fast").learning_rate == pytest.approx(0.014)
    assert training_of({"hidden_size": 512}, recipe="fast").learning_rate == pytest.approx(0.005)
    assert training_of(recipe="fast").learning_rate == muon_rate(512)
    assert muon_rate("wide") == muon_rate(-1) == muon_rate(512), "the validation reports it"


def test_an_alias_counts_as_given() -> None:
    assert training_of(recipe="fast", max_grad_norm=0.5).grad_clip == 0.5


def test_what_does_not_apply_is_left_out() -> None:
    adamw = changed(training_of(recipe="fast", optimizer="adamw"))
    assert not {"cautious_weight_decay", "learning_rate", "matrix_lr_multiplier"} & adamw.keys()
    assert "decay_fraction" not in changed(training_of(recipe="fast", decay_steps=50)) or (
        training_of(recipe="fast", decay_steps=50).decay_fraction is None
    )
    assert training_of(recipe="fast", from_weight="/w.pth").zero_init_projections is False
    for tied in (True, False):
        training_of({"tie_word_embeddings": tied}, recipe="fast")


def test_a_stored_spec_keeps_its_values() -> None:
    spec = parse_spec({**DATA, "training": {"recipe": "fast"}}).spec
    stored = json.loads(spec.model_dump_json())
    assert parse_spec(stored).spec == spec
    # As if it had been stored before the recipe had this setting.
    del stored["training"]["lr_scheduler"]
    assert parse_spec(stored, fills_recipe=False).spec.training.lr_scheduler == "cosine"


@pytest.mark.parametrize(
    ("training", "pointer"),
    [
        ({"recipe": "slow"}, "/training/recipe"),
        ({"recipe": ["fast"]}, "/training/recipe"),
        ({"cautious_weight_decay": True}, "/training/cautious_weight_decay"),
        ({"head_lr_multiplier": 2.0}, "/training/head_lr_multiplier"),
        ({"norm_lr_multiplier": 0.0}, "/training/norm_lr_multiplier"),
        ({"weight_decay_schedule": "cosine"}, "/training/weight_decay_schedule"),
    ],
)
def test_mistakes_are_reported(training: dict[str, Any], pointer: str) -> None:
    assert [problem.pointer for problem in parse_spec({**DATA, "training": training}).problems] == [pointer]
    assert parse_spec({**DATA, "training": "no object"}).problems[0].pointer == "/training"
