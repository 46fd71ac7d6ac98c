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
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge, Le
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from trainyard.contract.allowed_paths import directory_inside, open_inside, open_regular_in
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
from trainyard.worker.checkpoint.parts import ParameterPart
from trainyard.worker.paths import save_roots

OptimizerKind = Literal["adamw", "muon"]
OPTIMIZER_KEYS = ({"exp_avg", "exp_avg_sq", "step"}, {"momentum"})
"""State that the optimizers keep for each parameter. ``step`` is a number, the others have the parameter's shape."""

MAX_JSON_BYTES = 16 << 20
"""The largest state.json or manifest.json that is read."""

MAX_HEADER_BYTES = 128 << 20
"""The largest header that the safetensors library reads."""

Count = Annotated[int, Ge(0), Le(2**53)]
SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
COUNTERS = {"in_a_row", "skipped", "rollbacks"}
MIN_WINDOW_NUMBERS = 4
"""See `worker.training.nonfinite.NonFiniteCounters` and `worker.training.metrics.MetricsWindow`."""


@dataclass(frozen=True)
class RunState:
    """Everything a resume needs besides the tensors. Stored as the JSON object state.json, so field names are fixed.

    ``data_offset``, ``base_step``, ``base_tokens``: see `worker.training.state.TrainProgress`. ``interval``: the
    metrics window of each rank; ``interval_bytes``: the bytes of text in it, None if unknown, [] in checkpoints of 0.1.
    ``smoothed``: the sums of the smoothed loss, see `contract.smoothing.Ema`, [] if unknown. ``trouble``: the
    `NonFiniteCounters`. ``scaler``: the fp16 scaler's state, {} without one. ``probe``: the score of
    `worker.training.resume_check`, {} if there is none. ``unevaluated``: the metric line of the step if its evaluation
    was still to be done; None also in checkpoints of 0.1. ``stacks_matrices``: see `model.muon.NewtonSchulz`, False in
    checkpoints of 0.1.
    """

    # Without an annotation, because it is no field. Pydantic reads it in `from_json`.
    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # noqa: RUF012

    step: Count
    tokens: Count
    rows_per_step: Annotated[int, Ge(1), Le(2**31)]
    world_size: Annotated[int, Ge(1), Le(2**31)]
    identity: RunIdentity
    data_offset: Annotated[int, Ge(-(2**53)), Le(2**53)] = 0
    base_step: Count = 0
    base_tokens: Count = 0
    loss: float | None = None
    interval: list[list[float]] = field(default_factory=list)
    interval_bytes: list[float | None] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    trouble: dict[str, Count] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    unevaluated: dict[str, Any] | None = None
    stacks_matrices: bool = False
    torch_version: str = torch.__version__
    version: int = 1

    @classmethod
    def from_json(cls, value: Any) -> "RunState":
        """Return the state that `asdict` gave. Raises ValueError that names the first wrong field."""
        try:
            state = _state_adapter().validate_json(json.dumps(value))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg']}") from None
        if problem := _state_problem(state):
            raise ValueError(problem)
        return state


def _state_problem(state: RunState) -> str | None:
    if state.base_step > state.step or state.step + state.data_offset < 0:
        return "base_step and data_offset do not belong to step"
    if state.base_tokens > state.tokens:
        return "base_tokens does not belong to tokens"
    if not set(state.trouble) <= COUNTERS:
        return f"trouble: must hold {', '.join(sorted(COUNTERS))}"
    widths = {len(row) for row in state.interval}
    if len(widths) > 1 or any(width < MIN_WINDOW_NUMBERS for width in widths):
        return f"interval: must hold rows of one length, at least {MIN_WINDOW_NUMBERS}"
    if len(state.interval_bytes) not in (0, len(state.interval)):
        return "interval_bytes: must hold a number for each row of interval"
    if state.scaler and (set(state.scaler) != SCALER_KEYS or not all(map(_is_positive, state.scaler.values()))):
        return f"scaler: must hold positive numbers: {', '.join(sorted(SCALER_KEYS))}"
    if "loss" in state.probe and not _is_finite(state.probe["loss"]):
        return "probe.loss: must be a finite number"
    return None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value >= 0


@cache
def _state_adapter() -> TypeAdapter[RunState]:
    return TypeAdapter(RunState)


