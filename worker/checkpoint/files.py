"""The files of a checkpoint: written in a hidden directory, published by one rename, verified before use.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json  manifest.json
    checkpoints/step-...-weights/  a milestone: only its weights are kept, see `worker.checkpoint.retention`
    checkpoints/.saving-...     being written; leftovers are deleted at the next start
    checkpoints/.invalid-...    damaged, quarantined for inspection
    checkpoints/.superseded-... newer than the step that the user went back to; kept until the run has come as far again

``manifest.json`` is {"files": {name: {"bytes": n, "sha256": hex}}}; it is written last.

The tensors are written in one pass and hashed on the way, without a second copy in memory. The format of safetensors:
8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. Source:
https://github.com/huggingface/safetensors#format. Files are read back with the safetensors library.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainyard.contract.events import CheckpointSaved
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

OptimizerKind = Literal["adamw", "muon"]


@dataclass(frozen=True)
class RunState:
    """Everything a resume needs besides the tensors. Stored as the JSON object state.json, so field names are fixed.

    ``data_offset``, ``base_step``: see `worker.training.state.TrainProgress`. ``interval``: the metrics window of each
    rank. ``trouble``: the `NonFiniteCounters`. ``scaler``: the fp16 scaler's state, {} without one. ``probe``: the
    score of `worker.training.resume_check`, {} if there is none. ``unevaluated``: the metric line of the step if its
    evaluation was still to be done; None also in checkpoints of 0.1.
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
    unevaluated: dict[str, Any] | None = None
    torch_version: str = torch.__version__
    version: int = 1

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the state that `asdict` gave. Raises KeyError or TypeError."""
        return cls(**{**value, "identity": RunIdentity(**value["identity"])})


@dataclass(frozen=True)
class CheckpointInfo:
    """A published checkpoint."""

    step: int
    path: Path
    bytes: int
    sha256: str

    def saved_event(self, **details: Any) -> CheckpointSaved:
        """Return the event about this checkpoint. ``details``: its other fields, e.g. ``loss``."""
        return CheckpointSaved(step=self.step, path=str(self.path), bytes=self.bytes, sha256=self.sha256, **details)


def write_checkpoint(
    artifacts: ArtifactDir, state: RunState, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
) -> CheckpointInfo:
    """Write a checkpoint and publish it. Raises OSError; nothing is left on disk then."""
    final = artifacts.checkpoint(state.step)
    with atomic_directory(final, saving_directory(final)) as unfinished:
        written = {
            MODEL_FILE: write_tensors(unfinished / MODEL_FILE, model),
            OPTIMIZER_FILE: write_tensors(unfinished / OPTIMIZER_FILE, optimizer),
            STATE_FILE: write_state(unfinished, state),
        }
        manifest = write_manifest(unfinished, written)
    size = manifest.bytes + sum(file.bytes for file in written.values())
    return CheckpointInfo(state.step, final, size, written[MODEL_FILE].sha256)


def saving_directory(final: Path) -> Path:
    """Return where this process writes a checkpoint before it becomes ``final``."""
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
    """Return size and sha256 of each file. Raises OSError, ValueError, KeyError or TypeError on a damaged manifest."""
    manifest = parse_manifest((path / MANIFEST_FILE).read_bytes())
    if not set(needed) <= set(manifest):
        raise ValueError("names too few files")
    return manifest


@failpoint("resume.verify")
def verify(path: Path, *, thorough: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, e.g. ``model.safetensors sha256``, or None if it is valid.

    ``thorough`` reads every byte; otherwise only the manifest and the file sizes are checked.
    """
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} {_read_problem(error)}"
    for name, expected in manifest.items():
        try:
            if (path / name).stat().st_size != expected.bytes:
                return f"{name} size"
            if thorough and sha256_of(path / name) != expected.sha256:
                return f"{name} sha256"
        except OSError as error:
            return f"{name} {_read_problem(error)}"
    return None


