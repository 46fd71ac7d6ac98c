"""The data pages: the list of corpora, and what one of them holds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, Route, expect

from tests.browser.page_checks import check_both_themes
from tests.data.texts import docstrings, write_jsonl
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from trainyard.contract.corpus_files import expand
from trainyard.contract.corpus_report import CorpusReport, SourceReport
from trainyard.worker.data.fileset import FileSetOptions, open_files
from trainyard.worker.data.tokenizers import ByteTokenizer

pytestmark = pytest.mark.long

NOW = "2026-01-31T16:31:05Z"


def source_report(folder: Path, name: str, texts: list[list[str]], bad: str = "") -> SourceReport:
    """The report of a real corpus of some files."""
    place = folder / name
    place.mkdir(parents=True)
    for number, part in enumerate(texts):
        write_jsonl(place / f"part-{number:05}.jsonl", part)
    with (place / "part-00000.jsonl").open("a") as file:
        file.write(bad)
    corpus = open_files(
        expand(str(place)), FileSetOptions(ByteTokenizer(), "byte", folder / "cache", max_bad_lines=1.0)
    )
    report = SourceReport.read(corpus.directory)
    assert report is not None
    return report.model_copy(update={"name": name})


def corpus(corpus_id: str, **fields: Any) -> dict[str, Any]:
    """An answer of `GET /corpora/{id}`."""
    spec = {"data_path": "/data/web", "tokenizer_path": "/data/tokenizer", "max_seq_len": 128, "eval_fraction": 0.1}
    known = {"object": "corpus", "id": corpus_id, "status": "ready", "cached": True, "spec": spec, "launcher": "local"}
    unknown = dict.fromkeys(("attempt", "progress", "reason", "message", "error", "report", "restart_at"))
    return {**known, **unknown, "jobs": [], "created_at": NOW, "started_at": NOW, "finished_at": NOW, **fields}


def answer(page: Page, *corpora: dict[str, Any]) -> None:
    """Answer requests for corpora with these."""

    def fulfill(route: Route) -> None:
        found = {f"/corpora/{each['id']}": each for each in corpora}
        path = re.sub(r"^https?://[^/]+|\?.*$", "", route.request.url)
        if path == "/corpora":
            route.fulfill(json={"object": "list", "data": list(corpora), "has_more": False})
        elif path in found:
            route.fulfill(json=found[path])
        else:
            route.fulfill(status=404, json={"code": "corpus_not_found", "detail": "No corpus has this id."})

    page.route(re.compile(r"/corpora(/[^/]+)?(\?.*)?$"), fulfill)


PREPARING = corpus(
    "corpus_b",
    status="preparing",
    cached=False,
    spec={"sources": [{"name": "web", "path": "/data/web"}, {"name": "code", "path": ["/data/a", "/data/b"]}]},
    progress={
        "done_bytes": 300_000_000, "total_bytes": 1_200_000_000, "percent": 25.0,
        "bytes_per_second": 2_000_000.0, "eta_seconds": 450.0,
    },
)  # fmt: skip
FAILED = corpus(
    "corpus_c",
    status="failed",
    cached=False,
    message="/data/web/a-very-long-name-of-a-file-with-many-words-in-it.jsonl cannot be read: Permission denied",
    error={"code": "data_invalid", "message": "m", "hint": "`trainyard corpus check FILE` lists every bad line."},
)


def test_the_list_has_state_and_progress(rig: ServiceHarness, page: Page, tmp_path: Path) -> None:
    report = CorpusReport.of([source_report(tmp_path, "web", [["one", "two"]])])
    ready = corpus("corpus_a", report=report.model_dump(mode="json"), jobs=["job_x", "job_y", "job_z"])
    waiting = {"id": "job_z", "name": "needs-it", "status": "preparing"}
    answer(page, ready, PREPARING, FAILED)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        page.route(
            re.compile(r"/jobs\?limit=100&fields=summary$"),
            lambda route: route.fulfill(json={"object": "list", "data": [waiting], "has_more": False}),
        )
        page.get_by_role("link", name="Data").click()
        table = page.get_by_role("region", name="Corpora").locator("tbody tr")
        expect(table).to_have_count(3)
        expect(page.get_by_text("3 corpora")).to_be_visible()
        expect(table.nth(0)).to_contain_text("/data/web")
        expect(table.nth(0)).to_contain_text("ready")
        assert table.nth(0).locator("td.num").all_text_contents() == ["2", "10", "1"]
        expect(table.nth(0).locator("li")).to_have_text(["needs-it waits for it", "job_x ", "and 1 more "])
        expect(table.nth(0).get_by_role("link", name="Start a run from /data/web")).to_have_attribute(
            "href", "/submit?corpus=corpus_a"
        )
        expect(table.nth(1)).to_contain_text("web, code")
        expect(table.nth(1)).to_contain_text("300 MB of 1.2 GB, 2.0 MB/s, 8 min left")
        expect(table.nth(1).locator("progress")).to_have_attribute("value", "25")
        expect(table.nth(2)).to_contain_text("cannot be read: Permission denied")
        check_both_themes(page, "data")
        table.nth(1).get_by_role("link", name="web, code", exact=True).click()
        expect(page.get_by_role("heading", name="web, code")).to_be_visible()
        expect(page.get_by_text("code: /data/b")).to_be_visible()


def test_without_a_corpus_the_list_has_the_command(rig: ServiceHarness, page: Page) -> None:
    answer(page)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/data")
        expect(page.get_by_role("heading", name="No corpus yet")).to_be_visible()
        expect(page.locator(".command pre")).to_have_text("trainyard corpus build PATH")
        check_both_themes(page, "data-empty")


def test_a_corpus_is_described(rig: ServiceHarness, page: Page, tmp_path: Path) -> None:
    texts = sorted(set(docstrings()[:300]))
    bad = 'nonsense\n{"text": 3}\n'
    web = source_report(tmp_path, "web", [texts[:200], [*texts[200:260], texts[0], "文字 🙂"]], bad)
    code = source_report(tmp_path, "code", [["<b>not bold</b>", "x" * 5000]])
    spec = {
        "sources": [{"name": "web", "path": "/data/web"}, {"name": "code", "path": ["/data/code"]}],
        "tokenizer_path": "byte",
    }
    job = rig.submit(name="uses-it")
    described = corpus(
        "corpus_a",
        spec=spec,
        jobs=[job, "job_gone"],
        report=CorpusReport.of([web, code]).model_dump(mode="json"),
    )
    answer(page, described, FAILED)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/data/corpus_a")
        main = page.locator("main")
        expect(main.get_by_role("heading", name="Source web")).to_be_visible()
        expect(main).to_contain_text(f"Documents{web.documents + code.documents:,}")
        lengths = page.get_by_role("region", name="Lengths of the documents of web").locator("tbody tr")
        expect(lengths).to_have_count(len(web.lengths))
        expect(lengths.first).to_contain_text(f"{web.lengths[0].min} to {web.lengths[0].max}")
        names = page.get_by_role("region", name="Bad documents of web").locator("tbody tr")
        assert [row.locator("td").all_text_contents() for row in names.all()] == [
            ["part-00000.jsonl", "201", "not JSON at character 1"],
            ["part-00000.jsonl", "202", "'text' is not a string but a number"],
        ]
        copies = page.locator("dt", has_text="Copies of an earlier document").locator("+ dd")
        assert copies.all_text_contents() == [str(web.duplicates), "0"]
        expect(page.locator(".document")).to_have_count(5)
        expect(page.locator(".document", has_text="<b>not bold</b>")).to_be_visible()
        page.get_by_text("2 files").click()
        expect(page.get_by_role("region", name="Files of web").locator("tbody tr")).to_have_count(2)
        expect(page.get_by_role("link", name="uses-it")).to_have_attribute("href", f"/jobs/{job}")
        users = page.get_by_role("region", name="Jobs that use the corpus").locator("tbody tr")
        expect(users.first).to_contain_text("local")
        expect(users.nth(1)).to_contain_text("job_gonedeleted")
        check_both_themes(page, "corpus")
        page.goto(f"http://{host}:{port}/data/corpus_c")
        expect(page.get_by_text("lists every bad line")).to_be_visible()
        check_both_themes(page, "corpus-failed")
        page.goto(f"http://{host}:{port}/data/corpus_nope")
        expect(page.get_by_text("There is no such corpus.")).to_be_visible()


def test_a_run_is_started_from_a_corpus(rig: ServiceHarness, page: Page) -> None:
    answer(page, corpus("corpus_a"))
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/data/corpus_a")
        expect(page.get_by_text("An older release tokenized it")).to_be_visible()
        page.get_by_role("link", name="Start a run from it").click()
        expect(page.get_by_role("heading", name="Submit a job with the corpus corpus_a")).to_be_visible()
        page.get_by_text("JSON", exact=True).first.click()
        draft = json.loads(page.locator("textarea").last.input_value())
        assert draft["data"] == {"data_path": "/data/web", "tokenizer_path": "/data/tokenizer"}
        page.goto(f"http://{host}:{port}/submit?corpus=corpus_nope")
        expect(page.get_by_text("There is no corpus corpus_nope.")).to_be_visible()