@dataclass(frozen=True)
class TensorShapes:
    """The shapes of a model's tensors, by which a checkpoint is checked before it is loaded. All are float32.

    ``weights``: each tensor once, see `unique_tensors`. ``parameters``: the names that the optimizer may have.
    """

    weights: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Self:
        weights = {name: tuple(tensor.shape) for name, tensor in unique_tensors(model.state_dict()).items()}
        return cls(weights, frozenset(name for name, _ in model.named_parameters()))

    @property
    def max_bytes(self) -> int:
        """An upper limit for the size of a file with all weights, or with the optimizer's tensors."""
        return MAX_HEADER_BYTES + 2 * 4 * sum(math.prod(shape) + 1 for shape in self.weights.values())


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
    artifacts: ArtifactDir,
    state: RunState,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    before_publishing: Callable[[], None] = lambda: None,
) -> CheckpointInfo:
    """Write a checkpoint and publish it. Raises OSError, or what ``before_publishing`` raises: then nothing is left."""
    final = artifacts.checkpoint(state.step)
    with atomic_directory(final, saving_directory(final), save_roots()) as unfinished:
        written = {
            MODEL_FILE: write_tensors(unfinished / MODEL_FILE, model),
            OPTIMIZER_FILE: write_tensors(unfinished / OPTIMIZER_FILE, optimizer),
            STATE_FILE: write_state(unfinished, state),
        }
        manifest = write_manifest(unfinished, written)
        before_publishing()
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


