"""What an engine is given as its model: a hub id, a local folder, or a folder made from a catalogue architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.config.experiment import CellSpec
from bench.errors import BadInput, BenchError


def load_archs(models: list[str]) -> dict[str, Any]:
    """Model name -> ModelArch for every name that can be resolved here; the others are left out (hub ids offline).

    Raises:
        BadInput: a name that is neither in the catalogue, nor a folder, nor of the form of a hub id.
    """
    from bench.catalog.model import load_model

    out = {}
    for name in dict.fromkeys(models):
        try:
            out[name] = load_model(name)
        except BenchError:
            if not _is_hub_id(name):
                raise
    return out


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def prepare_model(spec: CellSpec, arch: Any | None, folder: Path) -> str:
    """The path or hub id for the engine.

    With ``weights: dummy`` a catalogue architecture becomes a folder with only its ``config.json`` (no download). With
    ``weights: auto`` it is the hub id, whose weights vLLM finds in its cache or downloads.

    Raises:
        BadInput: real weights are asked for of an architecture that has no hub id.
    """
    if spec.engine.kind not in ("vllm", "vllm_server"):
        return spec.model
    local = Path(spec.model)
    if (local / "config.json").is_file():
        return str(local.resolve())
    if arch is None:
        return spec.model
    if spec.weights == "dummy":
        from bench.catalog.model import materialise

        target = folder / ".models" / arch.name
        materialise(arch, target)
        return str(target.resolve())
    hub_id = getattr(arch, "hub_id", None)
    if not hub_id:
        raise BadInput(
            f"{spec.model} is an architecture without published weights",
            where="weights: auto",
            next_step="set weights: dummy",
        )
    return str(hub_id)
