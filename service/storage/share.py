"""Hard links to the files of a checkpoint, so that neither retention nor the deletion of its job removes them.

A published checkpoint never changes. If its files are removed while they are linked, either all links exist already, or
linking fails and the caller gives up.
"""

import os
import shutil
from pathlib import Path

from trainyard.contract.failpoints import failpoint, hit
from trainyard.contract.rundir import MANIFEST_FILE, fsync_directory
from trainyard.service.errors import StepUnavailable
from trainyard.service.storage.checkpoint_files import is_valid, open_file, read_manifest

DAMAGED = "The checkpoint of this step is damaged or was just removed."


@failpoint("share.checkpoint")
def link_checkpoint(source: Path, target: Path) -> None:
    """Create the directory ``target`` with links to the files of ``source``, or copies on another file system.

    Raises StepUnavailable; the caller then removes the partial directory.
    """
    manifest = read_manifest(source)
    if not manifest:
        raise StepUnavailable(DAMAGED)
    target.mkdir(parents=True)
    try:
        for name in (*manifest, MANIFEST_FILE):
            _link_file(source, target, name)
            hit("share.file_linked")
    except OSError as error:
        raise StepUnavailable(f"{DAMAGED} {error.strerror}.") from error
    if not is_valid(target) or read_manifest(target) != manifest:
        raise StepUnavailable(DAMAGED)
    fsync_directory(target)


@failpoint("share.file")
def _link_file(source: Path, target: Path, name: str) -> None:
    with open_file(source, name) as file:
        try:
            os.link(source / name, target / name, follow_symlinks=False)
        except FileNotFoundError:
            raise
        except OSError:
            with (target / name).open("xb") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        if not os.path.samestat(os.fstat(file.fileno()), (target / name).lstat()) and (target / name).is_symlink():
            raise FileNotFoundError(name)
