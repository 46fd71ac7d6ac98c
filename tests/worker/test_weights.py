"""Weights of other files: mismatches, pickles with code, half precision."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trainyard.contract.rundir import ArtifactDir
from trainyard.contract.spec import JobSpec
from trainyard.worker.checkpoint.weights import load_weights, mismatches, write_weights
from trainyard.worker.errors import TrainingError


def spec(**groups: Any) -> JobSpec:
    import json

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
