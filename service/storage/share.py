"""Hard links to the files of a checkpoint, so that neither retention nor the deletion of its job removes them.

A published checkpoint never changes. If its files are removed while they are linked, either all links exist already, or
linking fails and the caller gives up.
"""

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from trainyard.contract.allowed_paths import directory_inside, link_descriptor, new_directory
from trainyard.contract.failpoints import failpoint, hit
from trainyard.contract.rundir import MANIFEST_FILE, fsync_directory
from trainyard.service.errors import StepUnavailable
from trainyard.service.storage.checkpoint_files import is_valid, open_file, read_manifest

DAMAGED = "The checkpoint of this step is damaged or was just removed."


@failpoint("share.checkpoint")
def link_checkpoint(
    source: Path, target: Path, roots: Sequence[Path] = (), only: Collection[str] | None = None
) -> None:
    """Create the directory ``target`` with links to the files of ``source``, or copies on another file system.

    ``only``: the names of the files to link; None: all. The manifest, which lists all, is always linked.
    ``roots``: the directories below which both must lie. Raises StepUnavailable; the caller then removes the partial
    directory.
    """
    manifest = read_manifest(source, roots)
    if not manifest:
        raise StepUnavailable(DAMAGED)
    names = [name for name in manifest if only is None or name in only]
    try:
        with directory_inside(target.parent, roots, create=True) as folder, new_directory(folder / target.name) as made:
            for name in (*names, MANIFEST_FILE):
                _link_file(source, made, name, roots)
                hit("share.file_linked")
            fsync_directory(made)
    except OSError as error:
        raise StepUnavailable(f"{DAMAGED} {error.strerror}.") from error
    if not is_valid(target, roots, only) or read_manifest(target, roots) != manifest:
        raise StepUnavailable(DAMAGED)


@failpoint("share.file")
def _link_file(source: Path, target: Path, name: str, roots: Sequence[Path]) -> None:
    with open_file(source, name, roots) as file:
        try:
            link_descriptor(file.fileno(), target / name)
            return
        except FileNotFoundError:
            raise  # it was removed meanwhile
        except OSError:
            pass  # no links there, or not allowed
        with (target / name).open("xb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
