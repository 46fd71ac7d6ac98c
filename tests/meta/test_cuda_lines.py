"""Each function with a line that only CUDA runs is covered by a test that runs on a GPU."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainyard.worker.doctor.promises import PROMISES

ROOT = Path(__file__).parents[2]
NAMES = {"cuda", "is_cuda", "pin_memory", "nccl"}

PROMISE = "tests/doctor/test_gpu.py::test_a_promise_holds_on_the_gpu"
ATTENTION, SAVES, SPEED = f"{PROMISE}[check_attention]", f"{PROMISE}[check_saves]", f"{PROMISE}[check_speed]"
RUN, RANKS = f"{PROMISE}[check_resume]", f"{PROMISE}[check_several_ranks]"
"""A whole run of the worker on the GPU, and one on all of them."""
FLASH = "tests/worker/test_device_setup.py::test_on_a_gpu_flash_attention_is_that_of_the_mask_and_tf32_can_be_chosen"
GRAPHS = "tests/worker/test_device_setup.py::test_cuda_graphs_give_the_losses_of_the_compiled_model"
PREFETCH = "tests/worker/test_device_setup.py::test_on_a_gpu_micro_batches_are_prefetched_in_pinned_memory"
DIGESTS = "tests/worker/test_replicas.py::test_on_a_gpu_the_digests_are_of_the_step"
TIMER = "tests/worker/test_metrics.py::test_on_a_gpu_events_measure_a_ranks_own_time"
STACKS = "tests/model/test_muon.py::test_a_stack_gives_the_result_of_each_matrix"

COVERED = {
    "model/decoder.py:Decoder.score_tokens": "tests/worker/test_tasks.py::test_scores_on_a_gpu_are_those_of_a_cpu",
    "model/grouped_gemm.py:can_group": ATTENTION,
    "model/layers.py:Attention._masked_attention": ATTENTION,
    "model/layers.py:RMSNorm.forward": ATTENTION,
    "model/layers.py:RotaryTables.rotate": ATTENTION,
    "model/loss.py:": ATTENTION,
    "model/loss.py:cross_entropy_sum": ATTENTION,
    "model/varlen_attention.py:use_flash": "tests/model/test_varlen_attention.py::"
    "test_on_cuda_the_decoder_gives_the_loss_of_its_mask",
    "model/varlen_attention.py:varlen_attention": ATTENTION,
    "worker/checkpoint/replicas.py:DigestSender.__init__": DIGESTS,
    "worker/checkpoint/replicas.py:DigestSender.read": DIGESTS,
    "worker/checkpoint/replicas.py:DigestSender.start": DIGESTS,
    "worker/checkpoint/saver.py:StagingBuffers.__init__": SAVES,
    "worker/checkpoint/saver.py:StagingBuffers._allocate": "tests/worker/test_saver.py::"
    "test_on_a_gpu_the_copy_is_of_its_step",
    "worker/checkpoint/saver.py:StagingBuffers._start_copy": SAVES,
    "worker/checkpoint/saver.py:StagingBuffers.fill": SAVES,
    "worker/checkpoint/update_gate.py:UpdateGate._delay": SAVES,
    "worker/data/loader.py:MicroBatchLoader._make": PREFETCH,
    "worker/data/loader.py:MicroBatchLoader._prefetch": PREFETCH,
    "worker/data/loader.py:to_device": SPEED,
    "worker/data/packing.py:Batch.pin_memory": SPEED,
    "worker/digest.py:tensor_digest": "tests/worker/test_replicas.py::test_a_gpu_computes_the_same_digest",
    "worker/distributed.py:assigned_device": "tests/worker/test_generation.py::test_it_generates_on_a_gpu",
    "worker/distributed.py:cuda_problem": RUN,
    "worker/distributed.py:init_distributed": RANKS,
    "worker/distributed.py:require_device": RUN,
    "worker/distributed.py:select_device": RUN,
    "worker/matrix_speed.py:": SPEED,
    "worker/matrix_speed.py:measure": SPEED,
    "worker/train.py:train": RUN,
    "worker/training/device_setup.py:activate_flash_attention": FLASH,
    "worker/training/device_setup.py:set_up_device": FLASH,
    "worker/training/metrics.py:MetricsProcessor.__init__": RUN,
    "worker/training/metrics.py:RankTimer._between": TIMER,
    "worker/training/metrics.py:RankTimer._mark_end": TIMER,
    "worker/training/metrics.py:RankTimer._now": TIMER,
    "worker/training/metrics.py:device_name": RUN,
    "worker/training/metrics.py:peak_memory_bytes": RUN,
    "worker/training/startup.py:device_warnings": RUN,
    "worker/training/startup.py:rank_info": RUN,
    "worker/training/startup.py:supports_bfloat16": RUN,
    "worker/training/state.py:TrainState.defers_metrics": RUN,
    "worker/training/state.py:_build_optimizer": STACKS,
    "worker/training/state.py:_wrap_model": RANKS,
    "worker/training/state.py:build_train_state": GRAPHS,
}
"""File and function -> the test. For a new function, extend a trial of `worker/doctor`, or write a test."""


def cuda_functions() -> Iterator[str]:
    """Yield ``file:function`` of all code that mentions CUDA. The doctor itself is the test."""
    for folder in ("model", "worker"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = file.relative_to(ROOT)
            if "doctor" not in name.parts:
                yield from (f"{name}:{function}" for function in below(ast.parse(file.read_text()), ""))


def below(node: ast.AST, inside: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from below(child, f"{inside}.{child.name}".lstrip("."))
            continue
        match child:
            case ast.Attribute(attr=name) | ast.keyword(arg=name) | ast.Constant(value=name) if name in NAMES:
                yield inside
        yield from below(child, inside)


def test_each_line_that_only_cuda_runs_is_covered_on_a_gpu() -> None:
    found = set(cuda_functions())
    assert len(found) > 15
    assert found == set(COVERED)


@pytest.mark.parametrize("test", sorted(set(COVERED.values())))
def test_the_covering_test_exists_and_needs_a_gpu(test: str) -> None:
    path, _, name = test.partition("::")
    function, _, promise = name.rstrip("]").partition("[")
    module = ast.parse((ROOT / path).read_text())
    constants = [ast.unparse(node) for node in module.body if isinstance(node, ast.Assign)]
    (found,) = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == function]
    decorators = [ast.unparse(decorator) for decorator in found.decorator_list]
    marked = [line for line in constants if line.startswith("pytestmark = ")] + decorators
    assert any("pytest.mark.gpu" in line for line in marked)
    assert not promise or promise in {each.__name__ for each in PROMISES}
