"""Expected throughput without an earlier run: from the speed of a matrix product, measured once on this host."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from trainyard.contract.rundir import read_json, write_json
from trainyard.contract.spec import JobSpec
from trainyard.model.costs import flops_per_token
from trainyard.service.devices.inventory import Device, cuda_visible

MODULE = "trainyard.worker.matrix_speed"
EFFICIENCY = 0.3
"""Share of the speed of a matrix product that a run is assumed to reach. Small models reach less, large ones more."""

TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class MatrixEstimate:
    """``flops``: FLOP/s of a matrix product on one device."""

    tokens_per_second: float
    flops: float

    def __str__(self) -> str:
        return (
            f"a matrix product of one second ({self.flops / 1e9:,.0f} GFLOP/s), of which a run is expected to reach "
            f"{100 * EFFICIENCY:.0f} %; the first run gives a better estimate"
        )


@dataclass
class MatrixSpeed:
    """Measures in a separate process, because the service has no torch. Results are kept in the home.

    ``wait_seconds``: how long a plan waits for a measurement. After that the plan has no expected time, and the
    measurement continues for a later plan.
    """

    home: Path
    wait_seconds: float = 2.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _measuring: threading.Lock = field(default_factory=threading.Lock)
    _failed: set[str] = field(default_factory=set)
    _threads: dict[str, threading.Thread] = field(default_factory=dict)

    def estimate(
        self, spec: JobSpec, kind: str, attention_length: float, device: Device | None = None
    ) -> MatrixEstimate | None:
        """Return the expected throughput on devices of a kind, or None if their speed is not known, or not yet.

        ``attention_length``: tokens that a token attends to, see `model.costs.flops_per_token`. ``device``: the one to
        measure, which must be free.

        The first call for a kind takes up to ``wait_seconds``. Do not call it in a transaction.
        """
        flops = self._flops(kind, spec.training.dtype, device)
        if flops is None:
            return None
        # A product on the CPU uses all cores, which the ranks share.
        devices = 1 if kind == "cpu" else spec.resources.ranks
        per_token = flops_per_token(spec.model, attention_length)
        return MatrixEstimate(EFFICIENCY * flops * devices / per_token, flops)

    def bfloat16_on_cpu(self, spec: JobSpec, kind: str) -> tuple[float, float] | None:
        """Return the FLOP/s of a product in bfloat16 and in float32 for a run in bfloat16 on the CPU, else None.

        Also None if they are not known yet. A CPU without AMX or AVX512-BF16 emulates bfloat16, slower than float32.
        """
        if kind != "cpu" or spec.training.dtype != "bfloat16":
            return None
        # Without waiting: this plan has waited for its own type, and a later plan has the advice.
        own, other = (self._flops(kind, dtype, None, wait_seconds=0.0) for dtype in ("bfloat16", "float32"))
        return (own, other) if own is not None and other is not None else None

    def _flops(self, kind: str, dtype: str, device: Device | None, wait_seconds: float | None = None) -> float | None:
        name, file = f"{kind} {dtype}", self.home / "cache" / "matrix-speed.json"
        with self._lock:
            known = self._known(file)
            if name in known or name in self._failed:
                return known.get(name)
            thread = self._threads.get(name)
            if thread is None:
                visible = cuda_visible([device.id], [device]) if device is not None else ""
                thread = threading.Thread(
                    target=self._measure, args=(kind.partition(":")[0], visible, dtype, name, file), daemon=True
                )
                self._threads[name] = thread
                thread.start()
        thread.join(self.wait_seconds if wait_seconds is None else wait_seconds)
        return self._known(file).get(name)

    def _measure(self, kind: str, visible: str, dtype: str, name: str, file: Path) -> None:
        try:
            with self._measuring:  # two measurements at once would slow each other down
                measured = _measure(kind, visible, dtype)
        except subprocess.TimeoutExpired:
            with self._lock:
                del self._threads[name]  # the host was busy: a later plan measures again
            return
        with self._lock:
            if measured is None:
                self._failed.add(name)
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**self._known(file), name: measured})

    @staticmethod
    def _known(file: Path) -> dict[str, float]:
        try:
            content = read_json(file)
        except (OSError, ValueError):
            return {}
        entries = content.items() if isinstance(content, dict) else ()
        return {name: float(flops) for name, flops in entries if isinstance(flops, int | float) and flops > 0}


def _measure(kind: str, visible: str, dtype: str) -> float | None:
    environment = dict(os.environ)
    if visible:
        # Not CUDA's first device: a run may use all of its memory.
        environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-m", MODULE, kind, dtype]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT_SECONDS, check=True)
        return float(done.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None  # without torch, for example
