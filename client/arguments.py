"""The command line of `trainyard`. Nothing heavy is imported here: ``--help`` must answer at once.

Each subcommand names the function that runs it as "module:function"; `client.cli` imports that module and no other.
"""

import argparse
import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from contract.access import Scope

SUBMIT = "submit"
PLAN = "plan"
COMPLETE = "__complete"
"""What a shell asks at each Tab; not for people."""
OWN_SUBMIT_FLAGS = frozenset(
    {"--help", "--name", "--labels", "--set", "--yes", "--watch", "--json", "--timeout", "--url", "--token"}
)


_RULES = "nonfinite, no_progress=MINUTES, plateau=STEPS, eval_loss_below=VALUE; may be repeated"


class Parser(argparse.ArgumentParser):
    """Whole option names only: an abbreviation would change its meaning with the next option that is added."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but what is left over is refused here, where it is known what was meant."""
        parsed, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"there is no {left[0]} here{_meant(left[0], self._option_string_actions)}")
        return parsed, left

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        near = _meant(value, action.choices) if action.choices is not None and value not in action.choices else ""
        if near:
            raise argparse.ArgumentError(action, f"there is no {value!r}{near}")
        super()._check_value(action, value)


def _meant(given: str, there: Iterable[str]) -> str:
    near = get_close_matches(given.partition("=")[0], list(there), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, but for the flags of `submit`, which need the job spec."""
    parser = Parser(
        prog="trainyard",
        description="Launch, watch, interrupt and resume pretraining runs.",
        epilog="Exit codes: 0 succeeded, 1 the service said no, 2 wrong usage, 3 no service there, 4 not authorised, "
        "10 the run failed, 11 cancelled, 12 paused or interrupted, 124 --timeout passed, 130 detached. "
        "Settings: TRAINYARD_URL, TRAINYARD_TOKEN, TRAINYARD_HOME, TRAINYARD_DATABASE_URL.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_local(commands)
    commands.add_parser(SUBMIT, help="launch a run: SPEC.json, or MiniMind's flags", add_help=False)
    commands.add_parser(PLAN, help="what a run would be: the same arguments as submit", add_help=False)
    _add_reading(commands)
    _add_following(commands)
    _add_acting(commands)
    _add_tokens(commands.add_parser("token", help="named tokens of the service, for admins"))
    _add_webhooks(commands.add_parser("webhook", help="who is told of jobs, and whether it arrived"))
    return parser


def add_service_options(parser: argparse.ArgumentParser) -> None:
    """Where the service is and who asks."""
    parser.add_argument("--url", help="of the service (TRAINYARD_URL, else http://127.0.0.1:8000)")
    parser.add_argument("--token", help="bearer token (TRAINYARD_TOKEN)")


def submit_parser(command: str = SUBMIT) -> argparse.ArgumentParser:
    """`submit` or `plan` without the flags of the spec: `client.flags.add_leaf_flags` adds them."""
    does = {SUBMIT: "Launch a run", PLAN: "Show what a run would be, and launch nothing,"}[command]
    more = " [-y] [--watch]" if command == SUBMIT else " [--json]"
    parser = Parser(
        prog=f"trainyard {command}",
        usage=f"trainyard {command} [SPEC.json | -] [--data_path FILE --batch_size 64 ...]{more}",
        description=f"{does} from a spec file (- reads it from stdin), from MiniMind's flags, or from both: "
        "flags override the file. Relative paths are taken from the working directory.",
    )
    parser.add_argument("spec", nargs="?", metavar="SPEC.json", help="job spec; - is stdin")
    parser.add_argument("--name", default=argparse.SUPPRESS, help="of the job")
    parser.add_argument("--labels", nargs="+", action="extend", metavar="K=V", default=[], help="may be repeated")
    parser.add_argument("--set", action="append", metavar="GROUP.FIELD=JSON", default=[], help="any field, typed")
    if command == SUBMIT:
        parser.add_argument("-y", "--yes", action="store_true", help="do not ask, and submit in spite of warnings")
        parser.add_argument("--watch", action="store_true", help="follow the run; its end decides the exit code")
        parser.add_argument("--timeout", type=seconds, metavar="SECONDS", help="with --watch: follow no longer")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    add_service_options(parser)
    return parser


def _add(commands: Any, name: str, run: str, explained: str, *, job: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=explained, description=explained)
    parser.set_defaults(run=run)
    if job:
        parser.add_argument("job", metavar="JOB", help="id, or a name that only one job has")
    return parser


def _add_remote(commands: Any, name: str, run: str, explained: str, *, job: bool = True) -> argparse.ArgumentParser:
    parser = _add(commands, name, run, explained, job=job)
    parser.add_argument("--json", action="store_true", help="JSON, as the API has it")
    add_service_options(parser)
    return parser


def _add_local(commands: Any) -> None:
    demo = _add(commands, "demo", "client.demo.story:run", "a real run on this machine, from nothing")
    demo.add_argument("--home", help="folder for the demo (default: a new one in ./trainyard-home)")
    demo.add_argument("--keep", action="store_true", help="leave the service running at the end")
    serve = _add(commands, "serve", "client.local:serve", "run the service in the foreground")
    serve.add_argument("--host", help="address to bind (127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to bind (8000)")
    serve.add_argument("--no-scheduler", action="store_true", help="only answer: another service here schedules")
    _add_store_options(serve)
    _add_tools(commands)


def _add_store_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", help="folder of everything the service keeps (./trainyard-home)")
    parser.add_argument("--database-url", help="default: SQLite in the home")


def _add_tools(commands: Any) -> None:
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer").add_subparsers(
        metavar="train", required=True
    )
    train = _add(tokenizer, "train", "client.local:train_tokenizer", "train a byte-level BPE on a corpus")
    train.add_argument("file", metavar="FILE", help="corpus: JSONL, text, gzip, zstandard or parquet")
    train.add_argument("--vocab-size", type=int, default=6400, help="tokens, special ones included (6400)")
    train.add_argument("--out", required=True, metavar="DIR", help="folder for tokenizer.json")
    train.add_argument("--text-field", default="text", help="key of the text (text)")
    shell = _add(commands, "completion", "client.completion:completion", "what a shell reads to complete on Tab")
    shell.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    _add_corpora(commands.add_parser("corpus", help="look a corpus over; those that are tokenized here"))
    _add_database(commands.add_parser("db", help="the service's database"))


def _add_corpora(parser: argparse.ArgumentParser) -> None:
    corpus = parser.add_subparsers(metavar="check|list|prune", required=True)
    check = _add(corpus, "check", "client.local:check_corpus", "count the texts, name every line that cannot be read")
    check.add_argument("file", metavar="FILE", help="corpus: JSONL, text, gzip, zstandard or parquet")
    check.add_argument("--text-field", default="text", help="key of the text (text)")
    check.add_argument("--json", action="store_true", help="one JSON document")
    shown = _add(corpus, "list", "client.local:list_corpora", "what is in this host's cache of tokenized corpora")
    shown.add_argument("--json", action="store_true", help="one JSON document")
    prune = _add(corpus, "prune", "client.local:prune_corpora", "remove tokenized corpora that nobody uses, now")
    for each in (shown, prune):
        each.add_argument("--home", help="folder of everything the service keeps (./trainyard-home)")
    prune.add_argument("--days", help="those unused for longer; 0: of any age (TRAINYARD_CORPUS_DAYS)")
    prune.add_argument("--bytes", help="the least used until the cache is no larger (TRAINYARD_CORPUS_BYTES)")


def _add_database(parser: argparse.ArgumentParser) -> None:
    database = parser.add_subparsers(metavar="upgrade|copy|backup", required=True)
    upgrade = _add(database, "upgrade", "client.local:upgrade_database", "bring the tables to this version")
    _add_store_options(upgrade)
    copy = _add(database, "copy", "client.local:copy_database", "move everything into another, empty database")
    for name, explained in (("source", "FROM"), ("target", "TO")):
        copy.add_argument(name, metavar=explained, help="URL of a database, a SQLite file, or a home")
    backup = _add(database, "backup", "client.local:back_up_database", "copy the SQLite database while it is in use")
    backup.add_argument("file", metavar="FILE", help="where to; must not be there yet")
    _add_store_options(backup)


def _add_tokens(parser: argparse.ArgumentParser) -> None:
    tokens = parser.add_subparsers(metavar="create|list|limit|rotate|revoke", required=True)
    create = _add_token(tokens, "create", "make a token; its secret is printed once")
    create.add_argument("--scope", choices=list(Scope), default=Scope.READ, help="what it may do (read)")
    _add_expiry(create)
    _add_quotas(create)
    _add_remote(tokens, "list", "client.access:list_tokens", "the tokens and what they have running", job=False)
    _add_quotas(_add_token(tokens, "limit", "change the quotas of a token; what is left out is no limit"))
    rotate = _add_token(tokens, "rotate", "another secret for a token, printed once")
    rotate.add_argument("--overlap", default="0", metavar="TIME", help="the old one stays good for so long: 1h, 2d (0)")
    _add_expiry(rotate)
    _add_token(tokens, "revoke", "let nobody in by a token any more")


def _add_webhooks(parser: argparse.ArgumentParser) -> None:
    names = "create|list|show|deliveries|test|redeliver|rotate|enable|disable|delete"
    webhooks = parser.add_subparsers(metavar=names, required=True)
    create = _add_remote(webhooks, "create", "client.hooking:create", "send events; prints the secret, once", job=False)
    create.add_argument("to", metavar="URL", help="where to: http or https")
    create.add_argument(
        "--event", action="append", metavar="TYPE", help="job.failed, ..., or * (every change of status)"
    )
    create.add_argument("--rule", action="append", metavar="RULE", default=[], help=_RULES)
    create.add_argument("--label", action="append", metavar="K=V", default=[], help="only of jobs with this label")
    create.add_argument("--job", metavar="JOB", help="only of this job: its id, or a name that only one job has")
    create.add_argument("--description", help="for people")
    _add_remote(webhooks, "list", "client.hooking:list_webhooks", "all of them, newest first", job=False)
    _add_webhook(webhooks, "show", "one of them")
    sent = _add_webhook(webhooks, "deliveries", "what was sent and what waits, newest first")
    sent.add_argument("--state", choices=("pending", "delivered", "failed"), help="only those")
    sent.add_argument("--limit", type=positive, default=20, help="at most so many (20)")
    test = _add_webhook(webhooks, "test", "send webhook.test, and say what came of it")
    test.add_argument("--timeout", type=seconds, metavar="SECONDS", default=20.0, help="wait no longer (20)")
    again = _add_webhook(webhooks, "redeliver", "send one once more, under the same event id")
    again.add_argument("delivery", metavar="DELIVERY", help="its id: `trainyard webhook deliveries` lists them")
    _add_webhook(webhooks, "rotate", "another secret, printed once; for a day both sign")
    _add_webhook(webhooks, "enable", "switch it on, anew")
    _add_webhook(webhooks, "disable", "switch it off")
    gone = _add_webhook(webhooks, "delete", "remove it, with its log")
    gone.add_argument("-y", "--yes", action="store_true", help="do not ask")


def _add_webhook(webhooks: Any, name: str, explained: str) -> argparse.ArgumentParser:
    parser = _add_remote(webhooks, name, f"client.hooking:{name}", explained, job=False)
    parser.add_argument("webhook", metavar="WEBHOOK", help="its id")
    return parser


def _add_token(tokens: Any, name: str, explained: str) -> argparse.ArgumentParser:
    parser = _add_remote(tokens, name, f"client.access:{name}", explained, job=False)
    parser.add_argument("name", metavar="NAME", help="of the token")
    return parser


def _add_expiry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expires-in", metavar="TIME", help="it is good for so long: 12h, 90d")


def _add_quotas(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-jobs", type=int, metavar="N", help="so many jobs queued or running (no limit)")
    parser.add_argument("--max-devices", type=int, metavar="N", help="so many devices for them together (no limit)")


def _add_reading(commands: Any) -> None:
    jobs = _add_remote(commands, "list", "client.reading:list_jobs", "the jobs, newest first", job=False)
    jobs.add_argument("--status", help="only jobs with this status")
    jobs.add_argument("--label", action="append", metavar="K=V", default=[], help="only jobs with this label")
    jobs.add_argument("--name", help="only jobs with this name")
    jobs.add_argument("--limit", type=positive, default=20, help="at most so many (20)")
    _add_remote(commands, "show", "client.reading:show", "one job: how it is, why, and what can be done")
    metrics = _add_remote(commands, "metrics", "client.reading:metrics", "the points of the curve")
    metrics.add_argument("--csv", action="store_true", help="every field, comma-separated")
    metrics.add_argument("--after-step", type=int, default=0, metavar="STEP", help="only points behind this step")
    metrics.add_argument("--attempt", type=positive, help="of this attempt alone")
    metrics.add_argument("--lineage", action="store_true", help="of a fork: its ancestors' points first")
    _add_remote(commands, "events", "client.reading:events", "what happened to the job, and who asked for it")
    saved = _add_remote(commands, "checkpoints", "client.checkpoints:checkpoints", "the checkpoints, newest first")
    saved.add_argument("--download", type=int, metavar="STEP", help="fetch the files of this checkpoint")
    saved.add_argument("--out", metavar="DIR", help="with --download: folder for them (./JOB-step-STEP)")
    saved.add_argument("--delete", type=int, metavar="STEP", help="remove this checkpoint; never the last valid one")
    saved.add_argument("-y", "--yes", action="store_true", help="with --delete: do not ask")
    _add_remote(commands, "attempts", "client.reading:attempts", "the launches of the job and how they ended")
    _add_remote(commands, "samples", "client.reading:samples", "texts the model wrote")
    _add_remote(commands, "devices", "client.reading:devices", "the devices and who has them", job=False)
    _add_remote(commands, "version", "client.reading:version", "versions of this command and of the service", job=False)


def positive(text: str) -> int:
    """1 or more."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)


def seconds(text: str) -> float:
    """A time to wait, which ends."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be seconds: a number, 0 or more")
    return value


def rank(text: str) -> int | str:
    """A rank's number, or ``agent``."""
    return text if text == "agent" else int(text)


def _add_following(commands: Any) -> None:
    watch = _add_remote(commands, "watch", "client.watch:watch", "follow a run until it ends")
    watch.add_argument("--timeout", type=seconds, metavar="SECONDS", help="follow no longer; exit 124")
    logs = _add_remote(commands, "logs", "client.logs:logs", "what a rank printed")
    logs.add_argument("--follow", "-f", action="store_true", help="go on until the run ends")
    logs.add_argument("--rank", type=rank, metavar="RANK", help="which rank (0), or agent: what torchrun said")
    logs.add_argument("--attempt", type=positive, help="which attempt (the newest)")
    logs.add_argument("--tail", type=positive, metavar="LINES", help="only the last lines")
    logs.add_argument("--timeout", type=seconds, metavar="SECONDS", help="with --follow: no longer; exit 124")


def _add_acting(commands: Any) -> None:
    _add_remote(commands, "pause", "client.acting:pause", "save and stop, to be resumed")
    resume = _add_remote(commands, "resume", "client.acting:resume", "go on from the newest valid checkpoint")
    resume.add_argument("--epochs", type=int, help="raise the number of epochs")
    resume.add_argument("--max_steps", "--max-steps", type=int, help="raise the number of steps")
    resume.add_argument("--step", type=int, help="go back to the checkpoint of this step; newer ones are set aside")
    resume.add_argument("--set", action="append", default=[], metavar="resources.FIELD=JSON", help="other resources")
    _add_remote(commands, "save", "client.acting:save", "write a checkpoint at the next step, and go on")
    fork = _add_remote(commands, "fork", "client.acting:fork", "a new job from a checkpoint of this one")
    fork.add_argument("--step", type=int, help="the checkpoint to begin at (the newest full one)")
    fork.add_argument("--set", action="append", default=[], metavar="GROUP.FIELD=JSON", help="what is to be different")
    fork.add_argument("--name", help="of the new job")
    fork.add_argument("--restart-data", action="store_true", help="begin data and schedule anew (else they go on)")
    export = _add_remote(commands, "export", "client.acting:export", "write a checkpoint as others load it")
    export.add_argument("--step", type=int, help="which checkpoint (the newest)")
    export.add_argument("--format", choices=("hf", "minimind"), default="hf", help="Hugging Face, or MiniMind's .pth")
    _add_remote(commands, "cancel", "client.acting:cancel", "save and stop for good")
    _add_remote(commands, "kill", "client.acting:kill", "stop now, nothing saved")
    delete = _add_remote(commands, "delete", "client.acting:delete", "remove a job that has ended, with its files")
    delete.add_argument("-y", "--yes", action="store_true", help="do not ask")
