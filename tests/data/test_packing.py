"""Packing: every prediction exactly once, segments whole and apart, and the held-out documents."""

import random
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.texts import write_jsonl
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.worker.data import documents as documents_module
from trainyard.worker.data import packing as packing_module
from trainyard.worker.data.corpus import Corpus, open_corpus
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.packing import Batch, PackedDataset, Packing, SplitBy, SplitSpec, best_fit, segments_of
from trainyard.worker.data.tokenizers import ByteTokenizer
from trainyard.worker.splitmix import GAMMA, splitmix64

SPLITS: tuple[SplitBy, ...] = ("number", "text")
PACKINGS: tuple[Packing, ...] = ("none", "document")


@pytest.fixture
def corpus(docstring_file: Path, tmp_path: Path) -> Corpus:
    return open_corpus(docstring_file, ByteTokenizer(), cache=tmp_path)


def corpus_of(lengths: list[int], folder: Path) -> Corpus:
    """Documents of so many tokens, ends included."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    texts = ["".join(alphabet[(n + i) % 26] for i in range(length - 2)) for n, length in enumerate(lengths)]
    return open_corpus(write_jsonl(folder / "c.jsonl", texts), ByteTokenizer(), cache=folder / "cache")


def numbered(corpus: Corpus) -> Corpus:
    """The same documents, with each token's position in the corpus as its id, to see where it goes."""
    corpus.tokens = np.arange(corpus.meta.tokens, dtype=np.uint32)
    return corpus


def predictions(batch: Batch) -> Counter[tuple[int, int]]:
    asked = batch.labels != -100
    return Counter(zip(batch.input_ids[asked].tolist(), batch.labels[asked].tolist(), strict=True))


def all_predictions(corpus: Corpus) -> Counter[tuple[int, int]]:
    ends = corpus.offsets.tolist()
    return Counter((t, t + 1) for a, b in pairwise(ends) for t in range(a, b - 1))


@pytest.mark.parametrize("packing", PACKINGS)
@given(lengths=st.lists(st.integers(3, 60), min_size=1, max_size=25), max_seq_len=st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_every_prediction_is_made_exactly_once(packing: Packing, lengths: list[int], max_seq_len: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = numbered(corpus_of(lengths, Path(folder)))
        dataset = PackedDataset.open(corpus, max_seq_len=max_seq_len, packing=packing)
        batch = dataset.batch(np.arange(len(dataset)))
        assert predictions(batch) == all_predictions(corpus)
        assert (batch.labels != -100).sum(1).tolist() == dataset.targets_of(range(len(dataset))).tolist()
        assert dataset.tokens == sum(lengths) - len(lengths)


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_prediction_of_real_text_is_made_exactly_once(packing: Packing, corpus: Corpus) -> None:
    dataset = PackedDataset.open(numbered(corpus), max_seq_len=100, packing=packing)
    found: Counter[tuple[int, int]] = Counter()
    for start in range(0, len(dataset), 64):
        found += predictions(dataset.batch(np.arange(start, min(start + 64, len(dataset)))))
    assert found == all_predictions(corpus)


def test_packing_none_by_hand(tmp_path: Path) -> None:
    dataset = PackedDataset.open(numbered(corpus_of([4, 9, 5], tmp_path)), max_seq_len=5, packing="none")
    batch = dataset.batch(range(len(dataset)))
    assert batch.position_ids is None
    assert batch.segment_ids is None
    assert batch.input_ids.tolist() == [
        [0, 1, 2, 3, 0],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11, 12],
        [13, 14, 15, 16, 17],
    ]
    assert batch.labels.tolist() == [
        [1, 2, 3, -100, -100],
        [5, 6, 7, 8, -100],
        [9, 10, 11, 12, -100],
        [14, 15, 16, 17, -100],
    ]


def test_packing_document_by_hand(tmp_path: Path) -> None:
    # Longest first, each into the fullest row with room: 5 + 3, then 4 + 4.
    dataset = PackedDataset.open(numbered(corpus_of([4, 3, 5, 4], tmp_path)), max_seq_len=8, packing="document")
    batch = dataset.batch([1, 0])
    assert batch.position_ids is not None
    assert batch.segment_ids is not None
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2, 2, 2]]
    assert batch.labels.tolist() == [[1, 2, 3, -100, 13, 14, 15, -100], [5, 6, -100, 8, 9, 10, 11, -100]]
    assert batch.offsets is not None
    assert batch.offsets.tolist() == [0, 4, 8, 11, 16, 16, 16]


