"""Comparison of all ranks' weights at each save. They must have equal bits, so a difference is a fault of a device.

Without sharding, every rank applies the same update to the same weights. If a bit flips in the memory of one rank, or
it computes a product wrongly, its weights stay wrong, and the loss does not show it. All ranks compute digests
of their weights while training continues, and rank 0 compares them before it publishes the checkpoint.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainyard.contract.events import RankInfo
from trainyard.contract.failpoints import hit
from trainyard.contract.status import Reason
from trainyard.worker.checkpoint.files import unique_tensors
from trainyard.worker.checkpoint.update_gate import UpdateGate
from trainyard.worker.digest import tensor_digest
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import TrainingError


@dataclass(frozen=True)
class ReplicaCheck:
    """Compares the weights of all ranks. ``places``: host and device of each rank."""

    ranks: DistributedContext
    places: Sequence[RankInfo]

    def compare(self, weights: Mapping[str, Tensor], step: int) -> str | None:
        """Compare rank 0's ``weights`` with those of the other ranks. Called by a background thread of rank 0.

        Return None, or why they could not be compared. Raises TrainingError if they differ.
        """
        tensors = unique_tensors(weights)
        own = [int(tensor_digest(tensor)) for tensor in tensors.values()]
        try:
            digests = self.ranks.gather_in_background(own)
        except RuntimeError as error:
            # A rank has died, which ends the run. The weights of rank 0 may still be right.
            return str(error).splitlines()[0][:200]
        if any(row != own for row in digests):
            raise corruption_error(step, digests, list(tensors), self.places)
        return None


class DigestSender:
    """Computes the digests of one rank's live weights, for `ReplicaCheck` on rank 0."""

    def __init__(self, ranks: DistributedContext, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._ranks = ranks
        self._model = model
        self._gate = UpdateGate(optimizer, ranks.device)
        cuda: Any = torch.cuda  # its streams and events are unannotated
        self._stream: Any = cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None
        self._digests: Tensor | None = None

    def start(self) -> None:
        """Start reading the weights. `read` must follow, or the next update waits forever."""
        if self._stream is None:
            self._gate.close()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._ranks.device))
        with torch.cuda.stream(self._stream):
            self._digests = torch.stack([tensor_digest(tensor) for tensor in self._tensors()])
        self._gate.close_until(self._stream.record_event())

    def read(self) -> list[int]:
        """Return the digests. Called by a background thread."""
        hit("replicas.read", self._model)
        try:
            if self._digests is None:
                return [int(tensor_digest(tensor)) for tensor in self._tensors()]
            with torch.cuda.stream(self._stream):  # the default stream has training's kernels in its queue
                digests: list[int] = self._digests.tolist()
            return digests
        finally:
            self._gate.open()

    def send(self, digests: list[int]) -> None:
        """Send the digests to rank 0. Called by a background thread."""
        # If rank 0 has died, its death ends the run.
        with contextlib.suppress(RuntimeError):
            self._ranks.gather_in_background(digests)

    def _tensors(self) -> list[Tensor]:
        return list(unique_tensors(self._model.state_dict()).values())


def corruption_error(
    step: int, digests: Sequence[Sequence[int]], names: Sequence[str], places: Sequence[RankInfo]
) -> TrainingError:
    """Return the error for ranks whose digests differ. ``digests``: a row per rank, a number per tensor of ``names``.

    The ranks that differ from the most common row are named. If two rows are equally common, both halves may be wrong,
    and the error has no rank.
    """
    counts = Counter(tuple(row) for row in digests)
    common = max(counts.values())
    # Of equally common rows that of the first rank is the reference.
    reference = next(row for row in map(tuple, digests) if counts[row] == common)
    wrong = [rank for rank, row in enumerate(digests) if tuple(row) != reference]
    tensors = [name for i, name in enumerate(names) if any(digests[rank][i] != reference[i] for rank in wrong)]
    others = [str(places[rank]) for rank in range(len(digests)) if rank not in wrong]
    is_known = list(counts.values()).count(common) == 1
    than = f"the other {len(others)} ranks" if is_known else " and ".join(others)
    unknown = "" if is_known else "; it is not known which of them is right"
    message = (
        f"silent corruption: {' and '.join(str(places[rank]) for rank in wrong)} "
        f"{'has' if len(wrong) == 1 else 'have'} other weights at step {step} than {than}{unknown}. They differ in "
        f"{tensors[0]}{f' and {len(tensors) - 1} more tensors' if len(tensors) > 1 else ''}; the step was not saved"
    )
    hint = corruption_hint(places[wrong[0]].device)
    return TrainingError(Reason.SILENT_CORRUPTION, message, hint, wrong[0] if is_known else None)


def corruption_hint(device: str) -> str:
    """Return what to do about a device, such as ``cuda:3`` or ``cpu``, that computes or stores wrong bits."""
    if device.startswith("cpu"):
        return (
            "Test this host, then resume: the run continues from its last checkpoint, which was compared when it was "
            "saved. ras-mc-ctl --errors and lines with mce in the kernel log show errors of memory and processor, and "
            "memtest86+ tests the memory."
        )
    return (
        "Resume on other devices: the run continues from its last checkpoint, which was compared when it was saved. "
        "TRAINYARD_EXCLUDE_DEVICES keeps the service from using a device. Test it before you use it again: "
        "nvidia-smi -q -d ECC,ROW_REMAPPER shows errors of its memory, and the kernel log has lines with NVRM: Xid."
    )
