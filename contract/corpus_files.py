"""The files that a ``data_path`` names: one file, a directory, a glob, or a list of these. Standard library only."""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.contract.file_identity import FileFingerprint

if TYPE_CHECKING:
    from trainyard.contract.spec import DataSpec

KNOWN_FORMS = (".jsonl", ".ndjson", ".txt", ".parquet")
PACKED_FORMS = (".gz", ".zst")
MAX_FILES = 1_000_000
MAX_ENTRIES = 2_000_000
"""Names that are looked at to find the files of a directory or glob: a second or two."""

MAX_NAMED_CHANGES = 5

FORMS_TEXT = (
    f"{', '.join(KNOWN_FORMS[:-1])} or {KNOWN_FORMS[-1]}, or one of the first three with {' or '.join(PACKED_FORMS)}"
)


BLOCKS_PER_FILE = 4
"""Blocks of each file that `files_fingerprint` reads."""

MAX_FINGERPRINT_BYTES = 4 << 20
"""Limit on the ``files`` of a fingerprint in a checkpoint, as bytes of JSON: about 50,000 files."""


class CorpusFilesInvalid(ValueError):
    """The path names no usable file. ``reason`` says why and what to do; the message also has the path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{_quoted(path)} {reason}")
        self.path, self.reason = path, reason

    def reason_for(self, given: str) -> str:
        """Return ``reason`` to continue a sentence that begins with ``given``; names the path if it is another."""
        return self.reason if self.path == given else f"holds {_quoted(self.path)}, which {self.reason}"


@dataclass(frozen=True, order=True)
class NamedFile:
    """A file of a corpus. ``name``: its path below the directory that was given, or its file name."""

    name: str
    path: Path


def is_single_file(data_path: str | Sequence[str]) -> bool:
    """Return whether the path is one text that is neither a directory nor a glob: the only form of release 0.1."""
    return isinstance(data_path, str) and not os.path.isdir(data_path) and not is_glob(data_path)


def expand(data_path: str | Sequence[str]) -> list[NamedFile]:
    """Return the files of a ``data_path`` in their order: that of a list, and within a directory or glob by path.

    Below a directory, every file of a known form counts. Hidden files and directories, and links to directories, are
    skipped. A file that is reached twice, by two entries or by a link, counts once, under its first name. Raises
    CorpusFilesInvalid.
    """
    entries = [data_path] if isinstance(data_path, str) else list(data_path)
    files: dict[str, NamedFile] = {}
    for entry in entries:
        for file, target in _expand_entry(entry):
            files.setdefault(target, file)
        if len(files) > MAX_FILES:
            raise CorpusFilesInvalid(entry, f"has more than {MAX_FILES:,} files: join them into fewer")
    return list(files.values())


def _expand_entry(entry: str) -> list[tuple[NamedFile, str]]:
    """Return the files of an entry, each with the path that its links lead to."""
    if os.path.isdir(entry):
        base, empty = entry, f"is a directory without a corpus file: it needs files that end in {FORMS_TEXT}"
        found = (file for file in _Search(entry).files(entry, ("**",)) if has_known_form(file.name))
    elif is_glob(entry):
        base, empty = glob_base(entry), "matches no file. Links to directories are not followed"
        parts = Path(entry).parts[len(Path(base).parts) :]
        if ".." in parts:
            raise CorpusFilesInvalid(entry, 'has ".." after a mark of a glob: name the directory')
        found = (file for file in _Search(entry).files(base, parts) if file.is_file())
    else:
        return [(NamedFile(_checked(os.path.basename(entry), entry), Path(entry)), os.path.realpath(entry))]
    prefix, real_base = os.path.join(base, ""), os.path.realpath(base)
    files = []
    for file in found:
        name = _checked(file.path.removeprefix(prefix), file.path)
        # No directory below the base is a link, so only a link needs to be followed: that costs a stat for each part.
        target = os.path.realpath(file.path) if file.is_symlink() else f"{real_base}/{name}"
        files.append((NamedFile(name, Path(file.path)), target))
    if not files:
        raise CorpusFilesInvalid(entry, empty)
    return sorted(files, key=lambda file: file[0].name.split("/"))


def is_glob(entry: str) -> bool:
    """Return whether the path has wildcards and does not exist literally."""
    return any(mark in entry for mark in "*?") and not os.path.lexists(entry)


def glob_base(pattern: str) -> str:
    """Return the directory above the first part of ``pattern`` that has a wildcard."""
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if any(mark in part for mark in "*?"))
    return str(Path(*parts[:first])) if first else "."


class _Search:
    """A search for files below a directory that follows no link to a directory. Raises CorpusFilesInvalid.

    ``given``: the directory or glob. Hidden names match only a part of a glob that begins with a dot.
    """

    def __init__(self, given: str) -> None:
        self._given, self._looked_at = given, 0

    def files(self, directory: str, parts: Sequence[str]) -> Iterator[os.DirEntry[str]]:
        """Yield what is no directory and matches ``parts``: one a level, but ``**`` is any number of levels."""
        pending = [(directory, tuple(parts))]
        while pending:
            directory, (part, *rest) = pending.pop()
            if part == "**" and rest:
                # No level: the rest begins here. The levels below are those of the entries.
                pending.append((directory, tuple(rest)))
            matches = _matcher("*" if part == "**" else part)
            for entry in self._entries(directory):
                if not matches(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if part == "**":
                        pending.append((entry.path, ("**", *rest)))
                    elif rest:
                        pending.append((entry.path, tuple(rest)))
                elif (not rest) and not (entry.is_symlink() and entry.is_dir()):
                    yield entry

    def _entries(self, directory: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    self._looked_at += 1
                    if self._looked_at > MAX_ENTRIES:
                        raise CorpusFilesInvalid(
                            self._given, f"has more than {MAX_ENTRIES:,} names to look at: name a smaller directory"
                        )
                    yield entry
        except OSError as error:
            raise CorpusFilesInvalid(directory, f"cannot be read: {error.strerror}") from error


def _matcher(part: str) -> Callable[[str], bool]:
    # Brackets are no marks here: names of files have them.
    expression = re.compile(fnmatch.translate(part.replace("[", "[[]")))
    return lambda name: (part.startswith(".") or not name.startswith(".")) and expression.match(name) is not None


def has_known_form(name: str) -> bool:
    """Return whether a file in a directory counts as a corpus file, by its name."""
    stem = name.lower()
    for packed in PACKED_FORMS:
        stem = stem.removesuffix(packed)
    return stem.endswith(KNOWN_FORMS)


def _checked(name: str, path: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CorpusFilesInvalid(path, "has a name that is not UTF-8: rename it") from None
    return name


def _quoted(path: str | bytes | None) -> str:
    text = os.fsdecode(path or "")
    return text if text.isprintable() else ascii(text)


def shown(path: Path | str) -> str:
    """Return the path for a message: as it is, or with escapes if it has characters such as a line end."""
    return _quoted(str(path))


def file_sketch(path: Path, roots: Sequence[Path] = ()) -> str:
    """Return a digest of some blocks of a file, at a bounded cost. Raises OSError.

    Files with different sketches differ. Files of the same size with the same one may differ too.
    """
    return FileFingerprint.of(path, roots, BLOCKS_PER_FILE).sha256[:16]


def files_fingerprint(names: Sequence[str], sizes: Sequence[int], sketches: Sequence[str]) -> dict[str, Any]:
    """Return the ``corpus_file`` of a run identity: {"bytes", "sha256", "files": [[name, bytes, sketch], ...]}."""
    entries = [list(entry) for entry in zip(names, sizes, sketches, strict=True)]
    return {"bytes": sum(sizes), "sha256": hashlib.sha256(json.dumps(entries).encode()).hexdigest(), "files": entries}


def stored_fingerprint(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return ``fingerprint`` for a checkpoint, or {} ("unknown") if it has too many files.

    Every save writes the list, and readers reject a state.json of more than 16 MiB.
    """
    return fingerprint if len(json.dumps(fingerprint["files"])) <= MAX_FINGERPRINT_BYTES else {}


