"""YAML files with line numbers, and where the catalogue's files are.

Reading goes text -> node tree (ruamel.yaml, YAML 1.2) -> plain values plus the line of every key, so that whatever is
wrong with a value can be said with the place it stands at. YAML 1.2 matters: ``1e9`` is a number and ``on`` is a word.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    AnyModel = TypeVar("AnyModel", bound=BaseModel)

#: Names the folder that is searched first, before ./configs and the project's own.
CONFIGS_VARIABLE = "TOKENYIELD_CONFIGS"
_NAMES_LISTED = 20  # as many known names as an error message lists
_YAML_SUFFIXES = (".yaml", ".yml")

Location = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed YAML file: plain values, and the 1-based line of every mapping key and sequence item by its path."""

    name: str
    data: Any
    lines: dict[Location, int]

    def line(self, location: Location = ()) -> int | None:
        """Line of ``location``, or of its nearest enclosing entry that has one."""
        parts = tuple(location)
        while parts and parts not in self.lines:
            parts = parts[:-1]
        return self.lines.get(parts)

    def where(self, location: Location = ()) -> str:
        """``file.yaml:14: load.rate_per_s`` for an error message."""
        line = self.line(location)
        place = f"{self.name}:{line}" if line is not None else self.name
        field = dotted(location)
        return f"{place}: {field}" if field else place

    def bad(self, what: str, location: Location = (), next_step: str | None = None) -> BadInput:
        """A :class:`BadInput` at ``location``; the caller raises it."""
        return BadInput(what, where=self.where(location), next_step=next_step)


def dotted(location: Iterable[Any]) -> str:
    """``('load', 'rates', 0)`` -> ``load.rates[0]``."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text


def read_text(path: Path) -> str:
    """The file as UTF-8 text; raises BadInput when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput("no such file", where=str(path)) from None
    except IsADirectoryError:
        raise BadInput("is a folder, expected a file", where=str(path)) from None
    except UnicodeDecodeError as e:
        raise BadInput(f"not UTF-8 text (byte {e.start})", where=str(path), next_step="save it as UTF-8") from None
    except OSError as e:
        raise BadInput(f"cannot be read: {e.strerror or e}", where=str(path)) from None


def load_yaml(path: str | os.PathLike[str]) -> Document:
    """Parse one YAML file. Raises BadInput with the line for broken YAML, duplicate keys and unreadable files."""
    return parse_yaml(read_text(Path(path)), shown_path(Path(path)))


def parse_yaml(text: str, name: str = "<text>") -> Document:
    """Parse YAML text; ``name`` stands for the file in messages. An empty text gives ``data=None``."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(e.problem or e.context or "").split())
        raise BadInput(f"not valid YAML: {problem}", where=f"{name}{line}") from None
    except (YAMLError, ValueError, RecursionError) as e:
        raise BadInput(f"not valid YAML: {' '.join(str(e).split())[:200]}", where=name) from None
    lines: dict[Location, int] = {}
    if root is None:
        return Document(name, None, lines)
    return Document(name, _NodeReader(yaml, name, lines).value(root, ()), lines)


class _NodeReader:
    """Turns a node tree into plain values and notes the line of every entry."""

    def __init__(self, yaml: Any, name: str, lines: dict[Location, int]) -> None:
        self._constructor = yaml.constructor
        self._name = name
        self._lines = lines
        self._open: set[int] = set()  # nodes being read: an alias inside its own anchor would never end

    def value(self, node: Any, location: Location) -> Any:
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        self._lines.setdefault(location, node.start_mark.line + 1)
        if not isinstance(node, MappingNode | SequenceNode):
            return self._scalar(node)
        if id(node) in self._open or len(location) > 64:
            raise BadInput("nested too deep", where=f"{self._name}:{node.start_mark.line + 1}")
        self._open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                return [self.value(item, (*location, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, location)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: Any, location: Location) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                sources = value_node.value if isinstance(value_node.value, list) else [value_node]
                many = sources and not isinstance(sources[0], tuple)
                for source in sources if many else [value_node]:
                    inherited = self.value(source, location)
                    if not isinstance(inherited, dict):
                        raise BadInput("<<: needs a mapping", where=f"{self._name}:{line}")
                    merged = {**inherited, **merged}
                continue
            key = self.value(key_node, (*location, "?"))
            self._lines.pop((*location, "?"), None)
            if isinstance(key, dict | list):
                raise BadInput("a key must be a word or a number", where=f"{self._name}:{line}")
            if key in result:
                what = f"{dotted((*location, key))} is given twice"
                raise BadInput(what, where=f"{self._name}:{line}", next_step="keep one of them")
            self._lines[(*location, key)] = line
            result[key] = self.value(value_node, (*location, key))
        return {**merged, **result}

    def _scalar(self, node: Any) -> Any:
        try:
            return self._constructor.construct_object(node, deep=True)
        except Exception as e:  # ruamel raises many kinds for unknown tags and bad timestamps
            line = node.start_mark.line + 1
            problem = " ".join(str(getattr(e, "problem", None) or e).split())[:200]
            raise BadInput(f"cannot read {node.value!r}: {problem}", where=f"{self._name}:{line}") from None


# --- validation ------------------------------------------------------------------------------------------------------


def validate(document: Document, model: type[AnyModel], data: Any = None, at: Location = ()) -> AnyModel:
    """``data`` (default: the whole document) as a pydantic ``model``.

    ``at`` is the path of ``data`` in the document. Raises BadInput for the first thing wrong, with its line.
    """
    from pydantic import ValidationError

    value = document.data if data is None and not at else data
    if not isinstance(value, dict):
        raise document.bad(f"expected keys and values, got {shown(value)}", at)
    try:
        return model.model_validate(value)
    except ValidationError as e:
        raise validation_error(document, e, model, at) from None


def validation_error(document: Document, error: ValidationError, model: type[BaseModel], at: Location = ()) -> BadInput:
    """The most telling of pydantic's complaints as one line for the user, with file, line, field and what was expected."""
    errors = error.errors(include_url=False)
    # a misspelt field is the cause when another is missing as well
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # pydantic puts the tag of a union and the names of validators into the path; keep what the document has
    location: Location = tuple(at)
    node = _descend(document.data, at)
    for part in first["loc"]:
        inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if inside:
            node = node[part]
            location = (*location, part)
        elif first["type"] == "missing" and part == first["loc"][-1]:
            location = (*location, part)
    kind, message = first["type"], first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind == "missing":
        return document.bad("is missing", location, "add it")
    if kind == "extra_forbidden":
        names = _field_names(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        step = (
            f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(names))}" if names else "remove it"
        )
        return document.bad("unknown field", location, step)
    got = first.get("input")
    text = message[0].lower() + message[1:] if message else "not valid"
    return document.bad(f"{text}, got {shown(got)}" if not isinstance(got, dict) else text, location)


