"""`trainyard corpus build`, connected to a service whose processes do what the test says."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.service_home import until
from tests.service.conftest import Command, MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.test_corpora import finish, look, process, progress
from trainyard.client.cli.commands.corpora import progress_text
from trainyard.client.types import TokenizedCorpus
from trainyard.contract.status import Reason

Result = tuple[int, str, str]


@pytest.fixture
def rig(make_rig: MakeHarness, sqlite_url: str) -> Iterator[ServiceHarness]:
    """A service that prepares corpora; `command` is connected to it."""
    made = make_rig(sqlite_url, prepares=True)
    yield made
    made.close()


@pytest.fixture
def in_background(command: Command) -> Iterator[Callable[..., "Future[Result]"]]:
    with ThreadPoolExecutor(1) as pool:
        yield lambda *arguments: pool.submit(command, *arguments)


def started(rig: ServiceHarness) -> str:
    """The id of the corpus, whose process is running."""
    corpus: dict[str, str] = until(lambda: next(iter(rig.get("/corpora")["data"]), None))
    rig.reconcile()
    return corpus["id"]


def test_build_waits_and_prints_progress(rig: ServiceHarness, in_background: Callable[..., "Future[Result]"]) -> None:
    running = in_background("corpus", "build", str(rig.corpus))
    corpus_id = started(rig)
    attempt = process(rig, corpus_id)
    progress(attempt, 100)
    progress(attempt, 500)
    look(rig)
    until(lambda: rig.get(f"/corpora/{corpus_id}")["progress"]["percent"] == 50)
    finish(rig, attempt)
    code, out, err = running.result(60)
    assert (code, out) == (0, f"{corpus_id}\n")
    assert "ready: prepared 1 document with 5 tokens" in err


def test_a_failure_is_exit_code_10_with_the_hint(
    rig: ServiceHarness, in_background: Callable[..., "Future[Result]"]
) -> None:
    running = in_background("corpus", "build", str(rig.corpus), "--json")
    attempt = process(rig, started(rig))
    attempt.end("failed", Reason.DATA_INVALID, message="3 bad lines")
    look(rig)
    code, out, _ = running.result(60)
    assert code == 10
    assert json.loads(out)["error"]["message"] == "3 bad lines"


def test_no_wait_and_timeout(rig: ServiceHarness, command: Command) -> None:
    code, out, err = command("corpus", "build", str(rig.corpus), "--no-wait")
    assert (code, out.startswith("corpus_"), err) == (0, True, "queued\n")
    assert command("corpus", "build", str(rig.corpus), "--timeout", "0.1")[0] == 124


def test_mistakes_name_the_field(rig: ServiceHarness, command: Command) -> None:
    code, _, err = command("corpus", "build", "/nowhere/c.jsonl", "--tokenizer-path", "/nowhere")
    assert code == 1
    assert "/data_path: lies outside the directories" in err
    assert "/tokenizer_path: lies outside the directories" in err
    assert command("corpus", "build")[0] == 2
    assert command("corpus", "build", str(rig.corpus), "--spec", "x.json")[0] == 2


def test_the_data_of_a_spec(rig: ServiceHarness, command: Command) -> None:
    file = rig.home / "spec.json"
    sources = [{"name": "a", "path": str(rig.corpus), "weight": 2.0}]
    file.write_text(json.dumps({"data": {"sources": sources, "max_seq_len": 64}, "training": {"max_steps": 5}}))
    assert command("corpus", "build", "--spec", str(file), "--no-wait", "--text_field", "t")[0] == 0
    [corpus] = rig.get("/corpora")["data"]
    assert (corpus["spec"]["sources"][0]["name"], corpus["spec"]["text_field"]) == ("a", "t")
    for text in ("[]", "{}", "{", '{"data": 3}'):
        file.write_text(text)
        assert command("corpus", "build", "--spec", str(file))[0] == 2


def test_relative_paths_of_a_spec_start_at_the_working_directory(
    rig: ServiceHarness, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rig.corpus.parent)
    file = rig.home / "spec.json"
    for data in ({"data_path": rig.corpus.name}, {"sources": [{"name": "a", "path": rig.corpus.name}]}):
        file.write_text(json.dumps({"data": data}))
        code, _, err = command("corpus", "build", "--spec", str(file), "--no-wait")
        assert code == 0, err


def test_progress_text() -> None:
    corpus: TokenizedCorpus = {"status": "preparing", "progress": None}
    assert progress_text(corpus) == "preparing"
    corpus["progress"] = {
        "done_bytes": 12_000_000,
        "total_bytes": 24_000_000,
        "percent": 50.0,
        "bytes_per_second": 1_500_000.0,
        "eta_seconds": 8.0,
    }
    assert progress_text(corpus) == "preparing: 12.0 MB of 24.0 MB (50 %), 1.5 MB/s, 8 s left"


def test_a_wrong_path_is_printed_in_full(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("corpus", "build", "nope.jsonl")
    assert (code, f"({tmp_path / 'nope.jsonl'})" in err) == (1, True), err
