"""Any OpenAI-compatible URL: hosted APIs, SGLang, TensorRT-LLM, a vLLM started by somebody else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from typing_extensions import Self

from bench.engines.base import RecordSink
from bench.engines.http_run import serve_over_http
from bench.errors import BadInput, EngineUnavailable
from bench.load.driver import LoadOptions, Progress
from bench.load.oneshot import Reply, ask
from bench.load.target import Target
from bench.records import EngineInfo, Request, RequestRecord, Schedule


class EndpointEngine:
    """An endpoint as an engine. ``target.model`` empty: the one model that ``/v1/models`` lists.

    On entering, one short request is made: it tells a wrong key, URL or model before anything is measured, and which of
    the optional fields the server takes (``ignore_eos``, token counts in every chunk).
    """

    def __init__(self, target: Target, options: LoadOptions, *, num_gpus: int = 0, probe_tokens: bool = True) -> None:
        self.target, self.options = target, options
        self.num_gpus, self.probe_tokens = num_gpus, probe_tokens
        self.version = ""
        self.max_model_len: int | None = None
        self.metrics_path: str | None = None
        self.on_progress: Callable[[Progress], None] | None = None

    def __enter__(self) -> Self:
        """Raises EngineUnavailable (not reachable, wrong key, no such model) or BadInput (no key set)."""
        self._find_model()
        self._probe()
        self._find_metrics()
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is held between runs."""

    def _find_model(self) -> None:
        reply = ask(self.target, "GET", self.target.path("models"))
        self._refused(reply)
        data = reply.json()
        models = data.get("data") if isinstance(data, dict) else None
        models = [m for m in models if isinstance(m, dict) and m.get("id")] if isinstance(models, list) else []
        names = [str(m["id"]) for m in models]
        if not self.target.model:
            if len(names) != 1:
                shown = ", ".join(names[:8]) or "none"
                raise BadInput(
                    f"the server lists {len(names)} models, so the model must be named",
                    where=self.target.url,
                    next_step=f"give the model's name (--model); listed: {shown}",
                )
            self.target = replace(self.target, model=names[0])
        for m in models:
            if m["id"] == self.target.model and isinstance(m.get("max_model_len"), int):
                self.max_model_len = m["max_model_len"]
        self.version = reply.server or ""
        version = ask(self.target, "GET", self.target.root_path("version"))
        told = version.json() if version.status == 200 else None
        if isinstance(told, dict) and told.get("version"):
            self.version = str(told["version"])[:80]

    def _refused(self, reply: Reply) -> None:
        if reply.status in (401, 403):
            named = self.target.api_key_env
            raise EngineUnavailable(
                f"the server refused the key ({reply.status} {reply.text})"
                if named
                else f"a key is needed ({reply.status})",
                where=self.target.url,
                next_step=f"check {named}" if named else "name the variable that holds it: --api-key-env NAME",
            )

    def _probe_request(self) -> Request:
        if self.target.api == "chat":
            return Request(index=0, osl=2, messages=({"role": "user", "content": "Say hello."},))
        import numpy as np

        if self.probe_tokens:
            return Request(index=0, osl=2, isl=4, prompt_token_ids=np.asarray([300, 301, 302, 303], dtype=np.int32))
        return Request(index=0, osl=2, text="Say hello.")

    def _probe(self) -> None:
        """Leave out, one by one, optional fields that the server refuses."""
        target, dropped = self.target, []
        fallbacks: tuple[tuple[str, dict[str, Any]], ...] = (
            ("token counts in every chunk", {"continuous_usage": False}),
            ("ignore_eos", {"ignore_eos": False}),
            ("max_tokens", {"max_tokens_field": "max_completion_tokens"}),
            ("temperature", {"temperature": None}),
            ("usage", {"include_usage": False}),
        )
        reply = self._post(target)
        for name, change in fallbacks:
            if reply.status not in (400, 422):
                break
            changed = replace(target, **change)
            if changed == target:
                continue
            target = changed
            dropped.append(name)
            reply = self._post(target)
        self._refused(reply)
        if reply.status != 200:
            raise EngineUnavailable(
                f"a first short request was answered with {reply.status}: {reply.text}",
                where=self.target.url,
                next_step="check the URL, the model's name and --api",
            )
        self.target, self.dropped = target, dropped

    def _post(self, target: Target) -> Reply:
        return ask(target, "POST", target.request_path, target.body(self._probe_request()), timeout_s=120.0)

    def _find_metrics(self) -> None:
        path = self.target.root_path("metrics")
        try:
            reply = ask(self.target, "GET", path, timeout_s=5.0)
        except EngineUnavailable:
            return
        if reply.status == 200 and re.search(rb"^vllm:", reply.body, re.M):
            self.metrics_path = path

    def info(self) -> EngineInfo:
        args = {k: v for k, v in asdict(self.target).items() if v not in (None, {}, "")}
        return EngineInfo(
            kind="endpoint",
            version=self.version,
            effective_args=args,
            num_gpus=self.num_gpus,
            max_model_len=self.max_model_len,
            notes={"fields_refused": self.dropped, "has_vllm_metrics": self.metrics_path is not None},
        )

    def run(self, schedule: Schedule, sink: RecordSink, t0_monotonic_s: float) -> Iterator[RequestRecord]:
        exact = self.target.ignore_eos
        yield from serve_over_http(
            self.target,
            schedule,
            sink,
            t0_monotonic_s,
            replace(self.options, exact_osl=exact),
            metrics_path=self.metrics_path,
            on_progress=self.on_progress,
        )


def build(launch: Any) -> EndpointEngine:
    """From the experiment's engine spec (kind ``endpoint``)."""
    spec = launch.spec
    target = Target(
        url=spec["url"],
        model=spec.get("served_model") or "",
        api=spec.get("api", "completions"),
        api_key_env=spec.get("api_key_env"),
        ignore_eos=True,
        continuous_usage=True,
        extra_body=dict(spec.get("extra_body") or {}),
    )
    token_ids = spec.get("prompts", "text") == "token_ids"
    return EndpointEngine(target, LoadOptions(), num_gpus=int(spec.get("num_gpus", 0)), probe_tokens=token_ids)
