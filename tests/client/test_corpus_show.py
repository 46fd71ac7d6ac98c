"""`trainyard corpus show ID`: a corpus of the service."""

import json

import httpx2

from tests.client.conftest import Run
from tests.client.fake_service import FakeService, problem
from trainyard.contract.corpus_report import CorpusReport, LengthBucket, SampleDocument, SourceReport


def report() -> CorpusReport:
    sample = SampleDocument(file="a.jsonl", document=1, tokens=3, text="one\n\x1b[31mtwo", truncated=False)
    source = SourceReport(
        name="web", files=1, listed=(), bytes=1000, documents=1, tokens=5, text_bytes=9, bytes_per_token=3.0,
        single_byte_share=0.0, vocab_size=300, vocab_used=4, lengths=(LengthBucket(min=2, max=3, documents=1),),
        bad_documents=0, bad=(), samples=(sample,), duplicates=0, text_field="text", tokenizer="f",
    )  # fmt: skip
    return CorpusReport.of([source])


def answer(service: FakeService, **fields: object) -> None:
    corpus = {"object": "corpus", "id": "corpus_abc", "status": "ready", "cached": True, "jobs": ["job_x"]}
    spec = {"sources": [{"name": "web", "path": ["/a", "/b"]}], "tokenizer_path": "/t"}
    service.faults.append(lambda _: httpx2.Response(200, json={**corpus, "spec": spec, **fields}))


def test_a_tokenized_corpus_is_described(run: Run, service: FakeService) -> None:
    answer(service, report=report().model_dump(mode="json"))
    code, out, _ = run("corpus", "show", "corpus_abc")
    assert code == 0
    assert service.requests[0].url.path == "/corpora/corpus_abc"
    for line in ("corpus_abc  ready", "  data       web: /a, web: /b", "  tokenizer  /t", "  jobs       job_x"):
        assert line in out.splitlines()
    assert "web: 1 file, 1.0 kB" in out
    assert "\x1b" not in out


def test_a_corpus_that_is_being_prepared_has_its_progress(run: Run, service: FakeService) -> None:
    progress = {"done_bytes": 1, "total_bytes": 4, "percent": 25.0, "bytes_per_second": None, "eta_seconds": None}
    answer(service, status="preparing", cached=False, report=None, progress=progress, jobs=[])
    code, out, _ = run("corpus", "show", "corpus_abc")
    assert code == 0
    assert "corpus_abc  preparing, not in the cache" in out
    assert "progress   preparing: 1 B of 4 B (25 %)" in out
    assert "jobs       none" in out


def test_json_is_the_answer_of_the_service(run: Run, service: FakeService) -> None:
    answer(service, report=None)
    _, out, _ = run("corpus", "show", "corpus_abc", "--json")
    assert json.loads(out)["id"] == "corpus_abc"


def test_an_unknown_id_is_an_error(run: Run, service: FakeService) -> None:
    service.faults.append(lambda _: problem(404, "corpus_not_found", "No corpus has this id."))
    code, out, err = run("corpus", "show", "corpus_abc")
    assert (code, out) == (1, "")
    assert "No corpus has this id." in err
