"""Which files a data_path names, in which order, and how a change of them is described."""

import os
from pathlib import Path

import pytest

from trainyard.contract import corpus_files
from trainyard.contract.corpus_files import (
    CorpusFilesInvalid,
    describe_changes,
    expand,
    files_fingerprint,
    is_single_file,
    shown,
    stored_fingerprint,
)


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "a"}\n')


def names(data_path: str | list[str]) -> list[str]:
    return [file.name for file in expand(data_path)]


def test_a_directory_gives_its_files_of_known_forms_by_path(tmp_path: Path) -> None:
    make(
        tmp_path,
        "b.jsonl",
        "a/z.JSONL.gz",
        "a/y.txt.zst",
        "a-b.parquet",
        "c.ndjson",
        "notes.md",
        "x.json",
        "a/.h.jsonl",
    )
    make(tmp_path, ".git/d.jsonl")
    assert names(str(tmp_path)) == ["a/y.txt.zst", "a/z.JSONL.gz", "a-b.parquet", "b.jsonl", "c.ndjson"]


def test_links_to_files_count_and_links_to_directories_do_not(tmp_path: Path) -> None:
    make(tmp_path, "in/a.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "in" / "link.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    assert names(str(tmp_path / "in")) == ["a.jsonl", "link.jsonl"]


def test_a_glob_takes_files_of_any_name_and_brackets_are_no_marks(tmp_path: Path) -> None:
    make(tmp_path, "p1.data", "p2.data", "sub/p3.data", "[x].data")
    assert names(f"{tmp_path}/p?.data") == ["p1.data", "p2.data"]
    assert names(f"{tmp_path}/**/*.data") == ["[x].data", "p1.data", "p2.data", "sub/p3.data"]
    assert names(f"{tmp_path}/[x].*") == ["[x].data"]


def test_a_file_whose_name_has_a_star_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "a*.jsonl", "ab.jsonl")
    assert names(f"{tmp_path}/a*.jsonl") == ["a*.jsonl"]
    assert is_single_file(f"{tmp_path}/a*.jsonl")
    assert not is_single_file(f"{tmp_path}/b*.jsonl")


