"""From a checkpoint to what others load: a Hugging Face directory, or MiniMind's .pth.

``python -m trainyard.worker.checkpoint.export CHECKPOINT_OR_RUN_DIR --format hf|minimind --out DIR``
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from trainyard.contract.rundir import (
    MANIFEST_FILE,
    MODEL_FILE,
    STATE_FILE,
    ArtifactDir,
    AttemptDir,
    RunDir,
    atomic_directory,
    read_json,
    write_json,
)
from trainyard.contract.spec import JobSpec
from trainyard.contract.tokenizer_info import (
    BYTE,
    SPECIAL_TOKENS,
    TokenizerInvalid,
    tokenizer_file,
)
from trainyard.model.config import ModelConfig
from trainyard.worker.checkpoint.files import RunState, read_manifest, read_state
from trainyard.worker.checkpoint.huggingface import (
    CONFIG,
    WEIGHTS,
    UnsupportedByHF,
    config_json,
)
from trainyard.worker.checkpoint.safetensors_writer import sha256_of
from trainyard.worker.checkpoint.weights import write_weights
from trainyard.worker.data.tokenizers import Tokenizer, load_tokenizer

NEEDED = (MODEL_FILE, STATE_FILE)
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Taken over where they lie beside tokenizer.json."""


class ExportError(ValueError):
    """The export was refused; the message says what to do."""


@dataclass(frozen=True)
class ExportSource:
    """A sound checkpoint, and what its run directory says of it, where it lies in one."""

    path: Path
    state: RunState
    spec: JobSpec | None

    @property
    def model(self) -> ModelConfig:
        """The shape it was trained in."""
        return ModelConfig(**self.state.identity.model)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights, float32; tied ones stand under their first name."""
        return load_file(self.path / MODEL_FILE)


def find_export_source(path: Path) -> ExportSource:
    """The checkpoint ``path``, or the newest sound one of the run directory ``path``. Raises NotExported."""
    if (path / MANIFEST_FILE).is_file():
        damage = _damage(path)
        if damage is not None:
            raise ExportError(f"{path} is damaged: {damage}; export an older checkpoint")
        return _source(path, _spec_of(RunDir(path.parent.parent)))
    spec = _spec_of(RunDir(path))
    for products in _products(path, spec):
        for _, candidate in sorted([*products.published(), *products.milestones()], reverse=True):
            if _damage(candidate) is None:
                return _source(candidate, spec)
    raise ExportError(f"{path} is no checkpoint and holds no sound one: give a run directory or checkpoints/step-...")


def _damage(path: Path) -> str | None:
    """What is wrong with the files we need; None where they are sound. A milestone has no others."""
    try:
        manifest = read_manifest(path, NEEDED)
        damaged = [name for name in NEEDED if sha256_of(path / name) != manifest[name].sha256]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{damaged[0]} sha256" if damaged else None


def _source(path: Path, spec: JobSpec | None) -> ExportSource:
    try:
        return ExportSource(path, read_state(path), spec)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error


def _products(run: Path, spec: JobSpec | None) -> Iterator[ArtifactDir]:
    yield RunDir(run).artifacts(spec.checkpoint.save_dir if spec is not None else None)
    yield ArtifactDir(run)


def _spec_of(run: RunDir) -> JobSpec | None:
    """What the newest attempt ran, or None where ``run`` is no run directory."""
    attempts: list[AttemptDir] = list(run.attempts())
    for file in [*(attempt.spec for attempt in reversed(attempts)), run.spec]:
        try:
            raw = read_json(file)
            if raw is not None:
                return JobSpec.model_validate_json(json.dumps(raw))
        except (OSError, ValueError):
            continue  # of another version, or one that is being written: an older one has the same tokenizer
    return None


def tokenizer_of(source: ExportSource, given: str | None) -> tuple[str, Tokenizer]:
    """The tokenizer the run was trained with, and its path. Raises NotExported where it is another one now."""
    path = given or (source.spec.data.tokenizer_path if source.spec is not None else None)
    if path is None:
        raise ExportError(f"{source.path} lies in no run directory: name its tokenizer with --tokenizer DIR, or byte")
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != source.state.identity.tokenizer:
        raise ExportError(
            f"the tokenizer {path} is not the one the checkpoint was trained with: give it as --tokenizer"
        )
    return path, tokenizer


def export_minimind(source: ExportSource, out: Path, stem: str | None = None) -> Path:
    """Write ``out/pretrain_512.pth``: half precision, MiniMind's keys. Returns its path. ``stem``: for ``pretrain``."""
    model = source.model
    stem = stem or (source.spec.checkpoint.save_weight if source.spec is not None else "pretrain")
    file = out / f"{stem}_{model.hidden_size}{'_moe' if model.use_moe else ''}.pth"
    tensors = source.tensors()
    if model.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_weights(file, tensors)
    return file


