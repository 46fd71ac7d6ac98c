"""Checkpoints: written beside, published by one rename, verified before they are believed.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json  manifest.json
    checkpoints/step-...-weights/  a milestone of which only the weights are left, see `worker.checkpoint.retention`
    checkpoints/.saving-...     one that is being written; collected at the next start
    checkpoints/.invalid-...    one that was found damaged, set aside for whoever wants to look
    checkpoints/.superseded-... one from behind the step that the user went back to; until the run has come as far

``manifest.json`` is {"files": {name: {"bytes": n, "sha256": hex}}}; it is written last.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainyard.contract.failpoints import failpoint
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import (
    CHECKPOINT_FILES,
    INVALID_PREFIX,
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    SAVING_PREFIX,
    STATE_FILE,
    ArtifactDir,
    FileDigest,
    atomic_directory,
    manifest_json,
    parse_manifest,
)
from trainyard.worker.checkpoint.safetensors_writer import sha256_of, write_blocks, write_tensors

OptimizerKind = Literal["adamw", "muon"]


@dataclass(frozen=True)
class RunState:
    """Everything a resume needs beside the tensors. One JSON object, state.json.

    ``data_offset``, ``base_step``: see `worker.training.state.Progress`. ``interval``: each rank's sums since the last
    metric line. ``scaler``: the fp16 scaler's state, {} without one. ``probe``: what a few rows score with these
    weights, see `worker.training.resume_check`; {} where that is not known.
    """

    step: int
    tokens: int
    rows_per_step: int
    world_size: int
    identity: RunIdentity
    data_offset: int = 0
    base_step: int = 0
    loss: float | None = None
    interval: list[list[float]] = field(default_factory=list)
    trouble: dict[str, int] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    torch_version: str = torch.__version__
    version: int = 1

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `asdict`. Raises KeyError or TypeError."""
        return cls(**{**value, "identity": RunIdentity(**value["identity"])})


@dataclass(frozen=True)
class CheckpointInfo:
    """A published checkpoint."""

    step: int
    path: Path
    bytes: int
    sha256: str


def write_checkpoint(
    products: ArtifactDir, state: RunState, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
) -> CheckpointInfo:
    """Write a checkpoint and publish it. Raises OSError, and then leaves nothing behind."""
    final = products.checkpoint(state.step)
    with atomic_directory(final, saving_directory(final)) as unfinished:
        files = {
            MODEL_FILE: write_tensors(unfinished / MODEL_FILE, model),
            OPTIMIZER_FILE: write_tensors(unfinished / OPTIMIZER_FILE, optimizer),
            STATE_FILE: write_state(unfinished, state),
        }
        manifest = write_manifest(unfinished, files)
    size = manifest.bytes + sum(file.bytes for file in files.values())
    return CheckpointInfo(state.step, final, size, files[MODEL_FILE].sha256)


def saving_directory(final: Path) -> Path:
    """Where this process writes a checkpoint that becomes ``final``."""
    return final.with_name(f"{SAVING_PREFIX}{final.name}-{os.getpid()}")


def write_state(directory: Path, state: RunState) -> FileDigest:
    """Write state.json. Raises OSError."""
    content = json.dumps(asdict(state), allow_nan=False, indent=1).encode() + b"\n"
    return write_blocks(directory / STATE_FILE, iter([content]))


def write_manifest(directory: Path, files: Mapping[str, FileDigest]) -> FileDigest:
    """Write manifest.json, the last file of a checkpoint. Raises OSError."""
    return write_blocks(directory / MANIFEST_FILE, iter([manifest_json(files)]))


@failpoint("resume.manifest")
def read_manifest(path: Path, needed: Iterable[str] = CHECKPOINT_FILES) -> dict[str, FileDigest]:
    """What the manifest says of each file. Raises OSError, ValueError, KeyError or TypeError on a damaged one."""
    found = parse_manifest((path / MANIFEST_FILE).read_bytes())
    if not set(needed) <= set(found):
        raise ValueError("names too few files")
    return found


