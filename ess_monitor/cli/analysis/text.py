"""Reads a text and its tokenizer for a command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ess_monitor.errors import ConfigError

BYTES = "bytes"
"""Name of the tokenizer whose ids are the bytes of UTF-8."""


class TextTokenizer(NamedTuple):
    """Turns text into ids and back."""

    encode: Callable[[str], list[int]]
    label: Callable[[int], str]
    """The text of one token."""
    id_of: Callable[[str], int | None]
    """The id of a token of the vocabulary; None where there is none."""


def load_tokenizer(name: str) -> TextTokenizer:
    """Return a tokenizer: "bytes", a tokenizer.json or its folder, or a name that transformers knows.

    Raises:
        ConfigError: it cannot be loaded.

    Examples:
        >>> load_tokenizer("bytes").encode("ab."), load_tokenizer("bytes").label(46)
        ([97, 98, 46], '.')
    """
    if name == BYTES:
        return TextTokenizer(
            lambda text: list(text.encode()),
            lambda token: bytes([token]).decode("latin-1") if token < 256 else str(token),
            lambda text: text.encode()[0] if len(text.encode()) == 1 else None,
        )
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        tokenizers = _imported("tokenizers", name)
        try:
            fast = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise ConfigError(f"tokenizer: {file} is no tokenizer.json: {error}") from error
        return TextTokenizer(
            lambda text: list(fast.encode(text).ids),
            lambda token: fast.decode([token], skip_special_tokens=False) or str(fast.id_to_token(token)),
            fast.token_to_id,
        )
    transformers = _imported("transformers", name)
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of the hub, of files, of configurations
        first_line = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"tokenizer: {name!r} is neither 'bytes', nor a tokenizer.json or its folder, nor known to transformers: "
            f"{type(error).__name__}: {first_line}"
        ) from error

    def id_of(text: str) -> int | None:
        known: dict[str, int] = loaded.get_vocab()
        return known.get(text)

    return TextTokenizer(lambda text: list(loaded(text)["input_ids"]), lambda token: str(loaded.decode([token])), id_of)


def _imported(library: str, name: str) -> Any:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tokenizer: {name!r} needs {library}: pip install {library}; without it use --tokenizer bytes"
        ) from error


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"text: cannot read {path}: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"text: {path} is not UTF-8: byte {error.start}; give a text file") from error
    if not text.strip():
        raise ConfigError(f"text: {path} is empty; give some sentences")
    return text


def rows_of(ids: Sequence[int], batch: int, length: int) -> list[list[int]]:
    """Return the text in rows of `length` tokens, at most `batch`; what is left over is dropped, unless it is all.

    >>> rows_of([1, 2, 3, 4, 5], 8, 2), rows_of([1, 2, 3], 8, 4)
    ([[1, 2], [3, 4]], [[1, 2, 3]])
    """
    if len(ids) < length:
        return [list(ids)]
    return [list(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)][:batch]


def ids_of(option: str, text: str, tokenizer: TextTokenizer | None) -> dict[int, str]:
    """Return the ids that an option names, `0,50256`, or a token's own text, each with its text.

    Raises:
        ConfigError: it names no token.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() != "," else [","]
    if all(part.isdecimal() for part in parts):
        return {int(part): _shown(int(part), tokenizer) for part in parts}
    found = None if tokenizer is None else tokenizer.id_of(text)
    if found is None:
        raise ConfigError(
            f"{option}: {text!r} is neither a list of ids, as 0,50256, nor "
            + ("known without --tokenizer" if tokenizer is None else "a token of the tokenizer")
        )
    return {found: _shown(found, tokenizer)}


def ids_with(text: str, ids: Iterable[int], tokenizer: TextTokenizer) -> dict[int, str]:
    """Return those of the ids whose text holds `text`.

    Raises:
        ConfigError: none does.
    """
    found = {token: _shown(token, tokenizer) for token in sorted(set(ids)) if text in tokenizer.label(token)}
    if not found:
        raise ConfigError(f"scopes: no token of the text holds {text!r}; give what ends a scope there, such as '}}'")
    return found


def _shown(token: int, tokenizer: TextTokenizer | None) -> str:
    label = "" if tokenizer is None else tokenizer.label(token)
    return repr(label) if label else str(token)
