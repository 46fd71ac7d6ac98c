"""Sizes from a depth: each number by its rule, what is given stays, and mistakes are named. And the largest batch."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from trainyard.contract.recipes import RECIPES
from trainyard.contract.spec import JobSpec
from trainyard.model import costs
from trainyard.service.devices.inventory import Device
from trainyard.service.devices.memory import free_memory
from trainyard.service.jobs import memory
from trainyard.service.planning.depth_dial import scaling_parameters


def propose(rig: ServiceHarness, depth: int, **spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    answer = rig.client.post("/jobs/proposal", json={"depth": depth, "spec": spec})
    assert answer.status_code == 200, answer.text
    proposal = answer.json()
    return proposal, {setting["pointer"]: setting for setting in proposal["settings"]}


def spec_of(model: dict[str, Any]) -> JobSpec:
    return JobSpec.model_validate_json(json.dumps({"data": {"data_path": "x"}, "model": model}))


@pytest.mark.parametrize("depth", [1, 4, 5, 12, 24, 128])
def test_each_number_follows_its_rule(rig: ServiceHarness, depth: int) -> None:
    proposal, settings = propose(rig, depth, data={"max_seq_len": 1024})
    model, training = proposal["spec"]["model"], proposal["spec"]["training"]
    assert (model["num_hidden_layers"], model["hidden_size"]) == (depth, 64 * depth)
    assert model["num_attention_heads"] * model["head_dim"] == 64 * depth
    assert model["num_attention_heads"] % model["num_key_value_heads"] == 0

    def tokens(layers: int) -> float:
        found = propose(rig, layers)[0]["spec"]["model"]
        spec = spec_of({**found, "vocab_size": 259})
        matrices = costs.parameters(spec.model) - (2 * layers + 1) * 64 * layers - layers * 2 * found["head_dim"]
        assert scaling_parameters(spec.model) == matrices, "all but the norms"
        return 10.5 * float(matrices)

    assert training["max_tokens"] == round(tokens(depth))
    batch = 2 ** round(math.log2(2**19 * (tokens(depth) / tokens(12)) ** 0.383))
    rows = training["batch_size"] * training["accumulation_steps"]
    assert rows * 1024 == pytest.approx(batch, rel=0.5 if batch < 2**13 else 0.01)
    ratio = rows * 1024 / 2**19
    assert training["learning_rate"] == pytest.approx(6e-4 * math.sqrt(ratio * 768 / (64 * depth)), rel=1e-2)
    decay = 0.1 * math.sqrt(ratio) * tokens(12) / tokens(depth)
    assert training["weight_decay"] == pytest.approx(min(1.0, decay), rel=1e-2)
    assert all(setting["reason"] for setting in settings.values())
    assert {"/model/hidden_size", "/training/max_tokens", "/training/learning_rate"} <= settings.keys()
    if depth <= 12:  # larger ones may not fit into this host
        spec = {**proposal["spec"], "data": {"data_path": str(rig.corpus), "max_seq_len": 1024}}
        assert rig.client.post("/jobs/plan", json=spec).status_code == 200


def test_the_settings_of_a_recipe_stay(rig: ServiceHarness) -> None:
    proposal, settings = propose(rig, 4, training={"recipe": "fast"})
    filled = {f"/training/{name}" for name in RECIPES["fast"]({}, {})}
    assert not filled & settings.keys()
    assert "/training/max_tokens" in settings
    assert proposal["spec"]["training"]["recipe"] == "fast"


def test_what_is_given_stays_and_the_rest_follows_it(rig: ServiceHarness) -> None:
    training = {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 10, "decay_steps": 3}
    proposal, settings = propose(rig, 4, name="mine", training=training, data={"max_seq_len": 256})
    found = proposal["spec"]
    assert {name: found["training"][name] for name in training} == training
    assert found["name"] == "mine"
    assert found["data"] == {"max_seq_len": 256}
    given = {f"/training/{name}" for name in training} | {"/training/max_tokens", "/training/decay_fraction"}
    assert not given & settings.keys()
    assert found["training"]["accumulation_steps"] * 4 * 256 == pytest.approx(2**17, rel=0.5)
    assert rig.client.get("/jobs").json()["data"] == [], "nothing is stored"


def test_a_weighted_mixture_gets_the_length_that_it_needs(rig: ServiceHarness) -> None:
    sources = [{"name": name, "path": str(rig.corpus), "weight": 1.0} for name in ("a", "b")]
    proposal, _ = propose(rig, 2, data={"sources": sources})
    assert proposal["spec"]["training"]["max_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({}, ["/depth"]),
        ({"depth": 0}, ["/depth"]),
        ({"depth": 129}, ["/depth"]),
        ({"depth": "12"}, ["/depth"]),
        ({"depth": 12, "wide": 1}, ["/wide"]),
        ({"depth": 12, "spec": 3}, ["/spec"]),
        (
            {"depth": 12, "spec": {"training": {"batch_size": 0, "speed": 1}}},
            ["/spec/training/batch_size", "/spec/training/speed"],
        ),
        ({"depth": 12, "spec": {"model": {"num_key_value_heads": 5}}}, ["/spec/model/num_key_value_heads"]),
        ({"depth": 12, "spec": {"model": None, "training": []}}, ["/spec/model", "/spec/training"]),
        ({"depth": 12, "spec": {"data": {"tokenizer_path": "/nowhere"}}}, ["/spec/data/tokenizer_path"]),
        ({"depth": 12, "spec": {"data": {"data_path": "/nowhere"}}}, ["/spec/data/data_path"]),
    ],
)
def test_mistakes_are_named(rig: ServiceHarness, body: dict[str, Any], pointers: list[str]) -> None:
    answer = rig.client.post("/jobs/proposal", json=body)
    assert answer.status_code == 422
    assert sorted(error["pointer"] for error in answer.json()["errors"]) == sorted(pointers)


def test_the_suggested_batch_size_is_the_largest_that_fits() -> None:
    spec = spec_of({"vocab_size": 6400})
    free = 8 * 10**9
    size = memory.suggested_batch_size(spec, "cuda", free)
    assert size is not None
    totals = [
        memory.needed(memory.with_settings(spec, {"training": {"batch_size": each}}), "cuda")
        for each in (size, size + 1)
    ]
    assert totals[0] <= 0.9 * free < totals[1]
    assert memory.suggested_batch_size(spec, "cuda", 10**6) is None
    assert memory.suggested_batch_size(spec, "cuda", None) is None
    assert memory.suggested_batch_size(spec, "cuda", 10**18) == memory.MAX_BATCH_SIZE


def test_free_memory_is_that_of_the_fullest_device_a_run_would_use(tmp_path: Path) -> None:
    used = (70, 10, 30)
    devices = [Device(f"cuda:{n}", "cuda", memory_bytes=80, memory_used_bytes=value) for n, value in enumerate(used)]
    assert [free_memory("cuda", devices, ranks) for ranks in (1, 2, 3, 4)] == [70, 50, 10, 10]
    assert free_memory("cuda:0", devices) == 10
    assert free_memory("cuda", []) is None
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 40 kB\n")
    assert free_memory("cpu", [], proc=tmp_path) == 40 * 1024


def test_the_plan_suggests_a_batch_size(rig: ServiceHarness) -> None:
    plan = rig.client.post("/jobs/plan", json={"data": {"data_path": str(rig.corpus)}}).json()
    assert plan["suggested_batch_size"] is None or plan["suggested_batch_size"] >= 1
