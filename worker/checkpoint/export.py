"""Export of a checkpoint for other programs: a Hugging Face directory, or MiniMind's .pth file.

``python -m trainyard.worker.checkpoint.export CHECKPOINT_OR_RUN_DIR --format hf|minimind --out DIR``
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from trainyard.contract.allowed_paths import open_regular_inside
from trainyard.contract.file_identity import BOM
from trainyard.contract.rundir import (
    MANIFEST_FILE,
    MODEL_FILE,
    STATE_FILE,
    ArtifactDir,
    AttemptDir,
    RunDir,
    atomic_directory,
    read_json,
    weights_name,
    write_json,
)
from trainyard.contract.spec import JobSpec
from trainyard.contract.stdio import run_command
from trainyard.contract.tokenizer_info import BYTE, SPECIAL_TOKENS, TokenizerInvalid, tokenizer_file
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.worker.checkpoint.files import (
    RunState,
    open_saved,
    read_manifest,
    read_state,
    sha256_of,
    shared_names,
)
from trainyard.worker.checkpoint.huggingface import CONFIG, WEIGHTS, UnsupportedByHF, config_json
from trainyard.worker.checkpoint.weights import write_moe_config, write_weights
from trainyard.worker.data.byte_lengths import byte_characters
from trainyard.worker.data.tokenizers import Tokenizer, load_tokenizer
from trainyard.worker.paths import data_roots, save_roots

NEEDED_FILES = (MODEL_FILE, STATE_FILE)
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Copied too, if they are in the directory of tokenizer.json."""


class ExportError(ValueError):
    """The export is not possible. The message says what to do."""


