"""The public names of `import trainyard` as text: `python -m tests.client.public_api > tests/client/public_api.txt`."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import trainyard
from trainyard.client.async_client import AsyncWebhooks
from trainyard.client.webhooks import Webhooks

NOT_OURS = frozenset({*dir(dict), *dir(Exception)}) - {"update"}
MADE_BY_USERS = ("AsyncClient", "Client", "RetryPolicy")


def lines() -> Iterator[str]:
    """Yield each name with its methods and their signatures, in alphabetical order."""
    kinds = {name: getattr(trainyard, name) for name in trainyard.__all__ if name not in ("JobSpec", "__version__")}
    kinds |= {"Client.webhooks": Webhooks, "AsyncClient.webhooks": AsyncWebhooks}
    for name, kind in sorted(kinds.items()):
        if issubclass(kind, Exception):
            code = "that of the response" if issubclass(kind, trainyard.ApiError) else kind.code
            yield f"{name}({kind.__mro__[1].__name__}): code {code}"
            continue
        yield f"{name}{readable(kind) if name in MADE_BY_USERS else ''}"
        for method, value in sorted(inspect.getmembers(kind, inspect.isfunction)):
            if not method.startswith("_") and method not in NOT_OURS:
                yield f"    {method}{readable(value)}"
        if name != "AsyncJob":
            yield from (f"    {field}" for field in sorted(fields(kind)))


def fields(kind: type) -> Iterator[str]:
    """Yield the public attributes of a job or a dataclass."""
    for base in kind.__mro__:
        if base.__module__.startswith("trainyard"):
            for name, annotation in vars(base).get("__annotations__", {}).items():
                if not name.startswith("_"):
                    yield f"{name}: {plain(annotation)}"


def readable(value: Any) -> str:
    """Return the arguments and the result of a callable, without `self`. "await": it is a coroutine."""
    signature = inspect.signature(value)
    own = [each for each in signature.parameters.values() if each.name not in ("self", "_")]
    text = plain(str(signature.replace(parameters=own)))
    if inspect.iscoroutinefunction(value):
        text = text.replace("-> ", "-> await ")
    return re.sub(r"Coroutine\[Any, Any, (.*)\]$", r"await \1", text).removesuffix(" -> None")


def plain(annotation: Any) -> str:
    """Return a type without its modules and quotes."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:[a-z_0-9]+\.)+(?=[A-Za-z])", "", text).replace("~T", "T")
    return re.sub(r"-> '(.*)'$", r"-> \1", text)


if __name__ == "__main__":
    print("\n".join(lines()))
