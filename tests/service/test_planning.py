"""POST /jobs/plan: the estimate against the worker's own counts, the warnings, and that nothing is stored."""

import gzip
import itertools
import json
import math
import random
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.contract.prepared import corpus_parts, mark_prepared
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.model.config import ModelConfig
from trainyard.model.costs import flops_per_token
from trainyard.service.api.routers.planning import make_preview
from trainyard.service.auth.principal import LOCAL
from trainyard.service.devices.inventory import Device
from trainyard.service.devices.memory import disk_free, host_memory
from trainyard.service.jobs.submission import validate_spec
from trainyard.service.planning import corpus_sample
from trainyard.service.planning.corpus_sample import SampledLines, other_format, sample_lines
from trainyard.service.planning.estimate import PlannedSource, RunSize, estimate_size
from trainyard.service.planning.matrix_speed import EFFICIENCY, MatrixSpeed
from trainyard.service.planning.preview import sample_corpus
from trainyard.service.planning.token_count import longest_matches, token_counter
from trainyard.service.planning.warnings import HostCapacity, advice, source_warnings, warnings

WORDS = ["the", "of", "and", "to", "in", "was", "for", "with", "they", "have", "from", "one", "word", "but", "what"]


def write_corpus(path: Path, documents: int, seed: int, bad_every: int = 0, most_words: int = 60) -> None:
    dice = random.Random(seed)
    with path.open("w") as file:
        for number in range(documents):
            if bad_every and number % bad_every == 0:
                file.write("{not json\n")
            text = " ".join(dice.choice(WORDS) for _ in range(1 + dice.randrange(most_words)))
            file.write(json.dumps({"text": text + "é" * dice.randrange(3)}) + "\n")


def plan(rig: ServiceHarness, expect: int = 200, **groups: Any) -> dict[str, Any]:
    answer = rig.client.post("/jobs/plan", json=rig.spec(**groups))
    assert answer.status_code == expect, answer.text[:500]
    found: dict[str, Any] = answer.json()
    return found


# The sample


def test_a_short_file_is_counted_exactly(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": ""}\n{"text": 3}\n[1]\nx\n{"text": "\xc3\xa9\xe2\x80\xa8b"}'
    )
    found = sample_lines(path, "text")
    assert found is not None
    assert (found.texts, found.bad_lines, found.is_complete, found.scale) == (["a", "é\u2028b"], 4, True, 1.0)
    assert found.names == ("text",)


def test_a_file_under_another_name_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"content": "a", "id": 1, "title": "b"}\n{"body": "c"}\n')
    found = sample_lines(path, "text")
    assert found is not None
    assert (found.texts, found.bad_lines, found.names) == ([], 2, ("content", "title"))


def test_what_cannot_be_sampled(tmp_path: Path) -> None:
    assert sample_lines(tmp_path / "none", "text") is None
    assert sample_lines(tmp_path, "text") is None
    for name, content in (
        ("c.gz", b"\x1f\x8b"),
        ("c.zst", b"\x28\xb5\x2f\xfd"),
        ("c", b"PAR1"),
        ("c.txt", b"any text"),
    ):
        (tmp_path / name).write_bytes(content)
        assert sample_lines(tmp_path / name, "text") is None
    empty = tmp_path / "empty"
    empty.touch()
    found = sample_lines(empty, "text")
    assert found == SampledLines(0)
    assert found.scale == 0.0


def test_of_a_long_file_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_sample, "SAMPLE_BYTES", 64 << 10)
    path = tmp_path / "c.jsonl"
    write_corpus(path, 20_000, seed=1, bad_every=50)
    found = sample_lines(path, "text")
    assert found is not None
    assert not found.is_complete
    assert found.sampled_bytes <= 64 << 10
    assert found.scale * len(found.texts) == pytest.approx(20_000, rel=0.1)
    assert found.scale * found.bad_lines == pytest.approx(400, rel=0.6)


def test_one_endless_line_is_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_sample, "SAMPLE_BYTES", 16 << 10)
    path = tmp_path / "c.jsonl"
    path.write_text("x" * 200_000)
    found = sample_lines(path, "text")
    assert found is not None
    assert (found.texts, found.scale) == ([], 0.0)