def test_a_list_keeps_its_order_and_a_file_counts_once(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b/c.jsonl")
    assert names([f"{tmp_path}/b", f"{tmp_path}/a.jsonl", f"{tmp_path}/b/*"]) == ["c.jsonl", "a.jsonl"]


def test_a_file_that_is_reached_by_a_link_too_counts_once(tmp_path: Path) -> None:
    make(tmp_path, "data/a.jsonl", "data/sub/b.jsonl", "other/c.jsonl")
    (tmp_path / "data/0-again.jsonl").symlink_to("sub/b.jsonl")
    (tmp_path / "data/9-again.jsonl").symlink_to(tmp_path / "data/0-again.jsonl")
    (tmp_path / "data/c-too.jsonl").symlink_to("../other/c.jsonl")
    (tmp_path / "folder").symlink_to("data")
    assert names(str(tmp_path / "data")) == ["0-again.jsonl", "a.jsonl", "c-too.jsonl"]
    everything = [
        f"{tmp_path}/{name}" for name in ("other/c.jsonl", "folder", "data/**/*.jsonl", "data/sub/../a.jsonl")
    ]
    assert names(everything) == ["c.jsonl", "0-again.jsonl", "a.jsonl"]


@pytest.mark.parametrize("name", ["line\nend.jsonl", "naïve 文.jsonl", " .jsonl"])
def test_any_printable_or_unprintable_name_that_is_utf8_works(name: str, tmp_path: Path) -> None:
    make(tmp_path, name)
    (file,) = expand(str(tmp_path))
    assert file.path.read_text()
    assert "\n" not in shown(file.path)


def test_a_name_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.jsonl"), "w") as file:
        file.write("x")
    with pytest.raises(CorpusFilesInvalid, match="not UTF-8: rename it"):
        expand(str(tmp_path))


def test_nothing_to_read_is_an_error_that_says_what_is_needed(tmp_path: Path) -> None:
    make(tmp_path, "readme.md")
    with pytest.raises(CorpusFilesInvalid, match=r"directory without a corpus file.*\.parquet"):
        expand(str(tmp_path))
    with pytest.raises(CorpusFilesInvalid, match="matches no file"):
        expand(f"{tmp_path}/*.jsonl")


def test_changes_name_the_files() -> None:
    before = [["a", 1, "x"], ["b", 2, "y"], ["c", 3, "z"]]
    assert describe_changes(before, before) == []
    assert describe_changes(before, [["a", 1, "x"], ["c", 3, "z"]]) == ["b was removed"]
    assert describe_changes(before, [*before, ["d", 4, "w"]]) == ["d was added"]
    assert describe_changes(before, [["a", 1, "x"], ["q", 2, "y"], ["c", 3, "z"]]) == ["b was renamed to q"]
    assert describe_changes(before, [["a", 1, "x"], ["b", 2, "other"], ["c", 3, "z"]]) == ["b was changed"]
    assert describe_changes(before, [before[1], before[0], before[2]]) == ["the files are in another order"]
    assert describe_changes([], [[str(n), n, "s" * (n + 1)] for n in range(9)])[-1] == "and 4 more changes"


def test_a_glob_follows_no_link_to_a_directory_and_leads_nowhere_else(tmp_path: Path) -> None:
    make(tmp_path, "in/a.jsonl", "in/sub/b.jsonl", "elsewhere/secret.jsonl")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "file.jsonl").symlink_to(tmp_path / "elsewhere" / "secret.jsonl")
    assert names(f"{tmp_path}/in/**/*.jsonl") == ["a.jsonl", "file.jsonl", "sub/b.jsonl"]
    assert names(f"{tmp_path}/in/**/*/**/*") == ["sub/b.jsonl"]
    with pytest.raises(CorpusFilesInvalid, match=r"matches no file\. Links to directories are not followed"):
        expand(f"{tmp_path}/in/li*/*.jsonl")
    with pytest.raises(CorpusFilesInvalid, match=r'has "\.\." after a mark of a glob'):
        expand(f"{tmp_path}/in/*/../../elsewhere/*.jsonl")


def test_hidden_names_match_only_a_part_that_begins_with_a_dot(tmp_path: Path) -> None:
    make(tmp_path, ".h/a.jsonl", ".b.jsonl", "c.jsonl")
    assert names(f"{tmp_path}/**/*") == ["c.jsonl"]
    assert names(f"{tmp_path}/.*/*.jsonl") == [".h/a.jsonl"]
    assert names(f"{tmp_path}/.?.jsonl") == [".b.jsonl"]


@pytest.mark.parametrize("pattern", ["", "/**/*/**/*.jsonl", "/*.none"])
def test_a_search_ends_at_a_number_of_names(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "MAX_ENTRIES", 20)
    make(tmp_path, *(f"{number}.data" for number in range(21)))
    with pytest.raises(CorpusFilesInvalid, match="more than 20 names to look at: name a smaller directory"):
        expand(f"{tmp_path}{pattern}")


def test_a_reason_names_the_file_that_it_is_about() -> None:
    error = CorpusFilesInvalid("/data/a\nb", "cannot be read")
    assert error.reason_for("/data") == "holds '/data/a\\nb', which cannot be read"
    assert error.reason_for("/data/a\nb") == "cannot be read"


def test_a_fingerprint_of_too_many_files_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    small = files_fingerprint(["a", "b"], [1, 2], ["x", "y"])
    assert stored_fingerprint(small) == small
    monkeypatch.setattr(corpus_files, "MAX_FINGERPRINT_BYTES", len('[["a", 1, "x"], ["b", 2, "y"]]') - 1)
    assert stored_fingerprint(small) == {}