@dataclass(frozen=True)
class ExportSource:
    """A valid checkpoint, and the spec of its run if it is in a run directory."""

    path: Path
    state: RunState
    spec: JobSpec | None

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**self.state.identity.model)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights, float32, tied ones under their first name."""
        with open_saved(self.path / MODEL_FILE) as file:
            return load_file(f"/proc/self/fd/{file.fileno()}")

    def load_model(self, device: torch.device) -> Decoder:
        """Return the model on ``device``, for inference.

        Raises ExportError if the weights do not fit its config, or do not fit on the device.
        """
        try:
            return self._load_model(device)
        except (KeyError, RuntimeError) as error:
            raise ExportError(f"{self.path} cannot be loaded: {error}") from error

    def _load_model(self, device: torch.device) -> Decoder:
        # Without memory first: random weights would take longer than loading.
        with torch.device("meta"):
            model = Decoder(self.model)
        model.to_empty(device=device)
        if self.model.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        tensors = self.tensors()
        # Not while it is on the meta device: all tensors there have one address, and would count as shared.
        for names in shared_names(model.state_dict()):
            tensors.update(dict.fromkeys(names, tensors[names[0]]))
        model.load_state_dict(tensors, strict=True)
        return model.eval().requires_grad_(False)


def find_export_source(path: Path) -> ExportSource:
    """Return the checkpoint ``path``, or the newest valid one of the run directory ``path``. Raises ExportError."""
    if (path / MANIFEST_FILE).is_file():
        damage = _damage(path)
        if damage is not None:
            raise ExportError(f"{path} is damaged: {damage}; export an older checkpoint")
        return _source(path, _read_spec(RunDir(path.parent.parent)))
    run = RunDir(path)
    spec = _read_spec(run)
    for artifacts in (run.artifacts(spec.checkpoint.save_dir if spec is not None else None), ArtifactDir(path)):
        for _, candidate in sorted([*artifacts.published(), *artifacts.milestones()], reverse=True):
            if _damage(candidate) is None:
                return _source(candidate, spec)
    raise ExportError(f"{path} is no checkpoint and holds no valid one: give a run directory or checkpoints/step-...")


def _damage(path: Path) -> str | None:
    """Return what is wrong with the needed files, or None. A milestone has only these."""
    try:
        manifest = read_manifest(path, NEEDED_FILES)
        damaged = [name for name in NEEDED_FILES if sha256_of(path / name) != manifest[name].sha256]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{damaged[0]} sha256" if damaged else None


def _source(path: Path, spec: JobSpec | None) -> ExportSource:
    try:
        return ExportSource(path, read_state(path), spec)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error


def _read_spec(run: RunDir) -> JobSpec | None:
    """Return the spec of the newest attempt, or None if ``run`` is no run directory."""
    attempts: list[AttemptDir] = list(run.attempts())
    for file in [*(attempt.spec for attempt in reversed(attempts)), run.spec]:
        try:
            raw = read_json(file)
            if raw is not None:
                return JobSpec.model_validate_json(json.dumps(raw))
        except (OSError, ValueError):
            continue  # of another version, or being written: an older one names the same tokenizer
    return None


def tokenizer_of(source: ExportSource, given: str | None) -> tuple[str, Tokenizer]:
    """Return the tokenizer of the run, and its path. Raises ExportError if it is not the one of the training."""
    path = given or (source.spec.data.tokenizer_path if source.spec is not None else None)
    if path is None:
        raise ExportError(f"{source.path} is in no run directory: name its tokenizer with --tokenizer DIR, or byte")
    tokenizer = load_tokenizer(path, roots=data_roots())
    if tokenizer.fingerprint != source.state.identity.tokenizer:
        raise ExportError(
            f"the tokenizer {path} is not the one the checkpoint was trained with: give it as --tokenizer"
        )
    return path, tokenizer


def export_minimind(source: ExportSource, out: Path, stem: str | None = None) -> Path:
    """Write e.g. ``out/pretrain_512.pth``, in half precision, and return its path. ``stem`` replaces ``pretrain``."""
    model = source.model
    stem = stem or (source.spec.checkpoint.save_weight if source.spec is not None else "pretrain")
    file = out / weights_name(stem, model.hidden_size, model.use_moe)
    tensors = source.tensors()
    if model.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_weights(file, tensors)
    if model.use_moe:
        write_moe_config(out, model)
    return file


def export_huggingface(source: ExportSource, out: Path, tokenizer_path: str, tokenizer: Tokenizer) -> Path:
    """Write a directory that transformers loads, atomically. ``out`` must not exist or be empty. Return ``out``.

    Raises ExportError, and UnsupportedByHF for a model that transformers has no class for.
    """
    config = config_json(source.model, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty directory: choose another --out")
    temporary = out.with_name(f".{out.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    with atomic_directory(out, temporary, save_roots()) as building:
        write_json(building / CONFIG, config)
        write_json(building / "generation_config.json", {**ids, "do_sample": False})
        # transformers rejects a file without this metadata.
        save_file(source.tensors(), building / WEIGHTS, metadata={"format": "pt"})
        _write_tokenizer(building, tokenizer_path, tokenizer)
        # The libraries do not call fsync. After a power cut, an export with its final name could have empty files.
        for path in building.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return out


def _write_tokenizer(out: Path, tokenizer_path: str, tokenizer: Tokenizer) -> None:
    if tokenizer_path == BYTE:
        (out / "tokenizer.json").write_text(byte_level_tokenizer().to_str(pretty=True) + "\n")
    else:
        file = tokenizer_file(tokenizer_path)
        for source in (file, *(file.with_name(name) for name in TOKENIZER_FILES)):
            if source.is_file():
                # The tokenizers library rejects a byte order mark.
                with open_regular_inside(source, data_roots()) as opened:
                    (out / source.name).write_bytes(opened.read().removeprefix(BOM))
    written = HFTokenizer.from_file(str(out / "tokenizer.json"))
    config = read_json(out / "tokenizer_config.json") or {"clean_up_tokenization_spaces": False}
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    # We find these tokens by their usual names; transformers needs them in the config. Its own entries stay.
    added = {key: written.id_to_token(number) for key, number in ends.items() if config.get(key) is None}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config, **added})


def byte_level_tokenizer() -> HFTokenizer:
    """Return the tokenizer "byte" for the ``tokenizers`` library: every byte is a token, without merges."""
    vocabulary = {name: number for number, name in enumerate((*SPECIAL_TOKENS, *byte_characters()))}
    tokenizer = HFTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 if it is done, 1 on an error; wrong usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m trainyard.worker.checkpoint.export", description=__doc__.split("\n")[0]
    )
    parser.add_argument("source", type=Path, metavar="CHECKPOINT_OR_RUN_DIR", help="of a run: its newest valid one")
    parser.add_argument("--format", choices=("hf", "minimind"), default="hf", help="default: hf")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--tokenizer", metavar="DIR", help='or "byte"; not needed inside a run directory')
    parser.add_argument("--stem", help="first part of MiniMind's file name; not needed inside a run directory")
    options = parser.parse_args(arguments)
    try:
        source = find_export_source(options.source.resolve())
        if options.format == "minimind":
            out = export_minimind(source, options.out, options.stem)
        else:
            out = export_huggingface(source, options.out, *tokenizer_of(source, options.tokenizer))
        print(f"{out}: step {source.state.step:,} of {source.path}")
    except (ExportError, UnsupportedByHF, TokenizerInvalid, OSError) as error:
        print(f"trainyard export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command("trainyard export", main))
