"""What is peculiar to the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from ess_monitor import ConfigError
from ess_monitor.exporters import read_event_log
from tests.integrations.helpers import (
    EAGER,
    LanguageModel,
    callback,
    dataset,
    hf_trainer,
    hooks,
    measurements,
    train,
)
from tests.programs import run_program

transformers = pytest.importorskip("transformers")


def logged(folder: Path, **settings: object):
    log = folder / "log.jsonl"
    return log, callback("transformers", exporters=[{"kind": "event_log", "path": str(log)}], **settings)


class TokenLoss(LanguageModel):
    """Takes labels, and divides by the tokens of the whole step where it is told them, as models of the library do."""

    def forward(self, tokens, labels=None, num_items_in_batch=None, **kwargs):  # type: ignore[override]
        output = super().forward(tokens)
        if num_items_in_batch is None:
            return output
        count = tokens[:, 1:].numel()
        return {**output, "loss": output["loss"] * count / num_items_in_batch}


def test_metrics_of_evaluations_and_logs_reach_the_diagnosis(tmp_path: Path) -> None:
    log, ess = logged(tmp_path)
    trainer = hf_trainer(tmp_path, LanguageModel(), ess, eval_strategy="steps", eval_steps=5, label_names=["tokens"])
    trainer.train()
    evaluations = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    found = {m.step: m.metrics for m in measurements(log)}
    assert "eval_loss" not in found[3]
    assert found[6]["eval_loss"] == pytest.approx(evaluations[5])
    assert found[9]["eval_loss"] == pytest.approx(evaluations[5])
    assert found[9]["learning_rate"] == pytest.approx(1e-2)


def test_evaluation_batches_can_be_the_source(tmp_path: Path) -> None:
    log, ess = logged(tmp_path, capture={"source": "validation"})
    model = LanguageModel()
    hf_trainer(tmp_path, model, ess, eval_strategy="steps", eval_steps=4).train()
    assert [m.step for m in measurements(log)] == [4, 8, 12]
    assert hooks(model) == 0
    assert model.losses == train("transformers", tmp_path / "bare").losses


def test_the_loss_of_a_step_is_that_of_all_its_micro_batches(tmp_path: Path) -> None:
    log, ess = logged(tmp_path, every_n_steps=2)
    model = LanguageModel()
    hf_trainer(tmp_path, model, ess, steps=4, accumulate=3).train()
    expected = {step: sum(model.losses[3 * step : 3 * step + 3]) / 3 for step in (0, 2)}
    assert {m.step: m.metrics["loss"] for m in measurements(log)} == pytest.approx(expected)


def test_a_loss_that_is_a_share_of_the_steps_tokens_is_summed(tmp_path: Path) -> None:
    log, ess = logged(tmp_path, every_n_steps=2)
    model = TokenLoss()
    trainer = hf_trainer(tmp_path, model, ess, steps=4, accumulate=3)
    trainer.train_dataset = [{"tokens": row, "labels": row[1:]} for row in dataset()]
    trainer.train()
    assert trainer.model_accepts_loss_kwargs
    expected = {step: sum(model.losses[3 * step : 3 * step + 3]) / 3 for step in (0, 2)}
    assert {m.step: m.metrics["loss"] for m in measurements(log)} == pytest.approx(expected)


def test_without_a_loss_in_the_output_the_last_logged_one_is_taken(tmp_path: Path) -> None:
    log, ess = logged(tmp_path)
    trainer = hf_trainer(tmp_path, LanguageModel(), ess)
    trainer.compute_loss_func = lambda output, labels, num_items_in_batch=None: output.pop("other")
    forward = trainer.model.forward
    trainer.model.forward = lambda tokens, labels=None: {"other": forward(tokens)["loss"]}
    trainer.train_dataset = [{"tokens": row, "labels": row} for row in dataset()]
    trainer.train()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    found = {m.step: m.metrics for m in measurements(log)}
    assert "loss" not in found[0]
    assert {step: found[step]["loss"] for step in (3, 6, 9)} == pytest.approx({s: losses[s] for s in (3, 6, 9)})


@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("at", [None, 4])
def test_the_share_of_a_micro_batch_is_the_trainers_in_every_step(
    accumulate: int, at: int | None, tmp_path: Path
) -> None:
    """12 batches an epoch in groups of 5: the third group has two. Also when training resumes in the second epoch."""
    ess = callback("transformers", autopilot={"mode": "auto", "lag_steps": 2})
    seen: list[tuple[float, int]] = []

    class Noting(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
            scale = ess.monitor._results.autopilot._grad_scale()
            seen.append((scale, trainer.current_gradient_accumulation_steps))

    resume = None
    if at is not None:
        hf_trainer(tmp_path, LanguageModel(), None, steps=at, accumulate=accumulate).train()
        resume = str(tmp_path / f"checkpoint-{at}")
    trainer = hf_trainer(tmp_path, LanguageModel(), ess, steps=8, accumulate=accumulate)
    trainer.add_callback(Noting())
    trainer.train(resume_from_checkpoint=resume)
    assert len(seen) == 8 - (at or 0)
    assert [scale for scale, _ in seen] == [1 / steps for _, steps in seen]
    assert len({steps for _, steps in seen}) == (2 if accumulate == 5 else 1)


def test_a_stream_without_a_length_is_taken_for_full_steps(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([{"tokens": row} for row in dataset()])

    ess = callback("transformers")
    trainer = hf_trainer(tmp_path, LanguageModel(), ess, steps=4, accumulate=3)
    trainer.train_dataset = Stream()
    trainer.train()
    assert ess._shares.micro_batches == 3
    assert ess.monitor.snapshot().last_step == 4


def test_a_run_that_began_without_the_callback_resumes_and_saves_with_it(tmp_path: Path) -> None:
    train("transformers", tmp_path, steps=4)
    log, ess = logged(tmp_path)
    hf_trainer(tmp_path, LanguageModel(), ess, steps=8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [m.step for m in measurements(log)] == [4, 7]
    again = callback("transformers")
    hf_trainer(tmp_path, LanguageModel(), again, steps=12).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.monitor.snapshot().steps_total == 8


def test_a_second_training_from_step_0_begins_anew(tmp_path: Path) -> None:
    log, ess = logged(tmp_path)
    for _ in range(2):
        hf_trainer(tmp_path, LanguageModel(), ess, steps=5).train()
    assert [m.step for m in measurements(log)] == [0, 3, 0, 3]


def test_the_trainer_may_build_the_callback_anew_from_the_checkpoint(tmp_path: Path) -> None:
    train("transformers", tmp_path, callback("transformers", **EAGER), steps=9, model=LanguageModel("wla"))
    fresh = callback("transformers", every_n_steps=50)
    trainer = hf_trainer(tmp_path, LanguageModel("wla"), fresh, steps=12, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    (restored,) = [c for c in trainer.callback_handler.callbacks if type(c) is type(fresh)]
    assert restored is not fresh
    assert restored.config.every_n_steps == 4
    assert restored.monitor.snapshot().steps_total == 12
    assert restored.monitor.snapshot().interventions_total["pull_to_identity"]["applied"] >= 1


def test_a_state_that_json_cannot_hold_does_not_stop_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ess_monitor.monitor.Monitor.state_dict", lambda self: {"version": object()})
    train("transformers", tmp_path, callback("transformers"), steps=4)
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    assert "the monitor's state is not in this checkpoint: TypeError" in caplog.text


def test_two_callbacks_on_one_trainer_are_refused(tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, LanguageModel(), callback("transformers"))
    trainer.add_callback(callback("transformers"))
    with pytest.raises(ConfigError, match="2 of ESSMonitorCallback given"):
        trainer.train()


def test_the_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_trainer(tmp_path, LanguageModel(), callback("transformers", table=True), disable_tqdm=False, steps=4).train()
    assert "model.blocks.1.mixer" in capsys.readouterr().out


def test_a_training_that_dies_in_silence_ends_the_run_with_the_program(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from tests.integrations.helpers import LanguageModel, callback, hf_trainer\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "ess = callback('transformers', exporters=[{'kind': 'event_log', 'path': str(folder / 'log')}])\n"
        "hf_trainer(folder, LanguageModel(fail_at=4), ess).train()\n"
    )
    root = Path(__file__).parents[2]
    done = run_program([script], tmp_path, imports=["transformers.trainer"], cwd=root, env=_with_path(root))
    assert "ZeroDivisionError: injected" in done.stderr
    last = list(read_event_log(tmp_path / "log"))[-1]
    assert (last.event, last.data.status) == ("run_finished", "failed")


def _with_path(root: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(root)}


def test_a_small_pretrained_model_of_the_library_trains_with_it(tmp_path: Path) -> None:
    """The Trainer's way with its own models: configuration, safetensors, labels."""

    class Config(transformers.PreTrainedConfig):
        model_type = "ess_test"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.inner = LanguageModel()
            self.post_init()

        def forward(self, tokens):
            return self.inner(tokens)

    log, ess = logged(tmp_path)
    hf_trainer(tmp_path, Model(Config()), ess).train()
    assert [m.step for m in measurements(log)] == [0, 3, 6, 9]
    assert len(ess.monitor.layers) == 2


def test_a_reporter_of_the_trainer_that_lacks_what_pictures_need_gets_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard of `report_to` was not asked for here: a training must not end for want of Pillow."""
    common = importlib.import_module("ess_monitor.integrations.transformers")
    missing = importlib.import_module("ess_monitor.exporters.tensorboard.exporter").importlib.util
    find_spec = missing.find_spec
    monkeypatch.setattr(missing, "find_spec", lambda name: None if name == "PIL" else find_spec(name))
    monkeypatch.setattr(common, "is_installed", lambda name: name != "PIL")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    _, ess = logged(tmp_path, run_name="beside")
    hf_trainer(tmp_path, LanguageModel(), ess, steps=4, report_to=["tensorboard"], save_strategy="no").train()
    assert ess.monitor.snapshot().status == "finished"
    assert len(list((tmp_path / "runs" / "beside").glob("*tfevents*"))) == 1
