from pathlib import Path
from typing import Any

import pytest

from trainyard.client.cli.parser import trainyard
from trainyard.client.cli.spec_flags import (
    FLAG_ALIASES,
    differences,
    given_leaves,
    parse_assignment,
    parse_labels,
    spec_of,
    spec_options,
    with_absolute_paths,
)
from trainyard.client.exit_codes import UsageError
from trainyard.contract.parsing import ALIASES, GROUP_OF_LEAF, parse_spec

HERE = Path("/somewhere")

MINIMIND = (
    "--save_dir ../out --save_weight pretrain --epochs 2 --batch_size 32 --learning_rate 5e-4 --device cuda:0 "
    "--dtype bfloat16 --num_workers 8 --accumulation_steps 8 --grad_clip 1.0 --log_interval 100 --save_interval 1000 "
    "--hidden_size 768 --num_hidden_layers 8 --max_seq_len 340 --use_moe 1 --data_path ../dataset/pretrain_hq.jsonl "
    "--from_weight none --from_resume 0 --use_wandb --wandb_project MiniMind-Pretrain --use_compile 0"
)


def spec(line: str, base: dict[str, Any] | None = None, *sets: str) -> dict[str, Any]:
    given = given_leaves(trainyard.commands["submit"].make_context("submit", line.split()).params)
    return spec_of(base or {}, given, sets, HERE)


def test_minimind_s_own_command_line_is_a_spec() -> None:
    made = spec(MINIMIND)
    assert made == {
        "model": {"hidden_size": 768, "num_hidden_layers": 8, "use_moe": True},
        "data": {"max_seq_len": 340, "num_workers": 8, "data_path": "/somewhere/../dataset/pretrain_hq.jsonl"},
        "training": {
            "epochs": 2,
            "batch_size": 32,
            "accumulation_steps": 8,
            "learning_rate": 5e-4,
            "grad_clip": 1,
            "dtype": "bfloat16",
            "use_compile": False,
            "from_weight": None,
        },
        "checkpoint": {
            "save_dir": "/somewhere/../out",
            "save_weight": "pretrain",
            "save_interval": 1000,
            "from_resume": False,
        },
        "reporting": {"log_interval": 100, "use_wandb": True, "wandb_project": "MiniMind-Pretrain"},
        "resources": {"device": "cuda:0"},
    }
    assert parse_spec(made).problems == ()


def test_hugging_face_s_names() -> None:
    line = "--num_train_epochs 3 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_grad_norm 0.5"
    made = spec(f"{line} --save_steps 10 --save_total_limit 2 --logging_steps 5 --torch_compile true --data_path /d")
    assert made["training"] == {
        "epochs": 3,
        "batch_size": 4,
        "accumulation_steps": 2,
        "grad_clip": 0.5,
        "use_compile": True,
    }
    assert made["checkpoint"] == {"save_interval": 10, "keep_last": 2}
    assert made["reporting"] == {"log_interval": 5}


def test_every_leaf_and_every_alias_is_a_flag() -> None:
    for name in (*GROUP_OF_LEAF, *ALIASES):
        group, leaf = ALIASES.get(name, (GROUP_OF_LEAF.get(name, ""), name))
        assert leaf in spec(f"--{name} 1")[group], name


@pytest.mark.parametrize(
    ("line", "group", "leaf", "value"),
    [
        ("--batch_size 64", "training", "batch_size", 64),
        ("--batch-size 64", "training", "batch_size", 64),
        ("--batch_size=64", "training", "batch_size", 64),
        ("--batch_size many", "training", "batch_size", "many"),
        ("--batch_size 1.5", "training", "batch_size", 1.5),
        ("--max_steps 1e4", "training", "max_steps", 10000),
        ("--max_steps none", "training", "max_steps", None),
        ("--learning_rate 3e-4", "training", "learning_rate", 3e-4),
        ("--learning_rate inf", "training", "learning_rate", float("inf")),
        ("--use_moe 1", "model", "use_moe", True),
        ("--use_moe False", "model", "use_moe", False),
        ("--use_moe", "model", "use_moe", True),
        ("--use_moe 7", "model", "use_moe", "7"),
        ("--head_dim None", "model", "head_dim", None),
        ("--text_field 12", "data", "text_field", "12"),
        ("--tokenizer_path byte", "data", "tokenizer_path", "byte"),
        ("--betas 0.9 0.95", "training", "betas", [0.9, 0.95]),
        ("--betas=0.9 --betas 0.95", "training", "betas", [0.9, 0.95]),
        ("--betas [0.9,0.95]", "training", "betas", [0.9, 0.95]),
        ("--sample-prompts 1 two", "reporting", "sample_prompts", ["1", "two"]),
        ('--timeouts {"stop":5}', "resources", "timeouts", {"stop": 5}),
    ],
)
def test_values_get_the_type_of_their_leaf(line: str, group: str, leaf: str, value: Any) -> None:
    found = spec(line)[group][leaf]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--batchsize", "--batch_size"),
        ("--lr_rate", None),
        ("--lr", "--learning_rate"),
        ("--n_layers", "--num_hidden_layers"),
        ("--learning-rat", "--learning_rate"),
        ("--data", "--data_path"),
    ],
)
def test_a_wrong_flag_names_the_one_that_was_meant(flag: str, meant: str | None) -> None:
    with pytest.raises(UsageError, match=f"there is no flag {flag}") as caught:
        spec(f"{flag} 3")
    assert meant is None or f"did you mean {meant}" in str(caught.value)


