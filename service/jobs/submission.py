"""The last look at a spec before it becomes a job: what only this host can know, all mistakes at once."""

import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainyard.contract.allowed_paths import outside_reason
from trainyard.contract.parsing import ParsedSpec, Problem, parse_spec
from trainyard.contract.spec import JobSpec
from trainyard.contract.tokenizer_info import (
    BYTE,
    TokenizerInvalid,
    tokenizer_file,
    vocabulary_size,
)
from trainyard.model import costs
from trainyard.model.costs import memory_bytes
from trainyard.service.devices.inventory import Device, count_by_kind, kind_for
from trainyard.service.devices.memory import memory_limit
from trainyard.service.errors import SpecInvalid, with_problems
from trainyard.service.launch.slurm.launcher import SLURM, device_on_nodes
from trainyard.service.settings import Settings


def initial_plan(spec: JobSpec, device: str) -> dict[str, Any]:
    """The plan's fields that do not need the corpus. ``device`` is what the spec's device means on this host."""
    model, training = spec.model, spec.training
    assert model.vocab_size is not None
    memory = costs.memory_bytes(
        model,
        batch_size=training.batch_size,
        seq_len=spec.data.max_seq_len,
        dtype=training.dtype,
        optimizer=training.optimizer,
    )
    saved = costs.checkpoint_bytes(model, training.optimizer)
    return {
        "parameters": costs.parameters(model),
        "active_parameters": costs.active_parameters(model),
        "steps": training.max_steps,
        "world_size": spec.resources.ranks,
        "global_batch": spec.rows_per_step,
        "device": device,
        "dtype": training.dtype,
        "vocab_size": model.vocab_size,
        "flops_per_token": costs.flops_per_token(model, spec.data.max_seq_len),
        "memory_bytes": asdict(memory),
        "checkpoint_bytes": saved,
        "snapshot_bytes": saved,
        # An untrained model gives every token the same probability.
        "expected_first_loss": math.log(model.vocab_size),
    }


LARGEST_TOKENIZER_BYTES = 256 << 20

LARGEST_VOCABULARY = 2**24

FOLDERS = ("tokenizer_path", "from_weight")

"""What may be a folder of files to be read."""

UNLESS_SET = {
    "TRAINYARD_DATA_ROOTS": "unless it is set: where the service was started, its home and the temporary directory",
    "TRAINYARD_SAVE_ROOTS": "unless it is set: the service's home alone",
}

WEIGHT_ENDINGS = (".pth", ".safetensors")

Found = tuple[Problem, tuple[str, ...]]

"""A mistake, with the pointers of every field that takes part in it."""


@dataclass(frozen=True)
class HostLimits:
    """What a spec is held against."""

    settings: Settings
    devices: Sequence[Device]


def kind_of(spec: JobSpec, host: HostLimits) -> str:
    """What ``resources.device`` comes to where the job will run: ``cpu``, ``cuda``, or one such as ``cuda:1``."""
    setup = host.settings.slurm
    if spec.resources.launcher == SLURM and setup is not None:
        return device_on_nodes(spec, setup)
    return kind_for(spec.resources.device, host.devices)


def validate_spec(raw: object, host: HostLimits) -> JobSpec:
    """The resolved spec: absolute paths, the vocabulary's size. Raises SpecInvalid with every mistake."""
    parsed = parse_spec(raw)
    if not isinstance(raw, dict):
        raise with_problems(SpecInvalid, parsed.problems)
    check = _SpecValidator(parsed, host)
    problems = [*parsed.problems, *check.problems()]
    if problems:
        raise with_problems(SpecInvalid, problems)
    return check.resolved()


