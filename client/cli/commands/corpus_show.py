"""`trainyard corpus show`: a corpus of the service, or files of this host."""

import re
from collections.abc import Mapping
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.commands.corpora import progress_text
from trainyard.client.cli.commands.local import exec_module
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import ago
from trainyard.client.exit_codes import Exit
from trainyard.client.types import TokenizedCorpus
from trainyard.contract.corpus_page import report_lines
from trainyard.contract.corpus_report import CorpusReport
from trainyard.contract.spec import paths_in

CORPUS_ID = re.compile(r"corpus_[a-z2-7]{1,30}")


def show(args: SimpleNamespace, console: Console) -> int:
    if len(args.corpus) == 1 and CORPUS_ID.fullmatch(args.corpus[0]):
        with Client(args.url, args.token) as trainyard:
            corpus = trainyard.corpus(args.corpus[0])
        if args.json:
            console.json(corpus)
        else:
            console.lines(corpus_page(corpus, trainyard.server_time))
        return Exit.SUCCEEDED
    options = ["--text-field", args.text_field, "--special-tokens", args.special_tokens]
    options += ["--json"] if args.json else []
    options += ["--tokenizer", args.tokenizer_path] if args.tokenizer_path is not None else []
    return exec_module(
        "trainyard.worker.data.inspection", ["show", *options, "--", *args.corpus], {"TRAINYARD_HOME": args.home}
    )


def corpus_page(corpus: TokenizedCorpus, now: datetime) -> list[str]:
    """Return a corpus of the service as text: its state, and its report if it is tokenized."""
    lines = [f"{corpus['id']}  {corpus['status']}{'' if corpus.get('cached') else ', not in the cache'}"]
    facts: dict[str, Any] = {
        "data": ", ".join(_paths(corpus.get("spec") or {})),
        "tokenizer": (corpus.get("spec") or {}).get("tokenizer_path"),
        "progress": progress_text(corpus) if corpus.get("progress") else None,
        "message": corpus.get("message"),
        "hint": (corpus.get("error") or {}).get("hint"),
        "jobs": ", ".join(corpus.get("jobs") or []) or "none",
        "created": ago(corpus.get("created_at"), now),
    }
    lines += [f"  {name:<11}{value}" for name, value in facts.items() if value]
    report = corpus.get("report")
    return [*lines, *(report_lines(CorpusReport.model_validate(report)) if report else [])]


def _paths(data: Mapping[str, Any]) -> list[str]:
    named = [(f"{source.get('name')}: ", source.get("path")) for source in data.get("sources") or []]
    return [name + path for name, given in named or [("", data.get("data_path"))] for path in paths_in(given)]
