"""ESS at a question over the number of shots: against T built here, on a layer that forgets, and of mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor.analysis import LayerShots, ShotsProfile, shots_profile
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import ConfigError
from ess_monitor.featurizers import LA, WLA
from ess_monitor.report import figures_of, render_shots_profile

QUESTION = 10
IDS = torch.randint(9, (34,), generator=torch.Generator().manual_seed(3))
PROMPTS = [IDS[24:], IDS[12:], IDS]


def of_tokens(*mixers: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(9, 16), *mixers).double()


def operators_of(model: nn.Sequential, ids: Tensor) -> Tensor:
    """T of the heads of a WLA, (heads, L, L): q_i a^(i-j) k_j."""
    mixer: Any = model[1]
    with torch.no_grad():
        q, k, _ = mixer.features(model[0](ids[None]))
        decay = torch.sigmoid(mixer.decay_logit)[:, None, None] ** (1 / mixer.beta)
    apart = (torch.arange(len(ids))[:, None] - torch.arange(len(ids))).clamp_min(0)
    return torch.einsum("hin,hjn,hijn->hij", q[0], k[0], decay ** apart[None, :, :, None]).tril()


def test_sizes_are_those_of_the_svd_at_the_tokens_of_the_question() -> None:
    model = of_tokens(WLA(16, 2, beta=2.0))
    tau = 0.05
    [layer] = shots_profile(model, PROMPTS, question=QUESTION, config=MonitorConfig(tolerance=tau)).layers
    assert [(at.shots, at.tokens) for at in layer.at] == [(0, 10), (1, 22), (2, 34)]
    for ids, at in zip(PROMPTS, layer.at, strict=True):
        operator = operators_of(model, ids)
        assert at.offsets == tuple(range(1, QUESTION))
        expected = []
        for offset in at.offsets:
            i = len(ids) - QUESTION + offset
            expected.append(float((torch.linalg.svdvals(operator[:, i:, :i]) > tau).sum(-1).double().mean()))
        assert at.along == pytest.approx(expected)
        assert at.effective_size == pytest.approx(sum(expected) / len(expected))


def test_shots_fill_the_state_of_a_layer_that_keeps_and_not_of_one_that_forgets() -> None:
    forgets = WLA(16, 2, beta=0.05)  # A = 2^-20
    keeps, forgetful = shots_profile(of_tokens(LA(16, 2), forgets), PROMPTS, question=QUESTION).layers
    assert keeps.at[1].along[0] > keeps.at[0].along[0] + 1
    assert forgetful.at[1].along[0] == pytest.approx(forgetful.at[0].along[0], abs=0.5)


def test_a_long_question_is_measured_at_32_tokens() -> None:
    [layer] = shots_profile(of_tokens(LA(16, 2)), [IDS.repeat(3)], question=100).layers
    assert len(layer.at[0].offsets) == 32
    assert set(layer.at[0].offsets) <= set(range(1, 100))


def test_a_layer_that_fails_says_why_and_the_others_are_measured() -> None:
    model = of_tokens(LA(16, 2), LA(16, 2))
    with torch.no_grad():
        model[2].features.k.bias[0] = torch.nan  # type: ignore[union-attr, index]
    good, broken = shots_profile(model, PROMPTS, question=QUESTION).layers
    assert (good.status, broken.status) == ("ok", "nonfinite")
    assert not broken.at


def test_the_rows_the_page_and_the_figures_show_every_number_of_shots() -> None:
    result = shots_profile(of_tokens(LA(16, 2)), PROMPTS, question=QUESTION)
    assert [(row["layer"], row["shots"], row["tokens"]) for row in result.rows()] == [
        ("1", 0, 10),
        ("1", 1, 22),
        ("1", 2, 34),
    ]
    [figure] = figures_of(result)
    assert [trace.name for trace in figure.data] == ["0 shots", "1 shots", "2 shots"]
    assert "1: ESS along the question" in render_shots_profile(result)
    empty = ShotsProfile(model="Net", question=4, tolerance=1e-3, tolerance_scale="absolute",
                         layers=(LayerShots(layer="a", status="failed", message="no"),))  # fmt: skip
    assert empty.rows()[0]["effective_size"] is None


@pytest.mark.parametrize(
    ("prompts", "question", "message"),
    [
        ([], 4, "prompts is empty"),
        ([IDS], 1, "question=1"),
        ([IDS], 35, "prompts holds one of 34 tokens"),
        ([IDS[None]], 4, "pass ids of shape"),
        ([IDS.float()], 4, "pass ids of shape"),
    ],
)
def test_mistakes_are_named(prompts: list[Tensor], question: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shots_profile(of_tokens(LA(16, 2)), prompts, question=question)