# Tokens


def test_bytes_are_counted_exactly() -> None:
    assert token_counter("byte", [])("aé") == 2 + 3


def test_a_vocabulary_is_used_by_its_longest_matches(tmp_path: Path) -> None:
    assert longest_matches("abcab", frozenset({"a", "b", "c", "ab", "abc"})) == 2
    assert longest_matches("zzz", frozenset({"a"})) == 3
    spelt = ["a", "b", "\u0120", "ab", "\u0120ab"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {t: i for i, t in enumerate(spelt)}}}))
    count = token_counter(str(tmp_path), ["ab ab ab ab"])
    assert count("ab ab ab ab") == pytest.approx(2 + 4)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["\u2581a", 0.1], ["a", 0.2]]}}))
    assert token_counter(str(tmp_path), ["a a a"])("a a a") == pytest.approx(2 + 3)
    (tmp_path / "tokenizer.json").write_text("{")
    assert token_counter(str(tmp_path), ["abc"])("abc") == 5


# The size, against the worker's own


def test_special_tokens_are_counted_and_their_remedy_is_in_the_warning(rig: ServiceHarness, tmp_path: Path) -> None:
    from trainyard.worker.data.corpus import open_corpus
    from trainyard.worker.data.tokenizers import load_tokenizer

    path = Path(rig.spec()["data"]["data_path"]).parent / "marked.jsonl"
    texts = ["plain"] * 20 + ["<|im_start|>a<|im_end|> <|im_start|>b<|im_end|>"] * 20
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    as_text = plan(rig, data={"data_path": str(path)})
    assert (as_text["special_tokens"], as_text["special_texts"]) == (80, 20)
    (warning,) = [text for text in as_text["warnings"] if "special tokens" in text]
    assert warning.startswith("50.0 % of the texts hold special tokens (80 in all)")
    assert 'set data.special_tokens to "tokens"' in warning
    as_tokens = plan(rig, data={"data_path": str(path), "special_tokens": "tokens"})
    assert not [text for text in as_tokens["warnings"] if "special tokens" in text]
    # The byte tokenizer's counts are exact.
    modes: tuple[Any, ...] = ("text", "tokens")
    counts = [open_corpus(path, load_tokenizer("byte", mode), cache=tmp_path / "cache").meta.tokens for mode in modes]
    assert [as_text["tokens"], as_tokens["tokens"]] == counts


@pytest.mark.parametrize("packing", ["document", "none"])
@pytest.mark.parametrize("seq_len", [64, 340])
def test_the_estimate_is_near_what_the_worker_finds(tmp_path: Path, packing: Any, seq_len: int) -> None:
    from trainyard.worker.data.corpus import open_corpus
    from trainyard.worker.data.packing import PackedDataset
    from trainyard.worker.data.tokenizers import load_tokenizer

    path = tmp_path / "c.jsonl"
    write_corpus(path, 1500, seed=seq_len)
    corpus = open_corpus(path, load_tokenizer("byte"), cache=tmp_path / "cache")
    rows = PackedDataset.open(corpus, max_seq_len=seq_len, packing=packing)
    spec = JobSpec.model_validate({"data": {"data_path": str(path), "max_seq_len": seq_len, "packing": packing}})
    found = sample_lines(path, "text")
    assert found is not None
    count = token_counter("byte", found.texts)
    size = estimate_size(spec, Counter(map(count, found.texts)), found.bad_lines, found.scale)
    assert size is not None
    assert (size.tokens, size.documents) == (corpus.meta.tokens, corpus.meta.documents)
    assert size.targets == rows.tokens
    assert size.attention_length == pytest.approx(rows.attention_length)
    assert size.samples == pytest.approx(len(rows), rel=0.05)
    assert packing == "document" or size.samples == len(rows)


