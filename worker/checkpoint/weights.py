"""Weights-only files: written under MiniMind's names for inference, and loaded as initial weights (``from_weight``)."""

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainyard.contract.allowed_paths import OutsideRoots, directory_inside, open_regular_inside
from trainyard.contract.rundir import ArtifactDir, write_atomically, write_json
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.model.config import ModelConfig
from trainyard.worker.checkpoint.files import shared_names
from trainyard.worker.checkpoint.huggingface import (
    CONFIG,
    MOE_FIELDS,
    config_problems,
    is_hf_directory,
    read_config,
    split_experts,
    weight_files,
)
from trainyard.worker.errors import TrainingError
from trainyard.worker.paths import DATA_ROOTS, outside_error, save_roots, weight_paths

MAX_LISTED = 12


def weights_file(artifacts: ArtifactDir, spec: JobSpec) -> Path:
    """Return the path of the weights, e.g. ``out/pretrain_512.pth``."""
    return artifacts.weights(spec.checkpoint.save_weight, spec.model.hidden_size, spec.model.use_moe)


def publish_weights(artifacts: ArtifactDir, spec: JobSpec, state: Mapping[str, torch.Tensor]) -> None:
    """Write the weights, and make ``save_dir/pretrain_512.pth`` a link to them, as MiniMind's scripts expect."""
    file = weights_file(artifacts, spec)
    write_weights(file, state)
    if spec.model.use_moe:
        write_moe_config(file.parent, spec.model)
    if spec.checkpoint.save_dir is not None:
        _link_newest(Path(spec.checkpoint.save_dir) / file.name, file)


def write_moe_config(folder: Path, model: ModelConfig) -> None:
    """Write a config.json with what the .pth lacks: the number of experts per token, and how they are weighted."""
    with directory_inside(folder, save_roots(), create=True) as pinned:
        write_json(pinned / CONFIG, {"use_moe": True, **{name: getattr(model, name) for name in MOE_FIELDS}})


def _link_newest(link: Path, target: Path) -> None:
    # A file that MiniMind wrote is kept. A file system without links is no reason to end a run.
    with suppress(OSError), directory_inside(link.parent, save_roots()) as folder:
        if os.path.lexists(folder / link.name) and not (folder / link.name).is_symlink():
            return
        new = folder / f".{link.name}.{target.parent.parent.name}"
        new.unlink(missing_ok=True)
        new.symlink_to(target.relative_to(link.parent))
        new.replace(folder / link.name)


