"""Models by name: ``configs/models/*.yaml``, a local ``config.json``, or any Hugging Face hub id."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from bench.catalog.arch import KvGroup, LayerKind, Mla, ModelArch, Moe
from bench.catalog.facts import Fact
from bench.catalog.yaml_source import (
    Document,
    catalogue_files,
    load_yaml_cached,
    looks_like_path,
    normalised,
    read_text,
    unknown_name,
    validate,
)
from bench.errors import BadInput, BenchError

__all__ = ["KvGroup", "LayerKind", "Mla", "ModelArch", "ModelFile", "Moe", "list_models", "load_model", "materialise"]


class _Count(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    value: Annotated[int, Field(gt=0)]
    source: Annotated[str, Field(min_length=3)]
    as_of: datetime.date
    note: str | None = None


class ModelFile(BaseModel):
    """The YAML form of one model: published facts, and its ``config.json`` under ``config``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    hub_id: str | None = None
    aliases: tuple[str, ...] = ()
    description: str = ""
    license: str | None = None
    source: Annotated[str, Field(min_length=3)]
    as_of: datetime.date
    num_params: _Count | None = None
    num_active_params: _Count | None = None
    config: dict[str, Any]


def load_model(name: str | os.PathLike[str]) -> ModelArch:
    """A model by catalogue name or alias, YAML file, folder with a ``config.json``, ``config.json``, or hub id.

    Raises UnknownName with the nearest names; BadInput when a file or a hub's answer is not a model that is understood.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return _from_json(path / "config.json", path.resolve().name)
    if text.endswith(".json"):
        # a config.json is named by its folder, a file with a name of its own by that
        return _from_json(path, path.resolve().parent.name if path.stem == "config" else path.stem)
    if looks_like_path(text) and not path.is_dir():
        return _from_document(load_yaml_cached(path))
    entries = _entries()
    wanted = normalised(text)
    for document in entries.values():
        spec = document.data if isinstance(document.data, dict) else {}
        names = [spec.get("name"), spec.get("hub_id"), *(spec.get("aliases") or [])]
        if wanted in {normalised(str(n)) for n in names if n}:
            return _from_document(document)
    if text.count("/") == 1 and not path.exists():
        return _from_hub(text)
    raise unknown_name("model", text, entries)


def list_models() -> list[ModelArch]:
    """Every model of the catalogue, by name."""
    return sorted((_from_document(d) for d in _entries().values()), key=lambda m: m.name.lower())


def materialise(model: ModelArch, folder: str | os.PathLike[str]) -> Path:
    """Write ``config.json`` into ``folder``: all that vLLM needs with ``load_format="dummy"`` and no tokenizer.

    Returns the folder. The file is replaced at once, so engines that start side by side never read half of it.
    """
    if not model.config:
        raise BadInput(f"{model.name} has no config to write")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f".config.json.{os.getpid()}"
    temporary.write_text(json.dumps(model.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path / "config.json")
    return path


def _entries() -> dict[str, Document]:
    return {stem: load_yaml_cached(path) for stem, path in catalogue_files("models").items()}


def _from_document(document: Document) -> ModelArch:
    spec = validate(document, ModelFile)
    try:
        arch = ModelArch.from_hf_config(spec.config, spec.name)
    except BenchError as e:
        raise BadInput(e.what, where=document.where(("config",)), next_step=e.next_step) from None
    facts: dict[str, Any] = {"config": Fact(spec.hub_id or spec.name, spec.source, spec.as_of)}
    for key in ("num_params", "num_active_params"):
        count = getattr(spec, key)
        if count is not None:
            facts[key] = Fact(count.value, count.source, count.as_of, count.note)
    facts["description"] = spec.description
    facts["license"] = spec.license
    return dataclasses.replace(arch, hub_id=spec.hub_id, facts=facts)


def _from_json(path: Path, name: str) -> ModelArch:
    try:
        config = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise BadInput(f"not valid JSON: {e.msg}", where=f"{path}:{e.lineno}") from None
    except RecursionError:
        raise BadInput("nested too deep", where=str(path)) from None
    return ModelArch.from_hf_config(config, name)


def _from_hub(hub_id: str) -> ModelArch:
    """``config.json`` of a hub repository, from the local cache when it is there."""
    local = "or give a folder with its config.json"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        what = f"{hub_id!r} is not in the catalogue and huggingface_hub is not installed"
        raise BadInput(what, next_step=f"`pip install huggingface_hub`, {local}") from None
    try:
        path = _cached_config(hub_id)
        if path is None:
            _probe_hub()
            path = hf_hub_download(hub_id, "config.json", etag_timeout=10)
    except Exception as e:  # the library raises its own, requests', httpx' and OS errors, release by release
        reason = " ".join(str(e).split())[:160] or type(e).__name__
        what = f"{hub_id!r} is not in the catalogue and its config.json cannot be fetched ({reason})"
        raise BadInput(what, next_step=f"check the id, the network and HF_TOKEN, {local}") from None
    arch = _from_json(Path(path), hub_id.split("/")[1])
    return dataclasses.replace(arch, hub_id=hub_id)


def _cached_config(hub_id: str) -> str | None:
    """The file in the local hub cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return found if isinstance(found, str) else None


def _probe_hub() -> None:
    """Fail at once where the hub's host does not answer: the library would retry for half a minute, loudly.

    Raises OSError. Behind a proxy nothing can be said without going through it, so the library is left to try.
    """
    import socket
    import urllib.parse
    import urllib.request

    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if urllib.request.getproxies() or not endpoint.hostname:
        return
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    socket.create_connection((endpoint.hostname, port), timeout=5).close()