@pytest.mark.parametrize("packing", PACKINGS)
def test_attention_counts_the_squared_lengths_of_segments(packing: Packing, corpus: Corpus) -> None:
    dataset = PackedDataset.open(corpus, max_seq_len=60, packing=packing)
    squares = 0
    for row in range(len(dataset)):
        batch = dataset.batch([row])
        if batch.segment_ids is None:
            squares += (int(dataset.targets_of([row])[0]) + 1) ** 2
        else:
            squares += sum(n**2 for segment, n in Counter(batch.segment_ids[0].tolist()).items() if segment)
    assert dataset.attention_length == pytest.approx(squares / dataset.tokens)
    assert dataset.attention_length < 61


def test_offsets_count_padding_as_a_segment_and_keep_their_size(tmp_path: Path) -> None:
    dataset = PackedDataset.open(numbered(corpus_of([3, 3, 4, 6], tmp_path)), max_seq_len=9, packing="document")
    assert len(dataset) == 2
    offsets = {}
    for rows in ([0, 1], [1, 0], [1], []):
        batch = dataset.batch(rows)
        assert batch.offsets is not None
        assert batch.segment_ids is not None
        flat = batch.segment_ids.flatten()
        changes = (flat.diff() != 0).nonzero().flatten() + 1
        edges = {0, *changes.tolist(), *range(0, len(flat) + 1, 9)}
        assert sorted(set(batch.offsets.tolist())) == sorted(edges)
        offsets[tuple(rows)] = len(batch.offsets)
    assert offsets[0, 1] == offsets[1, 0]
    assert offsets[(1,)] == offsets[()]


@pytest.mark.parametrize("packing", PACKINGS)
def test_only_the_end_of_a_document_is_an_end(packing: Packing, corpus: Corpus) -> None:
    dataset = PackedDataset.open(corpus, max_seq_len=50, packing=packing)
    ends = sum(int((dataset.batch([row]).labels == 2).sum()) for row in range(len(dataset)))
    assert ends == corpus.meta.documents


def test_rows_are_well_filled(corpus: Corpus) -> None:
    dataset = PackedDataset.open(corpus, max_seq_len=340, packing="document")
    assert dataset.tokens / (len(dataset) * 340) > 0.97
    assert len(dataset) < 0.75 * len(PackedDataset.open(corpus, max_seq_len=340, packing="none"))


def test_no_row_at_all_is_one_row_of_padding(corpus: Corpus) -> None:
    for packing in PACKINGS:
        batch = PackedDataset.open(corpus, max_seq_len=20, packing=packing).batch([])
        assert batch.input_ids.tolist() == [[0] * 20]
        assert batch.labels.tolist() == [[-100] * 20]
        for tensor in (batch.position_ids, batch.segment_ids):
            assert (tensor is None) == (packing == "none")
            assert tensor is None or tensor.tolist() == [[0] * 20]


def test_batch_moves_and_keeps_its_dtype(corpus: Corpus) -> None:
    batch = PackedDataset.open(corpus, max_seq_len=20, packing="document").batch([3, 1])
    moved = batch.to("cpu")
    assert all(tensor is not None and tensor.dtype == torch.int64 and tensor.shape == (2, 20) for tensor in moved[:4])
    assert moved.offsets is not None
    assert moved.offsets.dtype == torch.int32
    assert PackedDataset.open(corpus, max_seq_len=20, packing="none").batch([3]).to("cpu").segment_ids is None


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), max_size=80),
    st.integers(50, 70),
)
def test_best_fit_fills_rows_within_their_capacity(lengths: list[int], capacity: int) -> None:
    row = best_fit(np.array(lengths, dtype=np.int64), capacity)
    used = np.bincount(row, weights=lengths) if lengths else np.zeros(0)
    assert (used <= capacity).all()
    assert (used > 0).all()
    # Any two rows together overflow one, or best fit would not have opened the second.
    assert len(used) < 2 or np.sort(used)[:2].sum() > capacity
    assert (best_fit(np.array(lengths, dtype=np.int64), capacity) == row).all()


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    # Rows of 10: 7, 6 and 6; then 4 goes to a row with 6, 3 fills the 7, and the last 4 the other 6.
    assert best_fit(np.array([7, 6, 6, 4, 3, 4]), 10).tolist() == [0, 1, 2, 2, 0, 1]


