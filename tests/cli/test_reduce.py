"""`ess-monitor reduce`: the checkpoint, the table, and one line for a mistake."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ess_monitor import CaptureConfig, MonitorConfig
from ess_monitor.analysis import reduce
from ess_monitor.cli.data import Batch, evaluation, load_batches
from ess_monitor.errors import ConfigError
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.tasks import MQAR, MQARConfig, accuracy, loss
from tests.cli.test_main import Run
from tests.report.helpers import unwanted_scripts

MODELS = """
import torch
from ess_monitor.featurizers import Backbone, BackboneConfig, build_mixer
from ess_monitor.tasks import MQAR, MQARConfig

def backbone(state_size=8):
    return Backbone(BackboneConfig(vocab_size=12, width=16, featurizer="gla", state_size=state_size))

def task():
    return MQAR(MQARConfig(length=16, kv_pairs=2, vocab_size=12, samples=48))

def features():
    return [torch.randn(2, 12, 16), torch.randn(2, 12, 16)]

attention = build_mixer("sa", 16, 2, 8)
wrong = 3
"""


@pytest.fixture
def here(run: Run, tmp_path: Path) -> Path:
    (tmp_path / "reduce_models.py").write_text(MODELS)
    return tmp_path


def backbone(state: int = 8) -> Backbone:
    return Backbone(BackboneConfig(vocab_size=12, width=16, featurizer="gla", state_size=state))


CALL = ("reduce", "reduce_models:backbone", "--calibrate", "reduce_models:task", "--batches", "2")


@pytest.mark.parametrize("name", ["small.safetensors", "small.pt"])
def test_the_checkpoint_is_that_of_python_and_loads_at_the_smaller_size(run: Run, here: Path, name: str) -> None:
    answer = run(*CALL, "--state", "3", "--out", name, "--json")
    assert answer.status == 0
    torch.manual_seed(0)
    model = backbone()
    data = MQAR(MQARConfig(length=16, kv_pairs=2, vocab_size=12, samples=48))
    batches = [data.batch(range(16)), data.batch(range(16, 32))]

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = [model(inputs) for inputs, _ in batches]
        values = [[float(f(each, y)) for each, (_, y) in zip(logits, batches, strict=True)] for f in (loss, accuracy)]
        return {name: sum(each) / 2 for name, each in zip(("loss", "accuracy"), values, strict=True)}

    config = MonitorConfig(capture=CaptureConfig(samples=16, heads=None, max_length=256))
    smaller, expected = reduce(model, batches[0][0], state=3, evaluate=evaluate, config=config)
    assert answer.json["layers"] == expected.model_dump(mode="json")["layers"]
    for moment in ("before", "after"):
        assert answer.json[moment] == pytest.approx(getattr(expected, moment))
    weights = load_file(here / name) if name.endswith("safetensors") else torch.load(here / name, weights_only=True)
    built = backbone(3)
    built.load_state_dict(weights)
    torch.testing.assert_close(weights, dict(smaller.state_dict()))
    loaded = run("profile", "model", "reduce_models:backbone", "--kwargs", '{"state_size": 3}', "--checkpoint", name,
                 "--input", "tokens", "--length", "16")  # fmt: skip
    assert (loaded.status, loaded.err) == (0, "")


def test_the_table_shows_what_each_layer_lost_and_how_to_build_the_smaller_model(run: Run, here: Path) -> None:
    answer = run(*CALL, "--state", "4", "--out", "small.pt", "--html", "page.html")
    assert answer.status == 0
    assert re.search(r"layer +operator +state +lost +distill-check +kept", answer.out)
    row = r"blocks.0.mixer +DiagonalRecurrence +8 → 4 +[\d.]+ % +[\d.e-]+ % \([\d.e-]+ %\) +the best dimensions"
    assert re.search(row, answer.out)
    assert re.search(r"loss [\d.]+ → [\d.]+; accuracy [\d.]+ → [\d.]+", answer.out)
    assert "state_size=4" in answer.out
    page = (here / "page.html").read_text()
    assert "Backbone: states of 4" in page
    assert unwanted_scripts(page) == []


def test_without_answers_in_the_data_there_is_no_loss(run: Run, here: Path) -> None:
    save_file({"inputs": torch.randint(12, (4, 16))}, here / "data.safetensors")
    answer = run(*CALL[:2], "--calibrate", "data.safetensors", "--state", "4", "--out", "small.pt")
    assert answer.status == 0
    assert "no targets or labels in the data" in answer.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--state", "8"), "state=8 must be below the states of Backbone, which have up to 8"),
        (("--out", "taken.pt"), "out: taken.pt exists, and is not replaced"),
        (("--out", "none/small.pt"), "out: the folder none does not exist"),
        (("--calibrate", "none.pt"), "calibrate: none.pt is no file of tensors"),
        (("--calibrate", "taken.pt"), "calibrate: taken.pt cannot be read as a file of tensors"),
        (("--calibrate", "reduce_models:wrong"), "calibrate: reduce_models:wrong holds a int; give inputs"),
        (("--calibrate", "reduce_models:features"), "tokens is a torch.float32 tensor of shape (2, 12, 16)"),
        (("--evaluate", "reduce_models:nothing"), "evaluate: reduce_models:nothing is no file of tensors"),
        (("--layer", "nothing"), "nothing"),
        (("--html", "taken.pt/page.html"), "--html: taken.pt/page.html cannot be written"),
        (("--html", "small.pt"), "html: small.pt is read or written by this command already"),
        (("--html", "-"), "html: '-' and --json both write to standard output"),
    ],
)
def test_a_mistake_gives_one_line_and_no_file(run: Run, here: Path, arguments: tuple[str, ...], says: str) -> None:
    (here / "taken.pt").write_text("kept")
    given = {"--state": "4", "--out": "small.pt", **dict([arguments])}
    answer = run(*CALL, *(text for pair in given.items() for text in pair), "--json")
    assert answer.status == 2
    [line] = answer.err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (here / "small.pt").exists()
    assert (here / "taken.pt").read_text() == "kept"


def test_a_model_that_does_not_run_on_the_data_is_named_with_its_error(run: Run, here: Path) -> None:
    data = ("--calibrate", "reduce_models:features", "--state", "2", "--out", "small.pt")
    answer = run("reduce", "cli_models:Net", *data)
    assert answer.status == 2
    assert "error: calibrate: the model does not run on these batches: RuntimeError: " in answer.err


def test_attention_is_refused_with_the_reason(run: Run, here: Path) -> None:
    data = ("--calibrate", "reduce_models:features", "--state", "4", "--out", "small.pt")
    answer = run("reduce", "reduce_models:attention", *data)
    assert answer.status == 2
    assert "attention keeps every token and has no state dimensions" in answer.err


@pytest.mark.usefixtures("here")
def test_batches_are_taken_in_every_form_and_no_more_than_asked_for() -> None:
    assert [batch.args[0].shape[0] for batch in load_batches("x", "reduce_models:task", 2, 20)] == [20, 20]
    assert [batch.args[0].shape[0] for batch in load_batches("x", "reduce_models:task", 9, 20)] == [20, 20, 8]
    assert len(load_batches("x", "reduce_models:features", 1, 1)) == 1  # a pair of tensors is inputs and targets
    torch.save({"input_ids": torch.zeros(1, 3), "labels": torch.ones(1, 3)}, "named.pt")
    [batch] = load_batches("x", "named.pt", 1, 1)
    assert sorted(batch.kwargs) == ["input_ids", "labels"]


def test_labels_are_the_next_tokens_and_means_are_over_what_is_asked() -> None:
    class Model(nn.Module):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
            value = loss(logits[:, :-1], labels[:, 1:])
            return type("Output", (), {"logits": logits, "loss": value})

    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    labels[1, 2:] = -100
    batches = [Batch((), {"logits": logits[[k]], "labels": labels[[k]]}) for k in range(2)]
    evaluate = evaluation(batches)
    assert evaluate is not None
    shifted, asked = logits[:, :-1], labels[:, 1:]
    assert evaluate(Model()) == pytest.approx(
        {"loss": float(loss(shifted, asked)), "accuracy": float(accuracy(shifted, asked))}
    )
    assert evaluation([Batch((logits,), {})]) is None
    with pytest.raises(ConfigError, match="x: none is no file"):
        load_batches("x", "none", 1, 1)


def test_batches_in_which_nothing_is_asked_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    asked, unasked = Batch((logits,), {}, targets), Batch((logits,), {}, torch.full_like(targets, -100))
    evaluate, nothing = evaluation([unasked, asked]), evaluation([unasked])
    assert evaluate is not None
    assert nothing is not None
    expected = {"loss": float(loss(logits, targets)), "accuracy": float(accuracy(logits, targets))}
    assert evaluate(nn.Identity()) == pytest.approx(expected)
    assert all(math.isnan(value) for value in nothing(nn.Identity()).values())
