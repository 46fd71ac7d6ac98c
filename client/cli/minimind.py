"""Accept MiniMind's command lines: apply the defaults that its script takes from the folders next to it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainyard.client.cli.spec_flags import PATHS
from trainyard.contract.rundir import weights_name
from trainyard.model.config import ModelConfig

SCRIPT = "train_pretrain.py"
CORPORA = ("pretrain_t2t_mini.jsonl", "pretrain_hq.jsonl")
"""The default corpora of MiniMind's releases, newest first. If none exists, the first ``pretrain*.jsonl`` is used."""

LAUNCHERS = frozenset({"torchrun", "python", "python3"})
LAUNCHER_FLAGS = frozenset({"--standalone"})
LAUNCHER_OPTIONS = frozenset({"--master_port", "--master_addr", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"})
"""Flags of the torchrun rendezvous, which the service sets up itself."""


@dataclass(frozen=True)
class PastedLine:
    """A command line without its launcher.

    ``script``: MiniMind's script as typed, or None. ``ignored``: the launcher's flags, which are left out.
    """

    words: list[str]
    script: Path | None = None
    ignored: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, words: Sequence[str]) -> "PastedLine":
        """Split ``torchrun --nproc_per_node 4 trainer/train_pretrain.py --batch_size 64``."""
        pasted = bool(words) and words[0] in LAUNCHERS
        rest: list[str] = []
        ignored: list[str] = []
        script: Path | None = None
        remaining = iter(words[pasted:])
        for word in remaining:
            name, equals, _ = word.replace("-", "_").partition("=")
            name = "--" + name.lstrip("_")
            if word.endswith(SCRIPT):
                script = Path(word)
            elif pasted and script is None and name in LAUNCHER_FLAGS | LAUNCHER_OPTIONS:
                ignored.append(name)
                if name in LAUNCHER_OPTIONS and not equals:
                    next(remaining, None)
            else:
                rest.append(word)
        return cls(rest, script, ignored)


def find_script(line: PastedLine, directory: Path) -> Path | None:
    """Return where MiniMind's script is or should be: the one in the line, or one in ``directory``; None if neither."""
    if line.script is not None:
        return directory / line.script
    beside = (directory / SCRIPT, directory / "trainer" / SCRIPT)
    return next((path for path in beside if path.is_file()), None)


def take_defaults(spec: dict[str, Any], line: PastedLine, given: Mapping[str, Any], directory: Path) -> list[str]:
    """Fill ``spec`` with the defaults of MiniMind's script; return a text for each."""
    notes = [f"{', '.join(line.ignored)}: ignored, because the service sets up the rendezvous"] if line.ignored else []
    script = find_script(line, directory)
    if script is None:
        return notes
    data = spec.setdefault("data", {})
    if not isinstance(data, dict):
        return notes
    notes += _move_paths(spec, given, script, directory)
    if "data_path" not in data:
        corpus = next((path for root in _roots(script, directory) for path in _corpora(root)), None)
        if corpus is not None:
            data["data_path"] = str(corpus)
            notes.append(f"--data_path {corpus}")
    if "tokenizer_path" not in data:
        folders = [root / "model" for root in _roots(script, directory)]
        folder = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
        if folder is not None:
            data["tokenizer_path"] = str(folder)
            notes.append(f"--tokenizer_path {folder}")
    notes += _take_weights(spec, _roots(script, directory))
    if "special_tokens" not in data:
        data["special_tokens"] = "tokens"
        notes.append(
            "--special_tokens tokens, because MiniMind reads <|im_start|> and <|im_end|> in its texts as tokens"
        )
    return notes


def _take_weights(spec: dict[str, Any], roots: Sequence[Path]) -> Iterator[str]:
    """Turn ``--from_weight pretrain`` without ``--save_dir`` into the file in ``../out``, MiniMind's default."""
    groups = {name: value if isinstance(value := spec.get(name), dict) else {} for name in ("training", "model")}
    name = groups["training"].get("from_weight")
    if not isinstance(name, str) or "/" in name or "save_dir" in (spec.get("checkpoint") or {}):
        return
    model = groups["model"]
    file = weights_name(name, model.get("hidden_size", ModelConfig.hidden_size), bool(model.get("use_moe")))
    path = next((root / "out" / file for root in roots if (root / "out" / file).is_file()), None)
    if path is not None:
        spec["training"]["from_weight"] = str(path)
        yield f"--from_weight {path}"


def _roots(script: Path, directory: Path) -> list[Path]:
    """Return MiniMind's folder relative to the working directory (as MiniMind does) and to the script."""
    return list(dict.fromkeys(Path(os.path.normpath(base / "..")) for base in (directory, script.parent)))


def _corpora(root: Path) -> Iterator[Path]:
    named = (root / "dataset" / name for name in CORPORA)
    yield from (path for path in (*named, *sorted((root / "dataset").glob("pretrain*.jsonl"))) if path.is_file())


def _move_paths(spec: dict[str, Any], given: Mapping[str, Any], script: Path, directory: Path) -> Iterator[str]:
    """Resolve paths from the script if they exist there and not in the working directory."""
    for group, leaf in PATHS:
        typed = given.get(leaf)
        if leaf == "save_dir" or not isinstance(typed, str) or Path(typed).is_absolute():
            continue
        moved = Path(os.path.normpath(script.parent / typed))
        if not (directory / typed).exists() and moved.exists() and "/" in typed:
            spec[group][leaf] = str(moved)
            yield f"--{leaf} {moved}"
