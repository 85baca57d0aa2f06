"""The paper's prompts, templates, and prompts from files and from the Hub."""

import csv
import json
from pathlib import Path

import pytest
from datasets import Dataset

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.prompts import animal_activities, common_animals, fill_template, imagenet_animals, load_prompts


# ---- Lists ----


def test_the_papers_lists_have_the_published_sizes():
    for prompts, size in ((common_animals(), 45), (imagenet_animals(), 398), (animal_activities(), 3 * 45)):
        assert len(prompts) == len(set(map(str, prompts))) == size


def test_imagenets_animals_are_its_first_classes_in_order():
    animals = imagenet_animals()
    # known indices of ImageNet's classes
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 388: "giant panda", 397: "puffer"}
    assert {index: animals[index] for index in known} == known


def test_activities_come_with_their_words_and_the_right_article():
    pairs = dict(animal_activities())
    assert pairs["a cat riding a bike"] == {"animal": "cat", "activity": "riding a bike"}
    assert pairs["an ant playing chess"] == {"animal": "ant", "activity": "playing chess"}
    assert pairs["a kangaroo washing dishes"] == {"animal": "kangaroo", "activity": "washing dishes"}


def test_the_lists_are_new_ones_each_time():
    common_animals().clear()
    assert common_animals()[0] == "cat"


@pytest.mark.parametrize(
    ("template", "words", "error", "message"),
    [
        ("a {thing}", {"colour": ["red"]}, ValueError, r"names \['thing'\], but words are given for \['colour'\]"),
        ("a {colour} {thing}", {"colour": ["red"]}, ValueError, "give words for each of its names and no others"),
        ("a {thing}", {"thing": "car"}, TypeError, "thing is 'car'; give a list"),
        ("a {thing}", {"thing": []}, ValueError, "thing is empty"),
    ],
)
def test_templates_that_words_do_not_fit_are_refused(template, words, error, message):
    with pytest.raises(error, match=message):
        fill_template(template, **words)


# ---- Files ----


ROWS = [{"prompt": "a cat", "Category": "animal"}, {"prompt": 'a "sign", red', "Category": "text"}]


def write(path: Path) -> Path:
    match path.suffix:
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["prompt", "Category"], delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(ROWS)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".parquet":
            Dataset.from_list(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_files_of_all_kinds_give_prompts_with_their_columns_as_metadata(tmp_path, ending):
    assert load_prompts(write(tmp_path / f"prompts{ending}")).to_list() == ROWS


def test_a_text_file_has_a_prompt_in_each_line_that_is_not_empty(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  \na dog, red\n")
    assert load_prompts(tmp_path / "prompts.txt").to_list() == [{"prompt": "a cat"}, {"prompt": "a dog, red"}]


def test_another_column_is_named_and_the_original_one_is_kept(tmp_path):
    dataset = load_prompts(write(tmp_path / "prompts.csv"), column="Category")
    assert dataset.to_list()[0] == {"prompt": "animal", "original_prompt": "a cat"}


def test_a_wrong_column_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="column is 'text', but .* has the columns prompt, Category"):
        load_prompts(write(tmp_path / "prompts.csv"), column="text")


def test_a_missing_or_unknown_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv', and there is no such file"):
        load_prompts(tmp_path / "nowhere.csv")
    (tmp_path / "prompts.docx").write_text("a cat")
    with pytest.raises(ValueError, match=r"files that end in \.txt, \.csv"):
        load_prompts(tmp_path / "prompts.docx")


def test_everything_else_is_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_dict({"Prompt": ["a cat"], "Challenge": ["Basic"]})

    monkeypatch.setattr("ddpo_trl.prompts.loading.load_dataset", load_dataset)
    dataset = load_prompts("nateraw/parti-prompts", column="Prompt", split="test")
    assert asked == [("nateraw/parti-prompts", "test")]
    assert dataset.to_list() == [{"prompt": "a cat", "Challenge": "Basic"}]


@pytest.mark.parametrize("kind", ["list", "pairs", "file"])
def test_they_are_what_the_trainer_takes_and_their_order_follows_its_seed(make_config, tmp_path, kind):
    given = {
        "list": lambda: common_animals(),
        "pairs": lambda: animal_activities(),
        "file": lambda: load_prompts(write(tmp_path / "prompts.csv")),
    }[kind]
    drawn = []
    for seed in (1, 1, 2):
        trainer = DDPOTrainer(make_config(seed=seed), brightness, given(), tiny_pipeline())
        drawn.append(trainer.prompts.draw(0, 20))
    assert drawn[0] == drawn[1] != drawn[2]
