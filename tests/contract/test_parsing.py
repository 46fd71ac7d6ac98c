"""Every mistake at once, each with its pointer, and never the value."""

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainyard.contract.parsing import ALIASES, FLAGS, GROUP_OF_LEAF, GROUPS, parse_spec, plain
from trainyard.contract.patterns import DEVICE
from trainyard.contract.spec import JobSpec

MINIMAL: dict[str, Any] = {"data": {"data_path": "/data/pretrain.jsonl"}}


def pointers(raw: object) -> list[str]:
    return [problem.pointer for problem in parse_spec(raw).problems]


def test_every_field_but_the_data_path_has_a_default() -> None:
    parsed = parse_spec(MINIMAL)
    assert parsed.problems == ()
    assert parsed.spec.training.learning_rate == 5e-4
    assert parsed.spec.model.intermediate_size == 1664  # ceil(512 * pi / 64) * 64 = 26 * 64
    assert parsed.spec.model.head_dim == 64


def test_five_mistakes_come_in_one_answer() -> None:
    raw = {
        "model": {"hidden_size": 100, "num_attention_heads": 7, "num_key_value_heads": 7},
        "training": {"learning_rate": -1, "batchsize": 64, "epochs": True},
        "data": {"data_path": "/x", "max_seq_len": 0},
    }
    assert set(pointers(raw)) == {
        "/model/num_attention_heads",
        "/training/learning_rate",
        "/training/batchsize",
        "/training/epochs",
        "/data/max_seq_len",
    }


def test_a_missing_data_path_is_named() -> None:
    requests: list[dict[str, Any]] = [{}, {"data": {}}, {"training": {"epochs": 2}}]
    for raw in requests:
        assert pointers(raw) == ["/data/data_path"]


@pytest.mark.parametrize("raw", [None, [], "text", 3, True])
def test_something_else_than_an_object_is_one_problem(raw: object) -> None:
    assert pointers(raw) == [""]


def test_an_alias_is_taken_and_its_own_name_is_reported() -> None:
    good = parse_spec({**MINIMAL, "training": {"num_train_epochs": 3, "per_device_train_batch_size": 4}})
    assert (good.spec.training.epochs, good.spec.training.batch_size) == (3, 4)
    assert pointers({**MINIMAL, "training": {"num_train_epochs": 0}}) == ["/training/num_train_epochs"]


def test_the_same_setting_under_two_names_is_rejected() -> None:
    raw = {**MINIMAL, "training": {"epochs": 1, "num_train_epochs": 1}}
    assert pointers(raw) == ["/training/num_train_epochs"]


def test_a_run_was_made_longer_at_one_step_after_the_other() -> None:
    assert pointers({**MINIMAL, "training": {"continued_at": [[3, 5], [9, 9]], "max_steps": 20}}) == []
    for pairs in ([[9, 5], [3, 2]], [[3, 5], [3, 9]]):
        raw = {**MINIMAL, "training": {"continued_at": pairs, "max_steps": 20}}
        assert pointers(raw) == ["/training/continued_at"]


def test_a_misspelt_key_gets_a_proposal_and_a_misplaced_one_its_group() -> None:
    misspelt = parse_spec({**MINIMAL, "training": {"learning_rat": 1e-3}}).problems[0]
    assert misspelt.message.endswith("did you mean learning_rate?")
    misplaced = parse_spec({**MINIMAL, "training": {"log_interval": 10}}).problems[0]
    assert '"reporting"' in misplaced.message