class _SpecValidator:
    """One spec held against the host. What was resolved on the way is kept for `resolved`."""

    def __init__(self, parsed: ParsedSpec, host: HostLimits) -> None:
        self.parsed = parsed
        self.spec = parsed.spec
        self.host = host
        self.paths: dict[str, str] = {}
        self.vocabulary: int | None = None

    def problems(self) -> list[Problem]:
        found = [
            *self._data(),
            *self._tokenizer(),
            *self._weights(),
            *self._save_dir(),
            *self._launcher(),
            *self._devices(),
            *self._memory(),
        ]
        return [problem for problem, involved in found if self.parsed.trusts(*involved, *map(_group, involved))]

    def resolved(self) -> JobSpec:
        """The spec with what was found out."""
        spec = self.spec
        assert self.vocabulary is not None
        return spec.model_copy(
            update={
                "model": spec.model.with_vocab_size(self.vocabulary),
                "data": spec.data.model_copy(update=self._real("data_path", "eval_data_path", "tokenizer_path")),
                "training": spec.training.model_copy(update=self._real("from_weight")),
                "checkpoint": spec.checkpoint.model_copy(update=self._real("save_dir")),
                "resources": spec.resources.model_copy(update={"launcher": SLURM})
                if self.elsewhere
                else spec.resources,
            }
        )

    def _real(self, *leaves: str) -> dict[str, str]:
        return {leaf: self.paths[leaf] for leaf in leaves if leaf in self.paths}

    def _data(self) -> Iterator[Found]:
        for leaf, given in (("data_path", self.spec.data.data_path), ("eval_data_path", self.spec.data.eval_data_path)):
            if given is not None:
                trouble = self._below_roots(leaf, given) or _why_no_corpus(Path(self.paths[leaf]))
                yield from _at(f"/data/{leaf}", trouble)

    def _tokenizer(self) -> Iterator[Found]:
        given = self.spec.data.tokenizer_path
        trouble = None
        if given != BYTE:
            trouble = self._below_roots("tokenizer_path", given)
        if trouble is None:
            trouble = self._read_vocabulary(self.paths.get("tokenizer_path", BYTE))
        yield from _at("/data/tokenizer_path", trouble)
        size = self.spec.model.vocab_size
        if self.vocabulary is not None and size is not None and size < self.vocabulary:
            message = f"must be at least the tokenizer's size, {self.vocabulary}, or left out"
            yield Problem("/model/vocab_size", message), ("/model/vocab_size", "/data/tokenizer_path")

    def _read_vocabulary(self, path: str) -> str | None:
        try:
            if path != BYTE and tokenizer_file(path).stat().st_size > LARGEST_TOKENIZER_BYTES:
                return "holds a tokenizer.json that is far too large"
            size = vocabulary_size(path)
        except (TokenizerInvalid, OSError, ArithmeticError):
            return (
                'must be a directory with a readable tokenizer.json, or "byte"; `trainyard tokenizer train` makes one'
            )
        if not 0 < size <= LARGEST_VOCABULARY:
            return f"must have at most {LARGEST_VOCABULARY} tokens"
        self.vocabulary = size
        return None

    def _weights(self) -> Iterator[Found]:
        given = self.spec.training.from_weight
        if given is None or not ("/" in given or given.endswith(WEIGHT_ENDINGS)):
            return  # nothing, or MiniMind's bare name, which the worker looks up in save_dir
        trouble = self._below_roots("from_weight", given)
        if trouble is None and not _holds_weights(Path(self.paths["from_weight"])):
            trouble = "must be a file of weights, or a Hugging Face directory with a model.safetensors"
        yield from _at("/training/from_weight", trouble)

    def _save_dir(self) -> Iterator[Found]:
        given = self.spec.checkpoint.save_dir
        if given is None:
            return
        settings = self.host.settings
        trouble = self._resolve("save_dir", given, (*settings.save_roots, settings.home), "TRAINYARD_SAVE_ROOTS")
        yield from _at("/checkpoint/save_dir", trouble or _why_not_writable(Path(self.paths["save_dir"])))

    def _launcher(self) -> Iterator[Found]:
        """Which launcher it will be, and whether it can do what is asked."""
        resources, settings = self.spec.resources, self.host.settings
        if self.elsewhere:
            yield from self._on_slurm()
        elif resources.launcher is None and resources.max_nodes > 1:
            message = 'must be 1 on this host; "launcher": "slurm" runs on several nodes'
            yield Problem("/resources/nnodes", message), ("/resources/nnodes", "/resources/launcher")
        if resources.launcher == SLURM and settings.slurm is None:
            yield from _at("/resources/launcher", 'must be "local": this service is not set up for Slurm')

    @property
    def elsewhere(self) -> bool:
        """Whether it does not run on this host's devices."""
        return (self.spec.resources.launcher or self.host.settings.launcher) == SLURM

    def _on_slurm(self) -> Iterator[Found]:
        resources, setup = self.spec.resources, self.host.settings.slurm
        if ":" in resources.device:
            yield from _at("/resources/device", 'must name no device: Slurm chooses; "cuda" is any')
        for place, line in enumerate(resources.slurm.extra if setup is not None else ()):
            name = line.partition("=")[0].removeprefix("--")
            if setup is not None and name not in setup.allowed:
                allowed = ", ".join(setup.allowed) or "none"
                yield from _at(
                    f"/resources/slurm/extra/{place}", f"is not allowed; TRAINYARD_SLURM_ALLOW has: {allowed}"
                )

    def _devices(self) -> Iterator[Found]:
        if self.elsewhere:
            return
        asked, ranks = self.spec.resources.device, self.spec.resources.nproc_per_node
        kind = kind_for(asked, self.host.devices)
        have = count_by_kind(self.host.devices, kind)
        if kind.startswith("cuda") and have == 0:
            there = "there is none" if kind == "cuda" else "there is no such device"
            yield from _at("/resources/device", f'asks for CUDA, and {there} on this host; "auto" takes what there is')
        elif ranks > have:
            what = {"cpu": "CPU slots", "cuda": "GPUs"}.get(kind, "device of that name")
            message = f"must be at most {have}: this host has {have} {what}"
            yield Problem("/resources/nproc_per_node", message), ("/resources/nproc_per_node", "/resources/device")

    def _memory(self) -> Iterator[Found]:
        """Only what no other batch would change; all else is an estimate, and for the plan to warn of."""
        resources, kind = self.spec.resources, kind_for(self.spec.resources.device, self.host.devices)
        limit = memory_limit(kind, self.host.devices)
        size = max(self.spec.model.vocab_size or 0, self.vocabulary or 0)
        if self.elsewhere or limit is None or not size:
            return
        model, optimizer = replace(self.spec.model, vocab_size=size), self.spec.training.optimizer
        least = memory_bytes(model, batch_size=1, seq_len=1, dtype="float32", optimizer=optimizer)
        alone = least.weights + least.gradients + least.optimizer
        needed = alone * (resources.nproc_per_node if kind == "cpu" else 1)
        if needed > limit:
            whose = "this host" if kind == "cpu" else "the device"
            message = (
                f"needs {needed / 1e9:,.1f} GB for weights, gradients and the optimizer alone, and {whose} has "
                f"{limit / 1e9:,.1f} GB: take a smaller model"
            )
            yield Problem("/model", message), ("/model", "/resources/nproc_per_node", "/resources/device")

    def _below_roots(self, leaf: str, given: str) -> str | None:
        settings = self.host.settings
        return self._resolve(leaf, given, (*settings.data_roots, settings.home), "TRAINYARD_DATA_ROOTS")

    def _resolve(self, leaf: str, given: str, roots: Sequence[Path], setting: str) -> str | None:
        """Put the real path into ``paths``; else say why not."""
        trouble = outside_reason(given, roots, content=leaf in FOLDERS)
        if trouble is not None:
            return f"{trouble} the directories that {setting} allows; {UNLESS_SET[setting]}"
        self.paths[leaf] = str(Path(given).resolve())
        return None


def _group(pointer: str) -> str:
    """``/data`` of ``/data/data_path``: a group that is wrong as a whole was reported as a whole."""
    return pointer.rpartition("/")[0]


def _at(pointer: str, trouble: str | None) -> Iterator[Found]:
    if trouble is not None:
        yield Problem(pointer, trouble), (pointer,)


def _why_no_corpus(path: Path) -> str | None:
    """A first cheap look that opens nothing: a FIFO would hang, and a device would never end."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return "does not exist or cannot be reached"
    if not stat.S_ISREG(found.st_mode):
        return "must be a regular file"
    if not os.access(path, os.R_OK):
        return "cannot be read by the service"
    return "is empty" if found.st_size == 0 else None


def _holds_weights(path: Path) -> bool:
    """A file, or a directory as Hugging Face writes it: in one piece or with an index."""
    return any(map(_is_file, (path, path / "model.safetensors", path / "model.safetensors.index.json")))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _why_not_writable(path: Path) -> str | None:
    try:
        nearest = next(p for p in (path, *path.parents) if p.exists())
    except OSError:
        return "cannot be reached"
    if not nearest.is_dir():
        return "must be a directory"
    return None if os.access(nearest, os.W_OK | os.X_OK) else "cannot be written by the service"
