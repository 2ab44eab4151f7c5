"""YAML with line numbers: what is read, and what broken files are told."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from bench.catalog import yaml_source as ys
from bench.errors import BadInput, UnknownName


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    rate_per_s: float


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    load: Inner
    many: tuple[Inner, ...] = ()


TEXT = """name: x
load:
  rate_per_s: 4
many:
  - rate_per_s: 1
  - rate_per_s: 2
"""


def test_values_and_lines() -> None:
    d = ys.parse_yaml(TEXT, "x.yaml")
    assert d.data == {"name": "x", "load": {"rate_per_s": 4}, "many": [{"rate_per_s": 1}, {"rate_per_s": 2}]}
    assert [d.line(p) for p in (("name",), ("load", "rate_per_s"), ("many", 1, "rate_per_s"))] == [1, 3, 6]
    assert d.where(("many", 1, "rate_per_s")) == "x.yaml:6: many[1].rate_per_s"
    assert d.line(("load", "nosuch")) == 2


def test_yaml_1_2_scalars() -> None:
    data = ys.parse_yaml("a: 1e9\nb: on\nc: 2026-01-02\nd: ~\ne: 3.35e12\n").data
    assert data == {"a": 1e9, "b": "on", "c": datetime.date(2026, 1, 2), "d": None, "e": 3.35e12}


def test_anchors_and_merges() -> None:
    d = ys.parse_yaml("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\n")
    assert d.data["b"] == {"p": 1, "q": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("rate_per_s: 4", "rate_per_s: 10/s"), "x.yaml:3: load.rate_per_s: "),
        (TEXT.replace("rate_per_s: 4", "rate: 4"), "x.yaml:3: load.rate: unknown field"),
        (TEXT.replace("name: x\n", ""), "name: is missing"),
        (TEXT.replace("  - rate_per_s: 2", "  - rate_per_s: null"), "x.yaml:6: many[1].rate_per_s"),
        (TEXT + "name: y\n", "x.yaml:7: name is given twice"),
        ("name: [1, 2", "x.yaml:"),
        ("- 1\n- 2\n", "expected keys and values"),
        ("", "expected keys and values, got nothing"),
        ("a: !!python/object:os.system x\n", "x.yaml:1"),
        ("a: &a [*a]\n", "x.yaml"),
        ("{a: 1}: 2\n", "x.yaml"),
        ("\tname: x\n", "x.yaml:1"),
    ],
)
def test_broken_files_get_one_line_with_the_place(text: str, message: str) -> None:
    with pytest.raises(BadInput) as e:
        ys.validate(ys.parse_yaml(text, "x.yaml"), Outer)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_unknown_field_suggests_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean rate_per_s"):
        ys.validate(ys.parse_yaml(TEXT.replace("  rate_per_s: 4", "  rate_per_sec: 4")), Outer)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        ys.load_yaml(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="is a folder"):
        ys.load_yaml(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(BadInput, match="not UTF-8"):
        ys.load_yaml(tmp_path / "bad.yaml")


def test_own_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own" / "slo").mkdir(parents=True)
    (tmp_path / "own" / "slo" / "interactive-chat.yaml").write_text("x: 1\n")
    monkeypatch.setenv(ys.CONFIGS_VARIABLE, str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    files = ys.catalogue_files("slo")
    assert files["interactive-chat"].parent == tmp_path / "own" / "slo"
    assert "batch" in files  # the project's own are still there
    monkeypatch.setenv(ys.CONFIGS_VARIABLE, str(tmp_path / "nosuch"))
    with pytest.raises(BadInput, match="is not a folder"):
        ys.config_roots()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\n")
    assert ys.load_yaml_cached(path).data == {"a": 1}
    path.write_text("a: 12\n")
    assert ys.load_yaml_cached(path).data == {"a": 12}


def test_unknown_names() -> None:
    assert isinstance(ys.unknown_name("GPU", "H10", ["H100", "L4"]), UnknownName)
    assert "did you mean H100" in str(ys.unknown_name("GPU", "h10", ["H100", "L4"]))
    assert "and 80 more" in str(ys.unknown_name("x", "qqqq", [f"name{i}" for i in range(100)]))
