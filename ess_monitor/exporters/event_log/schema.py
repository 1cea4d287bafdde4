"""Describes the event log's format as JSON Schema, for readers without this package.

python -m ess_monitor.exporters.event_log.schema > docs/event-log.schema.json
"""

from __future__ import annotations

import ast
import inspect
import json
from typing import Any

from ess_monitor import records
from ess_monitor.exporters.event_log.events import EVENT
from ess_monitor.records import SCHEMA_VERSION


def event_schema() -> dict[str, Any]:
    """Build the JSON Schema (draft 2020-12) of one line of the event log from the records.

    Fields with a default are optional: lines of an older release of the same schema version may lack them. Unknown
    fields are allowed: a newer release of the same version may add some.

    Examples:
        >>> sorted(event_schema()["discriminator"]["mapping"])
        ['action', 'finding', 'measurement', 'run_finished', 'run_started']
    """
    schema = EVENT.json_schema()
    for name, definition in schema["$defs"].items():
        definition.pop("additionalProperties", None)
        for field, text in _field_texts(name).items():
            definition["properties"][field].setdefault("description", text)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"One line of an ess_monitor event log, schema version {SCHEMA_VERSION}",
        **schema,
    }


def _field_texts(name: str) -> dict[str, str]:
    """Return the docstrings of a record's fields. Python does not keep them, so the source is read."""
    record = getattr(records, name, None)
    if record is None:
        return {}
    (definition,) = ast.parse(inspect.getsource(record)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            texts[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return texts


if __name__ == "__main__":
    print(json.dumps(event_schema(), indent=2, sort_keys=True))