def export_huggingface(source: ExportSource, out: Path, tokenizer_path: str, tokenizer: Tokenizer) -> Path:
    """Write a directory that transformers loads, whole or not at all. ``out`` must not exist or be empty.

    Raises NotExported, and `NotExpressible` for a model that transformers has no class for.
    """
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    described = config_json(source.model, **ids)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty directory: choose another --out")
    building = out.with_name(f".{out.name}.exporting")
    shutil.rmtree(building, ignore_errors=True)
    with atomic_directory(out, building):
        write_json(building / CONFIG, described)
        write_json(building / "generation_config.json", _generation(tokenizer))
        # Without this mark transformers refuses the file.
        save_file(source.tensors(), building / WEIGHTS, metadata={"format": "pt"})
        _write_tokenizer(building, tokenizer_path, tokenizer)
    return out


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {**ids, "do_sample": False}


def _write_tokenizer(out: Path, tokenizer_path: str, tokenizer: Tokenizer) -> None:
    if tokenizer_path == BYTE:
        (out / "tokenizer.json").write_text(byte_library().to_str(pretty=True) + "\n")
    else:
        file = tokenizer_file(tokenizer_path)
        for source in (file, *(file.with_name(name) for name in TOKENIZER_FILES)):
            if source.is_file():
                shutil.copyfile(source, out / source.name)
    library = Library.from_file(str(out / "tokenizer.json"))
    config = read_json(out / "tokenizer_config.json") or {"clean_up_tokenization_spaces": False}
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    # What we found by well-known names, transformers has to be told; what the file says already stays.
    named = {key: library.id_to_token(number) for key, number in ends.items() if config.get(key) is None}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config, **named})


def byte_library() -> Library:
    """The tokenizer "byte" in the library's form: every byte is a token, and nothing is ever merged."""
    alphabet = _byte_characters()
    vocabulary = {name: number for number, name in enumerate((*SPECIAL_TOKENS, *alphabet))}
    library = Library(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(SPECIAL_TOKENS))
    return library


def _byte_characters() -> list[str]:
    """The character that stands for byte 0, 1, ... in byte-level vocabularies: itself, or one from U+0100 on.

    Source: GPT-2's byte encoder, which the ``tokenizers`` library has too.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where it is done, 1 where it was refused, 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m trainyard.worker.checkpoint.export", description=__doc__.split("\n")[0]
    )
    parser.add_argument("source", type=Path, metavar="CHECKPOINT_OR_RUN_DIR", help="of a run: its newest sound one")
    parser.add_argument("--format", choices=("hf", "minimind"), default="hf", help="default: hf")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--tokenizer", metavar="DIR", help='or "byte"; not needed inside a run directory')
    parser.add_argument("--stem", help="first part of MiniMind's file name; not needed inside a run directory")
    options = parser.parse_args(arguments)
    try:
        source = find_export_source(options.source.resolve())
        print(f"{_export(source, options)}: step {source.state.step:,} of {source.path}")
    except (ExportError, UnsupportedByHF, TokenizerInvalid, OSError) as error:
        print(f"trainyard export: {error}", file=sys.stderr)
        return 1
    return 0


def _export(source: ExportSource, options: argparse.Namespace) -> Path:
    if options.format == "minimind":
        return export_minimind(source, options.out, options.stem)
    return export_huggingface(source, options.out, *tokenizer_of(source, options.tokenizer))


if __name__ == "__main__":
    sys.exit(main())
