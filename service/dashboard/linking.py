"""The page's modules as one script, so that it is a single request and no chain of them. Pure.

Each module becomes a function of its own that gives what it exports; one that is needed by another comes before it.
Understood is what the dashboard writes, each on a line of its own: ``import { a, b as c } from "./x.js";``,
``export { a } from "./x.js";``, and ``export`` before a const, a function or a class. Anything else is refused at the
start of the service, and so are modules that need each other.
"""

import posixpath
import re
from collections.abc import Mapping

IMPORT = re.compile(r'^import \{ ([^}]+) \} from "(\.[^"]+)";$', re.MULTILINE)
PASSED_ON = re.compile(r'^export \{ ([^}]+) \} from "(\.[^"]+)";$', re.MULTILINE)
NEEDED = re.compile(r'^(?:import|export) \{ [^}]+ \} from "(\.[^"]+)";$', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:const|class|function|async function) (\w+))", re.MULTILINE)
LEFT_OVER = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)


class CannotLink(RuntimeError):
    """A module has an import or export that is not understood, or modules need each other."""


def linked(modules: Mapping[str, str], entry: str) -> str:
    """One script that does what ``entry`` does. ``modules``: source by path. Raises CannotLink."""
    places: dict[str, int] = {}
    _place(modules, entry, (), places)
    return "".join(f"// {path}\n{_wrapped(path, modules[path], places)}" for path in places)


def _place(modules: Mapping[str, str], path: str, above: tuple[str, ...], places: dict[str, int]) -> None:
    """Number ``path`` behind all that it needs, in the order in which a browser would run them."""
    if path in above or path not in modules:
        raise CannotLink(" > ".join((*above, path)))
    for found in NEEDED.finditer(modules[path]):
        needed = _resolved(path, found[1])
        if needed not in places:
            _place(modules, needed, (*above, path), places)
    places[path] = len(places)


def _resolved(path: str, address: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), address))


def _wrapped(path: str, source: str, places: Mapping[str, int]) -> str:
    """The module as a function that is called once; its lines stay where they are."""

    def module(address: str) -> str:
        return f"module{places[_resolved(path, address)]}"

    given = EXPORT.findall(source)
    for names, address in PASSED_ON.findall(source):
        given += [f"{name}: {module(address)}.{name}" for name in _names(names)]
    body = IMPORT.sub(lambda found: f"const {{ {_bound(found[1])} }} = {module(found[2])};", source)
    body = EXPORT.sub("", PASSED_ON.sub("", body))
    left = LEFT_OVER.search(body)
    if left is not None:
        raise CannotLink(f"{path}: {left.group()}")
    return f"const module{places[path]} = (() => {{\n{body}\nreturn {{ {', '.join(given)} }};\n}})();\n"


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


def _bound(names: str) -> str:
    """``a, b as c`` as it is written where an object is taken apart."""
    return ", ".join(name.replace(" as ", ": ") for name in _names(names))