@failpoint("resume.open")
def open_saved(path: Path) -> io.FileIO:
    """Open a regular file of a checkpoint, not through a link, and below the save roots if there are any.

    Never blocks. Raises OSError.
    """
    directory = open_inside(path.parent, save_roots(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        return open_regular_in(directory, path.name)
    finally:
        os.close(directory)


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """Yield another path of the open file ``path``, for a library that opens files by name."""
    with open_saved(path) as file:
        yield Path(f"/proc/self/fd/{file.fileno()}")


@failpoint("resume.json")
def _read_json(path: Path) -> bytes:
    with open_saved(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
            raise ValueError(f"has more than {MAX_JSON_BYTES >> 20} MiB")
        return file.readall()


@failpoint("resume.manifest")
def read_manifest(path: Path, needed: Iterable[str] = CHECKPOINT_FILES) -> dict[str, FileDigest]:
    """Return size and sha256 of each file. Raises OSError, ValueError, KeyError or TypeError on a damaged manifest."""
    manifest = parse_manifest(_read_json(path / MANIFEST_FILE))
    if not set(needed) <= set(manifest):
        raise ValueError("names too few files")
    # A name with a folder in it could lead out of the directory.
    if any(name in ("", ".", "..") or "/" in name or "\0" in name for name in manifest):
        raise ValueError("names a file outside of the checkpoint")
    return manifest


@failpoint("resume.verify")
def verify(path: Path, *, thorough: bool = True, shapes: TensorShapes | None = None) -> str | None:
    """Return what is wrong with a checkpoint, e.g. ``model.safetensors sha256``, or None if it is valid.

    ``thorough`` reads every byte; otherwise only the manifest and the file sizes are checked. ``shapes``: check the
    state, and whether all tensors are those of the model, too.
    """
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} {_read_problem(error)}"
    for name, expected in manifest.items():
        try:
            with open_saved(path / name) as file:
                size = os.fstat(file.fileno()).st_size
                # A file without an end would be read for ever.
                if size != expected.bytes or (shapes is not None and size > shapes.max_bytes):
                    return f"{name} size"
                if thorough and hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                    return f"{name} sha256"
        except OSError as error:
            return f"{name} {_read_problem(error)}"
    return None if shapes is None else content_problem(path, shapes)


def content_problem(path: Path, shapes: TensorShapes, needed: Iterable[str] = CHECKPOINT_FILES) -> str | None:
    """Return what in a checkpoint could not be loaded, e.g. ``optimizer.safetensors: step.x is [2]``, or None.

    ``needed``: the files to check. Only the headers of tensor files are read, and the optimizer's step numbers.
    """
    for name in needed:
        problem = None
        try:
            if name == STATE_FILE:
                read_state(path)
            elif name == MODEL_FILE:
                problem = _weights_problem(path / name, shapes)
            elif name == OPTIMIZER_FILE:
                problem = _optimizer_problem(path / name, shapes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            problem = " ".join(str(error).split())[:200]
        if problem is not None:
            return f"{name}: {problem}"
    return None


def _weights_problem(path: Path, shapes: TensorShapes) -> str | None:
    found = _described(path)
    if missing := sorted(set(shapes.weights) - set(found)):
        return f"has no {missing[0]}"
    return next((problem for name in found if (problem := _mismatch(name, found, shapes.weights.get(name)))), None)


def _optimizer_problem(path: Path, shapes: TensorShapes) -> str | None:
    found, keys = _described(path), dict[str, set[str]]()
    for full_name in found:
        key, _, name = full_name.partition(".")
        keys.setdefault(name, set()).add(key)
        shape = None if name not in shapes.parameters else () if key == "step" else shapes.weights.get(name)
        if problem := _mismatch(full_name, found, shape):
            return problem
    incomplete = next((name for name, own in keys.items() if own not in OPTIMIZER_KEYS), None)
    if incomplete is not None:
        return f"has {' and '.join(sorted(keys[incomplete]))} of {incomplete}"
    with _readable(path) as readable, safe_open(readable, framework="pt") as file:
        for name in found:
            if name.startswith("step.") and not 0 <= float(file.get_tensor(name)) <= 2**53:
                return f"{name} is {float(file.get_tensor(name))}"
    return None


def _described(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor."""
    with _readable(path) as readable, safe_open(readable, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}


def _mismatch(name: str, found: Mapping[str, tuple[str, tuple[int, ...]]], shape: tuple[int, ...] | None) -> str | None:
    dtype, own = found[name]
    if shape is None:
        return f"{name} is not part of the model"
    if own != shape:
        return f"{name} is {list(own)} and must be {list(shape)}"
    return None if dtype == "F32" else f"{name} is {dtype} and must be F32"


def _read_problem(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({type(error).__name__})"


@failpoint("resume.state")
def read_state(path: Path) -> RunState:
    """Return the state of a verified checkpoint. Raises ValueError if it is invalid, or a newer version wrote it."""
    try:
        value = json.loads(_read_json(path / STATE_FILE))
    except RecursionError:
        raise ValueError("is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("is no object")
    if value.get("version") != 1:
        raise ValueError(f"{path / STATE_FILE} has version {str(value.get('version'))[:50]}; this program reads 1")
    return RunState.from_json(value)


def checkpoint_info(step: int, path: Path, needed: Iterable[str] = CHECKPOINT_FILES) -> CheckpointInfo:
    """Describe the published checkpoint ``path``. Raises as `read_manifest` does."""
    manifest = read_manifest(path, needed)
    size = (path / MANIFEST_FILE).lstat().st_size
    return CheckpointInfo(step, path, size + sum(file.bytes for file in manifest.values()), manifest[MODEL_FILE].sha256)


@dataclass(frozen=True)
class Damage:
    """A published checkpoint that differs from its manifest. ``path``: where it was before it was quarantined."""

    step: int
    path: Path
    problem: str

    def __str__(self) -> str:
        return f"checkpoint {self.step} invalid: {self.problem}"


def newest_valid(artifacts: ArtifactDir, damaged: list[Damage], shapes: TensorShapes | None = None) -> Path | None:
    """Return the newest checkpoint whose every byte is valid, or None. ``shapes``: see `verify`.

    Damaged ones are quarantined, so that nothing lists them, and appended to ``damaged``.
    """
    for step, path in artifacts.published():
        problem = verify(path, shapes=shapes)
        if problem is None and shapes is not None and read_state(path).step != step:
            problem = f"{STATE_FILE}: is of another step"
        if problem is None:
            return path
        damaged.append(Damage(step, path, problem))
        quarantine(path)
    return None


def quarantine(path: Path, prefix: str = INVALID_PREFIX) -> Path:
    """Rename a checkpoint to ``<prefix>step-...``, numbered if that exists already. Return the new path."""
    with directory_inside(path.parent, save_roots()) as folder:
        for number in range(1000):
            name = f"{prefix}{path.name}" + (f"-{number}" if number else "")
            if not os.path.lexists(folder / name):
                (folder / path.name).rename(folder / name)
                return path.with_name(name)
    raise FileExistsError(f"{path.parent} holds a thousand copies of {prefix}{path.name}")


@failpoint("resume.load")
def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Load a verified checkpoint into ``model`` and ``optimizer``, in place."""
    state = read_state(path)
    model.load_state_dict(load_weights(path, shared_names(model.state_dict())), strict=True)
    parts = [ParameterPart(name, tuple(each.shape), 0, each) for name, each in model.named_parameters()]
    load_optimizer_parts(path, parts, optimizer)
    return state


def load_weights(path: Path, names: Iterable[list[str]]) -> dict[str, torch.Tensor]:
    """Return the weights of a verified checkpoint, memory-mapped; tied ones under all of their ``names``."""
    with _readable(path / MODEL_FILE) as readable:
        tensors = load_file(readable)
    for tied in names:
        tensors.update(dict.fromkeys(tied, tensors[tied[0]]))
    return tensors


def optimizer_kind(path: Path) -> OptimizerKind | None:
    """Return which optimizer wrote the checkpoint ``path``, or None if it holds no optimizer state."""
    with _readable(path / OPTIMIZER_FILE) as readable, safe_open(readable, framework="pt") as file:
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


@failpoint("resume.load")
def load_optimizer_parts(path: Path, parts: Iterable[ParameterPart], optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer state of ``parts`` from a verified checkpoint. Only their bytes are read."""
    with _readable(path / OPTIMIZER_FILE) as readable:
        tensors = load_file(readable)
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        by_parameter.setdefault(name, {})[key] = tensor
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    # Cloned: on a CPU the library's tensors are memory-mapped views of the file, and would change if the file does.
    state = {
        index[id(part.tensor)]: {
            key: (part.of(tensor) if tensor.ndim else tensor).clone() for key, tensor in by_parameter[part.name].items()
        }
        for part in parts
        if part.name in by_parameter and id(part.tensor) in index
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
    """Return the sha256 of a file of a checkpoint as hex, read in blocks. Raises OSError."""
    with open_saved(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
