"""Validate a spec against this host before it becomes a job, with all mistakes at once; and its initial plan."""

import math
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainyard.contract.allowed_paths import outside_files, outside_reason
from trainyard.contract.corpus_files import CorpusFilesInvalid, expand, fingerprint_inputs, glob_base, is_glob, shown
from trainyard.contract.parsing import PLACEHOLDER, ParsedSpec, Problem, parse_spec
from trainyard.contract.rundir import find_named_weights, weights_name
from trainyard.contract.spec import EvalSourceSpec, JobSpec, SourceSpec, TaskSpec
from trainyard.contract.task_files import MAX_TASK_BYTES, TaskFileInvalid, read_task_file
from trainyard.contract.tokenizer_info import BYTE, TokenizerInvalid, TokenizerTooLarge, tokenizer_file, vocabulary_size
from trainyard.model import costs
from trainyard.service.devices.inventory import Device, count_by_kind, kind_for
from trainyard.service.devices.memory import memory_limit
from trainyard.service.errors import SpecInvalid, with_problems
from trainyard.service.jobs import memory
from trainyard.service.launch.slurm.launcher import SLURM, device_on_nodes
from trainyard.service.settings import Settings

MAX_VOCABULARY = 2**24

DIRECTORY_FIELDS = ("tokenizer_path", "from_weight")
"""Fields that may name a directory whose files are read."""

DEFAULT_ROOTS = {
    "TRAINYARD_DATA_ROOTS": "by default the folder in which the service was started, and its home",
    "TRAINYARD_SAVE_ROOTS": "by default only the home of the service",
}

WEIGHT_ENDINGS = (".pth", ".safetensors")

Finding = tuple[Problem, tuple[str, ...]]
"""A mistake, with the pointers of every field that is involved in it."""


@dataclass(frozen=True)
class HostLimits:
    """What a spec is validated against. ``names_roots``: messages may name the allowed directories to the caller."""

    settings: Settings
    devices: Sequence[Device]
    names_roots: bool = False


def initial_plan(spec: JobSpec, device: str) -> dict[str, Any]:
    """Return the plan's fields that do not need the corpus. ``device``: the device kind that `kind_of` returns."""
    model, training = spec.model, spec.training
    assert model.vocab_size is not None
    return {
        "parameters": costs.parameters(model),
        "active_parameters": costs.active_parameters(model),
        "steps": training.max_steps,
        "world_size": spec.resources.ranks,
        "global_batch": spec.rows_per_step,
        "device": device,
        "dtype": training.dtype,
        "vocab_size": model.vocab_size,
        # As if each row were one document. The plan of a preview or of a started job has the corpus's own number.
        "flops_per_token": costs.flops_per_token(model, spec.data.max_seq_len),
        "memory_bytes": asdict(memory.per_rank(spec)),
        "checkpoint_bytes": costs.checkpoint_bytes(model, training.optimizer),
        "snapshot_bytes": memory.snapshot(spec),
        # An untrained model gives every token the same probability.
        "expected_first_loss": math.log(model.vocab_size),
    }


def read_inputs(spec: JobSpec, roots: Sequence[Path] = ()) -> dict[str, dict[str, Any]]:
    """Return fingerprints of the files that the run will read, so that a change before it starts is noticed."""
    data = spec.data
    try:
        tokenizer = tokenizer_file(data.tokenizer_path) if data.tokenizer_path != BYTE else None
    except (TokenizerInvalid, OSError):
        tokenizer = None  # it has just disappeared: the attempt reports it
    found = fingerprint_inputs(data, tokenizer, roots)
    return {name: asdict(fingerprint) for name, fingerprint in found.items()}


def kind_of(spec: JobSpec, host: HostLimits) -> str:
    """Return what ``resources.device`` means where the job will run: ``cpu``, ``cuda``, or e.g. ``cuda:1``."""
    setup = host.settings.slurm
    if spec.resources.launcher == SLURM and setup is not None:
        return device_on_nodes(spec, setup)
    return kind_for(spec.resources.device, host.devices)


