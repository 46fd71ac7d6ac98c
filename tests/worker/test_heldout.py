"""Loss and bits per byte of held-out sets: those of a slow computation of each document alone, on any ranks."""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.worker import rank_runner
from trainyard.contract.events import Event, MetricEvent, Started, WarningEvent
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.worker.data.prepare import prepare_data
from trainyard.worker.data.tokenizers import train_tokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.heldout import HeldOutEvaluator, share_of_rank
from trainyard.worker.training.state import build_train_state, initial_model

ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
LENGTH = 32
CHINESE = [
    "今天天气很好。",
    "机器学习模型需要大量的数据,",
    "我们去公园散步",
    "\U0001f600\U0001f680",
    "\U0001f469\u200d\U0001f4bb 写代码",
]
CODE = ["def f(x):\n    return x\n", "for i in range(10):\n\tprint(i)\n", "# 注释 \U0001f40d\n", "x = {'a': 1}\n"]


def write(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def texts_of(parts: list[str], count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(count)]


def predictions(tokenizer: tokenizers.Tokenizer, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the inputs and labels of a document, in pieces of LENGTH tokens that overlap by one."""
    ids = [1, *tokenizer.encode(text, add_special_tokens=False).ids, 2]
    for start in range(0, len(ids) - 1, LENGTH - 1):
        piece = ids[start : start + LENGTH]
        yield piece[:-1], piece[1:]


def reference(run: RunDir, tokenizer: Path, texts: list[str]) -> dict[str, float]:
    """The loss and the bits per byte of ``texts``: one piece after the other, in float64 where it sums."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    spec = json.loads(run.spec.read_text())
    model = Decoder(ModelConfig(**spec["model"], vocab_size=library.get_vocab_size()))
    saved = sorted(run.artifacts(None).checkpoints.glob("step-*"))[-1]
    model.load_state_dict(load_file(saved / "model.safetensors"), strict=False)
    model.eval()
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for text in texts:
            for inputs, labels in predictions(library, text):
                logits = model(torch.tensor([inputs]), logits=True).logits[0].double()
                nats += torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
                tokens += len(labels)
    text_bytes = sum(len(text.encode()) for text in texts)
    return {"loss": nats / tokens, "bpb": nats / tokens / math.log(2) * tokens / text_bytes}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    train_tokenizer([*texts_of(CHINESE, 50, 1), "the cat sat on the mat " * 20], 400, root / "tok")
    rank_runner.corpus(root / "corpus.jsonl", documents=80)
    return root


def described(data: Path, world: int, **fields: Any) -> dict[str, Any]:
    training = {"dtype": "float32", "batch_size": 4 // world, "accumulation_steps": 1, "max_steps": 6}
    spec = rank_runner.spec(data / "corpus.jsonl", training=training, reporting={"log_interval": 2})
    spec["data"] |= {"tokenizer_path": str(data / "tok"), "max_seq_len": LENGTH, **fields}
    return spec


def last(run: RunDir) -> MetricEvent:
    return rank_runner.metrics(run)[6]


@pytest.mark.long
def test_each_set_is_as_computed_by_hand_on_one_rank_and_on_two(data: Path, tmp_path: Path) -> None:
    texts = {"chinese": texts_of(CHINESE, 23, 2), "code": texts_of(CODE, 5, 3), "one": ["\U0001f600"]}
    cut = texts_of(["word "], 40, 4)
    write(tmp_path / "cut.jsonl", cut)
    sources: list[dict[str, Any]] = [
        {"name": name, "path": str(write(tmp_path / f"{name}.jsonl", found, "content")), "text_field": "content"}
        for name, found in texts.items()
    ]
    sources.append({"name": "cut", "path": str(tmp_path / "cut.jsonl"), "max_tokens": 100})
    results = []
    for world in (1, 2):
        run = rank_runner.new_run(tmp_path / f"run-{world}", described(data, world, eval_sources=sources))
        assert rank_runner.run_to_end(run, world).outcome == "completed"
        line = last(run)
        assert line.eval is not None
        results.append(line.eval)
        started = next(event for event in rank_runner.events(run) if isinstance(event, Started))
        facts = {held_out.name: held_out for held_out in started.eval_sets}
        assert [facts[name].documents for name in ("chinese", "code", "one")] == [23, 5, 1]
        wanted = {**texts, "cut": cut[: facts["cut"].documents]}
        assert 1 < len(wanted["cut"]) < 40
        for name, found in wanted.items():
            expected = reference(run, data / "tok", found)
            assert line.eval[name].loss == pytest.approx(expected["loss"], rel=1e-6), name
            assert line.eval[name].bpb == pytest.approx(expected["bpb"], rel=1e-6), name
        whole = reference(run, data / "tok", [text for found in wanted.values() for text in found])
        assert line.eval_loss == pytest.approx(whole["loss"], rel=1e-6)
        assert line.eval_bpb == pytest.approx(whole["bpb"], rel=1e-6)
        tokens = sum(held_out.tokens for held_out in started.eval_sets)
        by_tokens = sum((line.eval[name].loss or 0) * facts[name].tokens for name in facts) / tokens
        assert line.eval_loss == pytest.approx(by_tokens, rel=1e-9)
        assert facts["cut"].tokens <= 100
    for name, one in results[0].items():
        assert results[1][name].loss == pytest.approx(one.loss, rel=1e-5)
        assert results[1][name].bpb == pytest.approx(one.bpb, rel=1e-5)


@pytest.mark.long
def test_the_training_loss_in_bits_per_byte(data: Path, tmp_path: Path) -> None:
    """One epoch in one step: its bytes are those of the corpus."""
    run = rank_runner.new_run(tmp_path / "run", described(data, 1))
    spec = json.loads(run.spec.read_text())
    spec["training"] |= {"max_steps": 1, "accumulation_steps": 30}
    run.spec.write_text(json.dumps(spec))
    rank_runner.run_to_end(run)
    line = rank_runner.metrics(run)[1]
    texts = [json.loads(row)["text"] for row in (data / "corpus.jsonl").read_text().splitlines()]
    assert line.epoch == 1
    assert line.loss is not None
    expected = line.loss * line.tokens / math.log(2) / sum(len(text.encode()) for text in texts)
    assert line.bpb == pytest.approx(expected, rel=1e-12)


@pytest.mark.long
def test_a_run_killed_within_a_window_has_the_same_bits_per_byte(data: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("untouched", "broken"):
        spec = described(data, 1) | {"reporting": {"log_interval": 6}, "checkpoint": {"save_interval": 2}}
        runs.append(rank_runner.new_run(tmp_path / name, spec))
    rank_runner.run_to_end(runs[0])
    ranks = rank_runner.start(runs[1], patch=partial(rank_runner.hold_after, 3))
    ranks.wait_for_step(3)
    ranks.kill()
    rank_runner.run_to_end(runs[1])
    assert last(runs[0]).bpb is not None
    assert rank_runner.metrics(runs[1], 2)[6].bpb == last(runs[0]).bpb


@pytest.mark.long
def test_a_fraction_is_held_out_of_every_source_and_counts_duplicates(data: Path, tmp_path: Path) -> None:
    texts = {"a": texts_of(CHINESE, 40, 5), "b": texts_of(CODE, 30, 6)}
    texts["a"] += texts["a"][:9]
    sources = [{"name": name, "path": str(write(tmp_path / f"{name}.jsonl", found))} for name, found in texts.items()]
    spec = described(data, 1, eval_fraction=0.3)
    spec["data"] = {**spec["data"], "sources": sources, "data_path": None}
    run = rank_runner.new_run(tmp_path / "run", spec)
    rank_runner.run_to_end(run)
    started = next(event for event in rank_runner.events(run) if isinstance(event, Started))
    assert [(each.name, each.files) for each in started.eval_sets] == [("a", 1), ("b", 1)]
    for each in started.eval_sets:
        assert each.duplicates == sum(count - 1 for count in Counter(texts[each.name]).values())
        assert each.documents is not None
        assert 0 < each.documents < len(texts[each.name])
    assert started.duplicates == sum(each.duplicates or 0 for each in started.eval_sets)
    results = last(run).eval
    assert results is not None
    assert [*results] == ["a", "b"]
    assert all(result.loss and result.bpb for result in results.values())


def test_a_tokenizer_without_fixed_bytes_is_reported_and_bits_per_byte_are_null(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "the": 2, "cat": 3}, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    spec = rank_runner.spec(text, data={"tokenizer_path": str(tmp_path), "eval_data_path": str(text)})
    warnings: list[Event] = []
    data = prepare_data(
        JobSpec.model_validate_json(json.dumps(spec)), RunDir(tmp_path), ALONE, warnings.append, lambda: False
    )
    (warning,) = (event for event in warnings if isinstance(event, WarningEvent))
    assert warning.code == "bytes_unknown"
    assert warning.message.endswith(
        "no fixed number of bytes: its pre-tokenizer Whitespace drops or inserts characters"
    )
    state = build_train_state(initial_model(data.spec.model, 1, ALONE.device), data.spec.training, 0.0, ALONE)
    found = HeldOutEvaluator(data.eval_sets, ALONE, 4, None).evaluate(state)
    assert found.loss is not None
    assert (found.bpb, found.sets["eval"].bpb, found.sets["eval"].loss) == (None, None, found.loss)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_row_of_every_set_is_evaluated_once(world: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for sizes in ([1], [1] * 256, [rng.randint(1, 40) for _ in range(rng.randint(1, 20))]):
        shares = [share_of_rank(sizes, rank, world, 4) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1, "all ranks take part in the same collectives"
        seen = Counter((number, row) for share in shares for number, rows in share for row in rows.tolist())
        assert seen == Counter((number, row) for number, size in enumerate(sizes) for row in range(size))
        rows = [sum(len(part) for _, part in share) for share in shares]
        assert max(rows) - min(rows) <= 1
        assert all(len(part) <= 4 for share in shares for _, part in share)


def test_one_set_is_cut_as_before_there_were_several() -> None:
    """So the sums, and with them `eval_loss`, are those of release 0.1 to the bit."""
    (first, second) = (share_of_rank([41], rank, 2, 4) for rank in (0, 1))
    assert np.concatenate([rows for _, rows in first]).tolist() == list(range(20))
    assert [len(rows) for _, rows in second] == [4, 4, 4, 4, 4, 1]
    assert [len(rows) for _, rows in first] == [4, 4, 4, 4, 4, 0]
