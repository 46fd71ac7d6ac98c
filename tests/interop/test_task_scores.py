"""Task scores equal those that lm-eval's formulas give with transformers on the exported model. Skipped without it."""

import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.interop.conftest import Make
from tests.interop.test_export import EXPERTS, export
from trainyard.contract.task_files import Example, TaskFile, TaskKind
from trainyard.worker.data.tokenizers import load_tokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.step import Precision
from trainyard.worker.training.tasks import TaskScorer, tokenize_task

transformers = pytest.importorskip("transformers")

WORDS = "the cat sat on a mat while dogs ran over green hills and rivers to the sea".split()  # noqa: SIM905
POSITIONS = 48


def sentence(chooser: random.Random, most: int) -> str:
    return " ".join(chooser.choices(WORDS, k=chooser.randint(1, most)))


def examples(kind: TaskKind, count: int) -> list[Example]:
    chooser = random.Random(17)
    found = []
    for line in range(1, count + 1):
        context = chooser.choice(["", sentence(chooser, 9), f"{sentence(chooser, 9)} ", f"{sentence(chooser, 60)}\n"])
        texts = tuple(f" {sentence(chooser, 4)}" for _ in range(4 if kind == "choice" else 1))
        found.append(Example(line, context, texts, chooser.randrange(len(texts))))
    return found


class HarnessModel:
    """The parts of lm-eval's ``HFLM`` that score a request, with ``add_bos_token=True``, written down again."""

    def __init__(self, directory: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.max_length = self.model.config.max_position_embeddings

    def tok_encode(self, string: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.tokenizer(string, add_special_tokens=False)["input_ids"]]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        n_spaces = len(context) - len(context.rstrip())
        if n_spaces > 0:
            continuation = context[-n_spaces:] + continuation
            context = context[:-n_spaces]
        whole_enc, context_enc = self.tok_encode(context + continuation), self.tok_encode(context)
        return context_enc, whole_enc[len(context_enc) :]

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        context_enc, continuation_enc = self.encode_pair(context, continuation)
        inp = torch.tensor((context_enc + continuation_enc)[-(self.max_length + 1) :][:-1], dtype=torch.long)
        with torch.no_grad():
            logits = torch.log_softmax(self.model(inp[None]).logits, dim=-1)[0]
        logits = logits[len(inp) - len(continuation_enc) :]
        cont_toks = torch.tensor(continuation_enc)
        greedy = bool((logits.argmax(dim=-1) == cont_toks).all())
        return float(logits.gather(1, cont_toks[:, None]).sum()), greedy


@pytest.mark.parametrize("shape", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", ["choice", "continuation"])
def test_scores_are_those_of_the_harness(
    make: Make, tmp_path: Path, tokenizer_directory: Path, kind: TaskKind, shape: dict[str, Any]
) -> None:
    run, ours = make(str(tokenizer_directory), max_position_embeddings=POSITIONS, **shape)
    assert export(run.path, tmp_path / "out") == 0
    theirs = HarnessModel(tmp_path / "out")
    chosen = examples(kind, 40)
    if kind == "continuation":
        # Some are right: what the model itself continues with.
        for index in range(0, 40, 4):
            begin = torch.tensor([theirs.tok_encode(chosen[index].context)[-20:]])
            new = ours.generate(begin, max_new_tokens=2)[0, begin.shape[1] :].tolist()
            chosen[index] = Example(index + 1, chosen[index].context, (theirs.tokenizer.decode(new) or " x",))
    task = tokenize_task("t", kind, TaskFile(tuple(chosen), ""), load_tokenizer(str(tokenizer_directory)), POSITIONS)
    ranks = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    scored = TaskScorer(ours, Precision("cpu", torch.float32), ranks, 256).score(task, 3)

    acc, acc_norm, nats, size = [], [], 0.0, 0
    for example in chosen:
        results = [theirs.loglikelihood(example.context, text) for text in example.texts]
        lls, is_greedy = zip(*results, strict=True)
        completion_len = np.array([float(len(text)) for text in example.texts])
        acc.append(np.argmax(lls) == example.answer if kind == "choice" else is_greedy[0])
        acc_norm.append(np.argmax(lls / completion_len) == example.answer)
        nats += lls[example.answer]
        size += len(example.texts[example.answer].encode())
    assert scored.acc == pytest.approx(np.mean(acc), abs=1e-9)
    assert scored.acc_norm == (pytest.approx(np.mean(acc_norm), abs=1e-9) if kind == "choice" else None)
    assert scored.bpb == pytest.approx(-nats / math.log(2) / size, abs=1e-5)
    assert scored.truncated > 0
    assert 0 < np.mean(acc) < 1, "the test must be able to fail"