def validate_spec(raw: object, host: HostLimits, *, is_new: bool = False) -> JobSpec:
    """Return the spec with absolute paths and the vocabulary's size. Raises SpecInvalid with every mistake.

    ``is_new``: it is the spec of a new run, which must find what it starts from, and gets the settings of its recipe.
    """
    parsed = parse_spec(raw, fills_recipe=is_new)
    if not isinstance(raw, dict):
        raise with_problems(SpecInvalid, parsed.problems)
    validator = _SpecValidator(parsed, host, is_new)
    problems = [*parsed.problems, *validator.problems()]
    if problems:
        error = with_problems(SpecInvalid, problems)
        outside = any(setting in problem.message for problem in problems for setting in DEFAULT_ROOTS)
        if outside and host.names_roots and host.settings.serves_local_user:
            error.extra["roots"] = _roots_for_user(host.settings)
        raise error
    return validator.resolved()


def validate_fields(raw: object) -> JobSpec:
    """Return a stored spec with changes. Its files and devices are not checked. Raises SpecInvalid."""
    parsed = parse_spec(raw, fills_recipe=False)
    if parsed.problems:
        raise with_problems(SpecInvalid, parsed.problems)
    return parsed.spec


def validate_without_corpus(raw: object, host: HostLimits) -> JobSpec:
    """Return a spec that may lack its corpus and its length, with the vocabulary's size.

    Raises SpecInvalid with every mistake.
    """
    given = raw if isinstance(raw, dict) else {}
    data = given.get("data")
    has_corpus = isinstance(data, dict) and not data.keys().isdisjoint(("data_path", "sources"))
    if not has_corpus and (data is None or isinstance(data, dict)):
        raw = {**given, "data": {**(data or {}), "data_path": PLACEHOLDER}}
    parsed = parse_spec(raw)
    validator = _SpecValidator(parsed, host, is_new=False)
    # What is missing may be added later: the corpus, and the length that a mixture needs. And a model that is too large
    # for this host ("/model") may be meant for another one.
    training = given.get("training")
    has_length = isinstance(training, dict) and "max_steps" in training
    ignored = {"/data/data_path": not has_corpus, "/training/max_steps": not has_length}
    host_problems = [each for each in validator.problems() if each.pointer != "/model"]
    problems = [each for each in (*parsed.problems, *host_problems) if not ignored.get(each.pointer)]
    if problems:
        raise with_problems(SpecInvalid, problems)
    assert validator.vocabulary is not None
    spec = parsed.spec
    return spec.model_copy(update={"model": spec.model.with_vocab_size(validator.vocabulary)})


def _roots_for_user(settings: Settings) -> dict[str, Any]:
    """Return the folders that jobs may use, and the command that starts this service, for the user who started it."""
    return {
        "settings": {
            "TRAINYARD_DATA_ROOTS": [str(root) for root in settings.data_roots],
            "TRAINYARD_SAVE_ROOTS": [str(root) for root in settings.save_roots],
        },
        "command": ["trainyard", "serve", "--home", str(settings.home), "--port", str(settings.port)],
    }


