"""`ess-monitor describe --hf-config`: the layers of a model that is only a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ess_monitor.cli.model_loading import model_of_hf_config
from ess_monitor.errors import ConfigError
from tests.programs import run_program

transformers = pytest.importorskip("transformers")

EXPECTED = {
    "Llama": {("LlamaAttention", "SoftmaxAttention", None, 32)},
    "Mamba2": {("Mamba2Mixer", "DiagonalRecurrence", 128, 128)},
    "Jamba": {("JambaMambaMixer", "DiagonalRecurrence", 16, 8192), ("JambaAttention", "SoftmaxAttention", None, 32)},
    "Qwen3Next": {
        ("Qwen3NextGatedDeltaNet", "DeltaRecurrence", 128, 32),
        ("Qwen3NextAttention", "SoftmaxAttention", None, 16),
    },
}
"""(class, operator, TSS, channels) of the default configurations, from their own numbers of heads and states."""


@pytest.mark.parametrize("name", EXPECTED)
def test_every_layer_of_a_model_is_described_at_its_real_size_without_memory(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")()
    config.to_json_file(tmp_path / "config.json")
    # In a process of its own: fla, once imported, puts its own models under transformers' names.
    command = ["-m", "ess_monitor.cli.main", "describe", "--hf-config", tmp_path, "--json"]
    done = run_program(command, tmp_path, imports=["transformers.trainer"])
    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout)["layers"]
    assert len(layers) == config.num_hidden_layers
    assert {(i["module"], i["operator"], i["state_capacity"], i["channels"]) for i in layers} == EXPECTED[name]
    assert all(i["capacity_grows"] == (i["operator"] == "SoftmaxAttention") for i in layers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "has no model_type"),
        ('{"model_type": "nothing-like-it"}', "cannot read"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "cannot read"),
    ],
)
def test_a_file_that_is_no_config_is_named_with_the_reason(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        model_of_hf_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        model_of_hf_config(tmp_path / "nowhere.json")
