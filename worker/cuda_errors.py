"""Advice for errors of CUDA, by their text. Does not import torch: the agent and the doctor import this module."""

import re

EXCEPTION = re.compile(r"^(?:\S+: )?[\w.]+(?:Error|Exception)\b")
"""The first line of an exception's text, such as `torch.AcceleratorError: CUDA error: ...`."""

NO_GPU = ("found no nvidia driver", "no cuda gpus are available")
"""Parts of torch's errors on a host without a GPU, or if all GPUs are hidden."""

CHECK_GPU = (
    "If it happens again on this GPU, look for XID errors (`dmesg`) and ECC errors (`nvidia-smi -q -d ECC`), and leave "
    "it out: TRAINYARD_EXCLUDE_DEVICES."
)

ADVICE: tuple[tuple[str, str], ...] = (
    (
        "driver on your system is too old",
        "Update the NVIDIA driver, or install the build of torch for the CUDA version that this driver supports.",
    ),
    (
        "system not yet initialized",
        "Start the fabric manager, in the driver's version: `systemctl start nvidia-fabricmanager`.",
    ),
    (
        "unsupported display driver",
        "The driver was updated, and its older kernel module is still loaded: restart the host, or reload the module.",
    ),
    (
        "forward compatibility was attempted",
        "Remove CUDA's compatibility libraries (cuda-compat) from LD_LIBRARY_PATH, or update the NVIDIA driver.",
    ),
    (
        "cuda unknown error",
        "Load nvidia_uvm: `nvidia-modprobe -u -c=0`, after `rmmod nvidia_uvm` if it is loaded. Or restart the host.",
    ),
    (
        "busy or unavailable",
        "End the other process that uses the GPU, or set its compute mode to the default: `nvidia-smi -c 0`.",
    ),
    (
        "no kernel image is available",
        "This build of torch has no kernels for the GPU: install one that has (`torch.cuda.get_arch_list()`).",
    ),
    ("found no nvidia driver", "Install the NVIDIA driver; in a container, start it with --gpus all."),
    (
        "no cuda gpus are available",
        "Check that `nvidia-smi` lists the GPU, that this user may open /dev/nvidia*, and CUDA_VISIBLE_DEVICES.",
    ),
    (
        "built for cpus",
        "If this host has a GPU, install the CUDA build of torch with pip, or by `make setup TORCH=cuda`.",
    ),
    ("driver initialization failed", "Run `nvidia-smi`, then reload the NVIDIA driver or restart the host."),
    *((text, CHECK_GPU) for text in ("illegal memory access", "uncorrectable", "unspecified launch failure")),
)
"""(part of an error's text in lower case, what to do)"""


def cuda_advice(text: str) -> str | None:
    """Return what to do about an error of CUDA with this text, or None if it is another error."""
    return next((advice for part, advice in ADVICE if part in text.lower()), None)


def is_missing_gpu(text: str) -> bool:
    """Return whether an error of CUDA only reports that there is no GPU, or that all are hidden."""
    return not text or any(part in text.lower() for part in NO_GPU)


def short_cuda_error(text: str) -> str:
    """Return the first line of torch's message without its guesses and links: ``Error 802: system not yet ...``."""
    line = next(iter(text.strip().splitlines()), "no message")
    return (
        line.rpartition("already set an error? ")[2]
        .partition(" Please ")[0]
        .partition(" - this may be ")[0]
        .rstrip(".")
    )


def error_line(text: str) -> str:
    """Return the line of a program's output that has its last exception, else its last line, "" if there is none."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return next((line for line in reversed(lines) if EXCEPTION.match(line)), lines[-1] if lines else "")
