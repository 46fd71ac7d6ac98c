"""Training errors name the numbers to change."""

import pickle

import torch

from trainyard.contract.spec import ResourcesSpec, TrainingSpec
from trainyard.contract.status import Reason
from trainyard.worker.errors import out_of_memory_error, save_error


def test_failures_carry_advice_with_numbers() -> None:
    training = TrainingSpec(batch_size=32, accumulation_steps=2)
    memory = out_of_memory_error(
        torch.OutOfMemoryError("2 GiB"), rank=1, step=4, training=training, peak_bytes=7 * 10**9
    )
    assert memory is not None
    assert (memory.rank, memory.outcome(4).error.peak_memory_bytes) == (1, 7 * 10**9)  # type: ignore[union-attr]
    assert "batch_size to 16 and training.accumulation_steps to 4" in str(memory)
    assert "Resume with training.gradient_checkpointing true" in str(memory)
    assert "Or, in a fork or a new job, set training.batch_size" in str(memory), "a resume cannot change it"
    recomputing = TrainingSpec(batch_size=1, gradient_checkpointing=True)
    for parallelism, hint in (("ddp", '"zero1"'), ("zero1", '"fsdp"'), ("fsdp", "One row needs too much")):
        resources = ResourcesSpec.model_validate({"parallelism": parallelism, "nproc_per_node": 2})
        error = out_of_memory_error(MemoryError(), rank=0, step=0, training=recomputing, resources=resources)
        assert hint in str(error)
        assert ("Resume with" in str(error)) == (parallelism != "fsdp")
    one_row = TrainingSpec(batch_size=1)
    assert out_of_memory_error(RuntimeError("shapes differ"), rank=0, step=0, training=one_row) is None
    single = out_of_memory_error(MemoryError(), rank=0, step=0, training=one_row)
    assert "max_seq_len" in str(single)
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ):
        full_card = out_of_memory_error(RuntimeError(text), rank=0, step=0, training=one_row)
        assert full_card is not None
        assert full_card.reason is Reason.OUT_OF_MEMORY
    full = save_error(OSError(28, "No space left on device", "/d/x"), "the checkpoint of step 3")
    assert str(full).splitlines()[0] == "the checkpoint of step 3 could not be written: No space left on device (/d/x)"
    assert "Free space" in str(full)
    other_size = save_error(OSError("/c/tokens.bin has 3 bytes, not 4: remove /c to build it again"), "it")
    assert other_size.message.endswith(": /c/tokens.bin has 3 bytes, not 4: remove /c to build it again")
    assert "writable" in str(save_error(OSError(13, "Permission denied"), "it"))
    assert pickle.loads(pickle.dumps(full)).hint == full.hint
