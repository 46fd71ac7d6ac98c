"""The side process generates the text that transformers generates from the export. Skipped without transformers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.conftest import Make
from tests.interop.test_export import EXPERTS, export
from trainyard.contract.generation import ChatMessage, GenerationTask
from trainyard.worker.generation.chat import render
from trainyard.worker.generation.loading import load_engine

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PROMPTS = ["Return the number of items", "", "\u4e2d\u6587 and na\u00efve", "x = [1, 2, 3]\n" * 20]


@pytest.mark.parametrize("shape", [{}, {**EXPERTS, "tie_word_embeddings": False}], ids=["dense", "experts"])
def test_the_greedy_text_is_the_same(
    make: Make, tmp_path: Path, tokenizer_directory: Path, shape: dict[str, Any]
) -> None:
    run, _ = make(str(tokenizer_directory), **shape)
    assert export(run.path, tmp_path / "out") == 0
    lines: list[dict[str, Any]] = []
    ours = load_engine(run.artifacts(None).checkpoint(3), str(tokenizer_directory), 1 << 24, lines.append)
    for number, prompt in enumerate(PROMPTS):
        ours.submit(GenerationTask(id=str(number), prompts=[prompt], max_new_tokens=40, temperature=0))
    while ours.busy:
        ours.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        for number, prompt in enumerate(PROMPTS):
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
            theirs = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            text = "".join(line["text"] for line in lines if line["id"] == str(number) and line["event"] == "text")
            assert text == theirs.encode(errors="replace").decode(), prompt


def test_a_conversation_has_the_prompt_of_transformers(tokenizer_directory: Path) -> None:
    template = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
    messages = [ChatMessage(role="system", content="be brief"), ChatMessage(role="user", content=" hi ")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_directory)
    turns = [message.model_dump() for message in messages]
    theirs = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert render(template, messages, tokenizer.bos_token, tokenizer.eos_token) == theirs
