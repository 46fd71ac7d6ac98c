"""The processes that generate text: one for each checkpoint, kept for a while after its last request.

Their number and memory are limited by the settings. If a checkpoint needs room, the idle process that was used least
recently ends; if none is idle, the request is rejected with Retry-After, as it is if too many requests wait.
"""

import asyncio
import contextlib
import importlib.util
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainyard.contract.generation import GenerationTask
from trainyard.contract.parsing import Problem
from trainyard.contract.rundir import MODEL_FILE
from trainyard.contract.sidecar import MAX_MESSAGE_BYTES, encode_message
from trainyard.service.devices.memory import host_memory
from trainyard.service.errors import (
    CheckpointNotFound,
    DeviceReclaimed,
    GenerationBusy,
    GenerationEnded,
    GenerationFailed,
    GenerationUnavailable,
    ModelTooLarge,
    RequestInvalid,
    ServiceStopping,
    TooManyGenerations,
    with_problems,
)
from trainyard.service.ids import new_id
from trainyard.service.settings import Settings
from trainyard.service.sidecars.sidecars import Sidecar, Sidecars
from trainyard.service.storage.checkpoint_files import read_manifest

PROGRAM = ("-m", "trainyard.worker.generation")
MAX_REQUESTS = 64
"""Requests that are computed or wait at once. Each holds a connection."""

BASE_BYTES = 512 << 20
"""Memory of a process before it loads a checkpoint: Python and torch."""

MIN_CACHE_BYTES = 256 << 20
SILENT_SECONDS = 120.0
"""A process that computes and sends nothing for so long hangs."""

WATCH_SECONDS = 1.0

WAITING_SECONDS = 5.0

Lines = asyncio.Queue[dict[str, Any] | None]
"""Lines of one task from its process; None: the process has ended."""

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint to generate with. ``sha256``: of its weights, because a rewound run may write its step again."""

    path: Path
    sha256: str
    bytes: int
    tokenizer: str

    @classmethod
    def of(cls, path: Path, tokenizer: str, roots: tuple[Path, ...]) -> "LoadedCheckpoint":
        """Read the manifest of the checkpoint ``path``. Raises CheckpointNotFound."""
        manifest = read_manifest(path, roots)
        if manifest is None or MODEL_FILE not in manifest:
            raise CheckpointNotFound()
        return cls(path, manifest[MODEL_FILE].sha256, manifest[MODEL_FILE].bytes, tokenizer)

    @property
    def cache_bytes(self) -> int:
        """Memory for keys and values."""
        return max(MIN_CACHE_BYTES, self.bytes // 2)

    @property
    def memory_bytes(self) -> int:
        """Memory of its process. The cache counts twice: it is copied when it grows."""
        return BASE_BYTES + self.bytes + 2 * self.cache_bytes


class Generation:
    """A request to a process. Iterate over `events`, and call `close` at the end in any case."""

    def __init__(self, process: "_Process", task: GenerationTask, lines: "Lines") -> None:
        self.task = task
        self.prompt_tokens = 0
        self.chat_template = False
        self._process = process
        self._lines = lines
        self._open = True
        self._done = False
        self.on_close: Callable[[], None] = lambda: None

    @property
    def device(self) -> str:
        return self._process.device

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the lines ``text`` and ``finished`` of the task, until all its choices have ended.

        If there is none for some seconds, the line ``waiting`` is yielded. Raises DeviceReclaimed, GenerationEnded,
        GenerationFailed or ServiceStopping.
        """
        left = max(1, len(self.task.prompts)) * self.task.n
        while left:
            try:
                line = await asyncio.wait_for(self._next(), WAITING_SECONDS)
            except TimeoutError:
                yield {"event": "waiting"}
                continue
            if line["event"] == "error":
                raise GenerationFailed(f"{line['message'][:1].upper()}{line['message'][1:]}.")
            left -= line["event"] == "finished"
            self._done = left == 0
            yield line

    async def accepted(self) -> None:
        """Wait until the process has accepted the task. Raises what `events` raises, and RequestInvalid."""
        line = await self._next()
        if line["event"] == "rejected":
            raise with_problems(RequestInvalid, [Problem(line["pointer"], line["message"])])
        self.prompt_tokens = sum(line["prompt_tokens"])
        self.chat_template = line["chat_template"]

    async def _next(self) -> dict[str, Any]:
        line = await self._lines.get()
        if line is None:
            self._lines.put_nowait(None)
            raise self._process.why_ended()
        return line

    def close(self) -> None:
        """Free the place of the request. If it is not done, the process gives it up."""
        if self._open:
            self._open = False
            self._process.forget(self.task.id, give_up=not self._done)
            self.on_close()


