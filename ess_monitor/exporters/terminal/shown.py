"""Shows objects as text where they are printed, with colors in a rich console, and as HTML in notebooks."""

from __future__ import annotations

import io
import shutil
from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_LEAST_COLUMNS = 100
_NOTEBOOK_COLUMNS = 140
_FONTS = "var(--jp-code-font-family, Menlo), 'DejaVu Sans Mono', Consolas, monospace"
"""JupyterLab shows text of outputs, `pre` too, in a proportional font, in which columns do not line up."""
_HTML = f'<pre style="white-space: pre; overflow-x: auto; line-height: 1.2; font-family: {_FONTS}">{{code}}</pre>'


class Shown:
    """Shows what `__rich__` returns: as text by `print`, as HTML in a notebook.

    Examples:
        >>> class Answer(Shown):
        ...     def __rich__(self):
        ...         return "42 < 43"
        >>> print(Answer())
        42 < 43
        >>> "42 &lt; 43" in Answer()._repr_html_()
        True
    """

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """Return what a rich console prints."""

    def __str__(self) -> str:
        console = _console(max(_LEAST_COLUMNS, shutil.get_terminal_size((_NOTEBOOK_COLUMNS, 24)).columns))
        console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in console.export_text().splitlines()).strip("\n")

    def _repr_html_(self) -> str:
        console = _console(_NOTEBOOK_COLUMNS)
        console.print(self.__rich__())
        return console.export_html(inline_styles=True, code_format=_HTML)


def _console(columns: int) -> Console:
    """Return a console that prints nowhere and records."""
    from rich.console import Console

    return Console(
        file=io.StringIO(),
        highlight=False,
        markup=False,
        record=True,
        width=columns,
        force_terminal=True,
        force_jupyter=False,  # in a notebook it would display by itself, beside what is returned
        color_system="truecolor",
        legacy_windows=False,
    )
