"""An alpha and a gate of which every rank holds a part: what is saved of them, and how they are taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor.capture import AlphaHandle
from ess_monitor.errors import CaptureError
from ess_monitor.featurizers import S6
from ess_monitor.integrations.json_state import from_json, to_json
from ess_monitor.interventions import rescale_alpha
from tests.interventions.pilots import LAST, Run, said, weights
from tests.interventions.shards import COLLAPSED, WAYS, WORLD_SIZE, observe
from tests.interventions.test_autopilot_state import resumed
from tests.ranks import saved_by_ranks

ROUNDING = {"rtol": 0.0, "atol": 3e-6}
"""Three rungs of roundings in float32, of numbers up to 8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return saved_by_ranks(observe, folder, WORLD_SIZE)


@pytest.mark.parametrize("how", WAYS)
def test_in_the_same_process_a_shard_and_its_moments_come_back_bitwise(ranks: list[dict[str, Any]], how: str) -> None:
    for rank in ranks:
        found = rank[how]["same process"]
        assert found["said"] == ["rolled_back"]
        assert torch.equal(found["alpha"], found["before"])
        assert all(map(torch.equal, found["moments"], found["moments before"]))


@pytest.mark.parametrize("how", WAYS)
def test_resumed_from_what_rank_0_saved_every_rank_gets_its_own_shard_back(
    ranks: list[dict[str, Any]], how: str
) -> None:
    assert sum(rank[how]["resumed"]["alpha"].numel() for rank in ranks) == 4  # one of FSDP's may hold nothing
    for rank in ranks:
        found = rank[how]["resumed"]
        assert found["said"] == ["rolled_back"]
        assert found["alpha"].numel() == 0 or not torch.allclose(found["treated"], found["before"])
        torch.testing.assert_close(found["alpha"], found["before"], **ROUNDING)
        assert not any(value.any() for value in found["moments"])


@pytest.mark.parametrize("how", ["plain", "fsdp2"])
def test_what_two_ranks_saved_is_taken_back_by_one(ranks: list[dict[str, Any]], how: str) -> None:
    found = ranks[0]["one"][how]
    assert found["said"] == ["rolled_back"]
    torch.testing.assert_close(found["alpha"], ranks[0]["fsdp2"]["whole before"], **ROUNDING)
    assert not any(value.any() for value in found["moments"])


@pytest.mark.parametrize("how", WAYS)
def test_the_copy_of_a_whole_alpha_is_not_laid_over_shards(ranks: list[dict[str, Any]], how: str) -> None:
    for rank in ranks:
        found = rank["from a whole copy"][how]
        assert found["said"] == ["rolled_back"]
        torch.testing.assert_close(found["alpha"], found["before"], **ROUNDING)


@pytest.mark.usefixtures("ranks")  # they write it
@pytest.mark.parametrize("how", WAYS)
def test_the_state_of_a_sharded_alpha_is_the_factor_and_goes_through_json(folder: Path, how: str) -> None:
    state = torch.load(folder / f"{how}.state", weights_only=True)
    [treatment] = state["treatments"]
    assert treatment["copy"] is None
    assert treatment["factor"] == 1000.0
    assert from_json(json.loads(json.dumps(to_json(state)))) == state


def test_an_alpha_that_is_a_view_into_a_flat_parameter_is_refused(ranks: list[dict[str, Any]]) -> None:
    """Reading it between two steps reads freed memory."""
    for rank in ranks:
        [(action, outcome, message)] = rank["flat"]
        assert (action, outcome) == ("advise", "rejected")
        assert "use_orig_params=False" in message


def test_a_tensor_that_is_computed_from_others_is_not_rescaled() -> None:
    layer = S6(16, state_size=8)
    held = layer.A_log.detach() * 1.0
    del layer.A_log
    layer.A_log = held
    before = held.clone()
    with pytest.raises(CaptureError, match="A_log of S6 is not a parameter or buffer"):
        rescale_alpha(layer, 100.0, handle=AlphaHandle("A_log"))
    assert torch.equal(held, before)


# -- the gate from before a trial -------------------------------------------------------------------------------------


