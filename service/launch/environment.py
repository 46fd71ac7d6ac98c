"""The environment variables of an attempt's agent, for every launcher."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import trainyard
from trainyard.contract.allowed_paths import format_roots
from trainyard.contract.processes import MARKER
from trainyard.contract.rundir import read_json
from trainyard.service.launch.base import Launch

# The folder that `trainyard` is imported from: `src` in a checkout, site-packages otherwise.
IMPORT_ROOT = str(Path(trainyard.__file__).resolve().parents[1])

# The agent's command, all that the service knows of the worker. -P: a folder `trainyard/` in the service's working
# directory must not be imported.
WORKER_AGENT = (sys.executable, "-P", "-m", "trainyard.worker.agent")

SERVICE_FILE_VARIABLE = "TRAINYARD_SERVICE_FILE"

INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "XDG_CACHE_HOME"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV"),
    # The compiler of `use_compile`.
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CPATH", "LIBRARY_PATH"),
    *("RAYON_NUM_THREADS", "TRAINYARD_THREADS"),
    # Trackers connect to servers outside.
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
"""Names of the variables that a worker inherits. All others, such as the service's secrets, do not reach it.

The list is documented in docs/reference/settings.md; a test compares both.
"""

INHERITED_PREFIXES = (
    "LC_",
    *("CUDA_", "CUBLAS_", "CUBLASLT_", "CUDNN_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_"),
    *("TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_"),
    *("OMP_", "GOMP_", "MKL_", "KMP_", "OPENBLAS_", "MALLOC_"),
    *("WANDB_", "SWANLAB_", "TRACKIO_", "HF_", "TOKENIZERS_"),
)


class WorkerEnvironment:
    """Builds the environment of an attempt's agent. ``home`` is the service's home directory."""

    def __init__(
        self, home: Path, corpus_cache: Path, data_roots: Sequence[Path] = (), save_roots: Sequence[Path] = ()
    ) -> None:
        self._home = home
        # The home is always included: an empty list means no limits to the worker.
        self._roots = roots_environment((*data_roots, home), (*save_roots, home))
        self._corpus_cache = corpus_cache

    @property
    def service_file(self) -> Path:
        """The file with the URL of the running service."""
        return self._home / "service.json"

    def of(self, launch: Launch) -> dict[str, str]:
        """Return all variables of ``launch``'s agent except those that select its devices."""
        service = read_json(self.service_file) or {}
        return {
            **inherited(dict(os.environ)),
            # Makes `trainyard` importable in a checkout that is not installed.
            "PYTHONPATH": IMPORT_ROOT,
            MARKER: str(launch.name),
            "TRAINYARD_CORPUS_CACHE": str(self._corpus_cache),
            # The worker checks each path again: a link may have changed since the spec was accepted.
            **self._roots,
            # The service reads the files of a preparation, which has no token to report with.
            "TRAINYARD_REPORT_URL": str(service.get("url", "")) if launch.task is None else "",
            SERVICE_FILE_VARIABLE: str(self.service_file),
            "TRAINYARD_ATTEMPT_ID": launch.attempt_id,
            "TRAINYARD_ATTEMPT_TOKEN": launch.token,
        }


def roots_environment(data_roots: Sequence[Path], save_roots: Sequence[Path]) -> dict[str, str]:
    """Return the variables that tell a worker below which directories it may read and write."""
    roots = {"TRAINYARD_DATA_ROOTS": data_roots, "TRAINYARD_SAVE_ROOTS": save_roots}
    return {name: format_roots(paths) for name, paths in roots.items() if paths}


def inherited(environment: dict[str, str]) -> dict[str, str]:
    """Return the part of ``environment`` that a worker inherits."""
    return {
        name: value for name, value in environment.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)
    }
