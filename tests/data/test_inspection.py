"""`trainyard corpus show` and `trainyard corpus sample` on files of this host."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.data.texts import write_jsonl
from trainyard.contract.corpus_files import expand
from trainyard.contract.corpus_page import report_lines
from trainyard.contract.corpus_report import CorpusReport
from trainyard.worker.data.inspection import main, write_sample


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRAINYARD_CORPUS_CACHE", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files with 40 documents, two of them the same, and a bad line."""
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "a.jsonl", [f"text {number}" for number in range(30)])
    write_jsonl(data / "b.jsonl", [*(f"文 {number}" for number in range(9)), "text 3"])
    with (data / "b.jsonl").open("a") as file:
        file.write("nonsense\n")
    return data


def sampled(folder: Path, out: Path, documents: int, seed: int = 1) -> list[str]:
    write_sample(expand(str(folder)), out, documents, seed, "text")
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


def test_a_corpus_is_described_and_stays_in_the_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(folder)]) == 0
    page = capsys.readouterr().out
    assert "data: 2 files," in page
    assert "documents  40, 1 with the text of an earlier one" in page
    assert "b.jsonl, line 11: not JSON at character 1" in page
    assert main(["show", str(folder), "--json"]) == 0
    report = CorpusReport.model_validate_json(capsys.readouterr().out)
    assert (report.documents, report.bad_documents, report.duplicates) == (40, 1, 1)
    (key,) = [path.parent.name for path in (folder.parent / "home").rglob("meta.json")]
    assert main(["show", key]) == 0
    assert capsys.readouterr().out == page
    assert (folder.parent / "home").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nothing-here"], "nothing-here cannot be read: No such file"),
        (["show", "0" * 32], "is not in the cache"),
        (["sample", "out.jsonl", "nothing-here"], "nothing-here cannot be read: No such file"),
        (["sample", "data/a.jsonl", "data/b.jsonl"], "data/a.jsonl exists already"),
        (["sample", "no-folder/out.jsonl", "data"], "No such file or directory"),
        (["sample", "out.jsonl", "data", "--text-field", "body"], "text_field says under which key"),
        (["show", "data", "--tokenizer", "nowhere"], "no tokenizer.json in nowhere"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not Path("out.jsonl").exists()
    assert len(list(folder.parent.iterdir())) <= 2, "no temporary file is left"


def test_names_with_control_characters_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a\x1b[31m.jsonl"
    file.write_text('{"text": "red \\u001b[31m"}\nnonsense\n')
    assert main(["show", str(file)]) == 0
    page = capsys.readouterr().out
    assert "\x1b" not in page
    assert "a�[31m.jsonl, line 2" in page
    assert main(["show", str(file), "--json"]) == 0
    report = CorpusReport.model_validate_json(capsys.readouterr().out)
    assert report.sources[0].samples[0].text == "red \x1b[31m", "JSON has the text as it is"
    assert all(line.isprintable() for line in report_lines(report))


def test_a_sample_is_reproducible_and_in_order(folder: Path, tmp_path: Path) -> None:
    first, again = sampled(folder, tmp_path / "1.jsonl", 10), sampled(folder, tmp_path / "2.jsonl", 10)
    assert first == again
    assert len(first) == 10
    everything = sampled(folder, tmp_path / "3.jsonl", 1000)
    assert everything == [f"text {number}" for number in range(30)] + [f"文 {number}" for number in range(9)] + [
        "text 3"
    ]
    places = [everything.index(text) for text in first]
    assert places == sorted(places)
    assert not Counter(first) - Counter(sampled(folder, tmp_path / "4.jsonl", 20))
    assert sampled(folder, tmp_path / "5.jsonl", 10, seed=2) != first


def test_each_document_is_as_likely(folder: Path, tmp_path: Path) -> None:
    seed = 3
    print("seed", seed)
    chance, found, rounds = random.Random(seed), Counter[str](), 300
    for number in range(rounds):
        found.update(sampled(folder, tmp_path / f"{number}.jsonl", 8, chance.randrange(2**31)))
    expected = rounds * 8 / 40
    texts = {f"text {number}" for number in range(30) if number != 3} | {f"文 {number}" for number in range(9)}
    assert all(abs(found[text] - expected) < 5 * expected**0.5 for text in texts), found


def test_the_sample_is_a_corpus(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["sample", "--documents", "7", "--seed", "6", str(out), str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 7 documents of 40\n"
    assert captured.err == "1 bad document left out: see `trainyard corpus check`\n"
    assert main(["show", str(out)]) == 0
    assert "documents  7, none twice" in capsys.readouterr().out
