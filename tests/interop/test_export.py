"""What an export writes, without transformers: config.json, keys, shapes, tokenizer, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library

from tests.interop.conftest import Make
from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.contract.spec import JobSpec
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.worker.checkpoint import retention
from trainyard.worker.checkpoint.export import ExportError, byte_level_tokenizer, find_export_source, main
from trainyard.worker.checkpoint.huggingface import UnsupportedByHF, config_json, config_problems, split_experts
from trainyard.worker.checkpoint.weights import load_weights
from trainyard.worker.data.tokenizers import load_tokenizer
from trainyard.worker.errors import TrainingError

IDS = {"bos_id": 1, "eos_id": 2, "pad_id": 0}
EXPERTS: dict[str, Any] = {"use_moe": True, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def export(run: Path, out: Path, *more: str) -> int:
    return main([str(run), "--out", str(out), *more])


def spec_from(weights: Path, model: ModelConfig) -> JobSpec:
    training = {"from_weight": str(weights)}
    return JobSpec.model_validate({"data": {"data_path": "/x"}, "model": model, "training": training})


def started(weights: Path, model: ModelConfig) -> Decoder:
    fresh = Decoder(model, torch.Generator().manual_seed(99))
    load_weights(fresh, spec_from(weights, model), ArtifactDir(weights.parent))
    return fresh.eval()


def same(one: Decoder, other: Decoder) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_a_dense_directory_has_qwen3s_config_and_keys(make: Make, tmp_path: Path) -> None:
    run, _ = make()
    assert export(run.path, tmp_path / "out") == 0
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["architectures"] == ["Qwen3ForCausalLM"]
    expected = {
        "model_type": "qwen3",
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    assert {key: described[key] for key in expected} == expected
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    layer = {
        "input_layernorm.weight": [32],
        "post_attention_layernorm.weight": [32],
        "self_attn.q_proj.weight": [32, 32],
        "self_attn.k_proj.weight": [16, 32],
        "self_attn.v_proj.weight": [16, 32],
        "self_attn.o_proj.weight": [32, 32],
        "self_attn.q_norm.weight": [8],
        "self_attn.k_norm.weight": [8],
        "mlp.gate_proj.weight": [128, 32],
        "mlp.up_proj.weight": [128, 32],
        "mlp.down_proj.weight": [32, 128],
    }
    around = {"model.embed_tokens.weight": [259, 32], "model.norm.weight": [32]}
    assert shapes == around | {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}


def test_a_directory_with_experts_has_qwen3_moes_config_and_keys(make: Make, tmp_path: Path) -> None:
    run, _ = make(**EXPERTS, tie_word_embeddings=False)
    assert export(run.path, tmp_path / "out") == 0
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["architectures"] == ["Qwen3MoeForCausalLM"]
    expected = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    assert {key: described[key] for key in expected} == expected
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert list(tensors["model.layers.1.mlp.gate.weight"].shape) == [3, 32]
    assert list(tensors["model.layers.1.mlp.experts.2.down_proj.weight"].shape) == [32, 24]
    assert list(tensors["lm_head.weight"].shape) == [259, 32]
    assert len(tensors) == 3 + 2 * (2 + 6 + 1 + 3 * 3)


@pytest.mark.parametrize("shape", [{}, EXPERTS, {"tie_word_embeddings": False}])
def test_a_run_starts_from_what_was_exported(make: Make, tmp_path: Path, shape: dict[str, Any]) -> None:
    run, model = make(**shape)
    assert export(run.path, tmp_path / "out") == 0
    assert same(started(tmp_path / "out", model.config), model)
    assert same(started(tmp_path / "out" / "model.safetensors", model.config), model)
    assert same(started(run.artifacts(None).checkpoint(3), model.config), model)


@pytest.mark.parametrize(("shape", "name"), [({}, "pretrain_32.pth"), (EXPERTS, "pretrain_32_moe.pth")])
def test_minimind_gets_its_own_file(make: Make, tmp_path: Path, shape: dict[str, Any], name: str) -> None:
    run, model = make(**shape)
    assert export(run.path, tmp_path / "out", "--format", "minimind") == 0
    content = torch.load(tmp_path / "out" / name, weights_only=True)
    assert set(content) == set(model.state_dict())
    assert content["lm_head.weight"].data_ptr() == content["model.embed_tokens.weight"].data_ptr()
    assert all(torch.equal(content[key], tensor.half()) for key, tensor in model.state_dict().items())
    half = started(tmp_path / "out" / name, model.config).state_dict()
    assert all(torch.equal(half[key], tensor.half().float()) for key, tensor in model.state_dict().items())


def test_experts_in_one_tensor_and_several_files_are_read(make: Make, tmp_path: Path) -> None:
    _, model = make(**EXPERTS)
    tensors, fused = dict(model.state_dict()), dict[str, torch.Tensor]()
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{at}.{n}.{name}_proj.weight") for n in range(3)])
            for name in ("gate", "up", "down")
        )
        fused |= {f"{at}.gate_up_proj": torch.cat((gate, up), dim=1), f"{at}.down_proj": down}
    tensors.pop("lm_head.weight")
    assert set(split_experts(fused)) | set(tensors) | {"lm_head.weight"} == set(model.state_dict())
    save_file(fused, tmp_path / "model-2.safetensors")
    save_file(tensors, tmp_path / "model-1.safetensors")
    where = {**dict.fromkeys(tensors, "model-1.safetensors"), **dict.fromkeys(fused, "model-2.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(started(tmp_path, model.config), model)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../secret"}}))
    with pytest.raises(TrainingError, match="names no files of this directory"):
        started(tmp_path, model.config)


def test_what_no_shape_would_show_is_listed(make: Make, tmp_path: Path) -> None:
    run, _ = make(**EXPERTS)
    assert export(run.path, tmp_path / "out") == 0
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    other = {**EXPERTS, "num_experts_per_tok": 3, "norm_topk_prob": False}
    wanted = ModelConfig(**shape, **other, rope_theta=1e4, rms_norm_eps=1e-5, vocab_size=259)
    with pytest.raises(TrainingError) as refused:
        started(tmp_path / "out", wanted)
    for expected in (
        "rms_norm_eps is 1e-06 and the model group has 1e-05",
        "num_experts_per_tok is 2 and the model group has 3",
        "norm_topk_prob is True and the model group has False",
        "rope_theta is 1000000.0 and the model group has 10000.0",
    ):
        assert expected in str(refused.value)
    (tmp_path / "out" / "config.json").write_text("[]")
    with pytest.raises(TrainingError, match="holds no JSON object"):
        started(tmp_path / "out", wanted)


def test_each_entry_of_a_config_is_compared() -> None:
    model = ModelConfig(vocab_size=97)
    good = config_json(model, **IDS)
    assert list(config_problems(good, model)) == []
    changes: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "llama"}, "model_type is 'llama' and must be 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which this decoder does not have"),
        ({"attention_bias": True}, "attention_bias is True, which this decoder does not have"),
        ({"hidden_size": 64}, "hidden_size is 64 and the model group has 512"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is {'type': 'linear'}"),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope_theta is 500000.0"),
    ]
    for change, why in changes:
        (problem,) = config_problems({**good, **change}, model)
        assert problem.startswith(why)
    untied = {key: value for key, value in good.items() if key != "tie_word_embeddings"}
    assert list(config_problems(untied, model)) == ["tie_word_embeddings is False and the model group has True"]


def test_a_model_without_query_norms_is_no_qwen3(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedByHF):
        config_json(ModelConfig(vocab_size=97, qk_norm=False), **IDS)
    run, _ = make(qk_norm=False)
    assert export(run.path, tmp_path / "out") == 1
    assert "qk_norm is off" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(run.path, tmp_path / "out", "--format", "minimind") == 0


def test_the_newest_sound_checkpoint_is_taken_and_none_is_touched(make: Make, tmp_path: Path) -> None:
    run, _ = make(step=3)
    make(step=7)
    assert find_export_source(run.path).state.step == 7
    weights = run.artifacts(None).checkpoint(7) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find_export_source(run.path).state.step == 3
    assert weights.exists()
    with pytest.raises(ExportError, match=r"step-00000007 is damaged: model\.safetensors sha256"):
        find_export_source(weights.parent)
    milestone = retention.keep_weights(run.artifacts(None), 3, run.artifacts(None).checkpoint(3)).path
    assert find_export_source(milestone).path == milestone
    with pytest.raises(ExportError, match="holds no valid one"):
        find_export_source(tmp_path / "nowhere")


def test_an_export_replaces_nothing(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make()
    (tmp_path / "out").mkdir()
    assert export(run.path, tmp_path / "out") == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert export(run.path, tmp_path / "out") == 1
    assert "is not an empty directory" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert export(run.path, tmp_path / "again") == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == before


def test_an_export_is_on_disk_before_it_has_its_name(
    make: Make, tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make(str(tokenizer_directory))
    fsync, rename, synced = os.fsync, Path.rename, set[str]()

    def recorded_fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def checked_rename(path: Path, target: Path) -> Path:
        if target.name == "out":
            assert {file.name for file in path.iterdir()} <= synced
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", checked_rename)
    assert export(run.path, tmp_path / "out") == 0
    assert "model.safetensors" in synced


def test_another_tokenizer_is_refused(
    make: Make, tmp_path: Path, tokenizer_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make()
    assert export(run.path, tmp_path / "out", "--tokenizer", str(tokenizer_directory)) == 1
    assert "is not the one the checkpoint was trained with" in capsys.readouterr().err
    run.spec.unlink()
    assert export(run.path, tmp_path / "out") == 1
    assert "name its tokenizer with --tokenizer" in capsys.readouterr().err
    assert export(run.path, tmp_path / "out", "--tokenizer", "byte") == 0


def test_byte_is_written_as_the_library_has_it() -> None:
    library, own = byte_level_tokenizer(), load_tokenizer("byte")
    assert library.get_vocab_size() == own.vocab_size
    text = "".join(map(chr, range(1, 0x250))) + "\u4e2d\U0001f600 two  spaces\n"
    (ids,) = own.encode_batch([text])
    assert library.encode(text, add_special_tokens=False).ids == ids.tolist()
    assert library.decode(ids.tolist()) == text
    assert library.encode("<|im_start|>").ids == [1]


def test_a_trained_tokenizer_goes_along(make: Make, tmp_path: Path, tokenizer_directory: Path) -> None:
    run, _ = make(str(tokenizer_directory))
    assert export(run.path, tmp_path / "out") == 0
    original = (tokenizer_directory / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == original
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (described["bos_token"], described["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    assert (
        load_tokenizer(str(tmp_path / "out")).vocab_size
        == Library.from_file(str(tmp_path / "out/tokenizer.json")).get_vocab_size()
    )


def test_the_spec_of_the_newest_attempt_names_the_tokenizer(
    make: Make, tmp_path: Path, tokenizer_directory: Path
) -> None:
    run, _ = make(str(tokenizer_directory))
    right = run.spec.read_text()
    run.spec.write_text("{")
    for number, content in ((1, '{"data": {"data_path": "/x"}}'), (2, right), (3, "{")):
        RunDir(run.path).attempt(number).path.mkdir()
        run.attempt(number).spec.write_text(content)
    assert export(run.path, tmp_path / "out") == 0
