"""The command line, as a user's shell sees it: output, error line, exit status."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ess_monitor import CaptureConfig, MonitorConfig
from ess_monitor import profile as profile_in_python
from ess_monitor.cli import main as cli
from tests.programs import run_program

MODELS = """
import torch
from torch import nn
from ess_monitor.featurizers import build_mixer


class Net(nn.Module):
    def __init__(self, vocab_size=11, width=16):
        super().__init__()
        print("building")
        self.embed = nn.Embedding(vocab_size, width)
        self.mixer = build_mixer("gla", width, 2, 4)
        self.attention = build_mixer("sa", width, 2, 4)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, tokens):
        return self.lstm(self.attention(self.mixer(self.embed(tokens))))[0]


def mixer(width=16):
    return build_mixer("gla", width, 2, 4)


def nothing():
    return 3


class broken:
    def __init__(self):
        raise KeyError("a bug in the user's own code")


ready = mixer()
number = 3
plain = nn.Linear(4, 4)
"""


class Answer(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Answer]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """The command, in a directory that holds `cli_models.py`."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # hundreds of tiny decompositions: threads would only wait for each other

    def command(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["ess-monitor", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return Answer(stopped.value.code or 0, out, err)  # type: ignore[arg-type]

    yield command
    torch.set_num_threads(threads)


def test_describe_lists_measured_and_skipped_layers(run: Run) -> None:
    answer = run("describe", "cli_models:Net")
    assert answer.status == 0
    assert "2 of 3 sequence mixers can be measured" in answer.out
    assert re.search(r"mixer .*GLA .*DiagonalRecurrence .*4", answer.out)
    assert re.search(r"attention .*SA .*SoftmaxAttention .*grows", answer.out)
    assert re.search(r"lstm .*LSTM .*skipped .*nonlinear", answer.out)


def test_describe_as_json_is_nothing_but_json_on_standard_output(run: Run) -> None:
    answer = run("describe", "cli_models:Net", "--json", "--layer", "mixer")
    assert answer.json["schema_version"] == 1
    assert {layer["name"]: layer["supported"] for layer in answer.json["layers"]} == {
        "mixer": True,
        "attention": False,
        "lstm": False,
    }
    assert "building" in answer.err


def test_describe_says_so_when_there_is_nothing_to_measure(run: Run) -> None:
    answer = run("describe", "cli_models:plain")
    assert (answer.status, answer.err) == (0, "")
    assert "no layer looks like a sequence mixer" in answer.out
    assert run("describe", "cli_models:plain", "--json").json["layers"] == []


def test_profile_gives_what_profile_gives_in_python(run: Run) -> None:
    answer = run("profile", "cli_models:mixer", "--width", "16", "--length", "40", "--json", "--positions", "2")
    [reading] = answer.json["readings"]
    assert (reading["status"], reading["length"], reading["state_capacity"]) == ("ok", 40, 4.0)
    assert reading["positions"] == [13, 27]
    assert reading["operators"] == 4 * 2

    import cli_models  # type: ignore[import-not-found]

    torch.manual_seed(0)
    inputs = torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(0))
    config = MonitorConfig(positions=2, capture=CaptureConfig(samples=4, heads=None))
    [expected] = profile_in_python(cli_models.mixer(), inputs, config=config).readings
    assert reading == json.loads(expected.model_dump_json())


def test_profile_on_tokens_takes_the_vocabulary_from_the_embedding(run: Run) -> None:
    answer = run("profile", "cli_models:Net", "--kwargs", '{"vocab_size": 3}', "--input", "tokens", "--json")
    assert [reading["layer"] for reading in answer.json["readings"]] == ["mixer", "attention"]
    assert [reading["capacity_grows"] for reading in answer.json["readings"]] == [False, True]


def test_profile_shows_a_table(run: Run) -> None:
    answer = run("profile", "model", "cli_models:Net", "--input", "tokens", "--layer", "mixer")
    assert answer.status == 0
    assert "tokens input (4, 128), tau 0.001" in answer.out
    assert re.search(r"layer +ESS +all positions +entropy +TSS +ESS/TSS +retention +mean A +far share", answer.out)
    assert re.search(r"mixer +[\d.]+ +[\d.]+ \([\d.]+\) +[\d.]+ +4.00", answer.out)
    assert re.search(r"attention +skipped: excluded by the `layers` setting", answer.out)


def test_a_sequence_too_short_to_measure_says_so(run: Run) -> None:
    answer = run("profile", "cli_models:mixer", "--width", "16", "--length", "1")
    assert answer.status == 0
    assert "too_short" in answer.out


def test_the_seed_and_the_tolerance_count(run: Run) -> None:
    def ess(*options: str) -> float:
        command = ("profile", "cli_models:mixer", "--width", "16", "--json", "--length", "32", *options)
        return float(run(*command).json["readings"][0]["entropy_size"])

    assert ess("--seed", "1") == ess("--seed", "1")
    assert ess("--seed", "1") != ess("--seed", "2")
    strict = run("profile", "cli_models:mixer", "--width", "16", "--json", "--tolerance", "1e9")
    assert strict.json["readings"][0]["effective_size"] == 0


def test_profile_measures_the_weights_of_a_checkpoint(run: Run, tmp_path: Path) -> None:
    from ess_monitor.featurizers import build_mixer

    torch.manual_seed(5)
    weights = {f"model.{name}": 0.0 * w for name, w in build_mixer("gla", 16, 2, 4).state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "run.ckpt")
    command = ("profile", "cli_models:mixer", "--width", "16", "--json")
    assert run(*command).json["readings"][0]["effective_size"] > 0
    answer = run(*command, "--checkpoint", "run.ckpt", "--prefix", "model.")
    assert answer.json["readings"][0]["effective_size"] == 0
    without_prefix = run(*command, "--checkpoint", "run.ckpt")
    assert without_prefix.status == 2
    assert "prefix" in without_prefix.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("describe", "cli_models"), "not of the form package.module:name"),
        (("describe", "no_such_module:x"), "no module 'no_such_module'"),
        (("describe", "cli_models.sub:x"), "no module 'cli_models.sub'"),
        (("describe", "cli_models:missing"), "has no 'missing'"),
        (("describe", "cli_models:number"), "is a int"),
        (("describe", "cli_models:nothing"), "returned a int"),
        (("describe", "cli_models:ready", "--kwargs", "{}"), "is a model already"),
        (("describe", "cli_models:Net", "--kwargs", "{wide}"), "is not JSON"),
        (("describe", "cli_models:Net", "--kwargs", "[1]"), "not a JSON object"),
        (("describe", "cli_models:Net", "--kwargs", '{"wide": 3}'), "unexpected keyword argument 'wide'"),
        (("profile", "cli_models:Net", "--input", "tokens", "--layer", "mixr*"), "'mixr*'"),
        (("profile", "cli_models:plain", "--width", "4"), "no sequence mixer that can be measured"),
        (("profile", "cli_models:mixer"), "--width N"),
        (("profile", "cli_models:mixer", "--width", "17"), "u is a torch.float32 tensor of shape (4, 128, 17)"),
        (("profile", "cli_models:Net", "--width", "17"), "does not run on torch.float32 of shape (4, 128, 17)"),
        (("profile", "cli_models:mixer", "--input", "tokens"), "--vocab-size N"),
        (("profile", "cli_models:mixer", "--width", "16", "--positions", "middle"), "positions"),
        (("profile", "cli_models:mixer", "--width", "16", "--tolerance", "-1"), "tolerance"),
        (("profile", "cli_models:mixer", "--width", "16", "--checkpoint", "none.pt"), "none.pt is not a file"),
        (("profile", "--json", "featurizers"), "profile featurizers"),
    ],
)
def test_a_mistake_gives_one_line_that_names_it_and_status_2(run: Run, arguments: tuple[str, ...], says: str) -> None:
    answer = run(*arguments)
    assert answer.status == 2
    assert answer.out == ""
    [line] = [line for line in answer.err.splitlines() if line != "building"]
    assert line.startswith("error: ")
    assert says in line


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_a_seed_that_torch_cannot_take_is_named(run: Run, seed: str) -> None:
    answer = run("profile", "cli_models:mixer", "--width", "16", "--seed", seed)
    assert answer.status == 2
    assert "--seed" in answer.err


