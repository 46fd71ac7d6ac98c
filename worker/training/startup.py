"""Before the first step: the `started` event, where each rank runs, and warnings about the device."""

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from trainyard.contract.corpus_files import fingerprint_inputs
from trainyard.contract.events import HeldOutFacts, RankInfo, Started, WarningEvent
from trainyard.contract.processes import LEASED_DEVICES
from trainyard.contract.spec import JobSpec, Parallelism, TrainingSpec, epochs_ignored
from trainyard.contract.tokenizer_info import BYTE, tokenizer_file
from trainyard.model.costs import active_parameters, flops_per_token, parameters
from trainyard.worker.checkpoint.replicas import ReplicaCheck
from trainyard.worker.checkpoint.resume import ResumePoint
from trainyard.worker.data.prepare import TrainingData
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.metrics import device_name
from trainyard.worker.training.state import TrainProgress


def started_event(
    data: TrainingData,
    ranks: DistributedContext,
    sampler: StepSampler,
    progress: TrainProgress,
    steps: int,
    resume_from: ResumePoint | None,
    places: Sequence[RankInfo],
    train_seconds: float,
) -> Started:
    spec = data.spec
    assert spec.model.vocab_size is not None
    return Started(
        start_step=progress.step,
        base_step=progress.base_step,
        base_tokens=progress.base_tokens,
        train_seconds=train_seconds,
        steps=steps,
        world_size=ranks.world,
        device=ranks.device.type,
        device_name=device_name(ranks.device),
        dtype=spec.training.dtype,
        torch_version=torch.__version__,
        parameters=parameters(spec.model),
        active_parameters=active_parameters(spec.model),
        vocab_size=spec.model.vocab_size,
        samples=len(data.train_set),
        documents=data.documents,
        tokens=data.tokens,
        bad_lines=data.stats.bad_lines,
        special_tokens=data.stats.special_tokens,
        special_texts=data.stats.special_texts,
        bos_token=data.tokenizer.bos,
        eos_token=data.tokenizer.eos,
        inputs=fingerprint_inputs(spec.data, _tokenizer_file(spec), data.roots),
        global_batch=sampler.global_batch,
        tokens_per_step=data.tokens_per_step(sampler),
        steps_per_epoch=sampler.steps_per_epoch,
        flops_per_token=flops_per_token(spec.model, data.train_set.attention_length),
        duplicates=data.train_set.duplicates,
        eval_sets=[
            HeldOutFacts(
                name=held_out.name,
                files=held_out.files,
                documents=held_out.rows.documents,
                tokens=held_out.rows.tokens,
                duplicates=held_out.rows.duplicates,
            )
            for held_out in data.eval_sets
        ],
        resumed_from=str(resume_from.source) if resume_from is not None else None,
        ranks=list(places),
    )


def rank_info(ranks: DistributedContext) -> RankInfo:
    """Return where this rank runs."""
    device, name = ranks.device, device_name(ranks.device)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if device.type != "cuda":
        return RankInfo(rank=ranks.rank, host=host, device="cpu", name=name)
    properties = torch.cuda.get_device_properties(device)
    bus = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    is_known = all(isinstance(part, int) for part in bus)  # not on AMD
    return RankInfo(
        rank=ranks.rank,
        host=host,
        device=host_device(device.index, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get(LEASED_DEVICES)),
        name=name,
        pci_bus_id=":".join(f"{part:0{digits}X}" for part, digits in zip(bus, (8, 2, 2), strict=True)) + ".0"
        if is_known
        else None,
    )


def host_device(index: int, visible: str | None, leased: str | None = None) -> str:
    """Return the host's name of the GPU that this process numbers ``index``.

    ``visible``: CUDA_VISIBLE_DEVICES. ``leased``: ids of the devices that the service has leased, separated by commas.
    """
    names = (leased or "").split(",")
    if leased and index < len(names):
        return names[index]
    numbers = (visible or "").split(",")
    is_listed = index < len(numbers) and numbers[index].strip().isdecimal()
    return f"cuda:{int(numbers[index]) if is_listed else index}"


def replica_check(
    ranks: DistributedContext, places: Sequence[RankInfo], parallelism: Parallelism = "ddp"
) -> tuple[ReplicaCheck | None, list[WarningEvent]]:
    """Return the check of the ranks' weights, or None and a warning if they cannot be compared.

    Devices of different types may round a sum differently, so only equal types must give equal bits. All ranks call it
    together.
    """
    if ranks.world == 1 or parallelism == "fsdp":
        return None, []  # no rank has the weights of another one
    threads = torch.get_num_threads() if ranks.device.type == "cpu" else 0
    kinds = ranks.gather_objects((places[ranks.rank].name, torch.__version__, threads))
    if len(set(kinds)) == 1:
        return ReplicaCheck(ranks, places), []
    words = " and ".join(
        f"{name} with torch {version}" + (f" and {n} threads" if n else "") for name, version, n in sorted(set(kinds))
    )
    message = (
        f"the ranks run on devices of different types ({words}), which may round differently. So their weights "
        "are not compared at saves, and a device that computes wrongly is not found"
    )
    return None, [WarningEvent(code="weights_not_compared", message=message)]


def _tokenizer_file(spec: JobSpec) -> Path | None:
    path = spec.data.tokenizer_path
    return tokenizer_file(path) if path != BYTE else None


def schedule_warnings(training: TrainingSpec, steps: int) -> Iterator[WarningEvent]:
    """Yield warnings about settings that a run of ``steps`` steps cannot follow."""
    if training.warmup_steps >= steps:
        message = (
            f"warmup_steps {training.warmup_steps:,} is not shorter than the run ({steps:,} steps): "
            "the full learning rate is never reached; lower warmup_steps, or train longer"
        )
        yield WarningEvent(code="warmup_beyond_run", message=message)
    if (training.max_steps is not None or training.max_tokens is not None) and training.epochs != 1:
        yield WarningEvent(code="epochs_ignored", message=epochs_ignored(training))


def device_warnings(spec: JobSpec, device: str, has_bfloat16: bool) -> Iterator[WarningEvent]:
    """Yield warnings if the ``device`` type ("cuda" or "cpu") may not be what the user wants."""
    if spec.resources.device == "auto" and device == "cpu":
        message = 'there is no CUDA device here, so this runs on the CPU; set resources.device to "cpu" if you mean it'
        yield WarningEvent(code="cpu_fallback", message=message)
    if device == "cuda" and spec.training.dtype == "bfloat16" and not has_bfloat16:
        message = (
            'this card computes bfloat16 by float32 (Ampere and later have it): training.dtype "float16" is faster'
        )
        yield WarningEvent(code="bfloat16_emulated", message=message)


def supports_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes bfloat16 natively. True for a CPU: it has nothing faster to offer."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 8