class _SpecValidator:
    # `problems` fills in paths and vocabulary, and `resolved` uses them.
    def __init__(self, parsed: ParsedSpec, host: HostLimits, is_new: bool) -> None:
        self.is_new = is_new
        self.parsed = parsed
        self.spec = parsed.spec
        self.host = host
        self.paths: dict[str, str] = {}
        self.data: dict[str, Any] = {}
        self.tasks: list[TaskSpec] = []
        self.vocabulary: int | None = None

    def problems(self) -> list[Problem]:
        findings = [
            *self._data(),
            *self._tokenizer(),
            *self._weights(),
            *self._tasks(),
            *self._save_dir(),
            *self._launcher(),
            *self._devices(),
            *self._memory(),
        ]
        return [problem for problem, involved in findings if self.parsed.trusts(*involved, *map(_group, involved))]

    def resolved(self) -> JobSpec:
        spec = self.spec
        assert self.vocabulary is not None
        return spec.model_copy(
            update={
                "model": spec.model.with_vocab_size(self.vocabulary),
                "data": spec.data.model_copy(update=self.data | self._resolved_paths("tokenizer_path")),
                "training": spec.training.model_copy(update=self._resolved_paths("from_weight")),
                "checkpoint": spec.checkpoint.model_copy(update=self._resolved_paths("save_dir")),
                "evaluation": spec.evaluation.model_copy(update={"tasks": self.tasks}),
                "resources": spec.resources.model_copy(update={"launcher": SLURM})
                if self.runs_on_slurm
                else spec.resources,
            }
        )

    def _resolved_paths(self, *leaves: str) -> dict[str, str]:
        return {leaf: self.paths[leaf] for leaf in leaves if leaf in self.paths}

    def _data(self) -> Iterator[Finding]:
        data = self.spec.data
        # If the sources are wrong, the parser has put a data_path in their place, which is no mistake of the caller.
        data_path = None if data.data_path == PLACEHOLDER else data.data_path
        for leaf, given in (("data_path", data_path), ("eval_data_path", data.eval_data_path)):
            if given is not None:
                self.data[leaf] = yield from self._corpus(f"/data/{leaf}", given)
        named: dict[str, Sequence[SourceSpec | EvalSourceSpec] | None]
        named = {"sources": data.sources, "eval_sources": data.eval_sources}
        for leaf, sources in named.items():
            if sources is not None:
                self.data[leaf] = []
                for index, source in enumerate(sources):
                    path = yield from self._corpus(f"/data/{leaf}/{index}/path", source.path)
                    self.data[leaf].append(source.model_copy(update={"path": path}))

    def _corpus(self, pointer: str, given: str | list[str]) -> Generator[Finding, None, str | list[str]]:
        """Yield what is wrong with a corpus's path, and return it with its links resolved."""
        if isinstance(given, str):
            path, error = self._corpus_entry(given)
            yield from _at(pointer, error)
            return path
        paths = []
        for index, entry in enumerate(given):
            path, error = self._corpus_entry(entry)
            yield from _at(f"{pointer}/{index}", error)
            paths.append(path)
        return paths

    def _corpus_entry(self, given: str) -> tuple[str, str | None]:
        """Return (the path with its links resolved, what is wrong with it or None)."""
        pattern = is_glob(given)
        base = glob_base(given) if pattern else given
        error = self._resolve_data_path("data_path", base)
        if error is not None:
            return given, error
        path = self.paths["data_path"]
        if pattern:
            path = os.path.join(path, *Path(given).parts[len(Path(base).parts) :])
        elif not os.path.isdir(path):
            return path, _corpus_error(Path(path))
        try:
            return path, self._files_error([file.path for file in expand(path)])
        except CorpusFilesInvalid as invalid:
            return path, invalid.reason_for(path)

    def _files_error(self, files: Sequence[Path]) -> str | None:
        settings = self.host.settings
        outside = outside_files(files, (*settings.data_roots, settings.home))
        if outside is not None:
            return f"holds {shown(outside)}, which leads outside the directories that TRAINYARD_DATA_ROOTS allows"
        for file in files:
            error = _corpus_error(file, may_be_empty=True)
            if error is not None:
                return f"holds {shown(file)}, which {error}"
        return None

    def _tokenizer(self) -> Iterator[Finding]:
        given = self.spec.data.tokenizer_path
        error = None
        if given != BYTE:
            error = self._resolve_data_path("tokenizer_path", given)
        if error is None:
            error = self._read_vocabulary(self.paths.get("tokenizer_path", BYTE))
        yield from _at("/data/tokenizer_path", error)
        size = self.spec.model.vocab_size
        if self.vocabulary is not None and size is not None and size < self.vocabulary:
            message = f"must be at least the tokenizer's size, {self.vocabulary}, or left out"
            yield Problem("/model/vocab_size", message), ("/model/vocab_size", "/data/tokenizer_path")

    def _read_vocabulary(self, path: str) -> str | None:
        try:
            size = vocabulary_size(path, self.host.settings.readable_roots)
        except TokenizerTooLarge as error:
            return f"has a tokenizer.json that is too large: {error.limits}"
        except (TokenizerInvalid, OSError, ArithmeticError):
            return (
                'must be a directory with a readable tokenizer.json, or "byte"; `trainyard tokenizer train` makes one'
            )
        if not 0 < size <= MAX_VOCABULARY:
            return f"must have at most {MAX_VOCABULARY} tokens"
        self.vocabulary = size
        return None

    def _weights(self) -> Iterator[Finding]:
        given = self.spec.training.from_weight
        if given is None:
            return
        if not ("/" in given or given.endswith(WEIGHT_ENDINGS)):
            if self.is_new:
                yield from self._named_weights(given)
            return
        error = self._resolve_data_path("from_weight", given)
        if error is None and not _has_weights(Path(self.paths["from_weight"])):
            error = "must be a file of weights, or a Hugging Face directory with a model.safetensors"
        yield from _at("/training/from_weight", error)

    def _named_weights(self, stem: str) -> Iterator[Finding]:
        # MiniMind's bare name. Only the names of files are read, and only below the folder that is checked itself.
        model, save_dir = self.spec.model, self.spec.checkpoint.save_dir
        folder = Path(save_dir) if save_dir is not None else self.host.settings.runs
        if save_dir is not None and outside_reason(save_dir, self._save_roots(), content=False) is not None:
            return  # reported for save_dir
        name = weights_name(stem, model.hidden_size, model.use_moe)
        if not find_named_weights(folder, name):
            where = "save_dir" if save_dir is not None else "the runs of this service, and save_dir is not given"
            moe = "_moe" if model.use_moe else ""
            message = f"names no weights: there is no file of that name with _{model.hidden_size}{moe}.pth"
            pointers = ("/training/from_weight", "/checkpoint/save_dir", "/model/hidden_size", "/model/use_moe")
            yield Problem("/training/from_weight", f"{message} in {where}, nor below its jobs"), pointers

    def _tasks(self) -> Iterator[Finding]:
        self.tasks = yield from check_tasks(self.spec.evaluation.tasks, "/evaluation/tasks", self.host)

    def _save_roots(self) -> tuple[Path, ...]:
        return (*self.host.settings.save_roots, self.host.settings.home)

    def _save_dir(self) -> Iterator[Finding]:
        given = self.spec.checkpoint.save_dir
        if given is None:
            return
        error = self._resolve("save_dir", given, self._save_roots(), "TRAINYARD_SAVE_ROOTS")
        yield from _at("/checkpoint/save_dir", error or _write_error(Path(self.paths["save_dir"])))

    def _launcher(self) -> Iterator[Finding]:
        resources, settings = self.spec.resources, self.host.settings
        if self.runs_on_slurm:
            yield from self._slurm_options()
        elif resources.launcher is None and resources.max_nodes > 1:
            message = 'must be 1 on this host; "launcher": "slurm" runs on several nodes'
            yield Problem("/resources/nnodes", message), ("/resources/nnodes", "/resources/launcher")
        if resources.launcher == SLURM and settings.slurm is None:
            yield from _at("/resources/launcher", 'must be "local": this service is not set up for Slurm')

    @property
    def runs_on_slurm(self) -> bool:
        return (self.spec.resources.launcher or self.host.settings.launcher) == SLURM

    def _slurm_options(self) -> Iterator[Finding]:
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

    def _devices(self) -> Iterator[Finding]:
        if self.runs_on_slurm:
            return
        device, ranks = self.spec.resources.device, self.spec.resources.nproc_per_node
        kind = kind_for(device, self.host.devices)
        available = count_by_kind(self.host.devices, kind)
        if kind.startswith("cuda") and available == 0:
            missing = "there is no GPU" if kind == "cuda" else "there is no such device"
            message = (
                f'asks for CUDA, and {missing} on this host: `trainyard doctor` checks the driver; "auto" takes any'
            )
            yield from _at("/resources/device", message)
        elif ranks > available:
            unit = {"cpu": "CPU slots", "cuda": "GPUs"}.get(kind, "device of that name")
            message = f"must be at most {available}: this host has {available} {unit}"
            yield Problem("/resources/nproc_per_node", message), ("/resources/nproc_per_node", "/resources/device")

    def _memory(self) -> Iterator[Finding]:
        # Only the part that no other batch size would change; the rest is an estimate, of which the plan warns.
        kind = kind_for(self.spec.resources.device, self.host.devices)
        limit = memory_limit(kind, self.host.devices)
        size = max(self.spec.model.vocab_size or 0, self.vocabulary or 0)
        if self.runs_on_slurm or limit is None or not size:
            return
        # It may be less than the tokenizer has, which is another mistake.
        whole = memory.with_settings(self.spec, {"model": {"vocab_size": size}})
        needed = memory.state_bytes(whole, kind)
        if needed > limit:
            split = [memory.with_settings(whole, {"resources": {"parallelism": name}}) for name in ("zero1", "fsdp")]
            fitting = (each.resources.parallelism for each in split if memory.state_bytes(each, kind) <= limit)
            parallelism = next(fitting, None)
            whose = "this host" if kind == "cpu" else "the device"
            message = (
                f"needs {needed / 1e9:,.1f} GB for weights, gradients and the optimizer alone, and {whose} has "
                f"{limit / 1e9:,.1f} GB: "
                + (f"set resources.parallelism to {parallelism}" if parallelism is not None else "take a smaller model")
            )
            involved = ("/model", "/resources/nproc_per_node", "/resources/device", "/resources/parallelism")
            yield Problem("/model", message), involved

    def _resolve_data_path(self, leaf: str, given: str) -> str | None:
        settings = self.host.settings
        return self._resolve(leaf, given, settings.readable_roots, "TRAINYARD_DATA_ROOTS")

    def _resolve(self, leaf: str, given: str, roots: Sequence[Path], setting: str) -> str | None:
        """Put the real path into ``paths`` and return None, or return why the path is not allowed."""
        path, error = resolve_path(given, roots, setting, self.host, content=leaf in DIRECTORY_FIELDS)
        if error is None:
            self.paths[leaf] = path
        return error


