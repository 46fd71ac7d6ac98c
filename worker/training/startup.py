"""What is known of an attempt before its first step: its `started` event, and cautions about the device."""

from collections.abc import Iterator

import torch

from trainyard.contract.events import Started, WarningEvent
from trainyard.contract.spec import JobSpec
from trainyard.model.costs import active_parameters, flops_per_token, parameters
from trainyard.worker.checkpoint.resume import ResumePoint
from trainyard.worker.data.prepare import TrainingData
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.metrics import device_name
from trainyard.worker.training.state import TrainProgress


def started_event(
    material: TrainingData,
    ranks: DistributedContext,
    order: StepSampler,
    progress: TrainProgress,
    steps: int,
    begin: ResumePoint | None,
) -> Started:
    """What this attempt runs, on what, over which data, and from where."""
    spec, meta = material.spec, material.corpus.meta
    assert spec.model.vocab_size is not None
    return Started(
        start_step=progress.step,
        base_step=progress.base_step,
        steps=steps,
        world_size=ranks.world,
        device=ranks.device.type,
        device_name=device_name(ranks.device),
        dtype=spec.training.dtype,
        torch_version=torch.__version__,
        parameters=parameters(spec.model),
        active_parameters=active_parameters(spec.model),
        vocab_size=spec.model.vocab_size,
        samples=len(material.train_set),
        documents=meta.documents,
        tokens=meta.tokens,
        bad_lines=meta.bad_lines,
        global_batch=order.global_batch,
        tokens_per_step=material.train_set.tokens / order.steps_per_epoch,
        steps_per_epoch=order.steps_per_epoch,
        flops_per_token=flops_per_token(spec.model, spec.data.max_seq_len),
        resumed_from=str(begin.path) if begin is not None else None,
    )


def device_warnings(spec: JobSpec, device: str, has_bfloat16: bool) -> Iterator[WarningEvent]:
    """What the user should hear of the ``device`` type that the run was given."""
    if spec.resources.device == "auto" and device == "cpu":
        message = 'there is no CUDA device here, so this runs on the CPU; set resources.device to "cpu" if you mean it'
        yield WarningEvent(code="cpu_fallback", message=message)
    if device == "cuda" and spec.training.dtype == "bfloat16" and not has_bfloat16:
        message = (
            'this card computes bfloat16 by float32 (Ampere and later have it): training.dtype "float16" is faster'
        )
        yield WarningEvent(code="bfloat16_emulated", message=message)


def supports_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed as such there. A CPU may be slow at it, and has nothing better to offer."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 8
