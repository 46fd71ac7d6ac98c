"""Token shards: what they hold, when they are built, and what happens when a build is cut short."""

import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.data.texts import docstrings, write_jsonl
from trainyard.contract.cache import CorpusCache
from trainyard.contract.locks import FileLock
from trainyard.worker.data import corpus as corpus_module
from trainyard.worker.data import tokenization
from trainyard.worker.data.byte_lengths import ByteLengths
from trainyard.worker.data.corpus import Corpus, content_digest, main, open_corpus
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.packing import PackedDataset
from trainyard.worker.data.tokenizers import ByteTokenizer, load_tokenizer


def texts_of(corpus: Corpus) -> list[str]:
    tokenizer = ByteTokenizer()
    ends = corpus.offsets.tolist()
    return [tokenizer.decode(corpus.tokens[a:b].tolist()) for a, b in pairwise(ends)]


def age(path: Path) -> None:
    """Wait until the file is old enough to be remembered by its times."""
    deadline = time.monotonic() + 60
    while time.time() - path.stat().st_ctime <= corpus_module.RECENT_CHANGE_SECONDS:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_shards_hold_every_document_between_its_ends(docstring_file: Path, tmp_path: Path) -> None:
    corpus = open_corpus(docstring_file, ByteTokenizer(), cache=tmp_path)
    assert texts_of(corpus) == list(docstrings())
    assert (corpus.tokens[corpus.offsets[:-1]] == 1).all()
    assert (corpus.tokens[corpus.offsets[1:] - 1] == 2).all()
    assert int((np.asarray(corpus.tokens) <= 2).sum()) == 2 * len(docstrings())
    assert corpus.meta.documents == corpus.meta.lines == len(docstrings())
    assert corpus.meta.tokens == sum(len(text.encode()) + 2 for text in docstrings())


def test_shards_of_a_trained_tokenizer_decode_to_the_texts(docstring_file: Path, trained: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(trained))
    corpus = open_corpus(docstring_file, tokenizer, cache=tmp_path)
    for number in range(0, len(docstrings()), 37):
        ids = corpus.tokens[corpus.offsets[number] : corpus.offsets[number + 1]]
        assert tokenizer.decode(ids.tolist()) == docstrings()[number]
    assert corpus.meta.tokens < 0.6 * sum(len(text.encode()) for text in docstrings())


def test_a_special_token_in_a_text_is_no_end(tmp_path: Path, trained: Path) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", ["before<|im_end|>after", "<|endoftext|>"])
    for name in ("byte", str(trained)):
        corpus = open_corpus(file, load_tokenizer(name), cache=tmp_path / "cache")
        assert np.flatnonzero(np.asarray(corpus.tokens) == 2).tolist() == (corpus.offsets[1:] - 1).tolist()
        assert not (np.asarray(corpus.tokens) == 0).any()


class Wide(ByteTokenizer):
    """Ids beyond 16 bits; some texts without a token."""

    vocab_size = 100_000
    fingerprint = "wide"

    def encode_batch(self, texts):  # type: ignore[no-untyped-def]
        return [ids[ids > 3 + ord("0")] + np.uint32(99_000) for ids in super().encode_batch(texts)]

    def decode(self, ids):  # type: ignore[no-untyped-def]
        return super().decode(number - 99_000 for number in ids)

    def byte_lengths(self) -> ByteLengths:
        known = super().byte_lengths()
        wide = (99_000, 1000 - len(known.lengths))
        return ByteLengths(np.pad(known.lengths, wide), np.pad(known.added, wide))


