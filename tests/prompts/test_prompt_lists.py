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
        ("a {colour} {thing}", {"colour": ["red"]}, ValueError, "pass words for each of its names and no others"),
        ("a {thing}", {"thing": "car"}, TypeError, "thing is 'car'; pass a list"),
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


# ---- Files as people have them ----


def prompts_of(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(load_prompts(path)["prompt"])


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "text with a byte order mark": ("a.txt", "\ufeffcat face\r\npizza\r\n"),
        "text in UTF-16": ("a.txt", "cat face\npizza\n".encode("utf-16")),
        "text with empty lines": ("a.txt", "\n\ncat face\n   \npizza"),
        "text of old Macs": ("a.txt", "cat face\rpizza\r"),
        "brackets in a name": ("a[1].txt", "cat face\npizza\n"),
        "a star in a name": ("a*.csv", "prompt\ncat face\npizza\n"),
        "a table with a byte order mark": ("a.csv", "\ufeffprompt,legs\r\ncat face,4\r\npizza,0\r\n"),
        "a table in UTF-16": ("a.tsv", "prompt\tlegs\ncat face\t4\npizza\t0\n".encode("utf-16")),
        "JSON lines with a mark": ("a.jsonl", '\ufeff{"prompt": "cat face"}\r\n\r\n{"prompt": "pizza"}\r\n'),
        "a list of texts": ("a.json", '["cat face", "pizza"]'),
        "lines in a file that is called JSON": ("a.json", '{"prompt": "cat face"}\n{"prompt": "pizza"}\n'),
        "an object of lists": ("a.json", '{"prompt": ["cat face", "pizza"], "legs": [4, 0]}'),
    }.values(),
)  # fmt: skip
def test_every_usual_way_to_write_a_file_gives_its_prompts(tmp_path, name, content):
    (tmp_path / "a1.txt").write_text("another file\n")
    assert prompts_of(tmp_path / name, content) == ["cat face", "pizza"]


def test_words_that_other_readers_take_for_missing_values_are_prompts(tmp_path):
    words = ["null", "NA", "None", "nan", "N/A", "true", "7", "2024-01-01"]
    assert prompts_of(tmp_path / "a.csv", "\n".join(["prompt", *words])) == words
    rows = "\n".join(
        ["prompt,kind,count,day", *(f"{word},{word},{index},2024-01-0{index + 1}" for index, word in enumerate(words))]
    )
    (tmp_path / "b.csv").write_text(rows)
    dataset = load_prompts(tmp_path / "b.csv")
    assert list(dataset["kind"]) == words and list(dataset["count"]) == list(range(8))
    assert dataset[0]["day"] == "2024-01-01"  # a text, which is JSON


@pytest.mark.parametrize("parquet", ["a[1].parquet", "a*.parquet"])
def test_a_parquet_file_is_that_of_its_name(tmp_path, parquet):
    Dataset.from_dict({"prompt": ["wrong"]}).to_parquet(tmp_path / "a1.parquet")
    Dataset.from_dict({"prompt": ["cat face"]}).to_parquet(tmp_path / parquet)
    assert list(load_prompts(tmp_path / parquet)["prompt"]) == ["cat face"]


def test_keys_that_only_later_rows_have_are_metadata_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "cat"}\n{"prompt": "owl", "legs": 2}\n')
    assert list(load_prompts(tmp_path / "a.jsonl")["legs"]) == [None, 2]


def test_a_folder_with_other_files_or_splits_has_the_lines_of_its_texts(tmp_path):
    (tmp_path / "train.txt").write_text("cat\n\ndog\n")
    (tmp_path / "test.txt").write_text("owl\n")
    assert load_prompts(tmp_path)["prompt"][:] == ["cat", "dog"]
    assert load_prompts(tmp_path, split="test")["prompt"][:] == ["owl"]


def test_hidden_files_of_a_folder_are_left_out_and_prompts_may_be_longer_than_what_is_read_at_once(tmp_path):
    (tmp_path / ".a.txt").write_text("owl\n")
    prompt = "two\nlines " + "x" * 50_000
    (tmp_path / "b.csv").write_text("prompt\n" + f'"{prompt}"\n' * 50)
    assert load_prompts(tmp_path)["prompt"][:] == [prompt] * 50


def test_files_of_a_folder_that_do_not_go_together_are_refused_with_its_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,x\ncat,1\n")
    (tmp_path / "b.csv").write_text("prompt,x\ndog,many\n")
    with pytest.raises(ValueError, match=f"The files of {tmp_path} don't have the same columns and types"):
        load_prompts(tmp_path)


def test_files_of_a_folder_are_read_as_each_of_them_is(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\nnull\n")
    (tmp_path / "b.csv").write_text("\ufeffprompt\nNA\n")
    assert list(load_prompts(tmp_path)["prompt"]) == ["null", "NA"]
    (tmp_path / "c.csv").write_text("prompt\nred cat, flat\n")
    with pytest.raises(ValueError, match=r"c\.csv can't be read: .*Expected 1 columns, got 2: red cat, flat"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt\nred cat, flat\npizza, 3d\n", "can't be read: .*Expected 1 columns, got 2: red cat, flat"),
        ("a.csv", "prompt,legs\ncat,4\nowl\n", "can't be read: .*Expected 2 columns, got 1: owl"),
        ("a.csv", "prompt,prompt\ncat,owl\n", "can't be read: it has several columns 'prompt'"),
        ("a.csv", "prompt,legs\ncat,4\n,2\n", r"The prompt in row 1 of .* is ''; it must be a text"),
        ("a.csv", "", "can't be read: it is empty"),
        ("a.csv", "prompt\n", "has no prompts"),
        ("a.csv", "caption\ncat\n", "column is 'prompt', but .* has the columns caption"),
        ("a.csv", "prompt\ncaf\xe9\n".encode("latin-1"), r"it is not UTF-8 \(byte 10 is 0xe9\); save it as UTF-8"),
        ("a.txt", "caf\xe9\n".encode("latin-1"), r"it is not UTF-8 \(byte 3 is 0xe9\)"),
        ("a.txt", "cat".encode("utf-16-le"), "NUL characters.*save it as UTF-8"),
        ("a.txt", "\n \n", "has no prompts"),
        ("a.jsonl", '{"prompt": "cat"}\n{"prompt": "owl"\n', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "cat"}\n{"prompt": null}\n', r"The prompt in row 1 of .* is None"),
        ("a.jsonl", '{"prompt": "cat"}\n{"caption": "owl"}\n', r"The prompt in row 1 of .* is None"),
        ("a.jsonl", '{"prompt": "cat", "prompt": "owl"}\n', "it has 'prompt' twice in one object"),
        ("a.jsonl", '{"prompt": "cat"}\n3\n', "row 1 is 3; it must be an object or a text"),
        ("a.jsonl", '{"prompt": "cat"}\n{"prompt": 3}\n', "a.jsonl"),
        ("a.json", "[]", "has no prompts"),
        ("a.parquet", "no parquet", "can't be read"),
        ("a.txt.gz", b"\x1f\x8b", "prompts are read from files that end in .txt, .csv"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_with_its_name(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        prompts_of(tmp_path / name, content)
    assert name in str(caught.value)
