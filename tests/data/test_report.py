"""The report of a tokenized corpus, compared with counts made in another way from the texts."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.data.test_byte_lengths import EXACT
from tests.data.texts import docstrings, write_jsonl
from trainyard.contract.corpus_files import expand
from trainyard.contract.corpus_page import report_lines
from trainyard.contract.corpus_report import CorpusReport, SourceReport, read_report
from trainyard.worker.data import report as report_module
from trainyard.worker.data.corpus import Corpus
from trainyard.worker.data.fileset import FileSetOptions, describe, open_files
from trainyard.worker.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(docstrings(3), 600, out)
    return out


def described(path: Path, cache: Path, tokenizer: Tokenizer, name: str = "byte") -> tuple[Corpus, SourceReport]:
    options = FileSetOptions(tokenizer, name, cache, max_bad_lines=0.5)
    files = expand(str(path))
    corpus = open_files(files, options)
    stored = SourceReport.read(corpus.directory)
    assert stored is not None, "the build writes it"
    assert describe(corpus, files, options) == stored
    return corpus, stored


def folder_of(texts: list[list[str]], folder: Path) -> Path:
    folder.mkdir()
    for number, part in enumerate(texts):
        write_jsonl(folder / f"{number:02}.jsonl", part)
    return folder


def test_counts_are_those_of_the_texts(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "BLOCK_TOKENS", 3000)
    seed = 5
    print("seed", seed)
    chance = random.Random(seed)
    texts = [chance.choice(["hello", "hello world", "文字 and 🙂", *docstrings(2)]) for _ in range(300)]
    folder = folder_of([texts[:100], texts[100:101], texts[101:]], tmp_path / "data")
    tokenizer = load_tokenizer(str(trained))
    corpus, report = described(folder, tmp_path / "cache", tokenizer, str(trained))
    ids = tokenizer.encode_batch(texts)
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    assert (report.files, report.bytes, report.documents) == (3, sum(sizes), 300)
    assert report.tokens == corpus.meta.tokens == sum(len(text) + 2 for text in ids)
    assert report.text_bytes == sum(len(text.encode()) for text in texts)
    assert report.bytes_per_token == report.text_bytes / sum(map(len, ids))
    assert report.duplicates == 300 - len(set(texts))
    expected = Counter(int(np.log2(len(text))) for text in ids)
    assert {bucket.min: bucket.documents for bucket in report.lengths if bucket.documents} == {
        2**power: count for power, count in expected.items()
    }
    assert [bucket.min for bucket in report.lengths] == [2**power for power in range(min(expected), max(expected) + 1)]
    assert report.vocab_used == len(set(np.concatenate(ids).tolist()) | {tokenizer.bos_id, tokenizer.eos_id})
    assert [(file.file, file.bytes, file.documents) for file in report.listed] == [
        ("00.jsonl", sizes[0], 100), ("01.jsonl", sizes[1], 1), ("02.jsonl", sizes[2], 199)
    ]  # fmt: skip
    for sample in report.samples:
        first = {"00.jsonl": 0, "01.jsonl": 100, "02.jsonl": 101}[sample.file]
        assert sample.text == texts[first + sample.document - 1][:2000]


def test_bytes_of_characters_without_a_token_are_counted(trained: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", ["ab", "é", "文a"])
    _, report = described(file, tmp_path / "cache", ByteTokenizer())
    assert (report.text_bytes, report.bytes_per_token, report.single_byte_share) == (8, 1.0, 5 / 8)
    _, report = described(file, tmp_path / "cache", load_tokenizer(str(trained)), str(trained))
    assert report.single_byte_share == 5 / 8, "no docstring has these characters often enough for a token"


def test_bad_documents_are_named_by_file_and_line(tmp_path: Path) -> None:
    folder = folder_of([["a", "b", "c"], ["d"]], tmp_path / "data")
    (folder / "02.jsonl").write_text('{"text": "e"}\n\nnonsense\n{"text": 3}\n')
    _, report = described(folder, tmp_path / "cache", ByteTokenizer())
    assert [(bad.file, bad.line, bad.reason) for bad in report.bad] == [
        ("02.jsonl", 3, "not JSON at character 1"),
        ("02.jsonl", 4, "'text' is not a string but a number"),
    ]
    assert (report.bad_documents, report.listed[2].bad_documents) == (2, 2)


def test_a_renamed_file_is_named_as_it_is_now(tmp_path: Path) -> None:
    folder = folder_of([["a", "b"], ["c"]], tmp_path / "data")
    (folder / "bad.jsonl").write_text('{"text": "e"}\nnonsense\n')
    before, first = described(folder, tmp_path / "cache", ByteTokenizer())
    (folder / "bad.jsonl").rename(folder / "worse.jsonl")
    after, second = described(folder, tmp_path / "cache", ByteTokenizer())
    assert before.directory == after.directory
    assert (first.bad[0].file, second.bad[0].file) == ("bad.jsonl", "worse.jsonl")
    assert second.model_copy(update={"bad": (), "listed": (), "samples": ()}) == first.model_copy(
        update={"bad": (), "listed": (), "samples": ()}
    )


def test_a_corpus_of_an_older_release_is_described_on_demand(tmp_path: Path) -> None:
    for path in (folder_of([["a", "b"], ["a"]], tmp_path / "data"), write_jsonl(tmp_path / "c.jsonl", ["x", "x"])):
        corpus, report = described(path, tmp_path / "cache", ByteTokenizer())
        (corpus.directory / "report.json").unlink()
        options = FileSetOptions(ByteTokenizer(), "byte", tmp_path / "cache")
        assert SourceReport.read(corpus.directory) is None
        assert describe(open_files(expand(str(path)), options), expand(str(path)), options) == report
        assert SourceReport.read(corpus.directory) == report


def test_a_damaged_report_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"name": "data"}', json.dumps({"files": "many"})):
        (tmp_path / "report.json").write_text(text)
        assert SourceReport.read(tmp_path) is None


def test_the_sums_of_sources(tmp_path: Path) -> None:
    reports = [
        described(write_jsonl(tmp_path / f"{name}.jsonl", texts), tmp_path / "cache", ByteTokenizer())[1]
        for name, texts in {"one": ["ab", "ab"], "two": ["éé"]}.items()
    ]
    report = CorpusReport.of(reports)
    assert (report.files, report.documents, report.tokens, report.duplicates) == (2, 3, 14, 1)
    assert (report.bytes_per_token, report.single_byte_share) == (1.0, 0.5)
    assert CorpusReport.model_validate_json(report.model_dump_json()) == report
    assert CorpusReport.of([]).bytes_per_token is None


def test_the_report_of_sources_in_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    keys, tokens = {}, {}
    for name, texts in {"web": ["ab", "cd"], "code": ["x"]}.items():
        corpus, report = described(write_jsonl(tmp_path / f"{name}.jsonl", texts), cache, ByteTokenizer())
        keys[name], tokens[name] = corpus.directory.name, report.tokens
    found = read_report(cache, keys)
    assert found is not None
    assert {source.name: source.tokens for source in found.sources} == tokens
    assert read_report(cache, {**keys, "gone": "0" * 32}) is None


@pytest.mark.parametrize("name", ["llama2 with words", "bert"])
def test_the_fit_of_other_tokenizers(name: str, tmp_path: Path) -> None:
    made = EXACT[name]() if name in EXACT else unknown_words()
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    texts = ["The cat <think> sat", "<think>词语", "é 龘 cat"]
    _, report = described(write_jsonl(tmp_path / "c.jsonl", texts), tmp_path / "cache", tokenizer, str(tmp_path))
    if name == "bert":
        assert (report.text_bytes, report.bytes_per_token, report.single_byte_share) == (None, None, None)
        assert CorpusReport.of([report]).bytes_per_token is None
    else:
        assert report.text_bytes == sum(len(text.encode()) for text in texts)
        assert report.single_byte_share == len("龘".encode()) / report.text_bytes
    assert any("fit" in line or "bytes per token" in line for line in report_lines(CorpusReport.of([report])))


def unknown_words() -> tokenizers.Tokenizer:
    words = {"[UNK]": 0, "<s>": 1, "</s>": 2, "cat": 3}
    made = tokenizers.Tokenizer(models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made
