"""A run resumes only with what its checkpoint was saved with; the error names each difference."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from tests.service.test_checkpoints import write_checkpoint
from trainyard.contract.file_identity import BLOCK_BYTES, BLOCKS, FileFingerprint
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.tokenizer_info import fingerprint_of
from trainyard.service.jobs.resume_compat import read_identity


def identity(rig: ServiceHarness, job_id: str) -> RunIdentity:
    """What the worker would write of the job as it is now."""
    spec = rig.job(job_id)["spec"]
    data, (size, fingerprint) = spec["data"], fingerprint_of(spec["data"]["tokenizer_path"])
    return RunIdentity(
        model=spec["model"],
        tokenizer=fingerprint,
        corpus="c" * 64,
        seed=spec["training"]["seed"],
        max_seq_len=data["max_seq_len"],
        packing=data["packing"],
        corpus_file=asdict(FileFingerprint.of(Path(data["data_path"]))),
        vocabulary=size,
    )


def put_state(path: Path, value: Any) -> None:
    """As its state.json, with a manifest that fits."""
    write_checkpoint(path)
    said = json.dumps(value).encode()
    (path / "state.json").write_bytes(said)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(said), "sha256": hashlib.sha256(said).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def paused_at(rig: ServiceHarness, *steps: int, **groups: Any) -> str:
    """A paused job with checkpoints as the worker writes them."""
    job_id, attempt = rig.running(steps=1000, **groups)
    for step in steps:
        put_state(rig.checkpoint(job_id, attempt, step), {"step": step, "identity": asdict(identity(rig, job_id))})
    rig.ship(attempt)
    rig.post_action(job_id, "pause")
    rig.exit(attempt, "stopped", step=max(steps))
    return job_id


def state_of(rig: ServiceHarness, job_id: str, step: int) -> Path:
    return rig.home / "runs" / job_id / "checkpoints" / f"step-{step:08d}" / "state.json"


def vocabulary_of(folder: Path, words: int, first: str = "<s>") -> Path:
    """A tokenizer of so many tokens."""
    folder.mkdir(exist_ok=True)
    names = [first, "</s>", *(f"w{number}" for number in range(words - 2))]
    vocab = {name: number for number, name in enumerate(names)}
    described = {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


def refused(rig: ServiceHarness, job_id: str, body: Any = None, verb: str = "resume") -> list[str]:
    answer = rig.post_action(job_id, verb, body, status=409)
    assert answer["code"] == "run_differs"
    assert all(difference in answer["detail"] for difference in answer["differences"])
    assert answer["hint"] in answer["detail"]
    found: list[str] = answer["differences"]
    return found


def test_a_corpus_of_another_size_is_named_and_the_job_stays_as_it_is(any_rig: ServiceHarness) -> None:
    any_rig.corpus.write_text('{"text": "one"}\n' * 80)
    job_id = paused_at(any_rig, 200, 400)
    any_rig.corpus.write_text('{"text": "one"}\n' * 75)
    before = any_rig.job(job_id)
    assert refused(any_rig, job_id) == ["data_path: 1,280 bytes when step 400 was saved, 1,200 now"]
    assert refused(any_rig, job_id, {"step": 200}) == ["data_path: 1,280 bytes when step 200 was saved, 1,200 now"]
    assert any_rig.job(job_id) == before
    assert 'fork with data "restart"' in any_rig.post_action(job_id, "resume", status=409)["hint"]
    # Put back, it is the same run again.
    any_rig.corpus.write_text('{"text": "one"}\n' * 80)
    assert any_rig.post_action(job_id, "resume")["status"] == "queued"


def test_as_many_other_bytes_are_another_corpus_and_none_is_a_difference_too(rig: ServiceHarness) -> None:
    job_id = paused_at(rig, 400)
    rig.corpus.write_text('{"text": "two"}\n')
    before = "data_path: 16 bytes when step 400 was saved"
    assert refused(rig, job_id) == [f"{before}, the same number now, but not the same bytes"]
    rig.corpus.unlink()
    assert refused(rig, job_id) == [f"{before}, and it cannot be read now"]
    os.mkfifo(rig.corpus)
    assert "cannot be read now" in refused(rig, job_id)[0]


def test_a_copy_and_another_time_are_the_same_corpus(rig: ServiceHarness) -> None:
    job_id = paused_at(rig, 400)
    copy = rig.corpus.with_name("copy")
    shutil.copyfile(rig.corpus, copy)
    copy.replace(rig.corpus)
    os.utime(rig.corpus, (1, 1))
    assert rig.post_action(job_id, "resume")["status"] == "queued"


def test_another_vocabulary_is_named_whether_smaller_or_larger(rig: ServiceHarness) -> None:
    folder = vocabulary_of(rig.home / "words", 640)
    job_id = paused_at(rig, 400, data={"data_path": str(rig.corpus), "tokenizer_path": str(folder)})
    for words in (320, 700):
        vocabulary_of(folder, words)
        assert refused(rig, job_id) == [f"vocabulary: 640 tokens when step 400 was saved, {words} now"]
        # No data beginning anew makes other tokens mean the same to the weights.
        assert "fork" not in rig.post_action(job_id, "resume", status=409)["hint"]
        assert refused(rig, job_id, {"data": "restart"}, "fork")
    vocabulary_of(folder, 640, first="[CLS]")
    assert refused(rig, job_id) == [
        "tokenizer_path: not the tokenizer it was when step 400 was saved, though of the same size"
    ]
    (folder / "tokenizer.json").write_text("{")
    assert refused(rig, job_id) == ["tokenizer_path: it could be read when step 400 was saved, and cannot be now"]
    vocabulary_of(folder, 640)
    # What changes no id is no difference.
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert rig.post_action(job_id, "resume")["status"] == "queued"


def test_a_checkpoint_of_another_run_in_this_one_s_place_is_named_in_all_it_differs(rig: ServiceHarness) -> None:
    job_id = paused_at(rig, 400)
    state = json.loads(state_of(rig, job_id, 400).read_text())
    state["identity"] |= {"seed": 7, "packing": "none", "model": {**state["identity"]["model"], "hidden_size": 64}}
    state_of(rig, job_id, 400).write_text(json.dumps(state))
    assert refused(rig, job_id) == [
        "model.hidden_size is 512 and was 64",
        "seed is 42 and was 7",
        "packing is document and was none",
    ]


@pytest.mark.parametrize("state", [b"", b"[]", b'{"identity": 3}', b'{"identity": {"model": {}, "new": 1}}', None])
def test_what_cannot_be_read_is_for_the_worker_to_judge_and_an_older_one_is_looked_at(
    rig: ServiceHarness, state: bytes | None
) -> None:
    job_id = paused_at(rig, 200, 400)
    file = state_of(rig, job_id, 400)
    file.unlink()
    if state is not None:
        file.write_bytes(state)
    assert read_identity(file.parent) is None
    with rig.corpus.open("a") as corpus:
        corpus.write("x")
    assert refused(rig, job_id) == ["data_path: 16 bytes when step 200 was saved, 17 now"]
    state_of(rig, job_id, 200).unlink()
    assert rig.post_action(job_id, "resume")["status"] == "queued"


def test_a_checkpoint_from_before_sketches_were_kept_is_gone_on_from(rig: ServiceHarness) -> None:
    job_id = paused_at(rig, 400)
    state = json.loads(state_of(rig, job_id, 400).read_text())
    for name in ("corpus_file", "vocabulary"):
        del state["identity"][name]
    state_of(rig, job_id, 400).write_text(json.dumps(state))
    rig.corpus.write_text('{"text": "another"}\n')
    assert rig.post_action(job_id, "resume")["status"] == "queued"


def test_a_fork_keeps_the_corpus_or_begins_with_another(any_rig: ServiceHarness) -> None:
    job_id = paused_at(any_rig, 400, 800, training={"max_steps": 1000})
    any_rig.corpus.write_text('{"text": "some"}\n')
    assert refused(any_rig, job_id, {"step": 400}, "fork") == ["data_path: 16 bytes when step 400 was saved, 17 now"]
    assert [path.name for path in (any_rig.home / "runs").iterdir()] == [job_id]
    made = any_rig.post_action(job_id, "fork", {"step": 400, "data": "restart"}, status=201)
    # Before its first attempt it has its parent's files alone: of those, only the weights must fit.
    any_rig.post_action(made["id"], "pause")
    any_rig.corpus.write_text('{"text": "any"}\n')
    assert any_rig.post_action(made["id"], "resume")["status"] == "queued"


def test_a_fork_that_keeps_its_parent_s_data_is_held_to_them_before_its_first_attempt(rig: ServiceHarness) -> None:
    made = rig.post_action(paused_at(rig, 400, training={"max_steps": 1000}), "fork", {"step": 400}, status=201)
    rig.post_action(made["id"], "pause")
    rig.corpus.write_text('{"text": "any more"}\n')
    # It never ran, so a resume looks at what its parent left for it.
    assert refused(rig, made["id"]) == ["data_path: 16 bytes when step 400 was saved, 21 now"]


def test_a_sketch_reads_as_little_of_a_large_file_and_sees_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, size = tmp_path / "large", 100 << 30
    with file.open("wb") as sparse:
        sparse.truncate(size)
    read: list[tuple[int, int]] = []
    pread = os.pread

    def counted(descriptor: int, count: int, start: int) -> bytes:
        read.append((start, count))
        return pread(descriptor, count, start)

    monkeypatch.setattr(os, "pread", counted)
    first = FileFingerprint.of(file)
    assert (first.bytes, len(read), sum(count for _, count in read)) == (size, BLOCKS, BLOCKS * BLOCK_BYTES)
    assert len(set(read)) == BLOCKS
    for place in (0, size - 1, read[30][0] + 5):
        with file.open("r+b") as changed:
            changed.seek(place)
            changed.write(b"x")
        assert FileFingerprint.of(file) != first, place
        with file.open("r+b") as changed:
            changed.seek(place)
            changed.write(b"\0")
    assert FileFingerprint.of(file) == first


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, BLOCKS * BLOCK_BYTES])
def test_all_of_a_small_file_is_in_its_sketch(tmp_path: Path, size: int) -> None:
    file = tmp_path / "small"
    content = bytes(number % 251 for number in range(size))
    file.write_bytes(content)
    assert FileFingerprint.of(file) == FileFingerprint(size, hashlib.sha256(content).hexdigest())
