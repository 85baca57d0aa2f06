"""Prompts from files and from the Hub."""

import codecs
import functools
import glob
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME
from pyarrow import csv


def load_prompts(source: str | os.PathLike[str], column: str | None = None, split: str = "train") -> Dataset:
    """
    Load prompts from a file, a folder or a dataset on the Hub.

    PartiPrompts, for instance, are `load_prompts("nateraw/parti-prompts", column="Prompt")`; the published CSV file of
    DrawBench is read with `column="Prompts"`.

    Args:
        source (`str` or `os.PathLike`):
            A `.txt` file with a prompt per line (empty lines are skipped); a `.csv`, `.tsv`, `.json`, `.jsonl` or
            `.parquet` file; a folder of such files, or one saved by `Dataset.save_to_disk`; or the id of a dataset on
            the Hub. Text is UTF-8, or UTF-16 with a byte order mark. In a file, no prompt may be missing, and words
            such as `null` are words.
        column (`str`, *optional*):
            Column with the prompts, `"prompt"` by default. Not for text files.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder or of a dataset on the Hub.

    Returns:
        `datasets.Dataset` with a `prompt` column. The other columns are the metadata of each prompt.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If the file can't be read as its name says, there is no such column, or a prompt in it is
            missing. The message names the file and the row, counted from 0.
    """
    path = Path(source)
    if path.suffix.lower() in READERS:
        if not path.is_file():
            raise FileNotFoundError(f"source is {str(source)!r}, and there is no such file.")
        return _read_file(path, column)
    if Path(path, DATASET_STATE_JSON_FILENAME).is_file():
        dataset = load_from_disk(str(source))
    elif path.is_file():
        raise ValueError(f"source is {str(source)!r}; prompts are read from files that end in {', '.join(READERS)}.")
    elif path.is_dir() and split == "train" and (files := _readable_files(path)):
        return _joined(files, column, path)
    else:
        dataset = load_dataset(glob.escape(str(source)) if path.is_dir() else str(source), split=split)
        if dataset.column_names == ["text"]:  # lines of text files
            dataset = dataset.filter(lambda row: row["text"].strip())
            column = column or "text"
    return _with_prompt_column(dataset, column or "prompt", str(source))


def _joined(files: Sequence[Path], column: str | None, folder: Path) -> Dataset:
    datasets = [_read_file(file, column) for file in files]
    try:
        return concatenate_datasets(datasets)
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"The files of {folder} don't have the same columns and types: {error}") from error


def _readable_files(folder: Path) -> list[Path]:
    """Return the files of a folder; none if `datasets` should read it, since one is unknown or names a split."""
    files = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    readable = all(file.is_file() and file.suffix.lower() in READERS for file in files)
    names_a_split = any(split in file.stem for file in files for split in ("test", "valid", "dev"))
    return files if readable and not names_a_split else []


def _read_file(path: Path, column: str | None) -> Dataset:
    is_text = path.suffix.lower() == ".txt"
    column = "text" if is_text else column or "prompt"
    try:
        dataset = READERS[path.suffix.lower()](path, column)
    except (ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not len(dataset):
        raise ValueError(f"{path} has no prompts.")
    dataset = _with_prompt_column(dataset, column, str(path))
    for row, prompt in enumerate(dataset["prompt"]):
        if not (isinstance(prompt, str) and prompt.strip()):
            raise ValueError(
                f"The prompt in row {row} of {path} is {prompt!r}; it must be a text. Add it, or remove the row."
            )
    return dataset


def _text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark."""
    content = path.read_bytes()
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not UTF-8 (byte {error.start} is {content[error.start]:#x}); save it as UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(
            "it contains NUL characters, as text in UTF-16 without a byte order mark does; save it as UTF-8."
        )
    return text


def _read_lines(path: Path, column: str) -> Dataset:
    lines = [line.removesuffix("\n") for line in io.StringIO(_text(path), newline=None)]
    return Dataset.from_dict({column: [line for line in lines if line.strip()]})


def _read_csv(path: Path, column: str, delimiter: str = ",") -> Dataset:
    """Read a table. Numbers are converted; `null`, `NA` and dates stay text."""
    content = _text(path).encode()
    if not content.strip():
        raise ValueError("it is empty.")
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)

    def read(texts: Sequence[str]) -> pa.Table:
        conversion = csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()))
        one_thread = csv.ReadOptions(use_threads=False)  # or else errors do not contain the row's number
        return csv.read_csv(pa.BufferReader(content), one_thread, parsing, conversion)

    table = read([column])
    if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
        raise ValueError(f"it has several columns {twice[0]!r}.")
    dates = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
    return Dataset(read([column, *dates]))


def _read_json(path: Path, column: str) -> Dataset:
    """Read a list of objects or texts, one object of lists, or an object per line."""
    text = _text(path)
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        rows = _json_lines(text)
    if isinstance(rows, dict) and all(isinstance(values, list) for values in rows.values()):
        return Dataset.from_dict(rows)
    rows = [{column: row} if isinstance(row, str) else row for row in (rows if isinstance(rows, list) else [rows])]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {index} is {row!r}; it must be an object or a text.")
    names = dict.fromkeys(name for row in rows for name in row)  # `from_list` uses those of the first row only
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        try:
            rows += [json.loads(line, object_pairs_hook=_object)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it has {twice!r} twice in one object.")
    return made


def _read_parquet(path: Path, column: str) -> Dataset:
    return Dataset.from_parquet(glob.escape(str(path)))


# By suffix; called with the file and the name of the column with the prompts.
READERS: dict[str, Callable[[Path, str], Dataset]] = {
    ".txt": _read_lines,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def _with_prompt_column(dataset: Dataset, column: str, source: str) -> Dataset:
    if column not in dataset.column_names:
        raise ValueError(
            f"column is {column!r}, but {source} has the columns {', '.join(dataset.column_names)}; pass the one with "
            "the prompts."
        )
    if column == "prompt":
        return dataset
    if "prompt" in dataset.column_names:  # or else it would be overwritten
        dataset = dataset.rename_column("prompt", "original_prompt")
    return dataset.rename_column(column, "prompt")
