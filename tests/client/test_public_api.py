"""The public names of `import trainyard` change only on purpose."""

import inspect
from pathlib import Path
from typing import Any

import pytest

import trainyard
from tests.client.public_api import lines
from trainyard.client.webhooks import Webhooks

FROZEN = Path(__file__).with_name("public_api.txt")


def test_the_public_signatures_are_those_in_the_file() -> None:
    """Scripts of users depend on them: a change needs a line in the changelog."""
    hint = f"if this is intended: python -m tests.client.public_api > {FROZEN.name}, and a line in CHANGELOG.md"
    assert list(lines()) == FROZEN.read_text().splitlines(), hint


@pytest.mark.parametrize("kind", [trainyard.Client, trainyard.Job, trainyard.Pages, Webhooks])
def test_every_public_method_is_documented(kind: type) -> None:
    public = inspect.getmembers(kind, lambda value: inspect.isfunction(value) and not value.__name__.startswith("_"))
    assert public
    assert [name for name, method in public if not inspect.getdoc(method)] == []


def test_every_error_has_a_code_of_its_own() -> None:
    kinds: list[Any] = trainyard.TrainyardError.__subclasses__()
    codes = [kind.code for kind in kinds if kind is not trainyard.ApiError]
    assert len(set(codes)) == len(codes) >= 6
    assert trainyard.TrainyardError.code not in codes