def write_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict in half precision to ``path``, atomically. Equal weights give equal bytes. Raises OSError."""
    half: dict[str, torch.Tensor] = {}
    for names in shared_names(state):
        # Tied names must share memory: then the file holds each matrix once, as if the model itself were saved.
        half.update(dict.fromkeys(names, _to_half(state[names[0]])))
    buffer = io.BytesIO()
    torch.save({name: half[name] for name in state}, buffer)
    with directory_inside(path.parent, save_roots(), create=True) as folder:
        write_atomically(folder / path.name, buffer.getvalue())


def _to_half(tensor: torch.Tensor) -> torch.Tensor:
    # With numpy: this runs in the background of training, and torch would take all cores away from it.
    with np.errstate(over="ignore"):  # as in torch, what is too large becomes infinite
        return torch.from_numpy(tensor.detach().cpu().numpy().astype(np.float16))


def load_weights(model: torch.nn.Module, spec: JobSpec, artifacts: ArtifactDir, roots: Sequence[Path] = ()) -> Path:
    """Load ``training.from_weight`` into ``model``, strictly. Raises TrainingError that lists the mismatches.

    ``roots``: the directories below which the weights must lie, if any.
    """
    path = find_weights(spec, artifacts)
    try:
        tensors = _read_tensors(path, roots)
        config = _config_problems(path, spec, roots)
    except OutsideRoots as error:
        raise outside_error("training.from_weight", error.reason, DATA_ROOTS) from error
    problems = [*config, *mismatches(model.state_dict(), tensors)]
    if problems:
        listed = "; ".join(problems[:MAX_LISTED]) + (
            f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        )
        hint = "Set the model group to the shape these weights have, or take other weights."
        raise TrainingError(Reason.CHECKPOINT_INVALID, f"from_weight: {path} does not fit the model: {listed}", hint)
    for names in shared_names(model.state_dict()):
        tensor = next(tensors[name] for name in names if name in tensors)
        tensors.update(dict.fromkeys(names, tensor))
    model.load_state_dict(tensors, strict=True)
    return path


def find_weights(spec: JobSpec, artifacts: ArtifactDir) -> Path:
    """Return the file or Hugging Face directory that ``from_weight`` names. Raises TrainingError if there is none."""
    candidates = weight_paths(spec, artifacts)
    for path in candidates:
        if path.is_file() or is_hf_directory(path):
            return path
    tried = ", ".join(map(str, candidates))
    hint = "Give a .pth or .safetensors file, a Hugging Face directory, or a name as in save_weight."
    raise TrainingError(Reason.SPEC_INVALID, f"from_weight: no such weights; looked for {tried}", hint)


def mismatches(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """Return every reason why ``given`` is no state dict for ``own``. Of tied weights one name is enough."""
    problems = []
    for names in shared_names(own):
        present = [name for name in names if name in given]
        if not present:
            problems.append(f"{names[0]} is missing")
        problems += [
            f"{name} is {list(given[name].shape)} and must be {list(own[name].shape)}"
            for name in present
            if given[name].shape != own[name].shape
        ]
        if any(not torch.equal(given[name], given[present[0]]) for name in present[1:]):
            problems.append(f"{' and '.join(present)} differ and must be one")
    return problems + [f"{name} is not part of the model" for name in given if name not in own]


def _config_problems(path: Path, spec: JobSpec, roots: Sequence[Path]) -> list[str]:
    # A directory's config.json has settings that no tensor shape shows, such as rope_theta.
    try:
        if not path.is_dir():
            return _moe_problems(path, spec.model, roots)
        config = read_config(path, roots)
        return [] if config is None else list(config_problems(config, spec.model))
    except OutsideRoots:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable_error(path, f"{type(error).__name__}: {str(error)[:200]}") from error


def _moe_problems(path: Path, model: ModelConfig, roots: Sequence[Path]) -> list[str]:
    """Return how the config.json beside a .pth with experts differs. Without one, MiniMind's settings are unknown."""
    file = path.resolve().with_name(CONFIG)
    config = read_config(file.parent, roots) if model.use_moe and path.suffix != ".safetensors" else None
    if not isinstance(config, dict):
        return []
    return [
        f"{name} is {config[name]} in {file} and {getattr(model, name)} in the model group"
        for name in ("num_experts_per_tok", "norm_topk_prob")
        if name in config and config[name] != getattr(model, name)
    ]


def _read_tensors(path: Path, roots: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of a file or directory. It may come from anywhere: no pickled code is ever run."""
    try:
        files = weight_files(path, roots) if path.is_dir() else [path]
        content: Any = {}
        for file in files:
            part = _content(file, roots)
            content = part if len(files) == 1 else {**content, **part}
    except OutsideRoots:
        raise
    except pickle.UnpicklingError as error:
        # torch's own message advises to load it with weights_only=False, which would run its code.
        raise _unreadable_error(path, "it is not a pickle, or has other objects than tensors") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        raise _unreadable_error(path, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if path.suffix == ".pth" and isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]  # a *_resume.pth of MiniMind: the optimizer and counters beside it are not used
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise _unreadable_error(path, "it is not a plain state dict of tensors")
    return split_experts({str(name): value for name, value in content.items()})


def _content(path: Path, roots: Sequence[Path]) -> Any:
    with io.BufferedReader(open_regular_inside(path, roots)) as file:
        if path.suffix != ".safetensors":
            return torch.load(file, map_location="cpu", weights_only=True)
        # The errors of its compiled part have a class of their own.
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            # By the name that /proc has for the open file: the library opens files by name.
            return load_file(f"/proc/self/fd/{file.fileno()}")
        except SafetensorError as error:
            raise ValueError(str(error)) from error


def _unreadable_error(path: Path, why: str) -> TrainingError:
    hint = "Nothing in the file was executed. Give a file of plain weights, as torch.save(state_dict) writes it."
    return TrainingError(Reason.CHECKPOINT_INVALID, f"from_weight: {path} cannot be read as weights: {why}", hint)
