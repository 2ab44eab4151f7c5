"""Which axes tell cells apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from bench.report.layout import NOT_SAID, axis_value, varying_axes


def cell(axes: dict[str, Any], **spec: Any) -> Any:
    return SimpleNamespace(axes=axes, spec=SimpleNamespace(model_dump=lambda mode: spec))


def test_a_whole_section_of_the_experiment_is_no_value_to_tell_cells_by() -> None:
    offline = [
        cell({"tensor_parallel_size": tp}, engine={"kind": "vllm", "args": {"tensor_parallel_size": tp}})
        for tp in (1, 2)
    ]
    served = cell({"engine": {"kind": "vllm_server", "args": {}}}, engine={"kind": "vllm_server", "args": {}})
    assert axis_value(offline[0], "engine") is NOT_SAID
    assert "engine" not in varying_axes([*offline, served])


def test_lengths_of_the_fixed_part_count() -> None:
    fixed = cell({}, workload={"isl": {"kind": "fixed", "tokens": 128}})
    drawn = cell({"workload.isl": 512}, workload={})
    assert axis_value(fixed, "workload.isl") == 128
    assert varying_axes([fixed, drawn]) == ["workload.isl"]
