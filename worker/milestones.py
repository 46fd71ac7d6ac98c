"""Milestones: of a checkpoint that is to be kept for good, only the weights are, once newer ones can be resumed from.

``checkpoints/step-00010000-weights/`` holds model.safetensors, state.json and a manifest. No resume ever picks it.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from contract.failpoints import failpoint
from contract.rundir import ProductDir, fsync_directory
from worker.checkpoint import MANIFEST, MODEL, SAVING, STATE, Saved, manifest_of
from worker.tensorfile import Written, write_blocks

KEPT = (MODEL, STATE)


def keep_weights(products: ProductDir, step: int, full: Path) -> Saved:
    """Publish the weights of the full checkpoint ``full`` as a milestone. Raises OSError, ValueError or KeyError.

    The files are linked, not copied, where the file system can: nothing is written but the manifest.
    """
    manifest = {name: file for name, file in manifest_of(full).items() if name in KEPT}
    final = products.milestone(step)
    if _manifest(final) != manifest:
        shutil.rmtree(final, ignore_errors=True)
        _publish(products, full, final, manifest)
    size = sum(file.bytes for file in manifest.values()) + (final / MANIFEST).stat().st_size
    return Saved(step, final, size, manifest[MODEL].sha256)


def _manifest(milestone: Path) -> dict[str, Written] | None:
    try:
        return manifest_of(milestone, KEPT)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _publish(products: ProductDir, full: Path, final: Path, manifest: dict[str, Written]) -> None:
    unfinished = products.checkpoints / f"{SAVING}{final.name}-{os.getpid()}"
    try:
        unfinished.mkdir()
        for name in manifest:
            link(full / name, unfinished / name)
        said = {"files": {name: asdict(file) for name, file in manifest.items()}}
        write_blocks(unfinished / MANIFEST, iter([json.dumps(said, indent=1).encode() + b"\n"]))
        fsync_directory(unfinished)
        unfinished.rename(final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    fsync_directory(products.checkpoints)


@failpoint("resume.link")
def link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has links.
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
