"""The text page of TensorBoard: findings with their evidence, the table of actions, the legend of the pictures."""

from __future__ import annotations

from pathlib import Path

from ess_monitor.exporters import TensorBoardConfig, TensorBoardExporter
from ess_monitor.exporters.tensorboard.heatmaps import PICTURES
from tests.exporters.helpers import ODD_LAYERS, action, evidence, examined, finding, measurement
from tests.exporters.tensorboard.helpers import as_page, read, write


def test_findings_are_text(tmp_path: Path) -> None:
    write(TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)), measurement(300, findings=(finding(step=300),)))
    (event,) = read(tmp_path / "demo").Tensors("ess_findings/blocks.0.mixer/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 300
    assert "healthy → **collapsed**" in text
    assert "used 2 of 16." in text
    assert "Raise alpha." in text


def _actions_as_shown(folder: Path) -> list[tuple[int, list[list[str]]]]:
    """(step, rows of cells) of every version of the table, as TensorBoard's own Markdown renderer shows it."""
    versions = []
    for event in read(folder).Tensors("ess_actions/table/text_summary"):
        table = as_page(event.tensor_proto.string_val[0]).find("table")
        assert table is not None
        versions.append((event.step, [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]))
    return versions


def test_the_newest_table_of_actions_has_all_of_them(tmp_path: Path) -> None:
    recovered = action(step=900, outcome="recovered", utilization_after=0.5, message="recovered in 600 steps")
    advice = action("blocks.1.mixer", 900, action="advise", outcome="dry_run", strength=None, utilization_before=None)
    write(
        TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)),
        measurement(290, actions=(action(step=300),)),
        measurement(590),
        measurement(890, actions=(recovered, advice)),
    )
    header = ["step", "layer", "action", "strength", "before", "after", "outcome", "message"]
    pull = ["blocks.0.mixer", "pull_to_identity", "0.5", "12.5%"]
    applied = ["300", *pull, "-", "applied", "regularizer attached"]
    assert _actions_as_shown(tmp_path / "demo") == [
        (290, [header, applied]),
        (
            890,
            [
                header,
                applied,
                ["900", *pull, "50.0%", "recovered", "recovered in 600 steps"],
                ["900", "blocks.1.mixer", "advise", "-", "-", "-", "dry_run", "regularizer attached"],
            ],
        ),
    ]


MARKUP = (
    "a | b",
    "**bold** _x_ __init__ q_proj",
    "`code` [link](http://x) ![i](x)",
    "<b>&amp; A->I</b>",
    "\\| \\n $x$ ~~y~~",
)


def test_names_and_messages_are_shown_as_they_are_and_never_become_markup(tmp_path: Path) -> None:
    names = (*ODD_LAYERS, *MARKUP)
    write(
        TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)),
        measurement(1, actions=tuple(action(name, 1, message=f"on {name}!") for name in names)),
    )
    ((_, (_, *rows)),) = _actions_as_shown(tmp_path / "demo")
    one_line = [name.replace("\n", " ").replace("\x1b", "\N{REPLACEMENT CHARACTER}") for name in names]
    assert [row[1] for row in rows] == [name or "root" for name in one_line]
    assert [row[-1] for row in rows] == [f"on {name}!" for name in one_line]


def test_a_finding_on_an_oddly_named_layer_is_no_markup_either(tmp_path: Path) -> None:
    (name,) = (name for name in ODD_LAYERS if "script" in name)
    write(TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)), measurement(findings=(finding(name),)))
    (tag,) = (tag for tag in read(tmp_path / "demo").Tags()["tensors"] if tag.startswith("ess_findings/"))
    (event,) = read(tmp_path / "demo").Tensors(tag)
    page = as_page(event.tensor_proto.string_val[0])
    assert page.findtext("p/strong") == name
    assert {element.tag for element in page.iter()} == {"page", "p", "strong", "em"}


def test_the_evidence_of_a_finding_is_a_table_below_it(tmp_path: Path) -> None:
    found = evidence(basis="kl", base=None, outcome="loud", far_share_ratio=None)
    measured = measurement(100, findings=(examined(), examined("blocks.1.mixer", found)))
    write(TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)), measured)
    events = read(tmp_path / "demo")
    shown = []
    for layer in ("blocks.0.mixer", "blocks.1.mixer"):
        (event,) = events.Tensors(f"ess_findings/{layer}/text_summary")
        page = as_page(event.tensor_proto.string_val[0])
        shown.append([["".join(cell.itertext()) for cell in row] for row in page.iter("tr")])
    assert "healthy → **forgets by choice**" in events.Tensors("ess_findings/blocks.0.mixer/text_summary")[
        0
    ].tensor_proto.string_val[0].decode("utf-8")
    assert shown[0] == [
        ["evidence", "step 100"],
        ["outcome", "by choice: the loss prefers the forgetting"],
        ["compared", "the loss, on 8 batches that were run again"],
        ["loss as it is", "8"],
        ["change with half the decay (m50)", "+1 ± 0.25, +12.50% of the loss"],
        ["change with a tenth of the decay (m90)", "+2, +25.00% of the loss"],
        ["change without the past (cut)", "+4, +50.00% of the loss"],
        ["m50 / cut", "25.0%"],
        ["share of the output that comes from afar", "12.5%"],
    ]
    assert ["change with half the decay (m50)", "1 ± 0.25"] in shown[1]
    assert ["share of the output that comes from afar", "–"] in shown[1]
    assert [point.value for point in events.Scalars("ess_evidence_m50_ratio/blocks.0.mixer")] == [0.125]
    assert [point.value for point in events.Scalars("ess_evidence_cut_nats/blocks.1.mixer")] == [4.0]


def test_the_table_of_actions_is_bounded(tmp_path: Path) -> None:
    write(
        TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)),
        measurement(1, actions=tuple(action(step=step, outcome="rejected") for step in range(150))),
    )
    ((_, (_, *rows)),) = _actions_as_shown(tmp_path / "demo")
    assert [row[0] for row in rows] == [str(step) for step in range(50, 150)]


def test_the_pictures_have_a_legend_that_the_text_page_shows_as_a_table(tmp_path: Path) -> None:
    write(TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)), measurement())
    (event,) = read(tmp_path / "demo").Tensors("ess_help/pictures/text_summary")
    table = as_page(event.tensor_proto.string_val[0]).find("table")
    assert table is not None
    rows = [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
    assert [row[0] for row in rows[1:]] == ["ess", *PICTURES]
    assert rows[1][1] == "layers, in the order of the model: blocks.0.mixer, blocks.1.mixer"