def describe_changes(saved: Sequence[Sequence[Any]], current: Sequence[Sequence[Any]]) -> list[str]:
    """Return texts such as ``b.jsonl was added``, from the ``files`` of two fingerprints; [] if they are equal."""
    before, after = ({str(name): tuple(rest) for name, *rest in files} for files in (saved, current))
    removed, added = [name for name in before if name not in after], [name for name in after if name not in before]
    texts = []
    for name in list(removed):
        renamed = next((new for new in added if after[new] == before[name]), None)
        if renamed is not None:
            removed.remove(name)
            added.remove(renamed)
            texts.append(f"{_quoted(name)} was renamed to {_quoted(renamed)}")
    texts += [f"{_quoted(name)} was removed" for name in removed]
    texts += [f"{_quoted(name)} was added" for name in added]
    texts += [f"{_quoted(name)} was changed" for name in before if name in after and before[name] != after[name]]
    if not texts and list(before) != list(after):
        texts.append("the files are in another order")
    more = len(texts) - MAX_NAMED_CHANGES
    return [*texts[:MAX_NAMED_CHANGES], f"and {more:,} more changes"] if more > 0 else texts


def fingerprint_inputs(
    data: "DataSpec", tokenizer: Path | None, roots: Sequence[Path] = ()
) -> dict[str, FileFingerprint]:
    """Return the fingerprints of what a run reads, by the name of its field, without what cannot be read.

    Each source has one fingerprint for all its files. ``tokenizer``: its file, or None if it is built in. ``roots``:
    the directories below which the files must be, if given.
    """
    paths = corpus_paths(data)
    if tokenizer is not None:
        paths.append(("tokenizer_path", str(tokenizer)))
    found = {}
    for name, path in paths:
        with suppress(OSError, ValueError):
            found[name] = _fingerprint(path, roots)
    return found


def corpus_paths(data: "DataSpec") -> list[tuple[str, str | list[str]]]:
    """Return the name of each field or source that names files of a corpus, and its path."""
    fields = (("data_path", data.data_path), ("eval_data_path", data.eval_data_path))
    sources = [(f"sources/{source.name}", source.path) for source in data.sources or ()]
    held_out = [(f"eval_sources/{source.name}", source.path) for source in data.eval_sources or ()]
    return [*((name, path) for name, path in fields if path is not None), *sources, *held_out]


def _fingerprint(path: str | list[str], roots: Sequence[Path]) -> FileFingerprint:
    if is_single_file(path):
        return FileFingerprint.of(Path(str(path)), roots)
    files = expand(path)
    sizes = [file.path.stat().st_size for file in files]
    joined = files_fingerprint([file.name for file in files], sizes, [file_sketch(file.path, roots) for file in files])
    return FileFingerprint(joined["bytes"], joined["sha256"])