@pytest.mark.parametrize(("packing", "seq_len"), [("document", 64), ("document", 512), ("none", 64)])
def test_a_tokenized_corpus_is_counted_by_its_report(tmp_path: Path, packing: Any, seq_len: int) -> None:
    """Also one that cannot be sampled, because it is compressed."""
    from trainyard.worker.data.corpus import open_corpus
    from trainyard.worker.data.packing import PackedDataset
    from trainyard.worker.data.tokenizers import load_tokenizer

    cache, path = tmp_path / "cache", tmp_path / "c.jsonl.gz"
    write_corpus(tmp_path / "c.jsonl", 1500, seed=seq_len, bad_every=300)
    path.write_bytes(gzip.compress((tmp_path / "c.jsonl").read_bytes()))
    spec = JobSpec.model_validate({"data": {"data_path": str(path), "max_seq_len": seq_len, "packing": packing}})
    assert sample_corpus(spec, cache=cache).size is None
    corpus = open_corpus(path, load_tokenizer("byte"), cache=cache, text_field="text", max_bad_lines=0.01)
    mark_prepared(cache, corpus_parts(spec.data), {("data", False): corpus.directory.name})
    rows = PackedDataset.open(corpus, max_seq_len=seq_len, packing=packing)
    found = sample_corpus(spec, cache=cache)
    assert found.size is not None
    assert found.other_format is None
    assert (found.size.tokens, found.size.documents) == (corpus.meta.tokens, corpus.meta.documents)
    assert found.size.bad_lines == 5
    assert found.size.targets == pytest.approx(rows.tokens, abs=1)
    assert found.size.samples == pytest.approx(len(rows), rel=0.05)
    assert found.size.attention_length == pytest.approx(rows.attention_length, rel=0.05)
    [source] = found.sources
    assert (source.tokens, source.documents) == (corpus.meta.tokens, corpus.meta.documents)


def test_a_learned_vocabulary_is_guessed_within_a_tenth(tmp_path: Path) -> None:
    from trainyard.worker.data.tokenizers import load_tokenizer, train_tokenizer

    path = tmp_path / "c.jsonl"
    write_corpus(path, 400, seed=9)
    found = sample_lines(path, "text")
    assert found is not None
    train_tokenizer(found.texts, 320, tmp_path / "tokenizer")
    exact = sum(2 + len(ids) for ids in load_tokenizer(str(tmp_path / "tokenizer")).encode_batch(found.texts))
    count = token_counter(str(tmp_path / "tokenizer"), found.texts)
    assert sum(map(count, found.texts)) == pytest.approx(exact, rel=0.1)


def test_steps_follow_epochs_or_max_steps() -> None:
    def size(**training: Any) -> RunSize:
        batch = {"batch_size": 2, "accumulation_steps": 2}
        spec = JobSpec.model_validate(
            {"data": {"data_path": "x", "max_seq_len": 10, "packing": "none"}, "training": {**batch, **training}}
        )
        found = estimate_size(spec, {10.0: 9}, 0, 2.0)
        assert found is not None
        return found

    assert (size().samples, size().steps_per_epoch, size().steps) == (18, 5, 5)
    assert size(epochs=3).steps == 15
    assert size(max_steps=7).steps == 7
    tokens_per_step = 18 * 9 / 5
    assert [size(max_tokens=tokens).steps for tokens in (1, 32, 33, 324, 325)] == [1, 1, 2, 10, 11]
    assert size(max_tokens=1000).trained_tokens - 1000 < tokens_per_step
    assert size(max_steps=7).trained_tokens == pytest.approx(7 * 18 * 9 / 5)
    spec = JobSpec.model_validate({"data": {"data_path": "x", "eval_fraction": 0.5, "packing": "none"}})
    half = estimate_size(spec, {10.0: 10}, 0, 1.0)
    assert half is not None
    assert (half.samples, half.targets, half.tokens) == (5, 45, 100)
    assert estimate_size(spec, {}, 3, 1.0) is None


# Warnings


SIZE = RunSize(
    documents=100,
    tokens=10_000,
    bad_lines=0,
    samples=1000,
    targets=9000,
    steps_per_epoch=10,
    steps=2000,
    attention_length=100.0,
)
HERE = HostCapacity("cpu", 1 << 30, 8 << 30, 1 << 20, 1 << 40)


