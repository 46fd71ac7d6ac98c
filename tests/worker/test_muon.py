"""A run with Muon: interrupted, it ends with the weights of the untouched one; another optimizer is refused."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import optimizers
from tests.worker import rank_runner
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.model.config import ModelConfig
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import TrainingError
from trainyard.worker.training import state as train_state

TRAINING = {"optimizer": "muon", "batch_size": 4, "accumulation_steps": 1, "learning_rate": 5e-3}


def run(path: Path, text: Path, steps: int) -> RunDir:
    described = rank_runner.spec(text, training={**TRAINING, "lr_scheduler": "constant", "max_steps": steps})
    made = RunDir(path)
    if path.exists():
        made.spec.write_text(json.dumps(described))
    else:
        made = rank_runner.new_run(path, described)
    rank_runner.run_to_end(made)
    return made


def test_a_resumed_run_is_the_untouched_one(tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "c.jsonl")
    whole = run(tmp_path / "whole", text, 8)
    run(tmp_path / "parted", text, 3)
    parted = run(tmp_path / "parted", text, 8)
    files = [made.artifacts(None).checkpoint(8) for made in (whole, parted)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert files[0].joinpath(name).read_bytes() == files[1].joinpath(name).read_bytes()
    state = load_file(files[0] / "optimizer.safetensors")
    assert "momentum.model.layers.0.self_attn.q_proj.weight" in state
    assert "exp_avg.model.layers.0.self_attn.q_proj.weight" not in state
    assert "exp_avg_sq.model.embed_tokens.weight" in state
    # The checkpoint is of muon: AdamW cannot go on with it.
    described = JobSpec.model_validate_json((parted.attempt(2).spec).read_text())

    ranks = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    model = train_state.initial_model(described.model.with_vocab_size(259), 1, ranks.device)
    training = described.training.model_copy(update={"optimizer": "adamw"})
    with pytest.raises(TrainingError, match="was trained with muon"):
        train_state.build_train_state(model, training, 0.0, ranks).load(files[1])


@pytest.mark.slow
def test_the_bench_holds_both_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, and with few steps: what is measured is real, what it comes to is the long form's to say."""
    shape = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    sizes = {"STEPS": 6, "ROWS": 2, "LENGTH": 32, "WINDOW": 2, "SHAPE": shape, "DOCUMENTS": 40}
    for name, value in {**sizes, "RATES": {"adamw": (1e-5,), "muon": (1e-2,)}}.items():
        monkeypatch.setattr(optimizers, name, value)
    adamw, muon = optimizers.train_all()
    assert [len(each.losses) for each in (adamw, muon)] == [6, 6]
    assert adamw.losses[0] == muon.losses[0], "the same weights and rows"
    assert muon.held_out < adamw.held_out < 6
    lines = optimizers.table([adamw, muon])
    assert lines[2].startswith("| adamw | 1e-05 | 5.")
    assert "Muon comes to 5." in lines[-1]
    drawn = ElementTree.fromstring(optimizers.draw([adamw, muon]))
    assert len([part for part in drawn if part.tag.endswith("polyline")]) == 2


def test_a_learner_reaches_a_loss_with_the_mean_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "WINDOW", 2)
    made = optimizers.Learner("muon", 1.0, None, None, [4.0, 2.0, 0.0, 0.0], [1.0, 3.0, 2.0, 2.0])  # type: ignore[arg-type]
    assert made.smoothed == [4.0, 3.0, 1.0, 0.0]
    assert made.clock == [2.0, 4.0, 6.0, 8.0]
    assert [made.reaches(loss) for loss in (9.0, 3.0, 2.0, 1.0, -1.0)] == [2, 2, 3, 3, None]
