"""Looking at what the service promises, instead of believing it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contract.rundir import ProductDir, read_json


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def damaged_files(checkpoint: Path) -> list[str]:
    """Names in the checkpoint's manifest whose file is missing or has other bytes; [] means it is whole."""
    manifest: dict[str, Any] = read_json(checkpoint / "manifest.json") or {"files": {"manifest.json": {}}}
    return [name for name, told in manifest["files"].items() if not _as_told(checkpoint / name, told)]


def _as_told(file: Path, told: dict[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == told.get("bytes") and sha256(file) == told.get("sha256")


def done_twice(before: list[Any], after: list[Any]) -> list[tuple[int, float, float]]:
    """(step, loss before, loss after) for the steps that two attempts both made."""
    first = {point["step"]: point["loss"] for point in before}
    return [(point["step"], first[point["step"]], point["loss"]) for point in after if point["step"] in first]


def weights_of(job: Mapping[str, Any], checkpoint: Path) -> Path:
    """The weights file of the job that wrote ``checkpoint``. OSError where it is not there."""
    spec = job["spec"]
    model, stem = spec["model"], spec["checkpoint"]["save_weight"]
    file = ProductDir(checkpoint.parent.parent).weights(stem, model["hidden_size"], model["use_moe"])
    if not file.is_file():
        raise FileNotFoundError(f"there is no weights file {file}")
    return file
