"""A run with Muon: interrupted, it ends with the weights of the untouched one; another optimizer is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contract.rundir import RunDir
from contract.spec import JobSpec
from tests.worker import driver
from worker import trainee
from worker.distributed import Ranks
from worker.failure import Failure

TRAINING = {"optimizer": "muon", "batch_size": 4, "accumulation_steps": 1, "learning_rate": 5e-3}


def run(path: Path, text: Path, steps: int) -> RunDir:
    described = driver.spec(text, training={**TRAINING, "lr_scheduler": "constant", "max_steps": steps})
    made = RunDir(path)
    if path.exists():
        made.spec.write_text(json.dumps(described))
    else:
        made = driver.new_run(path, described)
    driver.run_to_end(made)
    return made


def test_a_resumed_run_is_the_untouched_one(tmp_path: Path) -> None:
    text = driver.corpus(tmp_path / "c.jsonl")
    whole = run(tmp_path / "whole", text, 8)
    run(tmp_path / "parted", text, 3)
    parted = run(tmp_path / "parted", text, 8)
    files = [made.products(None).checkpoint(8) for made in (whole, parted)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert files[0].joinpath(name).read_bytes() == files[1].joinpath(name).read_bytes()
    state = load_file(files[0] / "optimizer.safetensors")
    assert "momentum.model.layers.0.self_attn.q_proj.weight" in state
    assert "exp_avg.model.layers.0.self_attn.q_proj.weight" not in state
    assert "exp_avg_sq.model.embed_tokens.weight" in state
    # The checkpoint is of muon: AdamW cannot go on with it.
    described = JobSpec.model_validate_json((parted.attempt(2).spec).read_text())

    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    model = trainee.initial_model(described.model.with_vocab_size(259), 1, ranks.device)
    training = described.training.model_copy(update={"optimizer": "adamw"})
    with pytest.raises(Failure, match="was trained with muon"):
        trainee.build(model, training, 0.0, ranks).load(files[1])
