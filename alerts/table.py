"""Reads the tables of rules and panels, which are YAML with placeholders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def read_table(path: Path, values: Mapping[str, str]) -> Any:
    """Return the content of a YAML file in which each `<name>` has been replaced by its value.

    PromQL and Go templates use braces and `$`; neither has a word in angle brackets.
    """
    return yaml.safe_load(re.sub(r"<(\w+)>", lambda found: values[found[1]], path.read_text(encoding="utf-8")))
