"""Many files in one corpus: the same tokens as one by one, each file tokenized once, killed at any time."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from tests.data.texts import docstrings, write_jsonl
from trainyard.contract import allowed_paths
from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.contract.corpus_files import expand
from trainyard.contract.corpus_page import report_lines
from trainyard.contract.corpus_report import CorpusReport, SourceReport
from trainyard.contract.status import RESTARTABLE
from trainyard.worker.data import file as file_module
from trainyard.worker.data import fileset, prepare
from trainyard.worker.data.corpus import Corpus, open_built, open_corpus
from trainyard.worker.data.fileset import FileSetOptions, file_counts, open_files
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.part import PartFiles, tokenize_part
from trainyard.worker.data.tokenizers import ByteTokenizer
from trainyard.worker.errors import StopRequested, TrainingError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 files of five forms, one of them empty."""
    texts = docstrings(12)
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    for number in range(20):
        write_jsonl(data / ("sub" if number % 2 else ".") / f"{number:03}.jsonl", texts[number::20])
    (data / "plain.txt").write_text("one\n\ntwo\n\n文\n")
    (data / "packed.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "packed"}).encode()))
    (data / "empty.jsonl").write_text("")
    return data


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileset, "PART_BYTES", 20_000)


def built(folder: Path, cache: Path, **options: object) -> Corpus:
    return open_files(expand(str(folder)), FileSetOptions(ByteTokenizer(), "byte", cache, **options))  # type: ignore[arg-type]


def one_by_one(folder: Path, cache: Path) -> Iterator[np.ndarray]:
    for file in expand(str(folder)):
        if file.path.stat().st_size:
            yield np.array(open_corpus(file.path, ByteTokenizer(), cache=cache).tokens)


@pytest.mark.parametrize("processes", [1, 3])
def test_the_tokens_are_those_of_the_files_in_order(processes: int, folder: Path, tmp_path: Path) -> None:
    corpus = built(folder, tmp_path / "cache", processes=processes)
    expected = list(one_by_one(folder, tmp_path / "other"))
    assert np.array_equal(corpus.tokens, np.concatenate(expected))
    counts = file_counts(corpus) or []
    assert [entry.tokens for entry in counts if entry.tokens] == [len(tokens) for tokens in expected]
    assert sum(entry.bytes for entry in counts) == corpus.meta.bytes
    assert int(corpus.offsets[-1]) == corpus.meta.tokens
    assert not [path for path in corpus.directory.iterdir() if path.name.startswith(".") or path.name == "journal.json"]


def test_a_corpus_that_gained_a_file_tokenizes_one_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(folder, tmp_path / "cache")
    tokenized: list[str] = []
    original = tokenize_part

    def record(directory: Path, part: PartFiles, *rest: object) -> object:
        tokenized.extend(file.name for file in part.files)
        return original(directory, part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fileset, "tokenize_part", record)
    write_jsonl(folder / "sub" / "0045.jsonl", ["one more"])
    (folder / "002.jsonl").rename(folder / "zz.jsonl")
    corpus = built(folder, tmp_path / "cache")
    assert tokenized == ["sub/0045.jsonl"]
    assert np.array_equal(corpus.tokens, np.concatenate(list(one_by_one(folder, tmp_path / "other"))))


