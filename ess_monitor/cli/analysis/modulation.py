"""`ess-monitor modulation`: how much of its state a layer lets go of at separators."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ess_monitor.cli.analysis.output import Heads, check_outputs, progress, put_out
from ess_monitor.cli.analysis.shots import prompts_of
from ess_monitor.cli.analysis.text import TextTokenizer, ids_of, ids_with, load_tokenizer, read_text, rows_of
from ess_monitor.cli.options import (
    AsJson,
    Batch,
    Checkpoint,
    Html,
    Kwargs,
    Layers,
    Length,
    Prefix,
    ScaleName,
    Seed,
    Target,
    ToleranceScale,
)
from ess_monitor.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ess_monitor.analysis import ShotsProfile


class TaskName(str, Enum):
    """Tasks with separators."""

    documents = "documents"


Text = Annotated[Path | None, typer.Option(metavar="FILE", help="A text; it is cut into rows of --length tokens.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="A tokenizer.json or its folder, a name that transformers knows, or 'bytes'."),
]
TaskOption = Annotated[TaskName | None, typer.Option(help="A task's batch in the place of a text.")]
TaskKwargs = Annotated[str | None, typer.Option(help="Settings of the task, as a JSON object.")]
Separators = Annotated[
    str | None, typer.Option(metavar="ID,ID,...", help="Ids of the separators, or one token's text.")
]
Scopes = Annotated[str | None, typer.Option(metavar="TEXT", help="Every token that holds this is one, such as '}'.")]
Substitute = Annotated[
    list[str] | None, typer.Option(metavar="ID", help="Put this token in their place, and compare; repeatable.")
]
Shots = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="A solved example to put before the text; repeatable. ESS by their number."),
]
Tolerances = Annotated[list[float] | None, typer.Option("--tolerance", help="tau; repeatable. Default .01 .1 .3 1.")]


def modulation(
    target: Target,
    kwargs: Kwargs = None,
    checkpoint: Checkpoint = None,
    prefix: Prefix = "",
    layer: Layers = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    task: TaskOption = None,
    task_kwargs: TaskKwargs = None,
    separators: Separators = None,
    scopes: Scopes = None,
    substitute: Substitute = None,
    shots: Shots = None,
    batch: Batch = 8,
    heads: Heads = 8,
    length: Length = 256,
    seed: Seed = 0,
    tolerance: Tolerances = None,
    tolerance_scale: ToleranceScale = ScaleName.absolute,
    as_json: AsJson = False,
    html: Html = None,
) -> None:
    """Show by how much the ESS of every layer falls at separators, beyond other tokens (section 4.4).

    On a text (--text FILE --tokenizer NAME) or on a task (--task documents). With --substitute the same text is
    measured again with another token in the place of every separator. With --shots the ESS at the text is measured
    behind none, one, two, ... of these examples instead. It means little without the weights of a trained model.
    """
    import torch

    from ess_monitor.analysis import shots_profile, state_modulation
    from ess_monitor.cli.measuring import config_of, run_on
    from ess_monitor.cli.model_loading import load_model
    from ess_monitor.cli.weights import load_into
    from ess_monitor.report import render_shots_profile, render_state_modulation

    check_outputs(html, as_json, checkpoint, text, *(shots or ()))
    if (text is None) == (task is None):
        raise ConfigError("text: give either --text FILE with --tokenizer, or --task documents")
    if text is not None and tokenizer is None:
        raise ConfigError("tokenizer: not given; a text needs one, --tokenizer tokenizer.json (or bytes)")
    if separators is not None and scopes is not None:
        raise ConfigError("scopes: separators are given already; leave out --separators or --scopes")
    known = None if tokenizer is None else load_tokenizer(tokenizer)

    def model_for(largest: Tensor, named: dict[int, str]) -> nn.Module:
        model = load_model(target, kwargs, seed=seed)
        if checkpoint is not None:
            load_into(model, checkpoint, prefix=prefix)
        _require_vocabulary(model, largest, named)
        return model

    if shots:
        if text is None or known is None:
            raise ConfigError("shots: needs --text FILE, which comes after them, and --tokenizer")
        if separators is not None or scopes is not None or substitute:
            raise ConfigError("shots: does not go with --separators, --scopes and --substitute; leave these out")
        if len(tolerance or ()) > 1:
            raise ConfigError(
                f"tolerance: {len(tolerance or ())} are given, with --shots it is one; leave out the others"
            )
        with redirect_stdout(sys.stderr):
            prompts, question = prompts_of(shots, text, known)
            ids = [torch.tensor(each) for each in prompts]
            model = model_for(ids[-1], {})
            device = next((each.device for each in model.parameters()), ids[-1].device)
            config = config_of(
                1,
                len(ids[-1]),
                layer,
                heads=heads,
                tolerance=(tolerance or [1e-3])[0],
                tolerance_scale=tolerance_scale.value,
            )

            def profiled(model: nn.Module, longest: Tensor) -> ShotsProfile:
                given = [each.to(longest.device) for each in ids]
                return shots_profile(model, given, question=question, config=config, progress=progress)

            over_shots = run_on(model, ids[-1].to(device), profiled)
        page = render_shots_profile(over_shots) if html is not None else None
        put_out(over_shots, page, as_json=as_json, html=html)
        return
    with redirect_stdout(sys.stderr):
        rows, default = _of_text(text, known, batch, length) if text is not None else _of_task(task_kwargs, batch, seed)
        ids_named = _separators(separators, scopes, rows, known, default)
        put = {key: name for each in substitute or () for key, name in ids_of("substitute", each, known).items()}
        inputs = torch.tensor(rows)
        model = model_for(inputs, {**ids_named, **put})
        device = next((each.device for each in model.parameters()), inputs.device)
        result = run_on(
            model,
            inputs.to(device),
            state_modulation,
            separators=list(ids_named),
            substitutes=put,
            tolerances=tolerance or (0.01, 0.1, 0.3, 1.0),
            config=config_of(len(rows), len(rows[0]), layer, heads=heads, tolerance_scale=tolerance_scale.value),
            progress=progress,
        )
    named = ", ".join(dict.fromkeys(ids_named.values()))
    title = f"{result.model}, {len(rows)} x {len(rows[0])} tokens: state modulation at {named}"
    page = render_state_modulation(result) if html is not None else None
    put_out(result, page, title, as_json=as_json, html=html)


def _of_text(path: Path, tokenizer: TextTokenizer | None, batch: int, length: int) -> tuple[list[list[int]], str]:
    assert tokenizer is not None
    rows = rows_of(tokenizer.encode(read_text(path)), batch, length)
    if len(rows[0]) < 16:
        raise ConfigError(f"text: {path} has {len(rows[0])} tokens; at least 16 are needed, give a longer text")
    return rows, ""


def _of_task(task_kwargs: str | None, batch: int, seed: int) -> tuple[list[list[int]], str]:
    from ess_monitor.tasks import SEPARATOR, Documents, DocumentsConfig

    try:
        given = json.loads(task_kwargs) if task_kwargs is not None else {}
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"task-kwargs: {task_kwargs!r} is not JSON ({error}); write it as '{{\"keys\": 8}}'"
        ) from error
    if not isinstance(given, dict):
        raise ConfigError(f"task-kwargs: {task_kwargs!r} is not a JSON object; write it as '{{\"keys\": 8}}'")
    data = Documents(DocumentsConfig(**{"seed": seed, **given}))
    return data.batch(range(batch))[0].tolist(), str(SEPARATOR)


def _separators(
    given: str | None, scopes: str | None, rows: list[list[int]], tokenizer: TextTokenizer | None, default: str
) -> dict[int, str]:
    if scopes is not None:
        if tokenizer is None:
            raise ConfigError("scopes: needs a text and its tokenizer; a task has no scopes")
        return ids_with(scopes, (token for row in rows for token in row), tokenizer)
    if given is None and not default:
        raise ConfigError("separators: not given; name the ids of the separators, --separators 0,50256, or --scopes")
    return ids_of("separators", given or default, tokenizer)


def _require_vocabulary(model: nn.Module, inputs: Tensor, named: dict[int, str]) -> None:
    """Raise `ConfigError` where an id has no row in any embedding of the model: that of positions may come first."""
    from torch import nn

    size = max((each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)), default=None)
    if size is None:
        return
    if int(inputs.max()) >= size:
        raise ConfigError(
            f"tokenizer: token {int(inputs.max())} is not among the {size} of the model's largest embedding; give the "
            "tokenizer, or the task, that it was trained with"
        )
    outside = [token for token in named if token >= size]
    if outside:
        raise ConfigError(f"separators, substitute: {outside[0]} is not among the model's {size} tokens")
