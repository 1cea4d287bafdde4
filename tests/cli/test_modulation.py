"""`ess-monitor modulation`: on texts and tasks, as table, JSON and page, and one line for a mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from ess_monitor import MonitorConfig
from ess_monitor.analysis import shots_profile, state_modulation
from ess_monitor.cli.analysis.modulation import _require_vocabulary
from ess_monitor.cli.analysis.text import load_tokenizer
from ess_monitor.errors import ConfigError
from tests.cli.test_main import Run

WORDS = ["<unk>", ".", "a", "b", "c", "}", "{", "x;", "y}"]
SENTENCES = "a b c a b a . c b a c a b . a a b c b a . c a b b a . a c b a c b . b a c a b . "


@pytest.fixture
def text(tmp_path: Path, run: Run) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(SENTENCES * 2)
    return tmp_path


OF_TEXT = ("cli_models:Net", "--text", "text.txt", "--tokenizer", "tokenizer.json")


def test_a_text_gives_what_it_gives_in_python(run: Run, text: Path) -> None:
    answer = run("modulation", *OF_TEXT, "--separators", ".", "--length", "32", "--json", "--substitute", "2")
    assert answer.status == 0, answer.err

    import cli_models  # type: ignore[import-not-found]

    ids = torch.tensor([WORDS.index(word) for word in (SENTENCES * 2).split()])
    rows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    torch.manual_seed(0)
    config = MonitorConfig(capture={"heads": 8, "max_length": 32})
    expected = state_modulation(cli_models.Net(), rows, separators=[1], substitutes={2: "'a'"}, config=config)
    assert answer.json == {"schema_version": 1, **expected.model_dump(mode="json")}


def test_the_table_and_the_page_show_separators_and_substitutes(run: Run, text: Path) -> None:
    answer = run("modulation", *OF_TEXT, "--separators", "1", "--substitute", "3", "--html", "page.html")
    assert answer.status == 0, answer.err
    assert re.search(r"layer +in their place +separators +tau 0.01 +tau 0.1 +tau 0.3 +tau 1 +entropy", answer.out)
    assert re.search(r"mixer +\d+ +-?\d\.\d\d ± \d\.\d\d", answer.out)
    assert re.search(r"mixer +'b' +\d+ ", answer.out)
    assert re.search(r"lstm +skipped: ", answer.out)
    page = (text / "page.html").read_text()
    assert "Net: state modulation" in page
    assert "mixer: ESS along the text" in page
    assert "mixer: mean ESS around separators" in page


def test_scopes_are_all_tokens_with_a_brace(run: Run, text: Path) -> None:
    (text / "code.txt").write_text("a b c x; y} a b { c a x; a b } c a b c a b " * 2)
    answer = run("modulation", *OF_TEXT, "--text", "code.txt", "--scopes", "}", "--json")
    assert answer.status == 0, answer.err
    assert answer.json["separators"] == [5, 8]


def test_a_task_has_separators_of_its_own(run: Run) -> None:
    short = ("--task-kwargs", '{"keys": 4, "values": 4, "length": 48}')
    answer = run("modulation", "cli_models:Net", "--task", "documents", *short, "--json", "--batch", "3")
    assert answer.status == 0, answer.err
    assert answer.json["separators"] == [0]
    assert {layer["status"] for layer in answer.json["layers"]} == {"ok"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "text: give either --text FILE with --tokenizer, or --task documents"),
        (("--text", "text.txt"), "tokenizer: not given"),
        (("--text", "text.txt", "--tokenizer", "tokenizer.json"), "separators: not given"),
        (("--text", "none.txt", "--tokenizer", "bytes", "--separators", "1"), "text: cannot read none.txt"),
        (
            ("--text", "text.txt", "--tokenizer", "bytes", "--separators", "46"),
            "tokenizer: token 99 is not among the 11",
        ),
        (("--text", "text.txt", "--tokenizer", "text.txt", "--separators", "1"), "tokenizer: text.txt is no tokenizer"),
        ((*OF_TEXT[1:], "--separators", "!"), "separators: '!' is neither a list of ids"),
        ((*OF_TEXT[1:], "--separators", "9"), "separators: none of 9 is among the tokens"),
        ((*OF_TEXT[1:], "--separators", "50256"), "50256 is not among the model's 11 tokens"),
        ((*OF_TEXT[1:], "--scopes", "#"), "scopes: no token of the text holds '#'"),
        ((*OF_TEXT[1:], "--scopes", "}", "--separators", "1"), "scopes: separators are given already"),
        (("--task", "documents", "--task-kwargs", "3"), "task-kwargs: '3' is not a JSON object"),
        (("--task", "documents", "--task-kwargs", '{"keyz": 3}'), "did you mean keys"),
        (("--task", "documents", "--scopes", "}"), "scopes: needs a text and its tokenizer"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(run: Run, text: Path, options: tuple[str, ...], message: str) -> None:
    answer = run("modulation", "cli_models:Net", *options)
    assert answer.status == 2
    assert answer.err.count("\n") <= 2
    assert message in answer.err


def test_empty_and_short_texts_are_refused(run: Run, text: Path) -> None:
    for content, message in (("  \n", "is empty"), ("a . b", "has 3 tokens; at least 16 are needed")):
        (text / "text.txt").write_text(content)
        answer = run("modulation", *OF_TEXT, "--separators", "1")
        assert answer.status == 2
        assert message in answer.err


def test_a_tokenizer_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="tokenizer: 'no/such' is neither 'bytes'"):
        load_tokenizer("no/such")


def test_shots_are_put_before_the_text_one_after_another(run: Run, text: Path) -> None:
    (text / "first.txt").write_text("a b . c\n")
    (text / "second.txt").write_text("b b . a\n")
    (text / "question.txt").write_text("c a b b a c a")
    given = ("cli_models:Net", "--text", "question.txt", "--tokenizer", "tokenizer.json")
    shots = ("--shots", "first.txt", "--shots", "second.txt")
    answer = run("modulation", *given, *shots, "--tolerance", "0.1", "--json")
    assert answer.status == 0, answer.err

    import cli_models

    words = ["a b . c", "b b . a", "c a b b a c a"]
    prompts = [" ".join([*words[:k], words[2]]) for k in range(3)]
    ids = [torch.tensor([WORDS.index(word) for word in prompt.split()]) for prompt in prompts]
    torch.manual_seed(0)
    config = MonitorConfig(tolerance=0.1, capture={"heads": 8})
    expected = shots_profile(cli_models.Net(), ids, question=7, config=config)
    assert answer.json == {"schema_version": 1, **expected.model_dump(mode="json")}
    assert [at["tokens"] for at in answer.json["layers"][0]["at"]] == [7, 11, 15]

    answer = run("modulation", *given, *shots, "--html", "shots.html")
    assert re.search(r"layer +shots +tokens +ESS +entropy-ESS", answer.out)
    assert re.search(r"mixer +2 +15 +\d", answer.out)
    assert "ESS along the question" in (text / "shots.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "documents"), "shots: needs --text FILE"),
        (("--text", "text.txt", "--tokenizer", "bytes", "--separators", "0"), "shots: does not go with --separators"),
        (
            ("--text", "text.txt", "--tokenizer", "bytes", "--tolerance", "1", "--tolerance", "2"),
            "tolerance: 2 are given",
        ),
        (("--text", "one.txt", "--tokenizer", "tokenizer.json"), "text: one.txt has 1 tokens of its own"),
        (("--text", "text.txt", "--tokenizer", "bytes"), "tokenizer: token"),
    ],
)
def test_mistakes_with_shots_are_named(run: Run, text: Path, options: tuple[str, ...], message: str) -> None:
    (text / "one.txt").write_text("a")
    answer = run("modulation", "cli_models:Net", "--shots", "text.txt", *options)
    assert answer.status == 2
    assert message in answer.err


def test_the_vocabulary_is_not_that_of_an_embedding_of_positions() -> None:
    model = nn.ModuleDict({"positions": nn.Embedding(16, 4), "tokens": nn.Embedding(128, 4)})
    _require_vocabulary(model, torch.tensor([[97, 46]]), {46: "."})
    with pytest.raises(ConfigError, match="token 128 is not among the 128"):
        _require_vocabulary(model, torch.tensor([[97, 128]]), {46: "."})