@settings(deadline=None)
@given(st.integers(2, 500), st.integers(2, 100))
def test_segments_overlap_by_one(length: int, max_seq_len: int) -> None:
    starts, lengths = segments_of(np.array([7, 7 + length]), np.array([True]), max_seq_len)
    assert starts[0] == 7
    assert int(starts[-1] + lengths[-1]) == 7 + length
    assert (starts[1:] == starts[:-1] + lengths[:-1] - 1).all()
    assert (lengths[:-1] == max_seq_len).all()
    assert 2 <= lengths[-1] <= max_seq_len


def test_blocks_bound_memory_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = numbered(corpus_of([5, 30, 3, 3, 12, 7, 9, 41, 4], tmp_path))
    monkeypatch.setattr(documents_module, "BLOCK_TOKENS", 16)
    blocks = list(documents_module.blocks(corpus.offsets))
    assert [first for first, _ in blocks] == [0, *[last for _, last in blocks[:-1]]]
    assert blocks[-1][1] == 9
    assert len(blocks) > 3
    dataset = PackedDataset.open(corpus, max_seq_len=20, packing="document")
    assert predictions(dataset.batch(range(len(dataset)))) == all_predictions(corpus)


def test_tables_are_kept_beside_the_shards(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = PackedDataset.open(corpus, max_seq_len=64, packing="document")
    with monkeypatch.context() as patch:
        patch.setattr(packing_module, "_write", None)
        again = PackedDataset.open(corpus, max_seq_len=64, packing="document")
    assert torch.equal(first.batch([5]).input_ids, again.batch([5]).input_ids)
    assert PackedDataset.open(corpus, max_seq_len=65, packing="document").max_seq_len == 65
    names = sorted(path.name for path in corpus.directory.iterdir() if path.is_dir())
    assert names == ["rows-1-64-document-all", "rows-1-65-document-all"]


@pytest.mark.parametrize("by", SPLITS)
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_held_out_documents_are_apart_and_about_as_many(fraction: float, by: SplitBy, corpus: Corpus) -> None:
    corpus = numbered(corpus)
    train, held = (
        PackedDataset.open(corpus, max_seq_len=200, packing="document", split=SplitSpec(part, fraction, by))
        for part in ("train", "eval")
    )
    parts = [predictions(dataset.batch(range(len(dataset)))) for dataset in (train, held)]
    assert parts[0] + parts[1] == all_predictions(corpus)
    assert not parts[0] & parts[1]
    starts = set(corpus.offsets[:-1].tolist())
    count = sum(1 for first, _ in parts[1] if first in starts)
    expected = fraction * corpus.meta.documents
    assert 1 <= count <= corpus.meta.documents - 1
    assert abs(count - expected) < 4 * np.sqrt(expected) + 2


@pytest.mark.parametrize("by", SPLITS)
def test_a_larger_fraction_holds_out_the_same_and_more(by: SplitBy, corpus: Corpus) -> None:
    hashes = documents_module.text_hashes(corpus.tokens, corpus.offsets)
    documents, chosen = corpus.meta.documents, None if by == "number" else hashes
    held = [
        packing_module.Holdout.of(SplitSpec("eval", fraction), documents, chosen).mask(0, documents)
        for fraction in (0.05, 0.2)
    ]
    assert (held[1] | ~held[0]).all()
    assert held[1].sum() > held[0].sum()


def texts_of(dataset: PackedDataset) -> Counter[tuple[int, ...]]:
    """The documents of a dataset with one document a row."""
    return Counter(tuple(dataset.batch([row]).input_ids[0].tolist()) for row in range(len(dataset)))


def split_texts(texts: list[str], folder: Path, by: SplitBy) -> list[PackedDataset]:
    folder.mkdir()
    corpus = open_corpus(write_jsonl(folder / "c.jsonl", texts), ByteTokenizer(), cache=folder / "cache")
    return [
        PackedDataset.open(corpus, max_seq_len=16, packing="none", split=SplitSpec(part, 0.3, by))
        for part in ("train", "eval")
    ]


def test_documents_with_the_same_text_are_on_the_same_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(documents_module, "CHUNK", 4)  # several chunks, and several ranges of hashes
    seed = 11
    print("seed", seed)
    chance = random.Random(seed)
    texts = [f"text {chance.randrange(120)}" for _ in range(400)]
    train, held = split_texts(texts, tmp_path / "text", "text")
    assert not texts_of(train).keys() & texts_of(held).keys()
    assert sum((texts_of(train) + texts_of(held)).values()) == 400
    assert 0.2 < len(held) / 400 < 0.4
    assert train.duplicates == held.duplicates == 400 - len(set(texts))
    assert not list(train.parts[0].corpus.directory.glob("rows-*/hashes.bin"))
    old_train, old_held = split_texts(texts, tmp_path / "number", "number")
    assert texts_of(old_train).keys() & texts_of(old_held).keys(), "0.1 trained on what it evaluated"
    assert old_train.duplicates is None


def test_the_split_of_release_0_1_is_still_there(corpus: Corpus) -> None:
    documents = corpus.meta.documents
    old = packing_module.Holdout.of(SplitSpec("eval", 0.1, "number"), documents).mask(0, documents)
    mixed = splitmix64(np.arange(1, documents + 1, dtype=np.uint64) * GAMMA, 0x5EED_0E7A1)
    assert (old == (mixed < np.uint64(int(0.1 * 2**64)))).all()
    assert str(SplitSpec("eval", 0.1, "number")) == "eval-0.1"


def test_a_corpus_of_one_text_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="two different documents"):
        split_texts(["the same"] * 9, tmp_path / "same", "text")
    train, held = split_texts(["the same"] * 9 + ["another"], tmp_path / "two", "text")
    assert sorted((len(train), len(held))) == [1, 9]