def sentences(size: RunSize | None = SIZE, here: HostCapacity = HERE, **groups: Any) -> list[str]:
    spec = {"data": {"data_path": "x", "tokenizer_path": "byte"}, "resources": {"device": "cpu"}, **groups}
    return warnings(JobSpec.model_validate(spec), size, here)


def test_a_byte_tokenizer_that_was_not_named_gives_a_warning(rig: ServiceHarness) -> None:
    assert any("tokenizer_path was not given" in text for text in plan(rig)["warnings"])
    data = {**rig.spec()["data"], "tokenizer_path": "byte"}
    named = plan(rig, data=data)["warnings"]
    assert not any("tokenizer_path" in text for text in named)


def test_a_usual_run_gives_no_warning() -> None:
    assert sentences() == []


@pytest.mark.parametrize(
    ("size", "here", "groups", "text"),
    [
        (SIZE, HERE, {"resources": {"device": "auto"}}, "will use the CPU"),
        (SIZE, replace(HERE, memory_limit=1 << 29), {}, "needs about 1.1 GB of memory and this host has 0.5 GB"),
        (SIZE, replace(HERE, memory_limit=(1 << 30) + 1), {}, "it may not fit"),
        (SIZE, replace(HERE, memory_limit=3 << 30, memory_needed=4 << 30), {}, "4.3 GB"),
        (SIZE, replace(HERE, disk_free=1 << 21), {}, "4 checkpoints (keep_last and the one being written) take 4.2 MB"),
        (replace(SIZE, bad_lines=10), HERE, {}, "9.1 % of the lines cannot be read and max_bad_lines allows 1.0 %"),
        (replace(SIZE, samples=10), HERE, {}, "one step takes 256 rows and the corpus has about 10"),
        (replace(SIZE, steps=50), HERE, {"training": {"warmup_steps": 50}}, "warmup_steps 50 is not shorter"),
        (replace(SIZE, steps=1), HERE, {}, "save_interval 1,000 is longer than the run (1 step)"),
        (replace(SIZE, steps=999), HERE, {}, "save_interval 1,000 is longer than the run (999 steps)"),
        (
            replace(SIZE, steps=99),
            HERE,
            {"reporting": {"log_interval": 100}},
            "log_interval 100 is longer than the run (99 steps)",
        ),
        (replace(SIZE, steps=99), HERE, {"training": {"verify_every": 100}}, "no step is verified"),
        (SIZE, HERE, {"resources": {"parallelism": "fsdp"}}, "parallelism fsdp has no effect"),
        (SIZE, HERE, {"training": {"zero_init_projections": True, "from_weight": "w.pth"}}, "has no effect with from_"),
        (SIZE, HERE, {"training": {"compile_mode": "max-autotune"}}, "compile_mode max-autotune has no effect"),
        (
            SIZE,
            HERE,
            {
                "training": {"use_compile": True, "compile_mode": "reduce-overhead"},
                "resources": {"parallelism": "fsdp", "nproc_per_node": 2},
            },
            "compile_mode reduce-overhead has no effect with parallelism fsdp",
        ),
        (None, HERE, {}, "no document was found in the sampled part of the corpus: it needs one JSON object a line"),
        (None, replace(HERE, names=("content", "id")), {}, "lines have texts under 'content', 'id': set text_field"),
        (
            None,
            replace(HERE, other_format="parquet"),
            {},
            "the corpus is parquet: tokens, steps and time are known once",
        ),
        (SIZE, replace(HERE, memory_limit=3 << 29, memory_needed=2 << 30), {}, "needs about 2.1 GB of memory"),
    ],
)
def test_each_warning(size: RunSize | None, here: HostCapacity, groups: dict[str, Any], text: str) -> None:
    assert [found for found in sentences(size, here, **groups) if text in found], sentences(size, here, **groups)


