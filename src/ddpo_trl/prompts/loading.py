"""Prompts from files and from the Hub, through `datasets`."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME


# What `datasets` reads a file with, and its options, by the file's ending.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


def load_prompts(source: str | os.PathLike[str], column: str | None = None, split: str = "train") -> Dataset:
    """
    Loads prompts for [`DDPOTrainer`] from a file, a folder or a dataset on the Hub.

    PartiPrompts, for instance, are `load_prompts("nateraw/parti-prompts", column="Prompt")`, and the CSV file in which
    DrawBench was published is read with `column="Prompts"`.

    Args:
        source (`str` or `os.PathLike`):
            A `.txt` file with a prompt per line (empty lines are left out); a `.csv`, `.tsv`, `.json`, `.jsonl` or
            `.parquet` file; a folder of such files, or one that `Dataset.save_to_disk` wrote; or the id of a dataset
            on the Hub.
        column (`str`, *optional*):
            The column with the prompts, `"prompt"` by default. Not for text files.
        split (`str`, *optional*, defaults to `"train"`):
            The split of a folder or of a dataset on the Hub.

    Returns:
        `datasets.Dataset` with a `prompt` column. The other columns are the metadata of each prompt.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If the ending is unknown, or there is no such column.
    """
    ending = Path(source).suffix.lower()
    if ending in READERS:
        if not Path(source).is_file():
            raise FileNotFoundError(f"source is {str(source)!r}, and there is no such file.")
        reader, options = READERS[ending]
        dataset = load_dataset(reader, data_files=str(source), split="train", **options)
    elif Path(source, DATASET_STATE_JSON_FILENAME).is_file():
        dataset = load_from_disk(str(source))
    elif Path(source).is_file():
        raise ValueError(f"source is {str(source)!r}; prompts are read from files that end in {', '.join(READERS)}.")
    else:
        dataset = load_dataset(str(source), split=split)
    if ending == ".txt":
        dataset = dataset.filter(lambda row: bool(row["text"].strip()))
        column = "text"
    return _with_prompt_column(dataset, column or "prompt", str(source))


def _with_prompt_column(dataset: Dataset, column: str, source: str) -> Dataset:
    if column not in dataset.column_names:
        raise ValueError(
            f"column is {column!r}, but {source} has the columns {', '.join(dataset.column_names)}; name the one with "
            "the prompts."
        )
    if column == "prompt":
        return dataset
    if "prompt" in dataset.column_names:  # another one, that would be overwritten
        dataset = dataset.rename_column("prompt", "original_prompt")
    return dataset.rename_column(column, "prompt")
