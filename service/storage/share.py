"""A fork's share of its parent's checkpoint: linked, so that neither retention nor a deletion takes it away.

A checkpoint's files never change once it is published. Whoever removes the parent's names meanwhile takes either none
of the files from us, or one that was not linked yet, and then there is no fork.
"""

import os
import shutil
from pathlib import Path

from trainyard.contract.failpoints import failpoint, hit
from trainyard.contract.rundir import MANIFEST_FILE, fsync_directory
from trainyard.service.errors import StepUnavailable
from trainyard.service.storage.checkpoint_files import is_valid, open_file, read_manifest

DAMAGED = "The checkpoint of this step is damaged, or was just removed."


@failpoint("share.checkpoint")
def link_checkpoint(source: Path, target: Path) -> None:
    """Make ``target`` hold the files of the checkpoint ``source``; copies where it is on another file system.

    Raises StepUnavailable; what was made by then is the caller's to remove.
    """
    manifest = read_manifest(source)
    if not manifest:
        raise StepUnavailable(DAMAGED)
    target.mkdir(parents=True)
    try:
        for name in (*manifest, MANIFEST_FILE):
            _share_file(source, target, name)
            hit("share.file_linked")
    except OSError as error:
        raise StepUnavailable(f"{DAMAGED} {error.strerror}.") from error
    if not is_valid(target) or read_manifest(target) != manifest:
        raise StepUnavailable(DAMAGED)
    fsync_directory(target)


@failpoint("share.file")
def _share_file(source: Path, target: Path, name: str) -> None:
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