@pytest.mark.parametrize(
    ("group", "leaf", "value"),
    [
        ("training", "learning_rate", math.nan),
        ("training", "learning_rate", "nan"),
        ("training", "learning_rate", math.inf),
        ("training", "batch_size", 2**63),
        ("training", "batch_size", 10**400),
        ("training", "batch_size", True),
        ("training", "batch_size", 1.5),
        ("training", "batch_size", 0),
        ("training", "seed", -1),
        ("training", "betas", [0.9]),
        ("model", "dropout", 1.0),
        ("model", "hidden_size", -512),
        ("data", "text_field", "\ud800"),
        ("data", "data_path", "a\0b"),
        ("checkpoint", "save_weight", "../../etc/passwd"),
        ("checkpoint", "save_weight", "--flag"),
        ("resources", "device", "tpu"),
        ("reporting", "sample_prompts", ["\ud800"]),
    ],
)
def test_one_bad_value_is_one_problem_at_its_place(group: str, leaf: str, value: object) -> None:
    raw: dict[str, Any] = {"data": {"data_path": "/x"}, group: {"data_path": "/x"} if group == "data" else {}}
    raw[group][leaf] = value
    found = pointers(raw)
    assert len(found) == 1
    assert found[0].startswith(f"/{group}/{leaf}")


def test_a_decay_has_one_length() -> None:
    wsd: dict[str, Any] = {"lr_scheduler": "wsd", "max_steps": 100, "warmup_steps": 10}
    assert parse_spec({**MINIMAL, "training": wsd}).spec.training.decay_fraction == 0.2
    steps = parse_spec({**MINIMAL, "training": {**wsd, "decay_steps": 90}})
    assert steps.problems == ()
    assert steps.spec.training.decay_fraction is None
    assert parse_spec(json.loads(steps.spec.model_dump_json())).problems == ()
    both = {**wsd, "decay_steps": 5, "decay_fraction": 0.2}
    assert pointers({**MINIMAL, "training": both}) == ["/training/decay_steps"]
    assert pointers({**MINIMAL, "training": {**wsd, "decay_steps": 91}}) == ["/training/decay_steps"]
    for fraction in (0, 1.1, "NaN"):
        assert pointers({**MINIMAL, "training": {**wsd, "decay_fraction": fraction}}) == ["/training/decay_fraction"]