def test_flag_aliases_are_leaves() -> None:
    flags = {option.name for option in spec_options()}
    assert set(FLAG_ALIASES.values()) <= flags
    assert not FLAG_ALIASES.keys() & flags


def test_a_flag_that_is_like_nothing_points_to_the_help() -> None:
    with pytest.raises(UsageError, match="submit --help"):
        spec("--zzzzzzzz=1")


def test_flags_override_the_file_under_whatever_name_it_used() -> None:
    base = {"name": "a", "training": {"num_train_epochs": 9, "batch_size": 1, "seed": 3}, "data": {"data_path": "/a"}}
    assert spec("--epochs 2 --per_device_train_batch_size 8", base)["training"] == {
        "epochs": 2,
        "batch_size": 8,
        "seed": 3,
    }
    assert base["training"] == {"num_train_epochs": 9, "batch_size": 1, "seed": 3}


def test_a_setting_under_both_its_names_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="--num_train_epochs and --epochs are the same setting"):
        spec_of({}, {"epochs": "2", "num_train_epochs": "3"}, [], HERE)


def test_set_is_typed_by_json_and_wins() -> None:
    sets = ("training.learning_rate=1e-3", "resources.timeouts.stop=5", "data.text_field=body", "labels.team=nlp")
    made = spec("--learning_rate 5e-4", {}, *sets)
    assert made["training"]["learning_rate"] == 1e-3
    assert made["resources"] == {"timeouts": {"stop": 5}}
    assert made["data"]["text_field"] == "body"
    assert made["labels"] == {"team": "nlp"}


def test_set_takes_a_bare_leaf_and_an_alias() -> None:
    assert parse_assignment("batch_size=3") == (("training", "batch_size"), 3)
    assert parse_assignment("training.num_train_epochs=3") == (("training", "epochs"), 3)
    assert parse_assignment("name=x=y") == (("name",), "x=y")


@pytest.mark.parametrize("wrong", ["batch_size", "=3", "training.=3", ".a=1"])
def test_set_without_a_place_or_value_is_wrong_usage(wrong: str) -> None:
    with pytest.raises(UsageError, match=r"GROUP\.FIELD=VALUE"):
        parse_assignment(wrong)


def test_labels() -> None:
    assert parse_labels(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    for wrong in ("a", "=1"):
        with pytest.raises(UsageError, match="KEY=VALUE"):
            parse_labels([wrong])


def test_paths_are_seen_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    data = {"data_path": "a.jsonl", "eval_data_path": "/abs/b.jsonl", "tokenizer_path": "tok"}
    made = with_absolute_paths(
        {"data": data, "training": {"from_weight": "w.pth"}, "checkpoint": {"save_dir": "o"}}, tmp_path
    )
    assert made["data"] == {
        "data_path": f"{tmp_path}/a.jsonl",
        "eval_data_path": "/abs/b.jsonl",
        "tokenizer_path": f"{tmp_path}/tok",
    }
    assert made["training"]["from_weight"] == f"{tmp_path}/w.pth"
    assert made["checkpoint"]["save_dir"] == f"{tmp_path}/o"


def test_task_files_are_found_from_here() -> None:
    tasks = [{"name": "a", "path": "tasks/a.jsonl", "kind": "choice"}, {"name": "b", "path": "/b"}, {}, 5]
    made = with_absolute_paths({"evaluation": {"tasks": tasks}}, HERE)
    assert [task.get("path") for task in made["evaluation"]["tasks"][:3]] == [f"{HERE}/tasks/a.jsonl", "/b", None]


@pytest.mark.parametrize("kept", ["none", "pretrain", ""])
def test_a_weight_s_name_is_no_path(kept: str) -> None:
    assert with_absolute_paths({"training": {"from_weight": kept}}, HERE) == {"training": {"from_weight": kept}}


@pytest.mark.parametrize(
    "odd", [{}, {"data": None}, {"data": []}, {"data": {"data_path": 5}}, {"data": {"data_path": "a\0"}}]
)
def test_a_spec_that_is_wrong_is_left_for_the_service(odd: dict[str, Any]) -> None:
    assert with_absolute_paths(dict(odd), HERE) == odd


def test_differences_name_what_was_chosen_and_nothing_else() -> None:
    sent = {"data": {"data_path": "/d"}, "model": {"hidden_size": 256}, "training": {"epochs": 1, "betas": [0.9, 0.95]}}
    assert differences(parse_spec(sent).spec, sent) == [
        ("model.hidden_size", "256"),
        ("data.data_path", '"/d"'),
        ("training.betas", "[0.9, 0.95]"),
    ]


def test_differences_show_a_derived_size_that_was_given() -> None:
    sent = {"data": {"data_path": "/d"}, "model": {"head_dim": 32}, "labels": {"a": "1"}}
    assert differences(parse_spec(sent).spec, sent) == [
        ("labels", '{"a": "1"}'),
        ("model.head_dim", "32"),
        ("data.data_path", '"/d"'),
    ]
