"""Scores of tasks against a plain computation: one text at a time, from the logits of the whole model."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.data.texts import docstrings
from trainyard.contract.task_files import Example, TaskFile, TaskFileInvalid, TaskKind
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.worker.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.step import Precision
from trainyard.worker.training.tasks import Task, TaskScorer, aggregate, split_batches, tokenize_task

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(docstrings(), 400, out)
    return load_tokenizer(str(out))


def random_model(vocabulary: int, **changes: Any) -> Decoder:
    config = ModelConfig(**{**SHAPE, "vocab_size": vocabulary, "max_position_embeddings": 256, **changes})
    model = Decoder(config, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in model.parameters():
            # Logits far apart, so that right and wrong answers differ by more than rounding.
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model


def tokenized(kind: TaskKind, examples: Sequence[Example], tokenizer: Tokenizer, positions: int = 256) -> Task:
    return tokenize_task("task", kind, TaskFile(tuple(examples), "sha"), tokenizer, positions)


def scorer(model: Decoder, batch_tokens: int = 200) -> TaskScorer:
    ranks = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    return TaskScorer(model, Precision("cpu", torch.float32), ranks, batch_tokens)


WORDS = "the cat sat on a mat while dogs ran over green hills and rivers to the sea".split()  # noqa: SIM905


def random_examples(kind: TaskKind, count: int, seed: int) -> list[Example]:
    chooser = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(chooser.choices(WORDS, k=chooser.randint(1, most)))

    examples = []
    for line in range(count):
        texts = tuple(f" {text(5)}" for _ in range(chooser.randint(2, 5) if kind == "choice" else 1))
        context = chooser.choice(["", f"{text(10)}", f"{text(6)} ", f"{text(40)}:\n"])
        examples.append(Example(line + 1, context, texts, chooser.randrange(len(texts))))
    return examples


def plainly(model: Decoder, tokenizer: Tokenizer, example: Example, positions: int) -> list[tuple[float, bool]]:
    """Log-probability of each text, and whether it is greedy: written as lm-eval does it, one request at a time."""
    found = []
    for text in example.texts:
        context, spaces = example.context, len(example.context) - len(example.context.rstrip())
        continuation = (context[-spaces:] if spaces else "") + text
        context = context[:-spaces] if spaces else context
        whole = tokenizer.encode_batch([context + continuation])[0].tolist()
        before = len(tokenizer.encode_batch([context])[0]) if context else 0
        target = whole[before:]
        ids = [tokenizer.bos_id, *whole][-(positions + 1) :]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids[:-1]])).logits
        assert logits is not None
        scores = torch.log_softmax(logits[0, -len(target) :].double(), dim=-1)
        log_prob = sum(float(scores[at, token]) for at, token in enumerate(target))
        found.append((log_prob, scores.argmax(dim=-1).tolist() == target))
    return found


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", ["choice", "continuation"])
def test_scores_equal_a_plain_computation(kind: TaskKind, changes: dict[str, Any], bpe: Tokenizer) -> None:
    positions, model = 40, random_model(bpe.vocab_size, max_position_embeddings=40, **changes)
    examples = random_examples(kind, 24, seed=11)
    if kind == "continuation":
        # What the model itself continues with is right.
        for index in range(0, 24, 3):
            prompt = [bpe.bos_id, *bpe.encode_batch([examples[index].context])[0].tolist()][-8:]
            new = model.generate(torch.tensor([prompt]), max_new_tokens=3)[0, len(prompt) :].tolist()
            text = bpe.decode(new)
            if text.strip() == text and text and "�" not in text:
                examples[index] = replace(examples[index], texts=(text,))
    scored = scorer(model.train()).score(tokenized(kind, examples, bpe, positions), step=7)
    assert model.training, "the mode is put back"
    results = [plainly(model, bpe, example, positions) for example in examples]
    right = norm = nats = size = 0.0
    for example, result in zip(examples, results, strict=True):
        sums = [log_prob for log_prob, _ in result]
        per_byte = [s / len(text.encode()) for s, text in zip(sums, example.texts, strict=True)]
        if kind == "choice":
            right += max(range(len(sums)), key=sums.__getitem__) == example.answer
            norm += max(range(len(sums)), key=per_byte.__getitem__) == example.answer
        else:
            right += result[0][1]
        nats -= sums[example.answer]
        size += len(example.texts[example.answer].encode())
    assert (scored.step, scored.examples, scored.file_sha256) == (7, 24, "sha")
    assert scored.acc == right / 24
    assert scored.acc_norm == (norm / 24 if kind == "choice" else None)
    assert scored.bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert scored.truncated > 0
    assert 0 < right < 24, "the test must be able to fail"


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_batches_do_not_change_scores(bpe: Tokenizer, batch_tokens: int) -> None:
    model, task = random_model(bpe.vocab_size), tokenized("choice", random_examples("choice", 30, seed=2), bpe)
    expected = scorer(model).score(task, 1)
    found = scorer(model, batch_tokens).score(task, 1)
    assert (found.acc, found.acc_norm) == (expected.acc, expected.acc_norm)
    assert found.bpb == pytest.approx(expected.bpb, rel=1e-6)


def test_batches_hold_every_text_once() -> None:
    lengths = [random.Random(4).randint(1, 90) for _ in range(200)]
    batches = split_batches(lengths, 128)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 128


# Tokenization


def test_white_space_between_context_and_text_belongs_to_the_text(bpe: Tokenizer) -> None:
    split = [("the cat", " sat down"), ("the cat ", "sat down"), ("the cat  \n", " sat down")]
    tasks = [tokenized("continuation", [Example(1, context, (text,))], bpe).texts[0] for context, text in split]
    assert (tasks[0].ids, tasks[0].scored) == (tasks[1].ids, tasks[1].scored)
    for (context, text), scored in zip(split, tasks, strict=True):
        assert scored.ids[0] == bpe.bos_id
        assert bpe.decode(scored.ids[1:]) == context + text
        assert bpe.decode(scored.ids[-scored.scored :]) == f"{context[7:]}{text}"


def test_a_text_after_an_empty_context_is_scored_from_bos() -> None:
    tokenizer = ByteTokenizer()
    for context in ("", " "):
        (scored,) = tokenized("continuation", [Example(1, context, ("ab",))], tokenizer).texts
        assert scored.ids == [tokenizer.bos_id, *tokenizer.encode_batch([f"{context}ab"])[0].tolist()]
        assert scored.scored == len(context) + 2


def test_a_token_across_the_boundary_is_scored(bpe: Tokenizer) -> None:
    """A context that ends within a word: its tokens are not the beginning of those of the whole."""
    merged = next(
        token for token in range(bpe.vocab_size) if len(text := bpe.decode([token])) > 1 and text.strip() == text
    )
    text = bpe.decode([merged])
    assert bpe.encode_batch([text])[0].tolist() == [merged]
    (scored,) = tokenized("continuation", [Example(1, text[:-1], (text[-1:],))], bpe).texts
    assert scored.ids == [bpe.bos_id, merged]
    assert scored.scored == 1, "at least one token is"


def test_what_is_too_long_loses_its_beginning() -> None:
    tokenizer = ByteTokenizer()
    example = Example(1, "x" * 20, ("abc",))
    fits, cut = (tokenized("continuation", [example], tokenizer, positions).texts[0] for positions in (23, 22))
    assert (len(fits.ids), fits.truncated, fits.scored) == (24, False, 3), "the last token is no input"
    assert (len(cut.ids), cut.truncated, cut.scored) == (23, True, 3)
    assert cut.ids == fits.ids[1:]
    with pytest.raises(TaskFileInvalid, match="line 1: 'continuation' has 3 tokens, and the model has 2 positions"):
        tokenized("continuation", [example], tokenizer, 2)
    choices = [Example(1, "", ("a", "b")), Example(5, "", ("a", "bcdef"))]
    with pytest.raises(TaskFileInvalid, match=r"1 bad line: line 5: 'choices\[1\]' has 5 tokens"):
        tokenized("choice", choices, tokenizer, 4)


def test_a_score_that_is_not_finite_is_null() -> None:
    tokenizer = ByteTokenizer()
    model = random_model(tokenizer.vocab_size)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    scored = scorer(model).score(tokenized("choice", random_examples("choice", 5, seed=1), tokenizer), 1)
    assert (scored.acc, scored.acc_norm, scored.bpb) == (None, None, None)


def test_the_norm_counts_bytes_of_the_text_as_it_is_written() -> None:
    import numpy as np

    example = [Example(1, "", ("äöü", "abcd"), 0)]
    # Per character the first has -2.0 and loses, per byte -1.0 and wins.
    acc, acc_norm, bpb = aggregate("choice", example, np.array([-6.0, -4.4]), np.zeros(2))
    assert (acc, acc_norm) == (0.0, 1.0)
    assert bpb == pytest.approx(6 / math.log(2) / 6)
