"""Ranks whose batches are run again: they find and do the same, and nobody waits for one that does not take part."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.replaying_ranks import sharded, under_ddp
from tests.pipeline.replaying import LAST
from tests.ranks import saved_by_ranks

FIRST = LAST.replace("1", "0")
TOLD = ("findings", "evidence", "actions", "conditions")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return saved_by_ranks(under_ddp, tmp_path_factory.mktemp("ddp"), 2, 2)


@pytest.fixture(scope="module", params=["fsdp2", "fsdp1"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return saved_by_ranks(sharded, tmp_path_factory.mktemp(request.param), 2, 2, request.param)


def told_alike(ranks: list[dict[str, Any]], run: str) -> dict[str, Any]:
    """What both ranks say."""
    a, b = ({name: rank[run][name] for name in TOLD} for rank in ranks)
    assert a == b
    return a


@pytest.mark.parametrize(("run", "basis"), [("all", "loss"), ("all by outputs", "kl")])
def test_evidence_is_that_of_the_batches_of_all_ranks(ddp: list[dict[str, Any]], run: str, basis: str) -> None:
    [found] = told_alike(ddp, run)["evidence"]
    assert (found["layer"], found["basis"], found["batches"]) == (LAST, basis, 6)
    losses = [loss for rank in ddp for loss in rank[run]["losses"]]
    assert len(losses) == 6
    if basis == "loss":
        assert found["base"] == pytest.approx(sum(losses) / 6, rel=1e-6)
    for rank in ddp:
        assert rank[run]["training"] == rank["bare"]["training"]
        assert rank[run]["failures"] == 0


def test_evidence_on_the_size_of_a_state_is_that_of_the_batches_of_all_ranks(ddp: list[dict[str, Any]]) -> None:
    found = told_alike(ddp, "full")["evidence"]
    assert [(each["layer"], each["basis"], each["batches"]) for each in found] == [
        (FIRST, "loss", 6),
        (LAST, "loss", 6),
    ]
    losses = [loss for rank in ddp for loss in rank["full"]["losses"]]
    assert [each["base"] for each in found] == pytest.approx([sum(losses) / 6] * 2, rel=1e-6)
    for rank in ddp:
        assert rank["full"]["training"] == rank["bare"]["training"]
        assert rank["full"]["failures"] == 0


@pytest.mark.parametrize(("run", "basis"), [("alone", "loss"), ("alone by outputs", "kl")])
def test_rank_0_runs_batches_again_alone_while_the_other_goes_on(
    ddp: list[dict[str, Any]], run: str, basis: str
) -> None:
    [found] = ddp[0][run]["evidence"]
    assert (found["basis"], found["batches"]) == (basis, 3)
    assert ddp[0][run]["replays"] == 3
    assert ddp[1][run]["replays"] == 0
    assert ddp[1][run]["evidence"] == []
    for rank in ddp:
        assert rank[run]["training"] == rank["bare"]["training"]
        assert rank[run]["failures"] == 0


@pytest.mark.parametrize(("run", "batches"), [("auto", 4), ("auto, rank 0 measures", 2)])
def test_in_mode_auto_all_ranks_treat_alike(ddp: list[dict[str, Any]], run: str, batches: int) -> None:
    told = told_alike(ddp, run)
    [found] = told["evidence"]
    assert found["batches"] == batches
    assert [(a["step"], a["outcome"]) for a in told["actions"]] == [(10, "applied")]
    for rank in ddp:
        assert rank[run]["replays"] == 4  # two batches for the evidence, two for the trial
        assert rank[run]["failures"] == 0


def test_a_loss_that_is_not_finite_on_one_rank_turns_nothing_off(ddp: list[dict[str, Any]]) -> None:
    left_to_rank_0(ddp)


def left_to_rank_0(ranks: list[dict[str, Any]]) -> None:
    """Assert that the batches of rank 0 count, and that rank 1 ran as many."""
    [found] = told_alike(ranks, "nan")["evidence"]
    assert found["batches"] == 6
    assert [rank["nan"]["failures"] for rank in ranks] == [0, 6]
    assert [rank["nan"]["off"] for rank in ranks] == [[], []]
    assert [rank["nan"]["replays"] for rank in ranks] == [6, 6]


# -- sharded ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "basis"), [("all", "loss"), ("all by outputs", "kl")])
def test_sharded_all_ranks_find_the_same_and_train_as_without(
    shards: list[dict[str, Any]], run: str, basis: str
) -> None:
    [found] = told_alike(shards, run)["evidence"]
    assert (found["basis"], found["batches"]) == (basis, 6)
    for rank in shards:
        assert rank[run]["training"] == rank["bare"]["training"]
        assert rank[run]["failures"] == 0


def test_sharded_one_rank_alone_runs_nothing_again_and_says_why(shards: list[dict[str, Any]]) -> None:
    for rank in shards:
        assert rank["alone"]["replays"] == 0
        assert rank["alone"]["training"] == rank["bare"]["training"]
        assert all("sharded" in reason for reason in rank["alone"]["hindered"].values())
    [finding] = shards[0]["alone"]["findings"]
    assert finding["condition"] == "collapsed"
    assert "batches could not be run again (its parameters are sharded" in finding["reason"]
    assert shards[0]["alone without a metric"]["findings"] == []
    assert set(shards[0]["alone without a metric"]["conditions"].values()) == {"unknown"}


@pytest.mark.parametrize("featurizer", ["wla", "s6"])
def test_sharded_all_ranks_treat_alike_and_take_back_their_shards_of_the_gate(
    shards: list[dict[str, Any]], featurizer: str
) -> None:
    told = told_alike(shards, featurizer)
    assert [(a["step"], a["outcome"]) for a in told["actions"]] == [(10, "applied"), (18, "rolled_back")]
    for rank in shards:
        of_run = rank[featurizer]
        assert of_run["failures"] == 0
        assert of_run["gates"][18] != of_run["gates"][10]
        assert of_run["back"] == of_run["gates"][10]


def test_sharded_a_loss_that_is_not_finite_on_one_rank_keeps_nobody_waiting(shards: list[dict[str, Any]]) -> None:
    left_to_rank_0(shards)