class _Process:
    """The process of one checkpoint."""

    def __init__(self, pool: "GenerationPool", checkpoint: LoadedCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.ready = asyncio.Event()
        """Set when the checkpoint is loaded, or the process has ended."""
        self.failure: str | None = None
        self.used_at = self.heard_at = time.monotonic()
        self.stopping = False
        self._pool = pool
        self._requests: dict[str, Lines] = {}
        self._sidecar: Sidecar | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ended = False
        self.run_task = asyncio.create_task(self._run())

    @property
    def device(self) -> str:
        return self._sidecar.device if self._sidecar is not None else ""

    @property
    def idle(self) -> bool:
        return not self._requests and self.ready.is_set()

    @property
    def silent_seconds(self) -> float:
        """Seconds without a line although it loads or computes."""
        return 0.0 if self.idle else time.monotonic() - self.heard_at

    def add(self, task: GenerationTask) -> Generation:
        """Register a request. `send` follows when the process is ready."""
        lines = Lines()
        if not self._requests:
            self.heard_at = max(self.heard_at, time.monotonic())
        self._requests[task.id] = lines
        if self._ended:
            lines.put_nowait(None)
        return Generation(self, task, lines)

    async def send(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self._ended:
            with contextlib.suppress(OSError):
                self._writer.write(encode_message(message))
                await self._writer.drain()

    def forget(self, task_id: str, give_up: bool) -> None:
        """Remove a request. ``give_up``: it is not done, and the process is to give it up."""
        if self._requests.pop(task_id, None) is None:
            return
        self.used_at = time.monotonic()
        if give_up and self._writer is not None and not self._ended:
            self._writer.write(encode_message({"cancel": task_id}))

    def why_ended(self) -> Exception:
        if self.stopping:
            return ServiceStopping()
        if self.failure is not None and not self.checkpoint.path.is_dir():
            return CheckpointNotFound("The checkpoint was deleted while it was loaded.")
        if self.failure is not None:
            return GenerationFailed(f"{self.failure[:1].upper()}{self.failure[1:]}.")
        if self._sidecar is not None and self._sidecar.reclaimed:
            return DeviceReclaimed()
        return GenerationEnded()

    def kill(self) -> None:
        if self._sidecar is not None:
            self._sidecar.kill()

    async def _run(self) -> None:
        try:
            self._sidecar = await asyncio.to_thread(self._start)
            if self.stopping:
                self._sidecar.kill()
            # From now on the stream owns the socket.
            reader, self._writer = await asyncio.open_connection(sock=self._sidecar.connection, limit=MAX_MESSAGE_BYTES)
            with contextlib.suppress(OSError, ValueError):
                while line := await reader.readline():
                    self._receive(json.loads(line))
        except OSError as error:
            self.failure = f"the process could not be started: {error.strerror or error}"
            log.warning("generation: %s", self.failure)
        finally:
            self._end()

    def _start(self) -> Sidecar:
        checkpoint = self.checkpoint
        arguments = (str(checkpoint.path), "--tokenizer", checkpoint.tokenizer)
        command = (*PROGRAM, *arguments, "--cache-bytes", str(checkpoint.cache_bytes))
        use_gpu = self._pool.settings.generation_device == "auto"
        return self._pool.sidecars.start("generation", command, use_gpu)

    def _receive(self, line: dict[str, Any]) -> None:
        self.heard_at = time.monotonic()
        match line["event"]:
            case "ready":
                self.used_at = self.heard_at
                self.ready.set()
            case "failed":
                self.failure = line["message"]
            case "beat":
                pass
            case _ if line["id"] in self._requests:
                self._requests[line["id"]].put_nowait(line)

    def _end(self) -> None:
        self._ended = True
        self._pool.remove(self)
        self.kill()
        if self._writer is not None:
            self._writer.close()
        self.ready.set()
        for lines in self._requests.values():
            lines.put_nowait(None)


class GenerationPool:
    """The processes that generate, by checkpoint. All methods but `stop` belong to the event loop of the service."""

    def __init__(self, sidecars: Sidecars, settings: Settings) -> None:
        self.sidecars = sidecars
        self.settings = settings
        self._processes: dict[LoadedCheckpoint, _Process] = {}
        self._ending: set[_Process] = set()
        self._requests = 0
        self._watch: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False

    async def open(self, checkpoint: LoadedCheckpoint, **options: Any) -> Generation:
        """Return a request that a process has accepted. ``options``: the fields of `GenerationTask`.

        Raises what `Generation.events` raises, and RequestInvalid, TooManyGenerations, GenerationBusy, ModelTooLarge
        or GenerationUnavailable.
        """
        self._require_available()
        if self._requests >= MAX_REQUESTS:
            raise TooManyGenerations()
        self._requests += 1
        try:
            generation = await self._accepted(checkpoint, GenerationTask(id=new_id("gen", 16), **options))
        except BaseException:
            self._requests -= 1
            raise
        generation.on_close = self._closed
        return generation

    def _closed(self) -> None:
        self._requests -= 1

    async def _accepted(self, checkpoint: LoadedCheckpoint, task: GenerationTask) -> Generation:
        # If a job needs the device before the task is accepted, the task goes to another process.
        while True:
            process = self._process_of(checkpoint)
            generation = process.add(task)
            try:
                await process.ready.wait()
                await process.send(task.model_dump())
                await generation.accepted()
                return generation
            except DeviceReclaimed:
                generation.close()
            except BaseException:
                generation.close()
                raise

    def _process_of(self, checkpoint: LoadedCheckpoint) -> _Process:
        if self._stopping:
            raise ServiceStopping()
        process = self._processes.get(checkpoint)
        if process is None:
            self._make_room(checkpoint)
            process = self._processes[checkpoint] = _Process(self, checkpoint)
            self._loop = asyncio.get_running_loop()
            if self._watch is None:
                self._watch = asyncio.create_task(self._watch_processes())
        return process

    def _require_available(self) -> None:
        if self.settings.generation_processes == 0:
            raise GenerationUnavailable("Generation is switched off: TRAINYARD_GENERATION_PROCESSES is 0.")
        if importlib.util.find_spec("torch") is None or importlib.util.find_spec("safetensors") is None:
            raise GenerationUnavailable()

    def _make_room(self, checkpoint: LoadedCheckpoint) -> None:
        """End idle processes until one more is within the limits. Raises GenerationBusy or ModelTooLarge."""
        limit = self.settings.generation_bytes or (host_memory() or 4 << 30) // 4
        needed = checkpoint.memory_bytes
        if needed > limit:
            numbers = f"It needs {needed:,} bytes of memory, and {limit:,} are allowed (TRAINYARD_GENERATION_BYTES)."
            raise ModelTooLarge(f"{(ModelTooLarge.__doc__ or '').strip()} {numbers}")
        idle = sorted((one for one in self._processes.values() if one.idle), key=lambda process: process.used_at)
        while len(self._processes) >= self.settings.generation_processes or self._used_bytes() + needed > limit:
            if not idle:
                raise GenerationBusy()
            self._retire(idle.pop(0))

    def _used_bytes(self) -> int:
        return sum(process.checkpoint.memory_bytes for process in self._processes.values())

    def _retire(self, process: _Process) -> None:
        self._processes.pop(process.checkpoint, None)
        self._ending.add(process)
        process.kill()

    def remove(self, process: _Process) -> None:
        """Forget a process that has ended."""
        self._ending.discard(process)
        if self._processes.get(process.checkpoint) is process:
            del self._processes[process.checkpoint]

    async def _watch_processes(self) -> None:
        """End processes that are idle for long, that hang, or whose checkpoint is gone."""
        while self._processes:
            await asyncio.sleep(WATCH_SECONDS)
            for process in list(self._processes.values()):
                if process.silent_seconds > SILENT_SECONDS:
                    log.warning("a process that generates has sent nothing for %d s: it is ended", SILENT_SECONDS)
                    self._retire(process)
                elif process.idle and await self._is_unwanted(process) and process.idle:
                    self._retire(process)
        self._watch = None

    async def _is_unwanted(self, process: _Process) -> bool:
        unused = time.monotonic() - process.used_at
        return unused > self.settings.generation_idle_seconds or not await asyncio.to_thread(
            process.checkpoint.path.is_dir
        )

    @property
    def processes(self) -> int:
        """Number of processes, also of those that are ending."""
        return len(self._processes) + len(self._ending)

    @property
    def requests(self) -> int:
        """Number of requests that are computed or wait."""
        return self._requests

    def stop(self) -> None:
        """End all processes and requests soon. Thread-safe."""
        self._stopping = True
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._stop_all)

    async def close(self) -> None:
        """End all processes, and wait for their end."""
        self._stopping = True
        self._stop_all()
        if self._loop is asyncio.get_running_loop():
            if self._watch is not None:
                self._watch.cancel()
            running = [process.run_task for process in (*self._processes.values(), *self._ending)]
            await asyncio.gather(*running, return_exceptions=True)

    def _stop_all(self) -> None:
        for process in (*self._processes.values(), *self._ending):
            process.stopping = True
            process.kill()