def resolve_path(
    given: str, roots: Sequence[Path], setting: str, host: HostLimits, *, content: bool
) -> tuple[str, str | None]:
    """Return the real path, and why it is not allowed or None. ``content``: see `outside_reason`."""
    if not given.startswith("/"):
        # The service's own working directory means nothing to a client.
        return given, f"must be absolute{'' if not host.names_roots else f', below {_any_of(roots)} ({setting})'}"
    error = outside_reason(given, roots, content=content)
    if error is not None:
        which = f": {_any_of(roots)}" if host.names_roots else f"; {DEFAULT_ROOTS[setting]}"
        return given, f"{error} the directories that {setting} allows{which}"
    return str(Path(given).resolve()), None


def check_tasks(tasks: Sequence[TaskSpec], pointer: str, host: HostLimits) -> Generator[Finding, None, list[TaskSpec]]:
    """Yield what is wrong with the files of the tasks, bad lines included; return the tasks with real paths.

    Reads MAX_TASK_BYTES at most over all files. The worker checks every file again.
    """
    checked, unread = [], MAX_TASK_BYTES
    for index, task in enumerate(tasks):
        roots = host.settings.readable_roots
        path, error = resolve_path(task.path, roots, "TRAINYARD_DATA_ROOTS", host, content=False)
        if error is None:
            error = _corpus_error(Path(path))
        if error is None and (size := os.path.getsize(path)) <= unread:
            unread -= size
            error = _task_file_error(path, task, roots)
        yield from _at(f"{pointer}/{index}/path", error)
        checked.append(task.model_copy(update={"path": path}))
    return checked