@failpoint("resume.verify")
def verify(path: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, e.g. ``model.safetensors sha256``; None where it is sound.

    ``thorough`` reads every byte; otherwise only the manifest and the sizes are looked at.
    """
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} {_kind(error)}"
    for name, said in manifest.items():
        try:
            if (path / name).stat().st_size != said.bytes:
                return f"{name} size"
            if thorough and sha256_of(path / name) != said.sha256:
                return f"{name} sha256"
        except OSError as error:
            return f"{name} {_kind(error)}"
    return None


def _kind(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({type(error).__name__})"


@failpoint("resume.state")
def read_state(path: Path) -> RunState:
    """The state of a verified checkpoint. Raises ValueError where it was written by a newer version."""
    value = json.loads((path / STATE_FILE).read_bytes())
    if value.get("version") != 1:
        raise ValueError(f"{path / STATE_FILE} has version {value.get('version')}; this program reads 1")
    return RunState.from_json(value)


def checkpoint_info(step: int, path: Path, needed: Iterable[str] = CHECKPOINT_FILES) -> CheckpointInfo:
    """What was published as ``path``. Raises as `manifest_of`."""
    manifest = read_manifest(path, needed)
    size = (path / MANIFEST_FILE).stat().st_size
    return CheckpointInfo(step, path, size + sum(file.bytes for file in manifest.values()), manifest[MODEL_FILE].sha256)


@dataclass(frozen=True)
class Damage:
    """A published checkpoint that is not what its manifest says, and where it was put."""

    step: int
    path: Path
    what: str

    def __str__(self) -> str:
        return f"checkpoint {self.step} invalid: {self.what}"


def newest_valid(products: ArtifactDir, damaged: list[Damage]) -> Path | None:
    """The newest checkpoint that is sound, byte for byte.

    Damaged ones are set aside under another name, so that nothing lists them, and appended to ``damaged``.
    """
    for step, path in products.published():
        what = verify(path)
        if what is None:
            return path
        damaged.append(Damage(step, path, what))
        quarantine(path)
    return None


def quarantine(path: Path, why: str = INVALID_PREFIX) -> Path:
    """Rename a checkpoint to ``.invalid-step-...``, or as ``why`` says, numbered where there is one already."""
    for attempt in range(1000):
        aside = path.with_name(f"{why}{path.name}" + (f"-{attempt}" if attempt else ""))
        if not aside.exists():
            path.rename(aside)
            return aside
    raise FileExistsError(f"{path.parent} holds a thousand copies of {why}{path.name}")


@failpoint("resume.load")
def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Put a verified checkpoint into ``model`` and ``optimizer``, in place."""
    state = read_state(path)
    tensors = load_file(path / MODEL_FILE)
    own = model.state_dict()
    for names in shared_names(own):
        tensors.update(dict.fromkeys(names, tensors[names[0]]))
    model.load_state_dict(tensors, strict=True)
    _load_optimizer(load_file(path / OPTIMIZER_FILE), model, optimizer)
    return state


def optimizer_kind(path: Path) -> OptimizerKind | None:
    """Return the optimizer whose state is in the checkpoint ``path``; None if it has no state yet."""
    with safe_open(path / OPTIMIZER_FILE, framework="pt") as file:
        names = list(file.keys())
    if not names:
        return None
    return "muon" if any(name.startswith("momentum.") for name in names) else "adamw"


def unique_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with each tensor once: tied weights stand under their first name."""
    return {names[0]: state[names[0]] for names in shared_names(state)}


def shared_names(state: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Groups of names that stand for the same memory, each in the state dict's order."""
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(name)
    yield from groups.values()


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as ``exp_avg.<parameter>``, ``exp_avg_sq.<parameter>`` and ``step.<parameter>``."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(
    tensors: Mapping[str, torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    named: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        named.setdefault(name, {})[key] = tensor
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    # Copied: on a CPU the library's tensors are the file itself, mapped, and the moments would change with it until
    # they are written to.
    state = {
        order[id(parameter)]: {key: tensor.clone() for key, tensor in named[name].items()}
        for name, parameter in model.named_parameters()
        if name in named
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
