"""The page of the Python API: its blocks are one program, run against a real service."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import trainyard
from benchmarks.corpus import write_docstrings
from tests.guides.code_blocks import DOCS, NOT_HERE, blocks
from tests.story.service_process import Served
from trainyard.client.webhooks import Webhooks

PAGE = DOCS / "guides" / "python.md"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    write_docstrings(tmp_path / "corpus.jsonl", 200)
    service = Served(tmp_path / "home", [tmp_path])
    service.start()
    yield service
    service.stop()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_blocks_run_in_order(service: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINYARD_URL", service.url)
    monkeypatch.delenv("TRAINYARD_TOKEN", raising=False)
    namespace: dict[str, Any] = {"__name__": "guide"}
    for block in blocks(PAGE):
        assert block.language == "python"
        if block.how.startswith(NOT_HERE) or ("to_pandas" in block.text and find_spec("pandas") is None):
            continue
        # The empty lines give a traceback the line numbers of the page.
        exec(compile("\n" * block.line + block.text, str(PAGE), "exec"), namespace)
    assert namespace["job"]["status"] == "cancelled"
    assert namespace["child"]["status"] == "succeeded"
    assert namespace["child"]["progress"]["step"] == namespace["last"]
    assert namespace["points"][0]["step"] == 11
    assert namespace["job"].id == namespace["child"].parent["job_id"]
    assert set(namespace["mistakes"]) == {"/data/data_path", "/training/learning_rate"}
    assert isinstance(namespace["losses"]["python-guide"], float)
    assert (tmp_path / "checkpoint" / "model.safetensors").stat().st_size > 0


def test_the_page_lists_every_method() -> None:
    text = PAGE.read_text()
    kinds = (trainyard.Client, trainyard.Job, trainyard.Pages, Webhooks)
    public = [name for kind in kinds for name in vars(kind) if not name.startswith("_")]
    assert public
    assert [name for name in public if f"`{name}`" not in text] == []


def test_the_page_lists_every_public_name() -> None:
    text = PAGE.read_text()
    assert [name for name in trainyard.__all__ if f"trainyard.{name}" not in text and f"`{name}`" not in text] == []