def test_what_the_users_own_code_raises_is_not_hidden(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cli_needs.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        _raise(run, "describe", "cli_needs:x")
    with pytest.raises(KeyError, match="own code"):
        _raise(run, "describe", "cli_models:broken")


def _raise(run: Run, *arguments: str) -> None:
    """`run` expects the command to exit; show what came instead."""
    sys.argv = ["ess-monitor", *arguments]
    cli.main()


def test_profile_featurizers_reproduces_finding_4(run: Run) -> None:
    answer = run("profile", "featurizers", "--tss", "16", "--tss", "4", "--tss", "8", "--length", "64", "--json")
    rows = {row["featurizer"]: row for row in answer.json["rows"]}
    assert list(rows) == ["LA", "WLA", "GLA", "SA", "S6", "GLA-S6 alpha=1", "GLA-S6 alpha=1000"]
    assert all(row["tss"] == [4, 8, 16] and len(row["entropy_ess"]) == 3 for row in rows.values())
    assert {name for name, row in rows.items() if row["scaling"] == "rises"} >= {"LA", "GLA", "GLA-S6 alpha=1000"}
    assert rows["S6"]["scaling"] == rows["GLA-S6 alpha=1"]["scaling"] == "flat"
    assert rows["GLA"]["tolerance_ess"] == pytest.approx([4, 8, 16], abs=0.5)
    assert max(rows["S6"]["tolerance_ess"]) < 4


def test_the_featurizer_table_says_below_which_rows_rise(run: Run) -> None:
    answer = run("profile", "featurizers", "--tss", "4", "--tss", "16", "--seeds", "1", "--length", "24")
    assert re.search(r"featurizer +TSS 4 +TSS 16 +ESS over TSS", answer.out)
    below = answer.out.split("ESS rises monotonically with TSS: ")[1]
    rising, flat = below.split(". Flat: ")
    assert "GLA-S6 alpha=1000" in rising
    assert "S6, GLA-S6 alpha=1" in flat
    assert "cannot show an ESS above 12" in flat


def test_a_single_tss_says_nothing_about_scaling(run: Run) -> None:
    answer = run("profile", "featurizers", "--tss", "4", "--seeds", "1", "--length", "16")
    assert "monotonically" not in answer.out
    assert "unknown" in answer.out


@pytest.mark.parametrize(
    "arguments", [("--help",), ("describe", "--help"), ("profile", "--help"), ("profile", "x", "--help")]
)
def test_help_is_there_at_every_level(run: Run, arguments: tuple[str, ...]) -> None:
    answer = run(*arguments)
    assert answer.status == 0
    assert "Usage: ess-monitor" in answer.out


def test_the_help_of_profile_shows_the_options_of_its_target(run: Run) -> None:
    answer = run("profile", "--help")
    target = run("profile", "model", "--help")
    options = set(re.findall(r"--[a-z][a-z-]+", target.out))
    assert {"--checkpoint", "--width", "--vocab-size", "--unknown"} <= options
    assert options <= set(re.findall(r"--[a-z][a-z-]+", answer.out))
    assert "featurizers" in answer.out


def test_the_help_names_each_exit_status(run: Run, tmp_path: Path) -> None:
    said = " ".join(run("--help").out.split())
    assert re.findall(r"\b(\d+): ", said.partition("Exit status:")[2]) == ["0", "1", "2", "130"]
    assert run("describe", "cli_models:plain").status == 0, "nothing in it can be measured"
    assert run("describe").status == 2, "the target is missing"
    assert run("describe", "nowhere:x").status == 2
    (tmp_path / "cli_raises.py").write_text("raise KeyError('a bug')\n")
    assert run_program(["-m", "ess_monitor.cli", "describe", "cli_raises:x"], tmp_path, cwd=tmp_path).returncode == 1
    (tmp_path / "cli_interrupted.py").write_text("raise KeyboardInterrupt\n")
    assert run("describe", "cli_interrupted:x").status == 130


def test_the_version_is_the_installed_one(run: Run) -> None:
    assert run("--version") == Answer(0, f"ess-monitor {version('ess-monitor')}\n", "")


@pytest.mark.parametrize("module", ["ess_monitor.cli", "ess_monitor.cli.main"])
def test_the_installed_command_ends_without_a_traceback(module: str, tmp_path: Path) -> None:
    done = run_program(["-m", module, "describe", "nowhere:x"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: target: no module 'nowhere'")
    assert len(done.stderr.splitlines()) == 1
