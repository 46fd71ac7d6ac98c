"""Texts the model writes at each save, so that a person sees what a loss means."""

from collections.abc import Iterator, Sequence

import torch

from trainyard.contract.events import Sample
from trainyard.model.decoder import Decoder
from trainyard.worker.step import Precision
from trainyard.worker.tokenizers import Tokenizer

NEW_TOKENS = 64


def written(
    model: Decoder, codec: Tokenizer, prompts: Sequence[str], step: int, precision: Precision, limit: int
) -> Iterator[Sample]:
    """The likeliest continuation of each prompt, at most NEW_TOKENS long and within ``limit`` positions."""
    for prompt in prompts:
        ids = [codec.bos_id, *map(int, codec.encode_batch([prompt])[0])][: max(1, limit - NEW_TOKENS)]
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        with precision.autocast():
            output = model.generate(inputs, max_new_tokens=NEW_TOKENS, eos_token_id=codec.eos_id)
        text = codec.decode([token for token in output[0, len(ids) :].tolist() if token != codec.eos_id])
        yield Sample(step=step, prompt=prompt, text=_encodable(text))


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