def test_a_file_of_a_corpus_of_its_own_is_copied(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in one_by_one(folder, tmp_path / "cache"):
        pass
    (folder / "empty.jsonl").unlink()
    monkeypatch.setattr(fileset, "tokenize_part", None)
    corpus = built(folder, tmp_path / "cache")
    assert np.array_equal(corpus.tokens, np.concatenate(list(one_by_one(folder, tmp_path / "other"))))


def test_links_with_another_extension_change_the_format(folder: Path, tmp_path: Path) -> None:
    """The name of a file decides whether it is plain text. The cached keys have only its inode and times."""
    named = {}
    for form in ("jsonl", "txt"):
        (tmp_path / form).mkdir()
        for number in range(2):
            (tmp_path / f"{number}.raw").touch()
            (tmp_path / form / f"{number}.{form}").symlink_to(tmp_path / f"{number}.raw")
        named[form] = expand(str(tmp_path / form))
    options = FileSetOptions(ByteTokenizer(), "byte", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    with mock.patch.object(fileset, "RECENT_CHANGE_SECONDS", -1e9):  # so that the keys are stored at once
        found = {form: fileset.identify_files(files, options) for form, files in named.items()}
    assert [[key.plain for key in keys] for keys in found.values()] == [[False, False], [True, True]]


def test_an_unchanged_corpus_is_opened_without_reading_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fileset, "RECENT_CHANGE_SECONDS", -1.0)
    first = built(folder, tmp_path / "cache")
    monkeypatch.setattr(fileset, "content_digest", None)
    assert built(folder, tmp_path / "cache").directory == first.directory


def test_a_bad_document_is_named_by_file_and_line(folder: Path, tmp_path: Path) -> None:
    (folder / "sub" / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    corpus = built(folder, tmp_path / "cache", max_bad_lines=0.5)
    assert corpus.stats.bad_lines == 1
    (example,) = corpus.stats.examples
    assert example[0] == 2
    assert example[1].endswith("(in sub/bad.jsonl)")
    with pytest.raises(DataInvalid, match=r"line 2: .*sub/bad\.jsonl"):
        built(folder, tmp_path / "cache", max_bad_lines=0.0)


@pytest.mark.parametrize("content", [b"\x1f\x8bnot gzip", b"\xff\xfeh\x00i\x00"])
def test_a_damaged_file_is_named(content: bytes, folder: Path, tmp_path: Path) -> None:
    (folder / "sub" / "005b.jsonl").write_bytes(content)
    for processes in (1, 2):
        with pytest.raises(DataInvalid, match=r"005b\.jsonl"):
            built(folder, tmp_path / "cache", processes=processes)


def test_a_request_that_was_not_sent_does_not_hide_the_error(tmp_path: Path) -> None:
    options = FileSetOptions(ByteTokenizer(), "byte", tmp_path / "cache")

    def fail() -> None:
        with fileset.TokenizerProcesses(options, 1) as pool:
            [process] = pool.processes
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.write("part of a request")
            raise DataInvalid("bad")

    with pytest.raises(DataInvalid, match="bad"):
        fail()


def test_the_next_build_continues_after_a_killed_tokenizing_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel kills a process if memory is short. It is not reported as a full disk, and no work is lost."""

    def killed(pool: fileset.TokenizerProcesses) -> fileset.TokenizerProcesses:
        # The first process must finish a part, so the second one is killed.
        pool.processes[1].kill()
        pool.processes[1].wait()
        return pool

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(fileset.TokenizerProcesses, "__enter__", killed)
        with pytest.raises(fileset.TokenizerProcessEnded, match=r"tokenizes .* was killed by SIGKILL"):
            built(folder, cache, processes=2)
        assert [path.name for path in cache.glob(".*.building/journal.json")] == ["journal.json"]

        patch.setattr(prepare, "_open", mock.Mock(side_effect=fileset.TokenizerProcessEnded(-9, folder)))
        with pytest.raises(TrainingError, match="was killed by SIGKILL") as raised:
            prepare.prepare_corpus(*[mock.Mock()] * 5)
        assert raised.value.reason in RESTARTABLE
    corpus = built(folder, cache, processes=2)
    assert np.array_equal(corpus.tokens, np.concatenate(list(one_by_one(folder, tmp_path / "other"))))


def test_a_stop_leaves_what_is_done_for_the_next_build(folder: Path, tmp_path: Path) -> None:
    reports = 0

    def stop_in_the_middle(done: int, total: int) -> None:
        nonlocal reports
        reports += done > total // 2
        if reports:
            raise StopRequested

    with pytest.raises(StopRequested):
        built(folder, tmp_path / "cache", processes=1, progress=stop_in_the_middle)
    (building,) = (tmp_path / "cache").glob(".*.building")
    done = json.loads((building / "journal.json").read_bytes())["files"]
    assert len(done) > 5
    corpus = built(folder, tmp_path / "cache", processes=1)
    assert np.array_equal(corpus.tokens, np.concatenate(list(one_by_one(folder, tmp_path / "other"))))


PROGRAM = """
import sys
from pathlib import Path
from trainyard.contract.corpus_files import expand
from trainyard.worker.data import fileset, shards
from trainyard.worker.data.tokenizers import ByteTokenizer
fileset.PART_BYTES, fileset.JOURNAL_SECONDS, shards.JOURNAL_SECONDS = 20_000, 0.0, 0.0
options = fileset.FileSetOptions(ByteTokenizer(), "byte", Path(sys.argv[2]), processes=2)
print("ready", flush=True)
fileset.open_files(expand(sys.argv[1]), options)
"""


@pytest.mark.long
@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    cache, command = tmp_path / "cache", [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "cache")]
    kills = 0
    while True:
        with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.3 + 0.1 * kills))
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
        kills += 1
    assert process.returncode == 0
    killed, untouched = built(folder, cache), built(folder, tmp_path / "untouched")
    for name in ("tokens.bin", "offsets.bin", "files.json", "meta.json"):
        assert (killed.directory / name).read_bytes() == (untouched.directory / name).read_bytes()
    shutil.rmtree(cache)


@pytest.mark.parametrize("change", ["gone", "parent"])
def test_a_file_that_disappears_is_an_error_of_the_data_that_names_it(
    change: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = open_built

    def change_then_remove(*arguments: object) -> object:
        if change == "gone":
            (folder / "000.jsonl").unlink()
        else:
            shutil.rmtree(folder)
            folder.write_text("now a file")
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fileset, "open_built", change_then_remove)
    with pytest.raises(DataInvalid, match=r"000\.jsonl cannot be read: N"):
        built(folder, tmp_path / "cache", processes=1)


def test_an_unreadable_file_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = allowed_paths.open_regular_inside

    def deny(path: Path, roots: Sequence[Path]) -> object:
        if path.name == "004.jsonl":  # root, who runs some of these tests, can read every file
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, roots)

    monkeypatch.setattr(file_module, "open_regular_inside", deny)
    with pytest.raises(DataInvalid, match=r"/004\.jsonl cannot be read: Permission denied"):
        built(folder, tmp_path / "cache")


def test_a_link_that_leads_nowhere_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(DataInvalid, match=r"/gone\.jsonl cannot be read: No such file"):
        built(folder, tmp_path / "cache")


def test_a_corpus_of_empty_files_is_rejected_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n")
    with pytest.raises(DataInvalid, match=r"2 files from .*/a\.jsonl holds no document: it needs one JSON object"):
        built(tmp_path / "data", tmp_path / "cache")


def test_a_name_with_a_line_end_is_escaped_in_messages(folder: Path, tmp_path: Path) -> None:
    (folder / "line\nend.jsonl").write_text('{"text": "good"}\nbad\n')
    corpus = built(folder, tmp_path / "cache")
    assert corpus.stats.describe_bad() == r"1 bad line: line 2: not JSON at character 1 (in 'line\nend.jsonl')"
    report = SourceReport.read(corpus.directory)
    assert report is not None
    assert [bad.file for bad in report.bad] == ["line\nend.jsonl"], "JSON has the name as it is"
    assert any(
        "line\N{REPLACEMENT CHARACTER}end.jsonl, line 2" in line for line in report_lines(CorpusReport.of([report]))
    )


def test_a_file_exchanged_for_a_link_is_refused_in_other_processes_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, secret = open_built, tmp_path / "secret.jsonl"
    write_jsonl(secret, ["secret"])

    def change_then_link(*arguments: object) -> object:
        (folder / "000.jsonl").unlink()
        (folder / "000.jsonl").symlink_to(secret)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fileset, "open_built", change_then_link)
    with pytest.raises(OutsideRoots) as refused:
        built(folder, tmp_path / "cache", processes=2, roots=(folder,))
    assert refused.value.filename == str(folder / "000.jsonl")


def test_tokens_of_another_tokenizer_are_not_stored_under_the_first_ones_key(folder: Path, tmp_path: Path) -> None:
    """A tokenizer's file may be exchanged after this process has read it and before the others do."""

    class Exchanged(ByteTokenizer):
        fingerprint = "of the file as it was"

    with pytest.raises(DataInvalid, match="the tokenizer was changed while the corpus was tokenized: start again"):
        open_files(expand(str(folder)), FileSetOptions(Exchanged(), "byte", tmp_path / "cache", processes=2))
    assert not list((tmp_path / "cache").glob("*/meta.json"))
