"""Samples of generated text: which part of a prompt fits, and the note about the rest."""

from typing import Any

import pytest
import torch

from trainyard.contract.events import SampleEvent
from trainyard.worker.data.tokenizers import ByteTokenizer
from trainyard.worker.training.samples import generate_samples
from trainyard.worker.training.step import Precision

TOKENIZER = ByteTokenizer()


class Recorder:
    """A fake decoder: records its input, and continues with the letter x."""

    def parameters(self) -> Any:
        yield torch.zeros(1)

    def generate(self, inputs: torch.Tensor, *, max_new_tokens: int, eos_token_id: int) -> torch.Tensor:
        self.ids, self.new = inputs[0].tolist(), max_new_tokens
        (x,) = TOKENIZER.encode_batch(["x"])[0]
        return torch.cat([inputs, torch.full((1, max_new_tokens), int(x))], dim=1)


def sample(prompt: str, limit: int) -> tuple[Recorder, SampleEvent]:
    model = Recorder()
    precision = Precision("cpu", torch.float32)
    (event,) = generate_samples(model, TOKENIZER, [prompt], 7, precision, limit)  # type: ignore[arg-type]
    return model, event


@pytest.mark.parametrize("limit", [2, 3, 16, 32, 33, 64, 100, 200])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 31, 32, 63, 99, 150, 400])
def test_prompt_and_text_fit_and_the_end_of_the_prompt_is_kept(length: int, limit: int) -> None:
    prompt = "".join(chr(ord("a") + n % 26) for n in range(length))
    model, event = sample(prompt, limit)
    assert len(model.ids) + model.new <= limit
    assert model.ids[0] == TOKENIZER.bos_id
    kept = TOKENIZER.decode(model.ids[1:])
    assert prompt.endswith(kept)
    assert kept or not prompt or limit < 4, "a prompt is not dropped"
    assert model.new >= min(16, limit // 2)
    assert model.new == 64 or len(kept) == length or model.new <= 16, "the prompt is cut last"
    assert event.text == "x" * model.new
    assert (event.note is None) == (kept == prompt and model.new == 64)


def test_the_note_names_what_was_cut() -> None:
    assert sample("a" * 20, 200)[1].note is None
    assert sample("a" * 79, 100)[1].note == "at most 20 new tokens: the model has 100 positions"
    note = (
        "the first 1,317 of 1,400 tokens of the prompt are left out, at most 16 new tokens: the model has 100 positions"
    )
    assert sample("a" * 1400, 100)[1].note == note