def test_wide_ids_and_texts_without_a_token(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", ["ab", "0", "c"])
    corpus = open_corpus(file, Wide(), cache=tmp_path / "cache", max_bad_lines=0.5)
    assert corpus.tokens.tolist() == [1, 99_100, 99_101, 2, 1, 99_102, 2]
    assert corpus.offsets.tolist() == [0, 4, 7]
    assert corpus.meta.named == ((2, "the tokenizer makes no token of its text"),)
    assert (corpus.meta.documents, corpus.meta.bad_lines, corpus.meta.token_bytes) == (2, 1, 4)


def built(cache: Path) -> list[Path]:
    return sorted(file.parent for file in cache.glob("*/meta.json"))


def test_built_once_for_a_content_a_tokenizer_and_a_field(tmp_path: Path, trained: Path) -> None:
    cache = tmp_path / "cache"
    first = tmp_path / "a.jsonl"
    first.write_text('{"text": "one", "body": "two"}\n')
    calls: list[tuple[int, int]] = []

    def opened(path: Path, tokenizer: str = "byte", text_field: str = "text") -> Corpus:
        calls.clear()
        return open_corpus(
            path,
            load_tokenizer(tokenizer),
            cache=cache,
            text_field=text_field,
            progress=lambda *seen: calls.append(seen),
        )

    opened(first)
    size = first.stat().st_size
    assert calls[-1] == (size, size)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(first.read_bytes())
    opened(copy)
    assert (size, size) not in calls
    assert len(built(cache)) == 1
    opened(first, text_field="body")
    opened(first, tokenizer=str(trained))
    assert len(built(cache)) == 3
    first.write_text('{"text": "one", "body": "2"}\n')
    assert texts_of(opened(first)) == ["one"]
    assert len(built(cache)) == 4


def test_digest_is_remembered_only_while_nothing_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text("a")
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "RECENT_CHANGE_SECONDS", 3600.0)  # however long it takes to get here
        fresh = content_digest(file, tmp_path, lambda done, total: None)
    assert not list(tmp_path.glob("content-*.json"))
    age(file)
    assert content_digest(file, tmp_path, lambda done, total: None) == fresh
    assert len(list(tmp_path.glob("content-*.json"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_hash_file", None)  # it is not read again
        assert content_digest(file, tmp_path, lambda done, total: None) == fresh
    times = file.stat()
    file.write_text("b")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the change time still tells
    assert content_digest(file, tmp_path, lambda done, total: None) != fresh


def bad_file(tmp_path: Path, bad: int, good: int) -> Path:
    file = tmp_path / "c.jsonl"
    file.write_text("broken\n" * bad + '{"text": "a"}\n' * good)
    return file


def test_bad_lines_up_to_the_limit_are_tolerated(tmp_path: Path) -> None:
    file = bad_file(tmp_path, 1, 99)
    assert open_corpus(file, ByteTokenizer(), cache=tmp_path / "c", max_bad_lines=0.01).meta.bad_lines == 1
    with pytest.raises(DataInvalid) as refused:
        open_corpus(file, ByteTokenizer(), cache=tmp_path / "c", max_bad_lines=0.0099)
    assert str(refused.value) == (
        f"{file} has 1 bad line: line 1: not JSON at character 1. That is 1.00% of its lines, "
        "and max_bad_lines allows 0.99%: mend the lines, or raise max_bad_lines"
    )


def test_blank_lines_are_not_bad(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('\n\n \r\n{"text": "a"}\n\n')
    meta = open_corpus(file, ByteTokenizer(), cache=tmp_path / "c", max_bad_lines=0.0).meta
    assert (meta.lines, meta.blank_lines, meta.bad_lines) == (5, 4, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no document: it needs one JSON object a line"),
        ("\n\n", "holds no document"),
        (
            '{"content": "a"}\n',
            "holds no text under 'text': 1 bad line: line 1: no 'text' in the object, which has 'content'. What",
        ),
    ],
)
def test_an_empty_corpus_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(content)
    with pytest.raises(DataInvalid, match=message):
        open_corpus(file, ByteTokenizer(), cache=tmp_path / "c", max_bad_lines=1.0)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    code = (
        "import sys, tracemalloc; from pathlib import Path; from trainyard.worker.data.corpus import open_corpus;"
        "from trainyard.worker.data.tokenizers import ByteTokenizer;"
        "tracemalloc.start();"
        "open_corpus(Path(sys.argv[1]), ByteTokenizer(), cache=Path(sys.argv[2]));"
        "print(tracemalloc.get_traced_memory()[1])"
    )
    # What is allocated, not what is resident: the maximum of a process includes its parent's, and the mapped shards.
    peaks = []
    for copies in (1, 8):
        file, cache = tmp_path / f"{copies}.jsonl", tmp_path / f"cache-{copies}"
        write_jsonl(file, ["a text of about forty bytes, repeated " * 200] * 400 * copies)
        command = [sys.executable, "-c", code, str(file), str(cache)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 8 << 20  # the second file is 20 MiB larger


def test_a_file_that_changes_between_hash_and_build_is_refused(
    docstring_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(docstring_file.read_bytes())
    digest = content_digest(file, tmp_path, lambda done, total: None)
    monkeypatch.setattr(corpus_module, "content_digest", lambda *_: digest)
    file.write_bytes(file.read_bytes().replace(b"the", b"THE", 1))
    with pytest.raises(DataInvalid, match="changed while it was read"):
        open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache")
    assert built(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob(".*"))


def open_and_report(path: Path, cache: Path, queue: "multiprocessing.Queue[tuple[int, int]]") -> None:
    built_here = []
    corpus = open_corpus(path, ByteTokenizer(), cache=cache, progress=lambda done, total: built_here.append(done))
    queue.put((corpus.meta.documents, sum(1 for done in built_here if done)))


def test_processes_that_want_the_same_corpus_build_it_once(docstring_file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    processes = [context.Process(target=open_and_report, args=(docstring_file, tmp_path, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert {documents for documents, _ in found} == {len(docstrings())}
    assert sum(batches > 0 for _, batches in found) == 1
    assert len(built(tmp_path)) == 1


def test_a_killed_build_leaves_nothing_and_the_next_one_succeeds(docstring_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from trainyard.worker.data.corpus import open_corpus;"
        "from trainyard.worker.data.tokenizers import ByteTokenizer\n"
        "def stuck(done, total):\n"
        "    if done: print('building', flush=True); time.sleep(600)\n"
        "open_corpus(Path(sys.argv[1]), ByteTokenizer(), cache=Path(sys.argv[2]), progress=stuck)"
    )
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", code, str(docstring_file), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.send_signal(signal.SIGKILL)
    assert built(cache) == []
    assert len(list(cache.glob(".*.building"))) == 1
    corpus = open_corpus(docstring_file, ByteTokenizer(), cache=cache)
    assert texts_of(corpus) == list(docstrings())
    assert not list(cache.glob(".*.building"))


def test_an_open_corpus_stays_in_the_cache_and_one_that_left_comes_back_the_same(tmp_path: Path) -> None:
    file, shelf = write_jsonl(tmp_path / "c.jsonl", docstrings()[:50]), CorpusCache(tmp_path / "cache")
    corpus = open_corpus(file, ByteTokenizer(), cache=shelf.path)
    before = (corpus.directory / "tokens.bin").read_bytes()
    rows = PackedDataset.open(corpus, max_seq_len=32, packing="document")
    del corpus
    assert not shelf.remove(shelf.entries()[0]), "its rows are still in use"
    del rows
    assert shelf.remove(shelf.entries()[0])
    assert (open_corpus(file, ByteTokenizer(), cache=shelf.path).directory / "tokens.bin").read_bytes() == before


def test_corpora_are_opened_whole_while_they_are_removed_all_the_time(tmp_path: Path) -> None:
    file, shelf = write_jsonl(tmp_path / "c.jsonl", docstrings()[:5]), CorpusCache(tmp_path / "cache")
    removed: list[bool] = []
    ended = threading.Event()

    def remove_all() -> None:
        while not ended.is_set():
            removed.extend(shelf.remove(each) for each in shelf.entries())

    remover = threading.Thread(target=remove_all)
    remover.start()
    try:
        deadline = time.monotonic() + 200
        while removed.count(True) < 8:
            assert time.monotonic() < deadline, "it was not removed again and again"
            corpus = open_corpus(file, ByteTokenizer(), cache=shelf.path)
            assert texts_of(corpus) == list(docstrings()[:5])
            PackedDataset.open(corpus, max_seq_len=32, packing="document").batch([0])
            del corpus
            ended.wait(0.005)  # no process has it open for a moment
    finally:
        ended.set()
        remover.join()


def test_waiting_for_another_build_can_be_broken_off(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", ["a"])
    open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache")
    (directory,) = built(tmp_path / "cache")
    (directory / "meta.json").unlink()  # as if it were not built yet

    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if (done, total) == (0, file.stat().st_size) and time.monotonic() > waited_until:
            raise Enough

    waited_until = time.monotonic() + 0.5  # the hash is long done by then
    with FileLock(directory.with_suffix(".lock")) as lock:
        lock.take()
        with pytest.raises(Enough):
            open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache", progress=stop)


def test_shards_of_another_size_are_not_read(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", ["a", "b"])
    corpus = open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache")
    os.truncate(corpus.directory / "tokens.bin", 4)
    with pytest.raises(OSError, match=r"tokens.bin has 4 bytes, not 12: remove"):
        open_corpus(file, ByteTokenizer(), cache=tmp_path / "cache")


def test_command_prints_what_a_job_would_find(
    docstring_file: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(docstring_file), "--tokenizer", str(trained)]) == 0
    assert f"{len(docstrings()):,} documents" in capsys.readouterr().out


def test_command_names_bad_lines_and_tolerates_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"body": "a"}\n\nbroken\n' + '{"body": "b"}\n' * 200)
    assert main(["check", str(file), "--text-field", "body"]) == 0
    out = capsys.readouterr().out
    assert "201 documents, 603 tokens, 203 lines" in out
    assert "1 blank line\n1 bad line\n" in out
    assert out.startswith("line 3: not JSON at character 1\n")
    assert main(["check", str(file), "--text-field", "body", "--max-bad-lines", "0"]) == 1
    assert "line 3: not JSON" in capsys.readouterr().err


def test_command_names_every_bad_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "a"}\nx\n' * 100)
    assert main(["check", str(file)]) == 1
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("line ")]
    assert named == [f"line {number}: not JSON at character 1" for number in range(2, 201, 2)]


def test_command_speaks_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "ab"}\n\n' * 9)
    assert main(["check", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["usable"], found["why_not"], found["tokens"]) == (str(file), True, None, 36)
    file.write_text("x\n")
    assert main(["check", str(file), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["usable"], "holds no text" in found["why_not"]) == (False, True)
    assert (found["lines"], found["bad_lines"], found["documents"], found["tokens"]) == (1, 1, 0, 0)
    assert found["named"] == [{"line": 1, "why": "not JSON at character 1"}]
    assert "examples" not in found


def test_command_refuses_what_a_job_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "missing")]) == 1
    assert main(["check", "/dev/zero"]) == 1
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "a"}))
    assert main(["check", str(tmp_path / "c.jsonl"), "--tokenizer", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("trainyard corpus: ") == 3


@pytest.mark.parametrize("arguments", [[], ["check"], ["check", "f", "--max-bad-lines", "2"], ["look", "f"]])
def test_wrong_usage_ends_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_check_needs_no_torch() -> None:
    code = "import sys, trainyard.worker.data.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def marked(path: Path) -> Path:
    """Three of a hundred texts hold special tokens: four of them."""
    texts = ["plain"] * 97 + ["<|im_start|>a<|im_end|>", "b<|im_end|>", "<|endoftext|>c"]
    return write_jsonl(path, texts)


def test_special_tokens_are_counted_and_their_reading_is_part_of_the_key(tmp_path: Path, trained: Path) -> None:
    file, cache = marked(tmp_path / "c.jsonl"), tmp_path / "cache"
    as_text = open_corpus(file, load_tokenizer(str(trained)), cache=cache)
    as_tokens = open_corpus(file, load_tokenizer(str(trained), "tokens"), cache=cache)
    for corpus in (as_text, as_tokens):
        assert (corpus.meta.special_tokens, corpus.meta.special_texts, corpus.meta.documents) == (4, 3, 100)
    # BOS and EOS of 100 documents, and what the texts hold.
    assert [int((c.tokens == 2).sum()) for c in (as_text, as_tokens)] == [100, 102]
    content, fingerprint = hashlib.sha256(file.read_bytes()).hexdigest(), load_tokenizer(str(trained)).fingerprint
    # The key of release 0.1: its corpora stay valid.
    old = hashlib.sha256(json.dumps([1, content, fingerprint, "text"]).encode()).hexdigest()[:32]
    assert as_text.directory.name == old != as_tokens.directory.name


def test_a_corpus_of_release_0_1_opens_without_counts(tmp_path: Path) -> None:
    file, cache = marked(tmp_path / "c.jsonl"), tmp_path / "cache"
    meta = open_corpus(file, load_tokenizer("byte"), cache=cache).directory / "meta.json"
    raw = json.loads(meta.read_bytes())
    for name in ("special_tokens", "special_texts", "added_tokens"):
        del raw[name]
    meta.write_text(json.dumps(raw))
    again = open_corpus(file, load_tokenizer("byte"), cache=cache).meta
    assert (again.special_tokens, again.documents) == (None, 100)


def test_counts_survive_an_interrupted_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = marked(tmp_path / "c.jsonl")
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 8)

    class Stopped(Exception):
        pass

    def stop_at_last_line(done: int, total: int) -> None:
        if done == total:
            raise Stopped

    with pytest.raises(Stopped):
        open_corpus(file, load_tokenizer("byte"), cache=tmp_path / "cache", progress=stop_at_last_line)
    meta = open_corpus(file, load_tokenizer("byte"), cache=tmp_path / "cache").meta
    assert (meta.special_tokens, meta.special_texts) == (4, 3)


def test_check_counts_special_tokens_and_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = marked(tmp_path / "c.jsonl")
    assert main(["check", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "4 special tokens in 3 texts\n" in printed
    assert "warning: 3.0 % of the texts hold special tokens (4 in all)" in printed
    assert 'set data.special_tokens to "tokens"' in printed
    assert main(["check", str(file), "--special-tokens", "tokens", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["special_tokens"], found["special_texts"], found["warning"]) == (4, 3, None)
    write_jsonl(file, ["plain"] * 99 + ["<|im_end|>"])
    assert main(["check", str(file)]) == 0
    assert "warning" not in capsys.readouterr().out


def test_check_of_a_directory_counts_each_file_and_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    write_jsonl(data / "a.jsonl", ["ab"] * 200)
    (data / "b.jsonl").write_text('broken\n{"text": "c"}\n')
    (data / "empty.jsonl").touch()
    (data / "sub" / "new\nline.txt").write_text("one\n\ntwo\n")
    assert main(["check", str(data)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{data}/a.jsonl: 200 documents, 800 tokens, 200 lines",
        f"{data}/b.jsonl: line 1: not JSON at character 1",
        f"{data}/b.jsonl: 1 document, 3 tokens, 2 lines",
        "1 bad line",
        f"{data}/empty.jsonl: 0 documents, 0 tokens, 0 lines",
        f"'{data}/sub/new\\nline.txt': 2 documents, 10 tokens, 3 lines",
        "1 blank line",
        "total of 4 files: 203 documents, 813 tokens, 205 lines",
        "1 blank line",
        "1 bad line",
    ]
    assert main(["check", f"{data}/*.jsonl", str(data / "sub"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["usable"], found["documents"], found["tokens"], found["bad_lines"]) == (True, 203, 813, 1)
    assert [file["documents"] for file in found["files"]] == [200, 1, 0, 2]
    assert found["files"][1]["named"] == [{"line": 1, "why": "not JSON at character 1"}]
    assert "examples" not in found["files"][1]


def test_check_goes_on_after_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "ab"}\n' * 500)[:-9])
    write_jsonl(tmp_path / "b.jsonl", ["ab"] * 2)
    assert main(["check", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert f"{tmp_path}/b.jsonl: 2 documents, 8 tokens, 2 lines" in printed.out
    assert "a.jsonl.gz is damaged gzip data" in printed.out
    assert "a.jsonl.gz is damaged gzip data" in printed.err
    assert main(["check", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["usable"]
    assert ["damaged" in (file["why_not"] or "") for file in found["files"]] == [True, False]
    assert main(["check", f"{tmp_path}/*.none"]) == 1
    assert "matches no file" in capsys.readouterr().err


def test_messages_about_a_file_are_one_line_whatever_its_name_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a\nb.jsonl"
    for content in (b"bad\n", b"\x00\xff" * 9, gzip.compress(b"x" * 99)[:-9]):
        file.write_bytes(content)
        assert main(["check", str(file)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "a\\nb.jsonl" in error