def from_flat(flat: Mapping[str, Any]) -> dict[str, Any]:
    """MiniMind's flat flags, or Hugging Face's, as groups. A name that is no leaf stays at the top, to be refused."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        group = ALIASES[name][0] if name in ALIASES else GROUP_OF_LEAF.get(name)
        if group is None or name in JobSpec.model_fields:
            nested[name] = value
        else:
            nested.setdefault(group, {})[name] = value
    return nested


def test_minimind_s_zeros_ones_and_none_are_understood() -> None:
    flags = {"use_moe": 1, "use_compile": 0, "from_resume": 1, "from_weight": "none", "data_path": "/x"}
    parsed = parse_spec(from_flat(flags))
    assert parsed.problems == ()
    assert parsed.spec.model.use_moe is True
    assert parsed.spec.training.use_compile is False
    assert parsed.spec.checkpoint.from_resume is True
    assert parsed.spec.training.from_weight is None


def test_only_boolean_leaves_read_zero_and_one_as_flags() -> None:
    schema = JobSpec.model_json_schema()["$defs"]
    boolean = {
        leaf
        for definition in schema.values()
        for leaf, described in definition.get("properties", {}).items()
        if described.get("type") == "boolean"
    }
    assert boolean == FLAGS


def test_leaf_names_are_unique_so_flat_flags_have_one_place() -> None:
    leaves = [leaf for group in GROUPS.values() for leaf in group]
    assert len(leaves) == len(set(leaves)) == len(GROUP_OF_LEAF)
    assert not set(ALIASES) & set(leaves)
    assert all(leaf in GROUPS[group] for group, leaf in ALIASES.values())


def test_a_run_has_one_length() -> None:
    assert pointers({**MINIMAL, "training": {"max_tokens": 10**9}}) == []
    assert pointers({**MINIMAL, "training": {"max_tokens": 10**9, "max_steps": 5}}) == ["/training/max_tokens"]
    assert pointers({**MINIMAL, "training": {"max_tokens": 0, "max_steps": 5}}) == ["/training/max_tokens"]
    sources = [{"name": name, "path": f"/{name}", "weight": 1} for name in "ab"]
    assert pointers({"data": {"sources": sources}}) == ["/training/max_steps"]
    assert pointers({"data": {"sources": sources}, "training": {"max_tokens": 10**9}}) == []


def test_held_out_data_is_given_in_one_way() -> None:
    sets = [{"name": "web", "path": "/w"}, {"name": "books", "path": ["/a", "/b/*"], "max_tokens": 10}]
    given: dict[str, Any] = {"eval_data_path": "/e", "eval_sources": sets, "eval_fraction": 0.1}
    wrong = {
        ("eval_data_path",): [],
        ("eval_sources",): [],
        ("eval_fraction",): [],
        ("eval_data_path", "eval_sources"): ["/data/eval_sources"],
        ("eval_data_path", "eval_fraction"): ["/data/eval_fraction"],
        ("eval_sources", "eval_fraction"): ["/data/eval_fraction"],
        tuple(given): ["/data/eval_sources", "/data/eval_fraction", "/data/eval_fraction"],
    }
    for names, expected in wrong.items():
        assert pointers({"data": {"data_path": "/x", **{name: given[name] for name in names}}}) == expected, names


def test_every_mistake_in_a_held_out_set_is_named() -> None:
    def found(*sets: dict[str, Any]) -> list[str]:
        return pointers({"data": {"data_path": "/x", "eval_sources": list(sets)}})

    assert found({"name": "web", "path": "/w"}, {"name": "web", "path": "/v"}) == ["/data/eval_sources/1/name"]
    assert found({"name": "Web", "path": 3}, {"name": "a"}, {"name": "b", "path": [""], "max_tokens": 0}) == [
        "/data/eval_sources/0/name",
        "/data/eval_sources/0/path",
        "/data/eval_sources/1/path",
        "/data/eval_sources/2/path/0",
        "/data/eval_sources/2/max_tokens",
    ]
    assert found({"name": "web", "path": "/w", "weight": 1}) == ["/data/eval_sources/0/weight"]
    assert found() == ["/data/eval_sources"]


def test_a_router_without_gradient_is_rejected() -> None:
    raw = {**MINIMAL, "model": {"use_moe": True, "num_experts_per_tok": 1}}
    assert pointers(raw) == ["/model/norm_topk_prob"]
    raw["model"]["norm_topk_prob"] = False
    assert pointers(raw) == []


def test_the_resolved_spec_reads_back_as_itself() -> None:
    spec = parse_spec(MINIMAL).spec
    assert parse_spec(json.loads(spec.model_dump_json())).spec == spec


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
leaf_names = st.sampled_from(sorted(GROUP_OF_LEAF) + sorted(ALIASES))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(JobSpec.model_fields)) | st.text(max_size=5), json_values, max_size=5))
def test_no_input_makes_it_raise(raw: dict[str, Any]) -> None:
    parsed = parse_spec(raw)
    assert isinstance(parsed.spec, JobSpec)
    assert all(problem.pointer.encode().decode() == problem.pointer for problem in parsed.problems)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(leaf_names, json_values, max_size=6))
def test_no_leaf_value_makes_it_raise_and_a_clean_answer_has_the_value(flat: dict[str, Any]) -> None:
    parsed = parse_spec(from_flat({"data_path": "/x", **flat}))
    if not parsed.problems:
        assert parse_spec(json.loads(parsed.spec.model_dump_json())).spec == parsed.spec


@pytest.mark.parametrize(
    ("pydantic_message", "message"),
    [
        ("List should have at least 1 item after validation, not 0", "should have at least 1 item, not 0"),
        ("Input should be a valid dictionary or object to extract fields from", "should be a JSON object"),
        ("Field required", "is required"),
        ("Value error, is the name of an earlier source", "is the name of an earlier source"),
        ("Input should be a valid integer, unable to parse string as an integer", "should be a valid integer"),
        ("Input should be a valid number, unable to parse string as a number", "should be a valid number"),
        (f"String should match pattern '{DEVICE}'", 'must be "auto", "cpu", "cuda", or one GPU such as "cuda:0"'),
    ],
)
def test_messages_continue_a_sentence_about_the_field(pydantic_message: str, message: str) -> None:
    assert plain(pydantic_message) == message
