"""Whatever a file or a mapping holds, it is a configuration or a ConfigError."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from ess_monitor import ConfigError, MonitorConfig
from ess_monitor.config import MAX_BYTES, MAX_DEPTH
from tests.fuzz.inputs import SCALARS, damaged, fuzz, is_short, mutated, nested

TEXT = b"""\
every_n_steps: 50
tolerance: 1.0e-3
layers: {include: ["blocks.*"], exclude: [head]}
capture: &small
  samples: 2
  heads: null
autopilot: advise
exporters:
  - prometheus
  - {kind: event_log, path: runs/x.jsonl}
run_name: demo
"""
PIECES = [
    b"&a ", b"*a", b"*small", b"<<: ", b"[", b"]", b"{", b"}", b": ", b"\n", b"\n  ", b"- ", b"? ", b"| ", b"> ",
    b"!!int ", b"!!binary ", b"!!python/object/apply:os.system ", b"!!python/name:os.system ", b"!!timestamp ",
    b"!!set ", b"!!omap ", b"!<tag:yaml.org,2002:map> ", b"%YAML 9.9\n---\n", b"---\n", b"...\n", b"\t", b"\0",
    b"\x85", b"\xff", b"\xef\xbb\xbf", b'"\\ud800"', b'"\\0"', b"0x" + b"f" * 40, b"1_000", b"1:59:59",
    b"2001-99-99", b".inf", b".nan", b"~", b"'", b'"', b"#",
]  # fmt: skip


def settings_of(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


NAMES = st.one_of(
    st.sampled_from([*settings_of(MonitorConfig), "kind", "mode", "samples", "url", "auth", "path", "include"]),
    st.text(max_size=4),
)
WHOLE: dict[str, Any] = yaml.safe_load(TEXT)
SETTINGS = st.one_of(
    st.dictionaries(NAMES, nested(names=NAMES), max_size=4),
    damaged(WHOLE, nested(names=NAMES)).filter(lambda value: isinstance(value, dict)),
)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "ess.yaml"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@fuzz(usual=250, long=8000)
@given(content=st.one_of(mutated(TEXT, PIECES), st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join)))
@example(TEXT)
def test_a_file_is_a_configuration_or_a_config_error(folder: Path, content: bytes) -> None:
    try:
        config = MonitorConfig.load(write(folder, content), environment=False)
    except ConfigError as error:
        is_short(str(error), 10_000)
    else:
        assert repr(config)
        assert MonitorConfig.model_validate_json(config.model_dump_json()) == config or "nan" in repr(config)


@fuzz(usual=250, long=8000)
@given(values=SETTINGS)
@example({"every_n_steps": 10**5000, "tolerance": -(10**5000)})
@example({f"setting_{k}": k for k in range(1000)})
def test_settings_are_a_configuration_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        MonitorConfig.load(environment=False, **{k: v for k, v in values.items() if k not in ("path", "environment")})
    except ConfigError as error:
        is_short(str(error), 10_000)


VARIABLES = st.one_of(
    st.sampled_from([name.upper() for name in settings_of(MonitorConfig)]),
    st.sampled_from(["CAPTURE__SAMPLES", "CAPTURE__SAMPLES__X", "LAYERS__INCLUDE", "EXPORTERS__0__KIND", "__", ""]),
    st.text(st.characters(codec="ascii", exclude_characters="=\0"), max_size=6),
)
JSON = nested(SCALARS.filter(lambda value: not isinstance(value, bytes) and value != 10**5000), names=NAMES).map(
    json.dumps
)
TEXTS = st.one_of(
    JSON, st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), st.just("[" * 5000)
)


@fuzz(usual=250, long=8000)
@given(variables=st.dictionaries(VARIABLES, TEXTS, max_size=3))
@example({"EVERY_N_STEPS": "9" * 5000})
@example({"EXPORTERS": '[{"kind": "prometheus", "port": ' + "9" * 5000 + "}]"})
@example({"EXPORTERS": '[{"kind": "prometheus", "port": NaN}]'})
def test_variables_of_the_environment_are_a_configuration_or_a_config_error(variables: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(f"ESS_MONITOR_{name}", value)
        try:
            MonitorConfig.load()
        except ConfigError as error:
            is_short(str(error), 10_000)


def laughs(levels: int) -> str:
    """Each level is nine of the one before."""
    return "x0: &a0 [x]\n" + "".join(f"x{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]\n" for k in range(levels))


BOMBS = {
    "flow lists": ("a: " + "[" * 90_000, "more than 16 levels"),
    "flow mappings": ("{a: " * 20_000, "more than 16 levels"),
    "block lists": ("- " * 40_000, "more than 16 levels"),
    "block mappings": ("\n".join(" " * k + "a:" for k in range(400)), "more than 16 levels"),
    "a billion laughs": (laughs(9), "aliases written out"),
    "laughs in merges": (laughs(9).replace("[*", "{<<: [*").replace("]\n", "]}\n"), "aliases written out|is not YAML"),
    "a list in itself": ("capture: &a [*a]", "inside of what it stands for"),
    "a mapping in itself": ("capture: &a {b: [*a]}", "inside of what it stands for"),
    "an alias of nothing": ("capture: *a", "undefined alias"),
    "many settings": ("\n".join(f"k{k}: 1" for k in range(9000)), "aliases written out"),
    "a long integer": ("every_n_steps: " + "9" * 90_000, "not of type int"),
    "a longer integer": ("every_n_steps: 0x" + "f" * 90_000, "more than 64 bits"),
    "an integer in base 60": ("every_n_steps: 1" + ":59" * 2000, "more than 64 bits"),
    "a date of no calendar": ("run_name: 2001-99-99", "not of type timestamp"),
    "a tag that does not fit": ("!!int ''", "not of type int"),
    "a name that is a number": ("1: 2", "int as the name"),
    "half a character": ('run_name: "\\ud800"', "no file or name can hold"),
    "a path with an end": ('exporters: [{kind: event_log, path: "a\\0b"}]', "no file or name can hold"),
    "an object": ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "a long scalar": ("run_name: " + "a" * 2 * MAX_BYTES, "larger than"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_goes_off(name: str, tmp_path: Path) -> None:
    text, message = BOMBS[name]
    path = write(tmp_path, text.encode())
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=message) as refused:
            MonitorConfig.load(path, environment=False)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 30_000_000
    assert len(str(refused.value)) < 1000


def test_aliases_and_depth_within_the_limits_are_read(tmp_path: Path) -> None:
    shared = "exporters: [&log {kind: event_log, path: a.jsonl}, *log]\n"
    assert len(MonitorConfig.load(write(tmp_path, shared.encode())).exporters) == 2
    with pytest.raises(ConfigError, match=r"layers\.include"):  # refused for what it is, not for its depth
        MonitorConfig.load(write(tmp_path, b"layers: " + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)))


def test_an_error_quotes_no_line_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1") as refused:
        MonitorConfig.load(write(tmp_path, b"password: hunter2: x\n"))
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_json_of_the_environment_that_is_too_deep_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESS_MONITOR_EXPORTERS", "[" * 100_000)
    with pytest.raises(ConfigError, match="environment"):
        MonitorConfig.load()
