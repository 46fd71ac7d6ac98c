"""Milestones: of a checkpoint that is to be kept for good, only the weights are, once newer ones can be resumed from.

``checkpoints/step-00010000-weights/`` holds model.safetensors, state.json and a manifest. No resume ever picks it.
"""

import os
import shutil
from pathlib import Path

from trainyard.contract.failpoints import failpoint
from trainyard.contract.rundir import MODEL_FILE, STATE_FILE, FileDigest, ProductDir, atomic_directory
from trainyard.worker.checkpoint import Saved, manifest_of, saved_at, saving_directory, write_manifest

KEPT = (MODEL_FILE, STATE_FILE)


def keep_weights(products: ProductDir, step: int, full: Path) -> Saved:
    """Publish the weights of the full checkpoint ``full`` as a milestone. Raises OSError, ValueError or KeyError.

    The files are linked, not copied, where the file system can: nothing is written but the manifest.
    """
    manifest = {name: file for name, file in manifest_of(full).items() if name in KEPT}
    final = products.milestone(step)
    if _manifest(final) != manifest:
        shutil.rmtree(final, ignore_errors=True)
        with atomic_directory(final, saving_directory(final)) as unfinished:
            for name in manifest:
                link(full / name, unfinished / name)
            write_manifest(unfinished, manifest)
    return saved_at(step, final, KEPT)


def _manifest(milestone: Path) -> dict[str, FileDigest] | None:
    try:
        return manifest_of(milestone, KEPT)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@failpoint("resume.link")
def link(source: Path, target: Path) -> None:
    """Link ``source`` as ``target``, or copy it if the file system has no links. Raises OSError.

    `service.forks.links` has a stricter one: the service does not follow a symbolic link that a run may have left.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
