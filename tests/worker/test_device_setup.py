"""Kernels are chosen for the device: newer flash attention if it works, and TF32 by choice."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention

from trainyard.contract.spec import JobSpec
from trainyard.model.config import ModelConfig
from trainyard.model.varlen_attention import varlen_attention
from trainyard.worker.agent.torchrun import ALLOCATOR
from trainyard.worker.data.microbatch import MicroBatch
from trainyard.worker.data.packing import Batch
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training import device_setup
from trainyard.worker.training.device_setup import activate_flash_attention, computes_attention, set_up_device
from trainyard.worker.training.state import build_train_state, initial_model

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("setting", ALLOCATOR.split(","))
def test_torch_accepts_each_allocator_setting(setting: str) -> None:
    """Without a GPU torch ignores unknown names, but checks the values of known ones."""
    change: Any = torch._C._accelerator_setAllocatorSettings  # noqa: SLF001 - it has no public name
    with pytest.raises(ValueError, match=r"nonsense|stoull"):
        change(f"{setting.partition(':')[0]}:nonsense")


class FakeFlash:
    """The registry of torch, and which packages are installed."""

    def __init__(self, installed: tuple[str, ...], generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.installed, self.active = installed, "FA2"
        attention = torch.nn.attention
        monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA3", "FA4"])
        monkeypatch.setattr(attention, "activate_flash_attention_impl", self.activate)
        monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: setattr(self, "active", "FA2"))
        properties = SimpleNamespace(major=generation)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    def activate(self, name: str) -> None:
        if name not in self.installed:
            raise ModuleNotFoundError(name)
        self.active = name


@pytest.mark.parametrize(
    ("installed", "generation", "works", "expected"),
    [
        (("FA3", "FA4"), 9, True, "FA3"),
        (("FA4",), 9, True, "FA4"),
        (("FA3", "FA4"), 10, True, "FA4"),
        (("FA3",), 8, True, None),
        ((), 9, True, None),
        (("FA3", "FA4"), 9, False, None),
    ],
)
def test_newer_flash_attention_is_used_if_it_is_installed_and_works(
    installed: tuple[str, ...], generation: int, works: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = FakeFlash(installed, generation, monkeypatch)
    monkeypatch.setattr(device_setup, "computes_attention", lambda *_: works)
    assert activate_flash_attention(CUDA, 64) == expected
    assert flash.active == (expected or "FA2")


def test_a_kernel_is_compared_with_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert computes_attention(cpu, 32)
    whole = torch.tensor([0, 128], dtype=torch.int32)
    monkeypatch.setattr(device_setup, "varlen_attention", lambda q, k, v, _: varlen_attention(q, k, v, whole))
    assert not computes_attention(cpu, 32), "it ignores the segments"

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("head_dim is not supported")

    monkeypatch.setattr(device_setup, "varlen_attention", fails)
    assert not computes_attention(cpu, 32)


def spec(dropout: float = 0.0, **training: Any) -> JobSpec:
    described = {"data": {"data_path": "/x"}, "model": {"hidden_size": 64, "dropout": dropout}, "training": training}
    return JobSpec.model_validate_json(json.dumps(described))


@pytest.mark.parametrize(
    ("training", "flash", "tf32"),
    [
        ({}, True, False),
        ({"deterministic": True}, False, False),
        ({"verify_every": 100}, False, False),
        ({"dtype": "float32"}, False, False),
        ({"dtype": "float32", "allow_tf32": True}, False, True),
        ({"allow_tf32": True}, True, False),
        ({"dropout": 0.1}, False, False),
    ],
)
def test_what_a_run_chooses(training: dict[str, Any], flash: bool, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.device] = []
    matmul = SimpleNamespace(fp32_precision="ieee")
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setattr(device_setup, "activate_flash_attention", lambda device, _: tried.append(device))
    set_up_device(spec(**training), CUDA)
    assert (bool(tried), matmul.fp32_precision == "tf32") == (flash, tf32)
    set_up_device(spec(**training), torch.device("cpu"))
    assert len(tried) == flash


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"use_compile": True}, False),
        ({"use_compile": True, "deterministic": True}, True),
        ({"use_compile": True, "verify_every": 100}, True),
    ],
)
@pytest.mark.filterwarnings("default")  # torch's compiler uses deprecated parts of torch
def test_a_deterministic_run_chooses_no_compiled_kernel_by_its_time(training: dict[str, Any], expected: bool) -> None:
    """torch sets this option of its compiler itself."""
    from torch._inductor import config

    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        set_up_device(spec(**training), torch.device("cpu"))
        assert config.deterministic is expected
    finally:
        torch.use_deterministic_algorithms(before)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_flash_attention_is_that_of_the_mask_and_tf32_can_be_chosen() -> None:
    assert computes_attention(CUDA, 64)
    name = activate_flash_attention(CUDA, 64)
    try:
        assert computes_attention(CUDA, 64), name
    finally:
        if name is not None:
            torch.nn.attention.restore_flash_attention_impl()
    before = torch.backends.cuda.matmul.fp32_precision
    set_up_device(spec(dtype="float32", allow_tf32=True), CUDA)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("default")  # torch's compiler uses deprecated parts of torch, and recommends TF32
@pytest.mark.parametrize("use_moe", [False, True])
def test_cuda_graphs_give_the_losses_of_the_compiled_model(use_moe: bool) -> None:
    from torch._inductor import cudagraph_trees

    # After 8 compilations of a function in one process, torch runs it uncompiled, without a CUDA graph.
    torch.compiler.reset()
    config = ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=128, use_moe=use_moe)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 128, (4, 2, 64), generator=generator).cuda()
    micro_batches = [MicroBatch(Batch(each, None, None, each), 1 / 512, (0, 1), 128) for each in rows]
    ranks, losses = DistributedContext(0, 1, 0, 1, CUDA), {}
    for mode in ("default", "reduce-overhead"):
        training = spec(use_compile=True, compile_mode=mode).training
        state = build_train_state(initial_model(config, 1, CUDA), training, 0.01 if use_moe else 0.0, ranks)
        losses[mode] = [
            state.train_step.run(iter(micro_batches), 1e-3, lambda _: None).read().loss_sum for _ in range(4)
        ]
    assert cudagraph_trees.get_container(CUDA.index).tree_manager is not None, "no CUDA graph was made"
    assert losses["reduce-overhead"] == pytest.approx(losses["default"], rel=1e-3)
    assert losses["default"][-1] < losses["default"][0]


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_micro_batches_are_prefetched_in_pinned_memory(tmp_path: Any) -> None:
    from tests.worker import rank_runner
    from trainyard.contract.rundir import RunDir
    from trainyard.worker.data.loader import MicroBatchLoader
    from trainyard.worker.data.prepare import prepare_data
    from trainyard.worker.data.sampler import StepSampler

    text = rank_runner.corpus(tmp_path / "corpus.jsonl", documents=83)
    described = JobSpec.model_validate_json(json.dumps(rank_runner.spec(text)))
    alone = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    rows = prepare_data(described, RunDir(tmp_path), alone, lambda _: None, lambda: False).train_set
    sampler = StepSampler(len(rows), 8, 42)
    plain = MicroBatchLoader(rows, sampler, alone, 3, "global_tokens")
    ahead = MicroBatchLoader(rows, sampler, DistributedContext(0, 1, 0, 1, CUDA), 3, "global_tokens", prefetches=True)
    for step in (1, 2, 3):
        for one, other in zip(plain.microbatches(step), ahead.microbatches(step), strict=True):
            assert other.batch.input_ids.is_cuda
            assert torch.equal(one.batch.input_ids, other.batch.input_ids.cpu())
