"""Hugging Face's transformers loads what we export, and computes and writes the same. Skipped where it is missing."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.conftest import Make
from tests.interop.test_export import EXPERTS, export, same, started
from trainyard.worker.data.tokenizers import load_tokenizer

transformers = pytest.importorskip("transformers")

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "untied": {"tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "head_dim": 16},
    "experts": EXPERTS,
    "not renormalised": {**EXPERTS, "norm_topk_prob": False, "tie_word_embeddings": False},
}


def loaded(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, said = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_logits_and_the_greedy_text_are_the_same(
    make: Make, tmp_path: Path, tokenizer_directory: Path, shape: dict[str, Any]
) -> None:
    run, ours = make(str(tokenizer_directory), **shape)
    assert export(run.path, tmp_path / "out") == 0
    theirs = loaded(tmp_path / "out")
    assert type(theirs).__name__ == ("Qwen3MoeForCausalLM" if ours.config.use_moe else "Qwen3ForCausalLM")
    ids = torch.randint(3, 400, (2, 33), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = ours(ids).logits
        assert logits is not None
        assert logits.std() > 0.1
        assert (theirs(ids).logits - logits).abs().max() < 1e-4
    own, foreign = (
        load_tokenizer(str(tokenizer_directory)),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert (foreign.bos_token_id, foreign.eos_token_id, foreign.pad_token_id) == (1, 2, 0)
    prompt = "Return the number of items"
    assert foreign(prompt, add_special_tokens=False)["input_ids"] == own.encode_batch([prompt])[0].tolist()
    begin = torch.tensor([[own.bos_id, *own.encode_batch([prompt])[0].tolist()]])
    mine = ours.generate(begin, max_new_tokens=24, eos_token_id=own.eos_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = theirs.generate(begin, attention_mask=torch.ones_like(begin), max_new_tokens=24)
    assert written.tolist() == mine.tolist()
    assert foreign.decode(written[0], skip_special_tokens=True) == own.decode(mine[0].tolist())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_run_starts_from_what_transformers_saved(make: Make, tmp_path: Path, shape: dict[str, Any]) -> None:
    run, ours = make(**shape)
    assert export(run.path, tmp_path / "out") == 0
    loaded(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    assert same(started(tmp_path / "theirs", ours.config), ours)


def test_byte_is_a_tokenizer_of_theirs(make: Make, tmp_path: Path) -> None:
    run, _ = make()
    assert export(run.path, tmp_path / "out") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "na\u00efve \u4e2d\u6587 \U0001f600\n\ttab"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [3 + byte for byte in text.encode()]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