def _descend(data: Any, at: Location) -> Any:
    for part in at:
        data = data[part]
    return data


def _field_names(model: Any, loc: Location) -> list[str]:
    """Names of the fields that are allowed at ``loc`` inside ``model`` (best effort: for suggestions only)."""
    from pydantic import BaseModel

    for part in loc:
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            continue
        annotation = fields[part].annotation
        nested = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        nested = [a for a in nested if issubclass(a, BaseModel)]
        if len(nested) != 1:
            return []
        model = nested[0]
    return [f.alias or name for name, f in getattr(model, "model_fields", {}).items()]


def shown(value: Any, limit: int = 60) -> str:
    """A value as it is quoted in messages, shortened."""
    if isinstance(value, dict):
        return "keys and values"
    if value is None:
        return "nothing"
    text = str(value) if isinstance(value, datetime.date) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --- where the files are ---------------------------------------------------------------------------------------------


def config_roots() -> list[Path]:
    """Folders that hold ``hardware/``, ``models/``, ``prices/``, ``slo/``..., the user's own first.

    In this order: the folder named by ``TOKENYIELD_CONFIGS``, ``./configs``, the project's ``configs/`` (a checkout or an
    editable install), and the copy that a wheel puts under ``share/tokenyield/configs``.
    """
    candidates: list[Path] = []
    named = os.environ.get(CONFIGS_VARIABLE)
    if named:
        root = Path(named).expanduser()
        if not root.is_dir():
            raise BadInput(
                "is not a folder", where=f"{CONFIGS_VARIABLE}={named}", next_step="set it to a configs folder"
            )
        candidates.append(root)
    candidates.append(Path("configs"))
    candidates.append(Path(__file__).resolve().parents[2] / "configs")
    candidates.append(Path(sys.prefix) / "share" / "tokenyield" / "configs")
    roots, seen = [], set()
    for path in candidates:
        key = path.resolve()
        if path.is_dir() and key not in seen:
            seen.add(key)
            roots.append(path)
    return roots


def catalogue_files(kind: str) -> dict[str, Path]:
    """File stem -> path of every YAML file of one ``kind`` (``hardware``, ``models``...); the user's own win."""
    found: dict[str, Path] = {}
    for root in config_roots():
        for path in sorted((root / kind).glob("*")):
            if path.suffix in _YAML_SUFFIXES and path.is_file():
                found.setdefault(path.stem, path)
    return found


def shown_path(path: Path) -> str:
    """``path`` as messages show it: relative to the current folder where it lies inside it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def looks_like_path(text: str) -> bool:
    """Whether the user meant a file rather than a catalogue name."""
    return text.endswith((*_YAML_SUFFIXES, ".json")) or text.startswith((".", "/", "~")) or os.path.exists(text)


def unknown_name(kind: str, name: str, known: Iterable[str], next_step: str | None = None) -> UnknownName:
    """An error that lists the nearest known names."""
    names = sorted(known)
    lowered = {n.lower(): n for n in names}
    near = [lowered[n] for n in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    more = f" and {len(names) - _NAMES_LISTED} more" if len(names) > _NAMES_LISTED else ""
    listed = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names[:_NAMES_LISTED])}{more}"
    return UnknownName(f"unknown {kind} {name!r}", next_step=next_step or listed)


def normalised(name: str) -> str:
    """A name without what people write differently: ``H100 SXM``, ``h100-sxm`` and ``H100_SXM`` are one."""
    return "".join(c for c in name.lower() if c.isalnum() or c == ".")


@functools.lru_cache(maxsize=512)
def _cached(path: str, _mtime_ns: int, _size: int) -> Document:
    return load_yaml(path)


def load_yaml_cached(path: Path) -> Document:
    """As :func:`load_yaml`, read once per version of the file. The result must not be changed by the caller."""
    try:
        stat = path.stat()
    except OSError:
        return load_yaml(path)
    return _cached(str(path), stat.st_mtime_ns, stat.st_size)


def iterate_documents(kind: str) -> Iterator[tuple[str, Document]]:
    """(stem, document) of every catalogue file of a kind, the user's own first."""
    for stem, path in catalogue_files(kind).items():
        yield stem, load_yaml_cached(path)