def _task_file_error(path: str, task: TaskSpec, roots: Sequence[Path]) -> str | None:
    try:
        read_task_file(path, task.kind, roots)
    except TaskFileInvalid as error:
        return error.reason
    except OSError as error:
        return f"cannot be read by the service: {error.strerror}"
    return None


def _any_of(roots: Sequence[Path]) -> str:
    return " or ".join(dict.fromkeys(map(str, roots)))


def _group(pointer: str) -> str:
    # ``/data`` of ``/data/data_path``: a group that is wrong as a whole was reported as a whole.
    return pointer.rpartition("/")[0]


def _at(pointer: str, error: str | None) -> Iterator[Finding]:
    if error is not None:
        yield Problem(pointer, error), (pointer,)


def _corpus_error(path: Path, *, may_be_empty: bool = False) -> str | None:
    # Does not open the file: a FIFO would hang, and a device would never end.
    try:
        info = path.stat()
    except (OSError, ValueError):
        return "does not exist or cannot be reached"
    if not stat.S_ISREG(info.st_mode):
        return "must be a regular file"
    if not os.access(path, os.R_OK):
        return "cannot be read by the service"
    return "is empty" if info.st_size == 0 and not may_be_empty else None


def _has_weights(path: Path) -> bool:
    # A file, or a Hugging Face directory with one file or with an index of several.
    try:
        return any(p.is_file() for p in (path, path / "model.safetensors", path / "model.safetensors.index.json"))
    except OSError:
        return False


def _write_error(path: Path) -> str | None:
    try:
        nearest = next(p for p in (path, *path.parents) if p.exists())
    except OSError:
        return "cannot be reached"
    if not nearest.is_dir():
        return "must be a directory"
    return None if os.access(nearest, os.W_OK | os.X_OK) else "cannot be written by the service"
