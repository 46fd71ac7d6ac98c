"""What the agents of all launchers get of the service's environment, and what is added for them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import trainyard
from trainyard.contract.processes import MARKER
from trainyard.contract.rundir import read_json
from trainyard.service.launch.base import Launch

IMPORT_ROOT = str(Path(trainyard.__file__).resolve().parents[1])
"""The folder that `trainyard` is imported from: `src` in a checkout, site-packages otherwise."""

WORKER_AGENT = (sys.executable, "-P", "-m", "trainyard.worker.agent")
"""All that the service knows of the worker. -P: a folder named worker/ where the service was started is not ours."""

INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)
INHERITED_PREFIXES = (
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "PYTORCH_",
    "OMP_",
    "GOMP_",
    "MKL_",
    "KMP_",
    "WANDB_",
    "HF_",
)
"""Environment variables that reach a worker. All others, the service's secrets among them, stay here."""


class WorkerEnvironment:
    """Makes the environment of an attempt's agent. ``home``: where the service keeps its runs."""

    def __init__(
        self, home: Path, corpus_cache: Path, data_roots: Sequence[Path] = (), save_roots: Sequence[Path] = ()
    ) -> None:
        self._home = home
        # The home is always among them, so that neither list is empty: to the worker an empty one means no limits.
        self._roots = {
            "TRAINYARD_DATA_ROOTS": (*data_roots, home),
            "TRAINYARD_SAVE_ROOTS": (*save_roots, home),
        }
        self._corpus_cache = corpus_cache

    def of(self, launch: Launch) -> dict[str, str]:
        """All variables of ``launch``'s agent, but those that say which devices it has."""
        service = read_json(self._home / "service.json") or {}
        return {
            **inherited(dict(os.environ)),
            # The worker is found where the service's own code is, installed or not.
            "PYTHONPATH": IMPORT_ROOT,
            MARKER: str(launch.name),
            "TRAINYARD_CORPUS_CACHE": str(self._corpus_cache),
            # The worker looks again at each path: a link may have been changed since the spec was accepted.
            **{name: ":".join(map(str, roots)) for name, roots in self._roots.items()},
            "TRAINYARD_REPORT_URL": str(service.get("url", "")),
            "TRAINYARD_SERVICE_FILE": str(self._home / "service.json"),
            "TRAINYARD_ATTEMPT_ID": launch.attempt_id,
            "TRAINYARD_ATTEMPT_TOKEN": launch.token,
        }


def inherited(environment: dict[str, str]) -> dict[str, str]:
    """The part of the service's environment that a worker gets."""
    return {
        name: value for name, value in environment.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)
    }