def test_the_advice_if_a_run_fits_with_no_batch() -> None:
    here = replace(HERE, memory_limit=3 << 29, memory_needed=2 << 30)
    [smaller_batch] = [text for text in sentences(SIZE, here) if "needs about" in text]
    assert smaller_batch.endswith("lower batch_size or max_seq_len, or take a smaller model")
    [smaller_model] = [text for text in sentences(SIZE, replace(here, fits_one_row=False)) if "needs about" in text]
    assert smaller_model.endswith("it does not fit with batch_size 1 either: take a smaller model")


def test_a_batch_too_small_for_a_gpu_is_advice_and_no_warning() -> None:
    spec = JobSpec.model_validate({"data": {"data_path": "x"}, "training": {"batch_size": 1}})
    here = replace(HERE, kind="cuda")
    assert list(advice(spec, here)) == ["batch_size 1 gives a GPU 340 tokens at once: it could take more"]
    assert sentences(here=here, training={"batch_size": 1}) == []


def test_unknown_facts_give_no_warning() -> None:
    assert sentences(here=replace(HERE, memory_limit=None, disk_free=None)) == []
    assert sentences(replace(SIZE, steps=999), checkpoint={"save_minutes": 5}) == []


@pytest.mark.parametrize(
    ("name", "head", "form"),
    [
        ("c.jsonl", b'{"text": "a"}', None),
        ("c.jsonl.gz", b"\x1f\x8b\x08", "gzip"),
        ("c.zst", b"\x28\xb5\x2f\xfd", "zstd"),
        ("c.parquet", b"PAR1", "parquet"),
        ("c.txt", b"Once", "plain text"),
        ("c.txt", b'{"text": "a"}', None),
        ("c.txt", b"", None),
    ],
)
def test_the_format_of_a_corpus_that_is_not_sampled(name: str, head: bytes, form: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(head)
    assert other_format(tmp_path / name) == form
    assert other_format(tmp_path) is other_format(tmp_path / "missing") is None


def test_memory_of_the_host(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal:        1000 kB\nMemFree: 1 kB\n")
    assert host_memory(tmp_path) == 1_024_000
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/unit\n")
    (tmp_path / "self/mountinfo").write_text(f"36 35 0:29 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert host_memory(tmp_path) == 5000
    assert (disk_free(tmp_path / "not" / "there") or 0) > 0


# The route


def test_a_plan_is_complete_and_stores_nothing(any_rig: ServiceHarness) -> None:
    write_corpus(any_rig.corpus, 300, seed=5)
    found = plan(any_rig, training={"batch_size": 4, "accumulation_steps": 2}, resources={"device": "cpu"})
    assert found["object"] == "plan"
    assert found["estimated"] is True
    for name in (
        "parameters",
        "tokens",
        "samples",
        "steps",
        "checkpoint_bytes",
        "disk_free_bytes",
        "memory_limit_bytes",
    ):
        assert found[name] > 0, name
    assert found["active_parameters"] == found["parameters"]
    assert found["steps"] == found["steps_per_epoch"] == math.ceil(found["samples"] / 8)
    whole_rows = flops_per_token(ModelConfig(vocab_size=259), 340)
    assert found["flops_per_token"] < whole_rows, "the documents are shorter than the sequences they are packed into"
    assert found["flops"] == pytest.approx(found["flops_per_token"] * found["tokens_per_step"] * found["steps"])
    assert found["expected_first_loss"] == pytest.approx(math.log(259))
    assert (found["eta_seconds"], found["eta_basis"], found["world_size"]) == (None, None, 1)
    assert found["queue"] == {"position": 1, "waiting_for": "nothing: it would start immediately"}
    assert set(found["memory_bytes"]) == {"weights", "gradients", "optimizer", "activations"}
    assert any_rig.get("/jobs")["data"] == []


def test_the_plan_has_the_held_out_sets(any_rig: ServiceHarness) -> None:
    write_corpus(any_rig.corpus, 300, seed=5)
    folder = any_rig.home / "held-out"
    folder.mkdir()
    for number in range(3):
        write_corpus(folder / f"{number}.jsonl", 100, seed=number)
    (any_rig.home / "book.txt").write_text("one\n\ntwo\n")
    whole = plan(any_rig, data={"data_path": str(folder)})
    data = {"data_path": str(any_rig.corpus)}
    sets = [
        {"name": "all", "path": str(folder)},
        {"name": "part", "path": str(folder), "max_tokens": 500},
        {"name": "book", "path": str(any_rig.home / "book.txt")},
    ]
    every, part, book = plan(any_rig, data={**data, "eval_sources": sets})["eval_sets"]
    predicted = whole["tokens"] - whole["documents"]
    assert every == {"name": "all", "files": 3, "documents": 300, "tokens": predicted, "duplicates": None}
    assert part == {**every, "name": "part", "tokens": 500, "documents": round(300 * 500 / predicted)}
    assert book == {**every, "name": "book", "files": 1, "tokens": None, "documents": None}, "not JSONL"
    (one,) = plan(any_rig, data={**data, "eval_data_path": str(folder)})["eval_sets"]
    assert one == {**every, "name": "eval"}
    (split,) = plan(any_rig, data={**data, "eval_fraction": 0.1})["eval_sets"]
    assert (split["name"], split["files"], split["documents"]) == ("data", 1, 30)
    assert plan(any_rig)["eval_sets"] == []


def test_a_plan_of_a_corpus_that_is_almost_all_held_out(rig: ServiceHarness) -> None:
    answer = rig.client.post("/jobs/plan", json={"data": {"data_path": str(rig.corpus), "eval_fraction": 0.9999999}})
    assert answer.status_code == 200
    assert answer.json()["tokens_per_step"] == 1


def test_a_bad_spec_gets_the_same_answer_as_at_submit(rig: ServiceHarness) -> None:
    body = rig.spec(training={"learning_rate": -1, "x": 1}, model={"hidden_size": 0})
    answers = [rig.client.post(path, json=body).json() for path in ("/jobs/plan", "/jobs")]
    assert [answer["code"] for answer in answers] == ["invalid_spec"] * 2
    assert answers[0]["errors"] == answers[1]["errors"]
    assert len(answers[0]["errors"]) == 3


def test_the_time_comes_from_an_earlier_run_of_the_same_shape(any_rig: ServiceHarness) -> None:
    rig = any_rig
    write_corpus(rig.corpus, 300, seed=6)
    job_id, attempt = rig.running(resources={"device": "cpu"})
    attempt.metric(1, tokens_per_second=500.0)
    rig.exit(attempt, "crashed", Reason.HUNG, step=1)
    found = plan(rig, resources={"device": "cpu"})
    assert found["eta_seconds"] == pytest.approx(found["tokens_per_step"] * found["steps"] / 500)
    assert found["eta_basis"] == f"500 tokens/s in {job_id} on fake CPU"
    others: list[dict[str, Any]] = [
        {"training": {"batch_size": 1}},
        {"data": {"data_path": str(rig.corpus), "max_seq_len": 64}},
    ]
    for other in others:
        assert plan(rig, resources={"device": "cpu"}, **other)["eta_seconds"] is None
    assert plan(rig, resources={"device": "cpu", "nproc_per_node": 2})["eta_seconds"] is None


def test_the_position_in_the_queue(any_rig: ServiceHarness) -> None:
    any_rig.running(resources={"nproc_per_node": 2})
    any_rig.submit()
    assert plan(any_rig)["queue"] == {"position": 2, "waiting_for": "1 CPU slot; 0 of 2 free"}
    assert plan(any_rig, resources={"priority": 5})["queue"]["position"] == 1


def test_a_gpu_and_its_memory(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, devices=[Device("cuda:0", "cuda", model="H100", memory_bytes=1 << 30)])
    found = plan(rig, training={"batch_size": 512})
    assert (found["device"], found["device_name"], found["memory_limit_bytes"]) == ("cuda", "H100", 1 << 30)
    assert any("the device has 1.1 GB" in text for text in found["warnings"])
    rig.close()


def test_a_run_that_does_not_fit_names_the_settings_with_which_it_does(make_rig: MakeHarness, sqlite_url: str) -> None:
    gpus = [Device(f"cuda:{number}", "cuda", memory_bytes=1 << 30) for number in range(4)]
    rig = make_rig(sqlite_url, devices=gpus)
    wide: dict[str, Any] = {"model": {"hidden_size": 768, "vocab_size": 6400}, "resources": {"nproc_per_node": 4}}
    small = plan(rig, training={"batch_size": 1})
    assert (small["settings_that_fit"], [one["fits"] for one in small["memory_options"]]) == (None, [True] * 6)
    tall = plan(rig, training={"batch_size": 16})
    assert tall["settings_that_fit"] == {"training": {"gradient_checkpointing": True}}
    assert any("it fits with gradient_checkpointing true" in text for text in tall["warnings"])
    found = plan(rig, training={"batch_size": 4}, **wide)
    assert found["settings_that_fit"] == {
        "training": {"gradient_checkpointing": True},
        "resources": {"parallelism": "zero1"},
    }
    assert any("it fits with gradient_checkpointing true and parallelism zero1" in text for text in found["warnings"])
    options = {(one["parallelism"], one["gradient_checkpointing"]): one for one in found["memory_options"]}
    assert list(options) == list(itertools.product(("ddp", "zero1", "fsdp"), (False, True)))
    assert options["ddp", False]["memory_bytes"] == found["memory_bytes"]
    assert [one["fits"] for one in options.values()] == [False, False, False, True, True, True]
    chosen = plan(rig, training={"batch_size": 4, "gradient_checkpointing": True}, **wide)
    assert chosen["memory_bytes"] == options["ddp", True]["memory_bytes"]
    rig.close()


@pytest.mark.long
def test_without_an_earlier_run_the_time_comes_from_a_matrix_product(rig: ServiceHarness, tmp_path: Path) -> None:
    spec = JobSpec.model_validate_json('{"data": {"data_path": "x"}, "model": {"vocab_size": 259}}')
    # In a home of its own: it continues to measure, and writes its result when it is done.
    impatient = MatrixSpeed(tmp_path / "other", wait_seconds=0.0)
    assert impatient.estimate(spec, "cpu", 340) is None, "a plan does not wait for it"
    speed = MatrixSpeed(tmp_path, wait_seconds=120.0)
    estimate = speed.estimate(spec, "cpu", 340)
    assert estimate is not None
    assert estimate.flops > 1e6
    assert estimate.tokens_per_second == pytest.approx(EFFICIENCY * estimate.flops / flops_per_token(spec.model, 340))
    assert "matrix product of one second" in str(estimate)
    # It is measured once: another service on the home reads the result.
    file = tmp_path / "cache" / "matrix-speed.json"
    file.write_text(json.dumps({"cpu bfloat16": 1e9, "cuda bfloat16": "x"}))
    again = MatrixSpeed(tmp_path).estimate(spec, "cpu", 340)
    assert again is not None
    assert again.flops == 1e9
    # A device that cannot be measured has no estimate, and is not tried again.
    assert [speed.estimate(spec, "nothing", 340) for _ in range(2)] == [None, None]
    assert plan(rig)["eta_seconds"] is None


def test_a_measurement_that_takes_too_long_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = JobSpec.model_validate_json('{"data": {"data_path": "x"}, "model": {"vocab_size": 259}}')
    calls = itertools.count(1)

    def measure(*_: str) -> float:
        if next(calls) == 1:
            raise subprocess.TimeoutExpired("matrix_speed", 60)
        return 1e12

    monkeypatch.setattr("trainyard.service.planning.matrix_speed._measure", measure)
    speed = MatrixSpeed(tmp_path, wait_seconds=60.0)
    assert speed.estimate(spec, "cpu", 340) is None
    second = speed.estimate(spec, "cpu", 340)
    assert second is not None
    assert second.flops == 1e12
    assert next(calls) == 3


def test_the_plan_uses_the_matrix_product_only_on_a_free_device(rig: ServiceHarness, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "matrix-speed.json").write_text(json.dumps({"cpu bfloat16": 1e12, "cpu float32": 1e11}))
    state = replace(rig.app.state.app_state, matrix_speed=MatrixSpeed(tmp_path))
    host = state.host_limits(LOCAL)
    spec = validate_spec(rig.spec(), host)
    found = make_preview(state, spec, host)
    assert found.flops is not None
    assert found.eta_seconds == pytest.approx(found.flops / (EFFICIENCY * 1e12))
    busy = rig.spec(resources={"nproc_per_node": 2})
    rig.running(resources=busy["resources"])
    assert make_preview(state, spec, host).eta_seconds is None


def test_a_gpu_that_a_run_uses_is_not_measured(
    make_rig: MakeHarness, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process on a GPU takes hundreds of megabytes. The run may need the whole memory."""
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        ran.append((command[-2:], {name: env[name] for name in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES")}))
        return SimpleNamespace(stdout=b"1e15")

    monkeypatch.setattr("trainyard.service.planning.matrix_speed.subprocess.run", run)
    rig = make_rig(sqlite_url, devices=(Device("cuda:0", "cuda"), Device("cuda:1", "cuda")))
    rig.running(resources={"device": "cuda"})
    state = replace(rig.app.state.app_state, matrix_speed=MatrixSpeed(tmp_path, wait_seconds=60.0))
    host = state.host_limits(LOCAL)
    assert make_preview(state, validate_spec(rig.spec(), host), host).eta_seconds is not None
    assert ran == [(["cuda", "bfloat16"], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"})]


@pytest.mark.parametrize(("float32", "advised"), [(3e11, True), (1e11, False)])
def test_the_plan_offers_float32_on_a_cpu_that_is_slow_in_bfloat16(
    float32: float, advised: bool, rig: ServiceHarness, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    measured = {"cpu bfloat16": 1.6e11, "cpu float32": float32}
    (tmp_path / "cache" / "matrix-speed.json").write_text(json.dumps(measured))
    state = replace(rig.app.state.app_state, matrix_speed=MatrixSpeed(tmp_path))
    host = state.host_limits(LOCAL)
    found = make_preview(state, validate_spec(rig.spec(), host), host)
    expected = (
        "this CPU computes a bfloat16 product at 160 GFLOP/s and one in float32 at 300: "
        'with training.dtype "float32" the run is faster, and more exact'
    )
    assert found.advice == ([expected] if advised else [])
    assert not any("bfloat16" in text for text in found.warnings), "advice stops no submission"
    exact = validate_spec(rig.spec(training={"dtype": "float32"}), host)
    assert make_preview(state, exact, host).advice == []


def test_the_shares_of_weights_are_known_without_the_sizes(any_rig: ServiceHarness) -> None:
    (any_rig.home / "book.txt").write_text("one\n\ntwo\n")
    names = {"web": str(any_rig.corpus), "book": str(any_rig.home / "book.txt")}
    data = {
        "sources": [{"name": name, "path": path, "weight": 3 - at} for at, (name, path) in enumerate(names.items())]
    }
    found = plan(any_rig, data=data, training={"max_steps": 9})["sources"]
    assert [(source["share"], source["passes"]) for source in found] == [(0.6, None), (0.4, None)]


def test_a_source_that_is_read_often_is_a_warning() -> None:
    often, once = (PlannedSource(name, 1, 10, 100, 0.5, passes) for name, passes in (("web", 4.3), ("book", 1.0)))
    assert source_warnings([often, once]) == ["source web is read 4.3 times: more than 4 passes teach little"]
    assert source_warnings([often]) == ["the corpus is read 4.3 times: more than 4 passes teach little"]
    assert source_warnings([once]) == []


def test_a_corpus_of_mixed_formats_gives_no_warning_about_missing_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a text"}\n' * 9)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a text"}\n' * 9))
    sample = sample_corpus(JobSpec.model_validate({"data": {"data_path": str(tmp_path)}}))
    assert (sample.size, sample.other_format) == (None, "partly gzip")
    (tmp_path / "b.jsonl.gz").unlink()
    sample = sample_corpus(JobSpec.model_validate({"data": {"data_path": str(tmp_path)}}))
    assert sample.size is not None
    assert sample.other_format is None
