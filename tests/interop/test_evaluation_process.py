"""The side process that evaluates a checkpoint: the same scores as in training, and clear errors."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.conftest import Make
from trainyard.contract.allowed_paths import format_roots
from trainyard.contract.evaluation import EvaluationRequest
from trainyard.contract.rundir import RunDir
from trainyard.contract.sidecar import DESCRIPTOR, encode_message
from trainyard.contract.spec import TaskSpec
from trainyard.contract.task_files import read_task_file
from trainyard.model.decoder import Decoder
from trainyard.service.launch.environment import IMPORT_ROOT
from trainyard.worker import evaluation
from trainyard.worker.data.tokenizers import load_tokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.step import Precision
from trainyard.worker.training.tasks import TaskScorer, tokenize_task


class FakeLink:
    """Keeps what would be sent to the service."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        if message["event"] != "progress":
            self.lines.append(json.loads(json.dumps(message, allow_nan=False)))


def sent(request: EvaluationRequest) -> list[dict[str, Any]]:
    """Evaluate in this process, and return what is sent."""
    link = FakeLink()
    evaluation.evaluate(link, request)  # type: ignore[arg-type]
    return link.lines


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    file = tmp_path / "facts.jsonl"
    words = ["Return", "the", "number", "of", "items", "in", "a", "list", "of", "words"]
    lines = [
        {"context": f"{word} the", "choices": [f" {w}" for w in words[:4]], "answer": i % 4}
        for i, word in enumerate(words)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def trained(make: Make, tokenizer_directory: Path) -> tuple[RunDir, Decoder]:
    return make(str(tokenizer_directory), use_moe=True, num_experts=4)


@pytest.fixture
def request_of(trained: tuple[RunDir, Decoder], tokenizer_directory: Path) -> Callable[..., EvaluationRequest]:
    def made(**tasks: Path) -> EvaluationRequest:
        run, _ = trained
        return EvaluationRequest(
            checkpoint=str(run.artifacts(None).checkpoint(3)),
            step=3,
            tokenizer_path=str(tokenizer_directory),
            special_tokens="text",
            dtype="float32",
            batch_tokens=64,
            tasks=[TaskSpec(name=name, path=str(path), kind="choice") for name, path in tasks.items()],
        )

    return made


def test_scores_are_those_of_training(
    request_of: Callable[..., EvaluationRequest],
    trained: tuple[RunDir, Decoder],
    tmp_path: Path,
    tokenizer_directory: Path,
    facts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the expected scores were computed on a CPU
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": ""}\n')
    of_bad, scored, of_none = sent(request_of(bad=bad, facts=facts, none=tmp_path / "none.jsonl"))
    assert (of_bad["event"], of_bad["task"]) == ("task_failed", "bad")
    assert of_bad["message"].endswith(
        "bad.jsonl has 1 bad line: line 1: 'choices' must be a list of at least 2 strings"
    )
    assert of_none["message"].endswith("none.jsonl cannot be read: No such file or directory")
    _, model = trained
    tokenizer = load_tokenizer(str(tokenizer_directory))
    task = tokenize_task("facts", "choice", read_task_file(facts, "choice"), tokenizer, 32768)
    ranks = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    expected = TaskScorer(model, Precision("cpu", torch.float32), ranks, 64).score(task, 3)
    assert (scored["acc"], scored["acc_norm"]) == (expected.acc, expected.acc_norm)
    assert scored["bpb"] == pytest.approx(expected.bpb, rel=1e-9)
    assert scored["file_sha256"] == expected.file_sha256


def test_what_cannot_be_evaluated(
    request_of: Callable[..., EvaluationRequest], facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(facts=facts)
    with pytest.raises(evaluation.CannotEvaluate, match="its tokenizer has changed"):
        sent(request.model_copy(update={"tokenizer_path": "byte"}))
    monkeypatch.setenv("TRAINYARD_DATA_ROOTS", format_roots([Path(request.tokenizer_path)]))
    (line,) = sent(request)
    assert "the directories this service may use" in line["message"]
    (Path(request.checkpoint) / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(evaluation.CannotEvaluate, match=r"is damaged: model\.safetensors sha256"):
        sent(request)


@pytest.mark.long
def test_the_process(request_of: Callable[..., EvaluationRequest], facts: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainyard.worker.evaluation"],
            env={**os.environ, "PYTHONPATH": IMPORT_ROOT, DESCRIPTOR: str(theirs.fileno()), "TRAINYARD_THREADS": "1"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        ours.settimeout(200)
        request = request_of(facts=facts)
        ours.sendall(encode_message(request.model_dump(mode="json")))
        with ours.makefile("rb") as lines:
            found = [json.loads(line) for line in lines]
        assert process.wait(60) == 0
    assert [line["event"] for line in found if line["event"] != "progress"] == ["scored", "done"]
    (scored,) = sent(request)
    assert {**found[-2], "at": "", "seconds": 0} == {**scored, "at": "", "seconds": 0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_each_task_is_scored(request_of: Callable[..., EvaluationRequest], facts: Path) -> None:
    (scored,) = sent(request_of(facts=facts))
    assert 0 <= scored["acc"] <= 1
    assert scored["bpb"] > 0
