"""A run with Muon: a resume ends with the weights of an uninterrupted run, and another optimizer is rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.worker import rank_runner
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.model.muon import Muon
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import TrainingError
from trainyard.worker.training import state as train_state

TRAINING = {"optimizer": "muon", "batch_size": 4, "accumulation_steps": 1, "learning_rate": 5e-3}


RECIPE = {
    "recipe": "fast",
    "lr_scheduler": "constant",
    "cautious_weight_decay": True,
    "weight_decay": 0.1,
    "weight_decay_schedule": "learning_rate",
    "warmup_steps": 2,
    "embedding_lr_multiplier": 2.0,
    "norm_lr_multiplier": 0.5,
    "zero_init_projections": True,
}


def run(path: Path, text: Path, steps: int, options: dict[str, Any]) -> RunDir:
    training = {**TRAINING, "lr_scheduler": "constant", "max_steps": steps, **options}
    described = rank_runner.spec(text, training=training)
    made = RunDir(path)
    if path.exists():
        made.spec.write_text(json.dumps(described))
    else:
        made = rank_runner.new_run(path, described)
    rank_runner.run_to_end(made)
    return made


@pytest.mark.parametrize("options", [{}, RECIPE], ids=["minimind", "fast"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "c.jsonl")
    whole = run(tmp_path / "whole", text, 8, options)
    run(tmp_path / "parted", text, 3, options)
    parted = run(tmp_path / "parted", text, 8, options)
    files = [made.artifacts(None).checkpoint(8) for made in (whole, parted)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert files[0].joinpath(name).read_bytes() == files[1].joinpath(name).read_bytes()
    state = load_file(files[0] / "optimizer.safetensors")
    assert "momentum.model.layers.0.self_attn.q_proj.weight" in state
    assert "exp_avg.model.layers.0.self_attn.q_proj.weight" not in state
    assert "exp_avg_sq.model.embed_tokens.weight" in state
    # AdamW cannot continue from a checkpoint of Muon.
    described = JobSpec.model_validate_json((parted.attempt(2).spec).read_text())

    ranks = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    model = train_state.initial_model(described.model.with_vocab_size(259), 1, ranks.device)
    # A checkpoint without the field is of 0.1, which did not stack.
    own = train_state.build_train_state(model, described.training, 0.0, ranks)
    assert isinstance(own.optimizer, Muon)
    own.optimizer.orthogonalizer.stacks = True
    assert own.load(files[1]).stacks_matrices is False
    assert own.optimizer.orthogonalizer.stacks is False
    training = described.training.model_copy(update={"optimizer": "adamw", "cautious_weight_decay": False})
    with pytest.raises(TrainingError, match="was trained with muon"):
        train_state.build_train_state(model, training, 0.0, ranks).load(files[1])
