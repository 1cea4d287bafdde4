"""Makes pandas data frames, and lists of records that become one. Loads pandas where a frame is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Generic, TypeVar, overload

from pydantic import BaseModel

from ess_monitor.errors import ConfigError

RecordT = TypeVar("RecordT", bound=BaseModel)


def data_frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Any:
    """Return rows as a pandas DataFrame.

    Args:
        rows: one mapping a row.
        columns: names and order of the columns; by default those of the rows.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        pandas: Any = import_module("pandas")
    except ModuleNotFoundError as error:
        raise ConfigError(
            'to_dataframe: needs pandas: pip install "ess-monitor[pandas]"; without it use the records themselves'
        ) from error
    return pandas.DataFrame(list(rows), columns=None if columns is None else list(columns))


class RecordList(Sequence[RecordT], Generic[RecordT]):
    """Holds records of one kind, and makes a data frame of them.

    Examples:
        >>> from ess_monitor.records import Reading
        >>> readings = RecordList(Reading, [Reading(step=s, layer="a", status="ok") for s in (10, 20)])
        >>> readings, readings[-1].step, [reading.step for reading in readings]
        (<2 records: Reading>, 20, [10, 20])
    """

    def __init__(self, kind: type[RecordT], items: Iterable[RecordT] = ()) -> None:
        self.kind = kind
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> RecordT: ...
    @overload
    def __getitem__(self, index: slice) -> RecordList[RecordT]: ...
    def __getitem__(self, index: int | slice) -> RecordT | RecordList[RecordT]:
        return RecordList(self.kind, self._items[index]) if isinstance(index, slice) else self._items[index]

    def __repr__(self) -> str:
        return f"<{len(self)} {'record' if len(self) == 1 else 'records'}: {self.kind.__name__}>"

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame with a row for each record and a column for each of its fields, in order.

        Fields with several values (`per_head`, `spectrum`) are tuples.

        Raises:
            ConfigError: pandas is not installed.
        """
        names = list(self.kind.model_fields)
        return data_frame(({name: getattr(item, name) for name in names} for item in self._items), names)