def test_resumed_in_the_middle_of_a_trial_every_rank_gets_its_shards_and_moments_back_bitwise(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        found = rank["trial"]["fsdp2"]
        assert found["has a gate"]
        assert found["back"].keys() == found["before"].keys()
        for name, tensor in found["back"].items():
            assert torch.equal(tensor, found["before"][name]), name
        assert any(not torch.equal(found["later"][name], found["before"][name]) for name in found["before"])
    assert all(rank["trial"]["fsdp2"]["before"]["A_log"].numel() == 2 for rank in ranks)


@pytest.mark.parametrize("how", ["plain", "fsdp2"])
def test_one_process_ends_the_trial_of_two(ranks: list[dict[str, Any]], how: str) -> None:
    found = ranks[0]["trial in one"][how]
    assert found["has a gate"]
    for name, tensor in ranks[0]["trial"]["fsdp2"]["whole before"].items():
        assert torch.equal(found["back"][name], tensor), name


def test_a_whole_tensor_goes_to_uneven_and_empty_shards(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert all(torch.equal(value, together) for value, together in rank["uneven"])


def test_a_part_of_a_flat_parameter_is_not_saved_and_the_gate_stays_as_it_is(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["trial"]["fsdp1"]
        assert not found["has a gate"]
        assert all(torch.equal(found["back"][name], tensor) for name, tensor in found["later"].items())


# -- the factor, in one process ---------------------------------------------------------------------------------------


def without_copy(run: Run) -> Run:
    """Resumed from a state as a sharded run writes it."""
    state = run.pilot.state_dict()
    for treatment in state["treatments"]:
        treatment["copy"] = None
    run.pilot = run.new_pilot()
    run.pilot.load_state_dict(state)
    return run


def last_alpha(run: Run) -> Tensor:
    mixer = run.model.blocks[1].mixer
    found: Tensor = mixer.A_log if isinstance(mixer, S6) else mixer.log_alpha
    return found.detach().clone()


@pytest.mark.parametrize("featurizer", ["s6", "gla_s6"])
def test_a_rung_after_the_resume_is_divided_away_with_the_one_before(featurizer: str) -> None:
    run = Run(featurizer)
    run.train(2)
    before = last_alpha(run)
    run.measure(COLLAPSED)
    without_copy(run)
    assert said(run.measure(COLLAPSED, times=2)) == [(LAST, "rescale_alpha", "applied", 10.0)]
    without_copy(run)
    assert [action.outcome for action in run.measure(COLLAPSED, loss=99.0)] == ["rolled_back"]
    torch.testing.assert_close(last_alpha(run), before, **ROUNDING)


def test_a_whole_copy_is_still_saved_and_restored_over_two_resumes() -> None:
    run = Run("s6")
    run.train(2)
    before, moments = weights(run.model), str(run.optimizer.state_dict())
    run.measure(COLLAPSED)
    other = resumed(resumed(run, "s6"), "s6")
    assert [action.outcome for action in other.measure(COLLAPSED, loss=99.0)] == ["rolled_back"]
    assert weights(other.model) == before
    assert str(other.optimizer.state_dict()) == moments


def test_a_copy_of_another_shape_is_not_used() -> None:
    run = Run("s6")
    before = last_alpha(run)
    run.measure(COLLAPSED)
    state = run.pilot.state_dict()
    state["treatments"][0]["copy"]["tensor"] = torch.zeros(1)  # would fill all of alpha
    run.pilot.load_state_dict(state)
    run.measure(COLLAPSED, loss=99.0)
    torch.testing.assert_close(last_alpha(run), before, **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sign", "form"), [(1.0, "exp"), (-1.0, "exp"), (1.0, "softplus"), (-1.0, "softplus")])
def test_dividing_by_the_factor_again_costs_one_rounding_a_step(sign: float, form: Any, dtype: torch.dtype) -> None:
    layer = nn.Module()
    layer.t = nn.Parameter(torch.linspace(-2, 2, 9).to(dtype))
    before = layer.t.detach().clone()
    handle = AlphaHandle("t", sign, form)
    rescale_alpha(layer, 100.0, handle=handle)
    largest = layer.t.detach().abs().max().item()
    rescale_alpha(layer, 1 / 100.0, handle=handle)
    assert (layer.t - before).abs().max() <= 2 * torch.finfo(dtype).eps * max(largest, 2.0)


# -- a roll-back that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("featurizer", ["s6", "wla"])
def test_a_roll_back_that_raises_is_told_once_and_not_tried_again(
    featurizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise RuntimeError("different meshes")

    calls: list[object] = []
    told: list[str] = []
    run = Run(featurizer)
    run.pilot._on_failure = lambda message, error: told.append(message)
    run.measure(COLLAPSED)
    target = "remedies.restore_alpha" if featurizer == "s6" else "identity_pull.IdentityPull.detach"
    monkeypatch.setattr(f"ess_monitor.interventions.{target}", broken)
    [action] = run.measure(COLLAPSED, loss=99.0)
    assert action.outcome == "failed"
    assert "could not be undone (RuntimeError: different meshes) and is not tried again" in action.message
    assert action.message.endswith("inspect the layer by hand")
    assert run.pilot.active == ()
    assert run.measure(COLLAPSED, loss=99.0, times=6) == ()
    assert run.measure(COLLAPSED, times=6) == ()  # given up
    assert len(calls) == len(told) == 1


def test_a_state_with_neither_copy_nor_factor_is_not_said_to_be_taken_back() -> None:
    run = Run("s6")
    run.measure(COLLAPSED)
    treated, state = weights(run.model), run.pilot.state_dict()
    state["treatments"][0]["copy"] = None
    del state["treatments"][0]["factor"]
    run.pilot.load_state_dict(state)
    [action] = run.measure(COLLAPSED, loss=99.0)
    assert action.outcome == "failed"
    assert "has no copy of this alpha, and no factor" in action.message
    assert weights(run.model) == treated
