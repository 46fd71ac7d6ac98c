"""Weights-only files under MiniMind's names: written for inference, read to start from (``from_weight``)."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainyard.contract.rundir import ArtifactDir, write_atomically
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.worker.checkpoint.files import shared_names
from trainyard.worker.checkpoint.huggingface import (
    config_problems,
    is_hf_directory,
    read_config,
    split_experts,
    weight_files,
)
from trainyard.worker.errors import TrainingError
from trainyard.worker.paths import weight_paths

MAX_LISTED = 12


def weights_file(products: ArtifactDir, spec: JobSpec) -> Path:
    """``out/pretrain_512.pth``."""
    return products.weights(spec.checkpoint.save_weight, spec.model.hidden_size, spec.model.use_moe)


def write_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Publish a state dict in half precision under ``path``; equal weights give equal bytes. Raises OSError."""
    half: dict[str, torch.Tensor] = {}
    for names in shared_names(state):
        # Tied names go on sharing memory, so the file holds each matrix once, as torch.save does for the model itself.
        half.update(dict.fromkeys(names, _halved(state[names[0]])))
    buffer = io.BytesIO()
    torch.save({name: half[name] for name in state}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    """In numpy and not in torch: this runs beside training, and torch would take all cores away from it."""
    with np.errstate(over="ignore"):  # as torch: what is too large becomes infinite
        return torch.from_numpy(tensor.detach().cpu().numpy().astype(np.float16))


def load_weights(model: torch.nn.Module, spec: JobSpec, products: ArtifactDir) -> Path:
    """Load ``training.from_weight`` into ``model``, strictly. Raises Failure that lists every mismatch."""
    path = find_weights(spec, products)
    tensors = _read(path)
    problems = [*_config_problems(path, spec), *mismatches(model.state_dict(), tensors)]
    if problems:
        shown = "; ".join(problems[:MAX_LISTED]) + (
            f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        )
        hint = "Set the model group to the shape these weights have, or take other weights."
        raise TrainingError(Reason.CHECKPOINT_INVALID, f"from_weight: {path} does not fit the model: {shown}", hint)
    for names in shared_names(model.state_dict()):
        given = next(tensors[name] for name in names if name in tensors)
        tensors.update(dict.fromkeys(names, given))
    model.load_state_dict(tensors, strict=True)
    return path


def find_weights(spec: JobSpec, products: ArtifactDir) -> Path:
    """What ``from_weight`` means: a file or a Hugging Face directory, or MiniMind's name where weights are saved."""
    candidates = weight_paths(spec, products)
    found = next((path for path in candidates if path.is_file() or is_hf_directory(path)), None)
    if found is None:
        looked = ", ".join(map(str, candidates))
        hint = "Give a .pth or .safetensors file, a Hugging Face directory, or a name as in save_weight."
        raise TrainingError(Reason.SPEC_INVALID, f"from_weight: no such weights; looked for {looked}", hint)
    return found


def mismatches(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """Every reason why ``given`` is not a state dict for ``own``; either name of a tied pair will do."""
    found = []
    for names in shared_names(own):
        present = [name for name in names if name in given]
        if not present:
            found.append(f"{names[0]} is missing")
        found += [
            f"{name} is {list(given[name].shape)} and must be {list(own[name].shape)}"
            for name in present
            if given[name].shape != own[name].shape
        ]
        if any(not torch.equal(given[name], given[present[0]]) for name in present[1:]):
            found.append(f"{' and '.join(present)} differ and must be one")
    return found + [f"{name} is not part of the model" for name in given if name not in own]


def _config_problems(path: Path, spec: JobSpec) -> list[str]:
    """What a directory's config.json says that no tensor would show, such as rope_theta."""
    try:
        described = read_config(path) if path.is_dir() else None
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"{type(error).__name__}: {str(error)[:200]}") from error
    return [] if described is None else list(config_problems(described, spec.model))


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file or a directory that may come from anybody: no pickled code is ever run."""
    try:
        files = weight_files(path) if path.is_dir() else [path]
        content: Any = {}
        for file in files:
            part = _content(file)
            content = part if len(files) == 1 else {**content, **part}
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise _refused(path, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise _refused(path, "it is not a plain state dict of tensors")
    return split_experts({str(name): value for name, value in content.items()})


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        # Its errors are a class of its own, of the library's compiled part.
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    return torch.load(path, map_location="cpu", weights_only=True)


def _refused(path: Path, why: str) -> TrainingError:
    hint = "Nothing in the file was executed. Give a file of plain weights, as torch.save(state_dict) writes it."
    return TrainingError(Reason.CHECKPOINT_INVALID, f"from_weight: {path} cannot be read as weights: {why}", hint)
