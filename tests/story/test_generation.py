"""Text of a real checkpoint by the real process: OpenAI's client, the command, and what is left if the service dies."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from benchmarks.corpus import write_docstrings
from tests.story.service_process import Served, until
from tests.story.test_story import spec as story_spec
from trainyard.contract.processes import ProcessIdentity, children

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

NAME = "writer"
SECONDS = 240.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    assert write_docstrings(file, 200) == 200
    return file


@pytest.fixture(scope="module")
def job(served: Served, corpus: Path) -> str:
    spec = {**story_spec(corpus, nproc_per_node=1), "name": NAME, "checkpoint": {"save_interval": 10}}
    spec["training"]["max_steps"] = 20
    job_id = served.submit(spec)
    served.wait(job_id, "succeeded")
    return job_id


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def generate(served: Served, job_id: str, step: int | str = "latest", **body: Any) -> dict[str, Any]:
    url = f"{served.url}/jobs/{job_id}/checkpoints/{step}/generate"
    answer = httpx2.post(url, json={"prompt": "Return the", "max_new_tokens": 24, **body}, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def helpers(served: Served) -> list[ProcessIdentity]:
    assert served.process is not None
    return children(served.process.pid)


def test_openai_s_own_client_lists_completes_streams_and_asks_for_logprobs(
    served: Served, job: str, stack: ExitStack
) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    # Closed here, and not by the garbage collector during another test.
    client = stack.enter_context(openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=SECONDS))
    assert [model.id for model in client.models.list()] == [f"{job}@latest", f"{job}@20", f"{job}@10"]
    assert client.models.retrieve(f"{NAME}@10").id == f"{NAME}@10"
    greedy = {"model": f"{NAME}@10", "prompt": "Return the", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**greedy)
    [choice] = whole.choices
    assert choice.text == generate(served, job, 10, temperature=0)["text"]
    assert (choice.finish_reason, whole.usage.completion_tokens) == ("length", 24)
    parts = list(client.completions.create(**greedy, stream=True))
    assert "".join(part.choices[0].text for part in parts) == choice.text
    assert parts[-1].choices[0].finish_reason == "length"
    scored = client.completions.create(**greedy, logprobs=3, echo=True)
    logprobs = scored.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 10 + 24
    assert all(value < 0 for value in logprobs.token_logprobs)
    assert all(len(top) == 3 for top in logprobs.top_logprobs)
    several = client.completions.create(**{**greedy, "temperature": 1}, n=3, seed=5)
    assert len({choice.text for choice in several.choices}) == 3
    assert several.choices[1].text == client.completions.create(**{**greedy, "temperature": 1}, seed=6).choices[0].text
    with pytest.raises(openai.NotFoundError, match="step 11"):
        client.completions.create(model=f"{NAME}@11", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=NAME, prompt="x", temperature=-1)


def test_twenty_clients_at_once_get_what_each_gets_alone(served: Served, job: str) -> None:
    alone = generate(served, job, seed=7, temperature=1.5)["text"]
    texts: dict[int, str] = {}

    def client(number: int) -> None:
        seed = {"seed": 7} if number % 2 else {}
        texts[number] = generate(served, job, temperature=1.5, **seed)["text"]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(texts) == 20
    assert {texts[number] for number in range(1, 20, 2)} == {alone}
    assert len(helpers(served)) <= 2


def test_the_command_prints_the_text_while_it_is_written(served: Served, job: str) -> None:
    def trainyard(*arguments: str, given: str = "") -> tuple[str, str]:
        program = "import sys; from trainyard.client.cli.main import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, *arguments, "--url", served.url]
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    options = ("--temperature", "0", "--max-new-tokens", "24")
    out, err = trainyard("generate", f"{NAME}@10", "Return the", *options)
    assert out == generate(served, job, 10, temperature=0)["text"] + "\n"
    assert "24 tokens by step 10 on cpu" in err
    out, err = trainyard("chat", NAME, *options, given="Return the\nnumber\n")
    assert out.startswith(generate(served, job, temperature=0)["text"])
    assert "no chat template" in err


def test_none_is_left_if_the_service_is_killed_and_none_if_it_stops(served: Served, job: str) -> None:
    generate(served, job)
    [helper] = [process for process in helpers(served) if process.alive()][:1]
    served.kill()
    until(lambda: not helper.alive())
    served.start()
    generate(served, job)
    started = helpers(served)
    assert started
    served.stop()
    assert not any(process.alive() for process in started)
    served.start()
