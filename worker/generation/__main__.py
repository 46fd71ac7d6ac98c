"""``python -m trainyard.worker.generation CHECKPOINT``: generate text with one checkpoint, for the service.

The lines of both sides are described in `contract.generation`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trainyard.worker.sidecar import ServiceLink, lower_priority

if TYPE_CHECKING:
    from trainyard.worker.generation.engine import Engine

BEAT_SECONDS = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Serve until the service ends the process. Return 1 if the checkpoint cannot be loaded."""
    parser = argparse.ArgumentParser(prog="python -m trainyard.worker.generation", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help='or "byte"')
    parser.add_argument("--cache-bytes", type=int, required=True, help="memory for keys and values")
    options = parser.parse_args(arguments)
    # Before torch is imported: the service may end meanwhile.
    link = ServiceLink.from_environment()
    from trainyard.worker.generation.loading import CannotGenerate, load_engine

    try:
        engine = load_engine(options.checkpoint, options.tokenizer, options.cache_bytes, link.send)
    except CannotGenerate as error:
        link.send({"event": "failed", "message": str(error)})
        return 1
    # Not before: on a busy host the import of torch alone would take a minute.
    lower_priority()
    link.send({"event": "ready"})
    serve(link, engine)
    return 0


def serve(link: ServiceLink, engine: "Engine") -> None:
    """Do the tasks of the service, until it ends this process."""
    from trainyard.contract.generation import GenerationTask

    beat_at = time.monotonic()
    while True:
        message = link.receive(wait=not engine.busy)
        while message is not None:
            if "cancel" in message:
                engine.cancel(message["cancel"])
            else:
                engine.submit(GenerationTask.model_validate(message))
            message = link.receive(wait=False)
        engine.step()
        if time.monotonic() - beat_at >= BEAT_SECONDS:
            beat_at = time.monotonic()
            link.send({"event": "beat"})


if __name__ == "__main__":
    sys.exit(main())
