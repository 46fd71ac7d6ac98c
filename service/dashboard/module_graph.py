"""Which scripts a page of the dashboard needs, read from the imports in the scripts themselves. Pure."""

import posixpath
import re
from collections.abc import Iterable, Mapping

ENTRY = "app.js"

_IMPORT = re.compile(r'^(?:import|export) \{[^}]*\} from "(\.[^"]+)";$', re.MULTILINE)
_ROUTE = re.compile(r'^addRoute\("([^"]+)", lazy\(\(\) => import\("(\.[^"]+)"\)', re.MULTILINE)


def needed_modules(sources: Mapping[str, str], entries: Iterable[str]) -> set[str]:
    """Return the names of ``entries`` and of all modules that they import, also indirectly. ``sources``: by name."""
    needed: set[str] = set()
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name not in needed and name in sources:
            needed.add(name)
            waiting += [_resolve(name, target) for target in _IMPORT.findall(sources[name])]
    return needed


def page_modules(sources: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    """Return the pages as (pattern of the path, name of the module), from the routes of the entry module."""
    routes = _ROUTE.findall(sources.get(ENTRY, ""))
    return [(re.compile(re.sub(r":\w+", "[^/]+", path)), _resolve(ENTRY, target)) for path, target in routes]


def _resolve(name: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
