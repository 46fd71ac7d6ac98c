"""The OpenAPI document says what each call, parameter, field and body is, with the unit of each number."""

import ast
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from tests.service.harness import ServiceHarness
from trainyard.contract.patterns import PATTERN_MESSAGES
from trainyard.service.api.descriptions import EXAMPLES, FIELDS, PARAMETERS, TAGS

UNIT = re.compile(
    r"\b(bytes?|seconds|minutes|steps?|tokens?|nats|percent|fraction|ratio|half-life|number of|offset|degrees|version"
    r"|status code|maximum number|minimum number|counted from|ids? of|always)\b",
    re.IGNORECASE,
)
VERBS = re.compile(
    "submit|plan|list|get|update|pause|cancel|kill|save|resume|fork|delete|read|search|stream|download|export|create"
    "|rotate|revoke|test|redeliver|generate|clear|evaluate"
)
SPEC = re.compile(r"JobSpec|.*Spec|ModelConfig|Timeouts|PatchJobBody|ResumeBody")
"""The units of the job spec are in `x-unit`."""


@pytest.fixture
def document(rig: ServiceHarness) -> dict[str, Any]:
    found: dict[str, Any] = rig.app.openapi()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, found in document["paths"].items():
        for method, operation in found.items():
            yield f"{method.upper()} {path}", operation


def is_number(schema: dict[str, Any]) -> bool:
    branches = [schema, *schema.get("anyOf", ()), schema.get("items", {})]
    return any(branch.get("type") in ("integer", "number") for branch in branches)


def needs_unit(name: str, described: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    if is_number(schema) and not UNIT.search(described["description"]):
        yield f"{name}: {described['description']}"


def test_every_parameter_has_a_description_with_its_unit(document: dict[str, Any]) -> None:
    parameters = [
        (where, found) for where, operation in operations(document) for found in operation.get("parameters", ())
    ]
    assert len(parameters) > 80
    assert [f"{where} {found['name']}" for where, found in parameters if not found.get("description")] == []
    lacking = [
        text for where, found in parameters for text in needs_unit(f"{where} {found['name']}", found, found["schema"])
    ]
    assert lacking == [], "a number without a unit"


def test_every_property_has_a_description_with_its_unit(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    properties = [
        (model, name, found)
        for model, schema in schemas.items()
        for name, found in schema.get("properties", {}).items()
    ]
    bodies = [operation["requestBody"] for _, operation in operations(document) if "requestBody" in operation]
    for body in bodies:
        inline = body["content"]["application/json"]["schema"].get("properties", {})
        properties += [("body", name, found) for name, found in inline.items()]
    assert len(properties) > 400
    assert [f"{model}.{name}" for model, name, found in properties if not found.get("description")] == []
    ours = [(model, name, found) for model, name, found in properties if not SPEC.fullmatch(model)]
    assert [text for model, name, found in ours for text in needs_unit(f"{model}.{name}", found, found)] == []


def test_no_description_is_left_over(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    fields = {
        f"{model.partition('_')[0]}.{name}"
        for model, schema in schemas.items()
        for name in schema.get("properties", {})
    }
    given = {
        f"{operation['operationId']}.{parameter['name']}"
        for _, operation in operations(document)
        for parameter in operation.get("parameters", ())
    }
    for table, there in ((FIELDS, fields), (PARAMETERS, given)):
        plain = {name.partition(".")[2] for name in there}
        assert [name for name in table if name not in (there if "." in name else plain)] == []


def test_every_body_has_a_valid_example(document: dict[str, Any]) -> None:
    used = set()
    for where, operation in operations(document):
        if "requestBody" not in operation:
            continue
        content = operation["requestBody"]["content"]["application/json"]
        assert content.get("example"), where
        schema = {**content["schema"], "components": document["components"]}
        assert not list(jsonschema_rs.validator_for(schema).iter_errors(content["example"])), where
        used.add(operation["operationId"])
    assert used == set(EXAMPLES)


def test_examples_are_accepted(rig: ServiceHarness) -> None:
    spec = {**EXAMPLES["submitJob"], "data": {"data_path": str(rig.corpus), "max_seq_len": 512}}
    answer = rig.client.post("/jobs", json=spec)
    assert answer.status_code == 201, answer.text
    assert rig.client.post("/jobs/plan", json=spec).status_code == 200
    assert rig.client.patch(f"/jobs/{answer.json()['id']}", json=EXAMPLES["updateJob"]).status_code == 200
    assert rig.client.post("/tokens", json=EXAMPLES["createToken"]).status_code == 201
    assert rig.client.patch("/tokens/ci", json=EXAMPLES["updateToken"]).status_code == 200
    assert rig.client.post("/tokens/ci/rotate", json=EXAMPLES["rotateToken"]).status_code == 200
    hook = rig.client.post("/webhooks", json=EXAMPLES["createWebhook"])
    assert hook.status_code == 201, hook.text
    assert rig.client.patch(f"/webhooks/{hook.json()['id']}", json=EXAMPLES["updateWebhook"]).status_code == 200


def test_the_id_of_an_operation_says_what_it_does_and_its_tag_to_what(document: dict[str, Any]) -> None:
    assert {tag["name"] for tag in document["tags"]} == set(TAGS)
    used = set()
    for where, operation in operations(document):
        verb, rest = re.fullmatch(r"([a-z]+)((?:[A-Z][a-z]+)+)", operation["operationId"]).groups()  # type: ignore[union-attr] # fails the test
        assert VERBS.fullmatch(verb), where
        assert rest
        [tag] = operation["tags"]
        assert tag in TAGS, where
        used.add(tag)
        parts = [part for part in where.split(" ")[1].split("/") if part and "{" not in part]
        assert tag in parts or tag in ("service", "exports", "generation", "evaluations"), where
    assert used == set(TAGS)


def test_every_pattern_has_a_message_in_words(document: dict[str, Any]) -> None:
    patterns = set(re.findall(r"'pattern': ('(?:[^'\\]|\\.)*')", repr(document)))
    found = {ast.literal_eval(pattern) for pattern in patterns}
    assert len(found) > 8
    assert found <= set(PATTERN_MESSAGES)


def test_a_name_that_does_not_match_says_in_words_what_it_may_be(rig: ServiceHarness) -> None:
    answer = rig.client.post("/tokens", json={"name": "my agent"}).json()
    assert [(each["pointer"], each["message"]) for each in answer["errors"]] == [
        ("/name", "must be 1 to 64 letters (a-z), digits, dots, _ or -, and begin with a letter or digit")
    ]
