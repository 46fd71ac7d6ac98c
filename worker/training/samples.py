"""Samples: text that the model generates from the prompts of the spec."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from trainyard.contract.events import SampleEvent
from trainyard.contract.failpoints import hit
from trainyard.model.decoder import Decoder
from trainyard.worker.data.tokenizers import Tokenizer
from trainyard.worker.training.step import Precision

MAX_NEW_TOKENS = 64
MIN_NEW_TOKENS = 16


def generate_samples(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    step: int,
    precision: Precision,
    limit: int,
    *,
    in_step: bool = False,
) -> Iterator[SampleEvent]:
    """Yield the greedy continuation of each prompt, at most MAX_NEW_TOKENS long and within ``limit`` positions.

    ``in_step``: all ranks generate together, so each runs the model equally often, also after an end-of-text token.
    """
    for prompt in prompts:
        hit("samples.prompt", prompt)
        all_ids = [tokenizer.bos_id, *map(int, tokenizer.encode_batch([prompt])[0])]
        ids, new_tokens, note = fit_prompt(all_ids, limit)
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        with precision.autocast():
            eos_id = tokenizer.eos_id if not in_step else None
            output = model.generate(inputs, max_new_tokens=new_tokens, eos_token_id=eos_id)
        new_ids = itertools.takewhile(lambda token: token != tokenizer.eos_id, output[0, len(ids) :].tolist())
        text = tokenizer.decode(list(new_ids))
        # A lone surrogate cannot be written as JSON.
        yield SampleEvent(step=step, prompt=prompt, text=text.encode(errors="replace").decode(), note=note)


def fit_prompt(ids: list[int], limit: int) -> tuple[list[int], int, str | None]:
    """Return the ids that fit with their continuation into ``limit`` positions, its length, and a note about the rest.

    A long prompt gets fewer new tokens, but MIN_NEW_TOKENS of them if possible. If it still does not fit, its beginning
    after the first id (BOS) is left out, because the end of the prompt decides how it continues.
    """
    new_tokens = min(MAX_NEW_TOKENS, max(limit - len(ids), min(MIN_NEW_TOKENS, limit // 2)))
    cut = max(0, len(ids) - (limit - new_tokens))
    notes = [f"the first {cut:,} of {len(ids) - 1:,} tokens of the prompt are left out"] if cut else []
    notes += [f"at most {new_tokens} new tokens"] if new_tokens < MAX_NEW_TOKENS else []
    note = f"{', '.join(notes)}: the model has {limit:,} positions" if notes else None
    return [ids[0], *ids[1 + cut :]], new_tokens, note