def _read_problem(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({type(error).__name__})"


@failpoint("resume.state")
def read_state(path: Path) -> RunState:
    """Return the state of a verified checkpoint. Raises ValueError if a newer version wrote it."""
    value = json.loads((path / STATE_FILE).read_bytes())
    if value.get("version") != 1:
        raise ValueError(f"{path / STATE_FILE} has version {value.get('version')}; this program reads 1")
    return RunState.from_json(value)


def checkpoint_info(step: int, path: Path, needed: Iterable[str] = CHECKPOINT_FILES) -> CheckpointInfo:
    """Describe the published checkpoint ``path``. Raises as `read_manifest` does."""
    manifest = read_manifest(path, needed)
    size = (path / MANIFEST_FILE).stat().st_size
    return CheckpointInfo(step, path, size + sum(file.bytes for file in manifest.values()), manifest[MODEL_FILE].sha256)


@dataclass(frozen=True)
class Damage:
    """A published checkpoint that differs from its manifest. ``path``: where it was before it was quarantined."""

    step: int
    path: Path
    problem: str

    def __str__(self) -> str:
        return f"checkpoint {self.step} invalid: {self.problem}"


def newest_valid(artifacts: ArtifactDir, damaged: list[Damage]) -> Path | None:
    """Return the newest checkpoint whose every byte is valid, or None.

    Damaged ones are quarantined, so that nothing lists them, and appended to ``damaged``.
    """
    for step, path in artifacts.published():
        problem = verify(path)
        if problem is None:
            return path
        damaged.append(Damage(step, path, problem))
        quarantine(path)
    return None


def quarantine(path: Path, prefix: str = INVALID_PREFIX) -> Path:
    """Rename a checkpoint to ``<prefix>step-...``, numbered if that exists already. Return the new path."""
    for number in range(1000):
        target = path.with_name(f"{prefix}{path.name}" + (f"-{number}" if number else ""))
        if not target.exists():
            path.rename(target)
            return target
    raise FileExistsError(f"{path.parent} holds a thousand copies of {prefix}{path.name}")


@failpoint("resume.load")
def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Load a verified checkpoint into ``model`` and ``optimizer``, in place."""
    state = read_state(path)
    tensors = load_file(path / MODEL_FILE)
    for names in shared_names(model.state_dict()):
        tensors.update(dict.fromkeys(names, tensors[names[0]]))
    model.load_state_dict(tensors, strict=True)
    _load_optimizer(load_file(path / OPTIMIZER_FILE), model, optimizer)
    return state


def optimizer_kind(path: Path) -> OptimizerKind | None:
    """Return which optimizer wrote the checkpoint ``path``, or None if it holds no optimizer state."""
    with safe_open(path / OPTIMIZER_FILE, framework="pt") as file:
        names = list(file.keys())
    if not names:
        return None
    return "muon" if any(name.startswith("momentum.") for name in names) else "adamw"


def unique_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict with each tensor once: tied weights under their first name."""
    return {names[0]: state[names[0]] for names in shared_names(state)}


def shared_names(state: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Yield the names of each tensor, in the order of the state dict. Tied weights share memory and thus a group."""
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(name)
    yield from groups.values()


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state by name, e.g. ``exp_avg.<parameter>`` and ``step.<parameter>`` of AdamW."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(
    tensors: Mapping[str, torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        by_parameter.setdefault(name, {})[key] = tensor
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    # Cloned: on a CPU the library's tensors are memory-mapped views of the file, and would change if the file does.
    state = {
        index[id(parameter)]: {key: tensor.clone() for key, tensor in by_parameter[name].items()}
        for name, parameter in model.named_parameters()
        if name in by_parameter
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

BLOCK_BYTES = 1 << 24


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileDigest:
    """Write ``tensors`` to ``path`` and fsync it. The bytes depend on names and values alone. Raises OSError."""
    return write_blocks(path, _blocks(dict(sorted(tensors.items()))))


def write_blocks(path: Path, blocks: Iterator[bytes | memoryview]) -> FileDigest:
    """Write ``blocks`` one after the other to a new file, fsync it, and return its size and sha256. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for block in blocks:
            for start in range(0, len(block), BLOCK_BYTES):
                part = block[start : start + BLOCK_BYTES]
                digest.update(part)
                size += len(part)
                rest = memoryview(part)
                while rest:  # os.write may write less than it is given
                    rest = rest[os.write(file.fileno(), rest) :]
        os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


def _blocks(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        # As bytes, because numpy has no bfloat16. One tensor at a time is copied from the device.
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        yield flat.numpy().data


@failpoint("resume.digest")
def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hex, read in blocks. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
