"""`trainyard corpus build`: tokenize a corpus on the service's CPUs, and show the progress."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import duration, size
from trainyard.client.cli.spec_flags import with_absolute_paths
from trainyard.client.errors import InvalidSpec
from trainyard.client.exit_codes import Exit, UsageError
from trainyard.client.types import TokenizedCorpus
from trainyard.contract.status import CorpusStatus

BUILT_IN_TOKENIZER = "byte"


def build(args: SimpleNamespace, console: Console) -> int:
    data = _data(args)
    with Client(args.url, args.token) as trainyard:
        try:
            corpus = trainyard.build_corpus(data)
        except InvalidSpec as error:
            console.error(f"trainyard: {error.detail}")
            for problem in error.errors:
                # A wrong path is printed in full, because the user may have typed a relative one.
                value = data.get(problem.pointer[1:])
                shown = f" ({value})" if isinstance(value, str) else ""
                console.error(f"  {problem.pointer or 'the corpus'}: {problem.message}{shown}")
            return Exit.REJECTED
        if not args.no_wait:
            progress = ProgressPrinter(console)
            corpus = trainyard.wait_for_corpus(corpus["id"], args.timeout, on_progress=progress.show)
            progress.end()
    return _report(corpus, args, console)


def _data(args: SimpleNamespace) -> dict[str, Any]:
    """Return the body of the request. Paths are those of this host, which the service shares."""
    if bool(args.paths) == bool(args.spec):
        raise UsageError("give PATH..., or --spec SPEC.json")
    data = _data_of_spec(Path(args.spec)) if args.spec else {}
    if args.paths:
        paths = [os.path.abspath(path) for path in args.paths]
        data["data_path"] = paths[0] if len(paths) == 1 else paths
    if args.tokenizer_path is not None:
        tokenizer = args.tokenizer_path
        data["tokenizer_path"] = tokenizer if tokenizer == BUILT_IN_TOKENIZER else os.path.abspath(tokenizer)
    for leaf in ("text_field", "special_tokens"):
        if getattr(args, leaf) is not None:
            data[leaf] = getattr(args, leaf)
    return data


def _data_of_spec(file: Path) -> dict[str, Any]:
    try:
        spec = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    data = spec.get("data") if isinstance(spec, dict) else None
    if not isinstance(data, dict):
        raise UsageError(f'{file} must hold a job spec with "data"')
    resolved: dict[str, Any] = with_absolute_paths({"data": data}, Path.cwd())["data"]
    return resolved


class ProgressPrinter:
    """Prints the progress of a corpus on stderr: one line that is replaced on a terminal, otherwise one every 10 %."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._redraws = console.err.isatty()
        self._shown: str | None = None
        self._tenth = -1

    def show(self, corpus: TokenizedCorpus) -> None:
        text = progress_text(corpus)
        if text == self._shown:
            return
        if self._redraws:
            print(f"\r{text}\x1b[K", end="", file=self._console.err, flush=True)
        else:
            tenth = int((corpus.get("progress") or {}).get("percent") or 0) // 10
            if tenth == self._tenth:
                return
            self._tenth = tenth
            self._console.error(text)
        self._shown = text

    def end(self) -> None:
        if self._redraws and self._shown is not None:
            print(file=self._console.err, flush=True)


def progress_text(corpus: TokenizedCorpus) -> str:
    """Return e.g. ``preparing: 12.0 MB of 24.0 MB (50 %), 1.5 MB/s, 8 s left``."""
    progress = corpus.get("progress")
    done, total = (progress.get("done_bytes"), progress.get("total_bytes")) if progress else (None, None)
    if progress is None or done is None or not total:
        return corpus["status"]
    text = f"{corpus['status']}: {size(done)} of {size(total)} ({100 * done / total:.0f} %)"
    rate, eta = progress.get("bytes_per_second"), progress.get("eta_seconds")
    text += f", {size(rate)}/s" if rate else ""
    return text + (f", {duration(eta)} left" if eta is not None else "")


def _report(corpus: TokenizedCorpus, args: SimpleNamespace, console: Console) -> int:
    if args.json:
        console.json(corpus)
    else:
        console.data(corpus["id"])
        error = corpus.get("error")
        console.error(f"{corpus['status']}{': ' + str(corpus['message']) if corpus.get('message') else ''}")
        if error and error.get("hint"):
            console.error(f"  {error['hint']}")
    failed = corpus["status"] in (CorpusStatus.FAILED, CorpusStatus.STOPPED)
    return Exit.RUN_FAILED if failed else Exit.SUCCEEDED