def test_two_documents_can_be_split_and_one_cannot(tmp_path: Path) -> None:
    two = corpus_of([5, 6], tmp_path)
    sizes = [
        PackedDataset.open(two, max_seq_len=9, packing="none", split=SplitSpec(part, 0.01)).tokens
        for part in ("train", "eval")
    ]
    assert sorted(sizes) == [4, 5]
    one = corpus_of([5], tmp_path)
    with pytest.raises(DataInvalid, match="at least two documents"):
        PackedDataset.open(one, max_seq_len=9, packing="none", split=SplitSpec("eval", 0.5))


def test_splitmix64_gives_its_published_numbers() -> None:
    # The first numbers of SplitMix64 seeded with 1234567: the generator's published test vector.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + (n + 1) * gamma) % 2**64 for n in range(3)], dtype=np.uint64)
    assert splitmix64(states, 0).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("changes", [{}, {"use_moe": True, "moe_intermediate_size": 48}], ids=["dense", "moe"])
def test_loss_and_gradients_do_not_depend_on_packing(changes: dict[str, Any], corpus: Corpus) -> None:
    """The same documents, one a row and packed: equal to 1e-5, with the real dataset and the real decoder."""
    model = Decoder(
        ModelConfig(
            vocab_size=259, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **changes
        ),
        torch.Generator().manual_seed(0),
    )
    results = []
    for packing in PACKINGS:
        dataset = PackedDataset.open(corpus, max_seq_len=64, packing=packing, split=SplitSpec("eval", 0.01))
        model.zero_grad()
        loss, aux = 0.0, 0.0
        for start in range(0, len(dataset), 16):
            batch = dataset.batch(range(start, min(start + 16, len(dataset))))
            out = model(**batch._asdict())
            ((out.loss_sum + 0.01 * out.aux_sum) / dataset.tokens).backward()
            loss, aux = loss + out.loss_sum.item() / dataset.tokens, aux + out.aux_sum.item() / dataset.tokens
        results.append(
            (loss, aux, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (loss, aux, grads), (packed_loss, packed_aux, packed_grads) = results
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_aux == pytest.approx(aux, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-4, atol=1e-5)
