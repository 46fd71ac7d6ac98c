"""The compiled model: one graph without breaks, and a clear error if nothing can compile it."""

import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker import rank_runner
from tests.worker.test_step import SHAPE, rows
from trainyard.contract.events import PhaseChanged
from trainyard.contract.failpoints import arm
from trainyard.contract.rundir import RunDir
from trainyard.contract.status import Phase
from trainyard.model.config import ModelConfig
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import compile_error
from trainyard.worker.training.state import initial_model

ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
EXPERTS = replace(SHAPE, use_moe=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def packed(batch: Any) -> dict[str, Any]:
    """The arguments of a training pass over rows of two segments each."""
    half = batch.input_ids.shape[1] // 2
    segments = torch.ones_like(batch.input_ids)
    segments[:, half:] = 2
    positions = torch.arange(batch.input_ids.shape[1]) % half
    return {"position_ids": positions.expand_as(segments).contiguous(), "segment_ids": segments}


@pytest.mark.filterwarnings("default::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("default::FutureWarning:torch.*")
@pytest.mark.parametrize("shape", [SHAPE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("packing", ["document", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_one_graph(packing: str, dtype: torch.dtype, shape: ModelConfig) -> None:
    import torch._dynamo

    model, batch = initial_model(shape, 1, ALONE.device), rows(2, seed=1)
    more = packed(batch) if packing == "document" else {}
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        explained = torch._dynamo.explain(model)(batch.input_ids, labels=batch.labels, **more)
    assert explained.break_reasons == []
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def no_compiler() -> None:
    """Hide the compiler and what it has compiled before, as on a host without g++."""
    import torch._inductor.config as config

    # The compiler warns if its caches are off.
    warnings.simplefilter("default")
    config.force_disable_caches = True
    config.cpp.cxx = (None, "no-such-compiler")
    os.environ["PATH"] = "/nonexistent"


@pytest.mark.long
@pytest.mark.slow
def test_without_a_compiler_the_error_says_what_to_do(tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    described = rank_runner.spec(text, training={"use_compile": True, "max_steps": 2})
    run = rank_runner.new_run(tmp_path / "run", described)
    failed = rank_runner.run_to_end(run, patch=no_compiler)
    assert (failed.outcome, failed.reason, failed.step) == ("failed", "spec_invalid", 0)
    assert "training.use_compile: the model cannot be compiled here" in str(failed.message)
    assert failed.error is not None
    assert "A C++ compiler is missing: install one" in str(failed.error.hint)
    assert "training.use_compile to false" in str(failed.error.hint)


def stop_the_compiler(run: RunDir) -> None:
    """Request a stop and hide the compiler, as if the SIGTERM of the stop had also ended it."""
    no_compiler()
    arm("resume.find", run.attempt(1).stop.touch)


@pytest.mark.long
@pytest.mark.slow
def test_a_compiler_that_a_stop_has_ended_is_not_reported_as_broken(tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training={"use_compile": True, "max_steps": 2}))
    stopped = rank_runner.run_to_end(run, patch=partial(stop_the_compiler, run))
    assert (stopped.outcome, stopped.reason, stopped.message) == ("stopped", "user", "stopped while compiling")


@pytest.mark.slow
@pytest.mark.long
def test_a_run_compiles_before_its_first_step_and_never_after(tmp_path: Path) -> None:
    """The last step of an epoch has 5 of 8 rows: in release 0.1 it was compiled in phase `training`."""
    text = rank_runner.corpus(tmp_path / "corpus.jsonl", documents=83)
    curves = []
    for compiled in (False, True):
        training = {"batch_size": 8, "accumulation_steps": 1, "epochs": 2, "max_steps": None, "dtype": "float32"}
        described = rank_runner.spec(
            text,
            model={"num_hidden_layers": 1},
            data={"packing": "none"},
            training={**training, "use_compile": compiled},
            checkpoint={"save_interval": 100},
            reporting={"log_interval": 1},
        )
        run = rank_runner.new_run(tmp_path / f"compiled-{compiled}", described)
        assert rank_runner.run_to_end(run).outcome == "completed"
        phases = [event.phase for event in rank_runner.events(run) if isinstance(event, PhaseChanged)]
        assert phases.count(Phase.COMPILING) == compiled
        curves.append([line.loss for line in rank_runner.metrics(run).values()])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_errors_of_the_compiler_are_recognized() -> None:
    from torch._inductor.exc import InvalidCxxCompiler, TritonMissing

    missing = compile_error(InvalidCxxCompiler())
    assert missing is not None
    assert "C++ compiler is missing" in str(missing.hint)
    other = compile_error(TritonMissing(None))
    assert other is not None
    assert str(other.hint).startswith("Set training.use_compile to false")
    assert compile_error(RuntimeError("shapes differ")) is None
    assert compile_error(MemoryError()) is None
