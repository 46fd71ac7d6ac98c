"""Weights of other files: mismatches, pickles with code, half precision."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from trainyard.contract.rundir import ArtifactDir
from trainyard.contract.spec import JobSpec
from trainyard.worker.checkpoint.weights import load_weights, mismatches, publish_weights, write_weights
from trainyard.worker.errors import TrainingError


def spec(**groups: Any) -> JobSpec:
    return JobSpec.model_validate_json(json.dumps({"data": {"data_path": "/x"}, **groups}))


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_with_code_is_refused_and_nothing_executed(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    for name, content in (("code.pth", Bomb()), ("list.pth", [1, 2])):
        torch.save(content, tmp_path / name)
        wanted = spec(training={"from_weight": str(tmp_path / name)})
        with pytest.raises(TrainingError, match=f"{name} cannot be read as weights") as refused:
            load_weights(model, wanted, ArtifactDir(tmp_path))
        assert "Nothing in the file was executed" in str(refused.value)
        assert "weights_only" not in str(refused.value), "torch advises to switch it off"
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(TrainingError, match="cannot be read"):
        load_weights(model, spec(training={"from_weight": str(tmp_path / "torn.safetensors")}), ArtifactDir(tmp_path))


def test_every_mismatch_is_listed() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    given = {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)}
    assert mismatches(own, given) == ["b is [4] and must be [3]", "c is missing", "d is not part of the model"]
    assert mismatches(own, own) == []
    tied = torch.zeros(2)
    assert mismatches({"x": tied, "y": tied}, {"y": torch.ones(2)}) == []
    assert mismatches({"x": tied, "y": tied}, {"x": torch.ones(2), "y": tied}) == ["x and y differ and must be one"]


def test_half_precision_weights_come_back_as_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    write_weights(tmp_path / "out" / "w.pth", model.state_dict())
    load_weights(other, spec(training={"from_weight": str(tmp_path / "out" / "w.pth")}), ArtifactDir(tmp_path))
    assert other.weight.dtype is torch.float32
    assert torch.equal(other.weight, model.weight.half().float())
    first = (tmp_path / "out" / "w.pth").read_bytes()
    write_weights(tmp_path / "out" / "w.pth", model.state_dict())
    assert (tmp_path / "out" / "w.pth").read_bytes() == first


def job_weights(save_dir: Path, job: str, wanted: JobSpec, value: float) -> ArtifactDir:
    artifacts = ArtifactDir(save_dir / job)
    publish_weights(artifacts, wanted, {"weight": torch.full((2, 2), value), "bias": torch.zeros(2)})
    return artifacts


def test_a_name_means_the_newest_weights_below_save_dir(tmp_path: Path) -> None:
    wanted = spec(training={"from_weight": "pretrain"}, checkpoint={"save_dir": str(tmp_path)})
    model, new = torch.nn.Linear(2, 2), ArtifactDir(tmp_path / "job_new")
    with pytest.raises(TrainingError, match="looked for"):
        load_weights(model, wanted, new)
    for age, value in ((20, 1.0), (10, 2.0)):
        file = job_weights(tmp_path, f"job_{age}", wanted, value).out / "pretrain_512.pth"
        os.utime(file, (time.time() - age, time.time() - age))
    load_weights(model, wanted, new)
    assert model.weight[0, 0] == 2
    # MiniMind's scripts find the newest under its own name.
    link = tmp_path / "pretrain_512.pth"
    assert os.readlink(link) == "job_10/out/pretrain_512.pth"
    # A run does not start from its own weights by name, and a link to a deleted job is passed over.
    shutil.rmtree(tmp_path / "job_10")
    load_weights(model, wanted, new)
    assert model.weight[0, 0] == 1
    job_weights(tmp_path, "job_new", wanted, 3.0)
    link.unlink()
    load_weights(model, wanted, new)
    assert model.weight[0, 0] == 1


def test_a_file_that_minimind_wrote_is_not_replaced_by_a_link(tmp_path: Path) -> None:
    wanted = spec(checkpoint={"save_dir": str(tmp_path)})
    (tmp_path / "pretrain_512.pth").write_bytes(b"MiniMind's")
    job_weights(tmp_path, "job", wanted, 1.0)
    assert (tmp_path / "pretrain_512.pth").read_bytes() == b"MiniMind's"


def test_minimind_s_resume_file_is_weights(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    file = tmp_path / "pretrain_512_resume.pth"
    state = {name: value.half() for name, value in model.state_dict().items()}
    saved = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 1, "step": 7, "world_size": 1}
    torch.save({**saved, "wandb_id": None, "scaler": {}}, file)
    load_weights(other, spec(training={"from_weight": str(file)}), ArtifactDir(tmp_path))
    assert torch.equal(other.weight, model.weight.half().float())


def test_weights_with_experts_carry_how_many_a_token_takes(tmp_path: Path) -> None:
    moe = {"use_moe": True, "num_experts_per_tok": 2}
    wanted = spec(model=moe, checkpoint={"save_dir": str(tmp_path)}, training={"from_weight": "pretrain"})
    artifacts = job_weights(tmp_path, "job", wanted, 1.0)
    config = json.loads((artifacts.out / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (4, 2)
    load_weights(torch.nn.Linear(2, 2), wanted, ArtifactDir(tmp_path / "new"))
    other = spec(
        model={**moe, "num_experts_per_tok": 3},
        checkpoint={"save_dir": str(tmp_path)},
        training={"from_weight": "pretrain"},
    )
    with pytest.raises(TrainingError, match=r"num_experts_per_tok is 2 in .*config.json and 3 in the model group"):
        load_weights(torch.nn.Linear(2, 2), other, ArtifactDir(tmp_path / "new"))
    # Weights of MiniMind have no such file.
    (artifacts.out / "config.json").unlink()
    load_weights(torch.nn.Linear(2, 2), other, ArtifactDir(tmp_path / "new"))
