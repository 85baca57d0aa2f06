"""Runs that push to a Hub on this machine (test_hub.py): HF_ENDPOINT is read when the client is imported."""

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpo_trl.versions import installed
from hub_server import Hub, running


CARD_OF_THE_BASE = b"""---
license: other
license_name: tiny-licence
license_link: LICENSE.md
---
"""

Observations = dict[str, Any]


class Collector(logging.Handler):
    """Puts the texts of warnings and errors into a list."""

    def __init__(self, messages: list[str]):
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Runs:
    """Trainers of the tiny pipeline, each in a folder of its own, that push to the Hub."""

    def __init__(self, hub: Hub, directory: Path):
        import torch
        from diffusers import StableDiffusionPipeline

        from conftest import brightness, tiny_pipeline
        from ddpo_trl import DDPOConfig, DDPOTrainer

        self.hub, self.directory, self.torch, self.reward = hub, directory, torch, brightness
        self.config_class, self.trainer_class, self.pipeline_class = DDPOConfig, DDPOTrainer, StableDiffusionPipeline
        tiny_pipeline().save_pretrained(directory / "base")
        hub.add("me/base", files={**contents(directory / "base"), "README.md": CARD_OF_THE_BASE})
        self.warnings: list[str] = []
        logging.getLogger("ddpo_trl").addHandler(Collector(self.warnings))

    def pipeline(self) -> Any:
        pipeline = self.pipeline_class.from_pretrained("me/base")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def trainer(self, name: str, pipeline: Any = None, **settings: Any) -> Any:
        config = self.config_class(
            **{
                "output_dir": str(self.directory / name),
                "hub_model_id": f"me/{name}",
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
                "save_strategy": "epoch",
                "num_train_epochs": 2,
                "num_inference_steps": 2,
                "per_device_sample_batch_size": 2,
                "num_sample_batches": 1,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "log_images_rounds": 0,
                "push_to_hub": True,
                "hub_always_push": True,
                **settings,
            }
        )
        return self.trainer_class(config, self.reward, ["cat", "dog"], pipeline or self.pipeline())

    def image(self, pipeline: Any) -> Any:
        with self.torch.no_grad():
            generator = self.torch.Generator().manual_seed(3)
            return pipeline("cat", num_inference_steps=2, generator=generator, output_type="pt").images


def contents(directory: Path) -> dict[str, bytes]:
    """All files below a folder, by their paths in it."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Environment variables that are other ones for a while, or none."""
    before = {name: os.environ.pop(name, None) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def message_of(action: Callable[[], Any]) -> str:
    """Type and text of what is raised."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def strategies(runs: Runs) -> Observations:
    """What each strategy leaves on the Hub after `train()`."""
    from huggingface_hub import snapshot_download

    found: Observations = {}
    for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
        trainer = runs.trainer(strategy, hub_strategy=strategy, hub_token="hf_write")
        trainer.train()
        repository = runs.hub.repositories[f"me/{strategy}"]
        found[strategy] = {"files": sorted(repository.files()), "messages": repository.messages()}
        if strategy == "every_save":
            found["mid_run_weights_are_those_of_the_checkpoint"] = (
                repository.branches["main"][1].files["pytorch_lora_weights.safetensors"].content
                == (runs.directory / strategy / "checkpoint-1" / "pytorch_lora_weights.safetensors").read_bytes()
            )
        if strategy == "checkpoint":
            pushed = {
                path.removeprefix("last-checkpoint/"): content
                for path, content in repository.files().items()
                if path.startswith("last-checkpoint/")
            }
            found["last_checkpoint_is_whole"] = pushed == contents(runs.directory / strategy / "checkpoint-2")
            downloaded = Path(snapshot_download("me/checkpoint"), "last-checkpoint")
            resumed = runs.trainer("resumed", num_train_epochs=3, push_to_hub=False)
            resumed.train(resume_from_checkpoint=str(downloaded))
            found["resumed_from_the_hub"] = [log["episode"] for log in resumed.state.log_history if "reward" in log]
    return found


def pictures_card_and_loading(runs: Runs) -> Observations:
    """A run with pictures and leftovers is pushed at its end; the card's own example loads it."""
    from huggingface_hub import ModelCard

    trainer = runs.trainer("shown", hub_strategy="end", hub_token="hf_write", log_images_rounds=1, num_train_epochs=1)
    leftover = runs.directory / "shown" / "_unfinished" / "checkpoint-9"
    leftover.mkdir(parents=True)
    (leftover / "optimizer.pt").write_bytes(b"half of it")
    trainer.train()
    trainer.push_to_hub()
    repository = runs.hub.repositories["me/shown"]
    card = ModelCard.load("me/shown")
    if installed("huggingface_hub") >= (2, 0):  # earlier versions ask the real Hub, whatever HF_ENDPOINT says
        card.validate()
    trainer.push_to_hub()
    names = executed(card.text)
    fresh = runs.pipeline()
    plain = runs.image(fresh)
    fresh.load_lora_weights("me/shown")
    return {
        "files": sorted(repository.files()),
        "messages": repository.messages(),
        "metadata": card.data.to_dict(),
        "card": card.text,
        "same_images": runs.torch.equal(runs.image(fresh), runs.image(trainer.pipeline)),
        "same_images_by_the_example": runs.torch.equal(runs.image(names["pipeline"]), runs.image(trainer.pipeline)),
        "other_images_than_before": not runs.torch.equal(plain, runs.image(fresh)),
        "image_of_the_example": list(names["image"].size),
    }


def executed(card: str) -> dict[str, Any]:
    """The names that the card's example leaves."""
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    return names


def other_forms(runs: Runs) -> Observations:
    """The whole denoiser, and an adapter for which diffusers has no loader."""
    from huggingface_hub import ModelCard
    from peft import PeftModel

    from conformance.image_pipelines import PIXART_KWARGS, pixart_sigma

    full = runs.trainer("full", use_lora=False, hub_strategy="end", num_train_epochs=1, save_strategy="no")
    full.train()
    full.save_model()
    card = ModelCard.load("me/full")
    names = executed(card.text)
    pixart = runs.trainer(
        "pixart", pixart_sigma(0), hub_strategy="every_save", num_train_epochs=1, pipeline_kwargs=PIXART_KWARGS
    )
    pixart.train()
    fresh = pixart_sigma(0)
    PeftModel.from_pretrained(fresh.transformer, "me/pixart")

    def image(pipeline: Any) -> Any:
        generator = runs.torch.Generator().manual_seed(3)
        kwargs = {**PIXART_KWARGS, "num_inference_steps": 2, "output_type": "pt"}
        return pipeline("cat", generator=generator, **kwargs).images

    return {
        "full_files": sorted(runs.hub.repositories["me/full"].files()),
        "full_metadata": card.data.to_dict(),
        "full_same_images": runs.torch.equal(runs.image(names["pipeline"]), runs.image(full.pipeline)),
        "peft_files": sorted(runs.hub.repositories["me/pixart"].files()),
        "peft_card": ModelCard.load("me/pixart").text,
        "peft_difference": (image(fresh) - image(pixart.pipeline)).abs().max().item(),
        "peft_change": (image(fresh) - image(pixart_sigma(0))).abs().max().item(),
    }


def the_page(runs: Runs) -> Observations:
    """The examples of docs/hub.md, in the order in which they stand there."""
    from test_documentation import ROOT, shorter, snippets

    os.chdir(runs.directory)
    codes = snippets((ROOT / "docs" / "hub.md").read_text())
    names: list[Observations] = [{} for _ in codes]
    for code, of in zip(codes, names, strict=True):
        exec(compile(shorter(code), "hub.md", "exec"), of)
    repository = runs.hub.repositories["me/simple-emoji"]
    return {"files": sorted(repository.files()), "image": list(names[-1]["image"].size)}


def private_branch(runs: Runs) -> Observations:
    trainer = runs.trainer("branch", hub_revision="second-try", hub_private_repo=True, num_train_epochs=1)
    trainer.train()
    repository = runs.hub.repositories["me/branch"]
    return {
        "private": repository.private,
        "main": sorted(repository.files("main")),
        "branch": sorted(repository.files("second-try")),
        "card": repository.files("second-try")["README.md"].decode(),
        "again": message_of(lambda: runs.trainer("branch", hub_revision="second-try").push_to_hub()),
    }


def without_having_said_so(runs: Runs) -> Observations:
    """`push_to_hub()` of a run whose config does not push."""
    trainer = runs.trainer("late", push_to_hub=False, hub_model_id="late")  # in the namespace of the user
    with environment(HF_TOKEN=None):
        refused = message_of(trainer.push_to_hub)
    before = "me/late" in runs.hub.repositories
    future = trainer.push_to_hub(blocking=False, private=True)
    future.result()
    repository = runs.hub.repositories["me/late"]
    return {
        "refused": refused,
        "made_too_early": before,
        "private": repository.private,
        "files": sorted(repository.files()),
        "card": repository.files()["README.md"].decode(),
    }


def refused_at_construction(runs: Runs) -> Observations:
    with environment(HF_TOKEN=None):
        no_token = message_of(lambda: runs.trainer("a"))
    runs.hub.broken = "/create"
    server_error = message_of(lambda: runs.trainer("a"))
    runs.hub.broken = None
    return {
        "no token": no_token,
        "wrong token": message_of(lambda: runs.trainer("a", hub_token="hf_wrong")),
        "token to read": message_of(lambda: runs.trainer("a", hub_token="hf_read")),
        "token to read, repository is there": message_of(lambda: runs.trainer("shown", hub_token="hf_read")),
        "someone else": message_of(lambda: runs.trainer("a", hub_model_id="stabilityai/ours")),
        "name": message_of(lambda: runs.trainer("a", hub_model_id="me/my model!")),
        "server error": server_error,
        "name of the folder": message_of(lambda: runs.trainer("my model", hub_model_id=None)),
        "made": sorted(runs.hub.repositories),
    }


def failing_pushes(runs: Runs) -> Observations:
    """The Hub answers with errors from the first push on, and recovers."""
    trainer = runs.trainer("failing", hub_strategy="checkpoint")
    runs.hub.broken = "/commit/"
    runs.warnings.clear()
    trainer.train()
    warnings = list(runs.warnings)
    runs.warnings.clear()
    trainer.save_model()
    errors_of_saving = list(runs.warnings)
    raised = message_of(trainer.push_to_hub)
    local = sorted(contents(runs.directory / "failing"))
    runs.hub.broken = None
    command = shlex.split(raised.rpartition("or run: ")[2])
    command[0] = str(Path(sys.executable).with_name("hf"))
    advised = subprocess.run(command, capture_output=True, text=True)
    by_command = runs.hub.repositories["me/failing"].files()
    on_the_disk = (runs.directory / "failing" / "pytorch_lora_weights.safetensors").read_bytes()
    trainer.push_to_hub()
    return {
        "steps": trainer.state.global_step,
        "warnings": warnings,
        "errors_of_saving": errors_of_saving,
        "raised": raised,
        "local": local,
        "advised": f"{advised.returncode} {advised.stderr}",
        "pushed_by_the_advised_command": sorted(by_command),
        "weights_are_those_on_the_disk": by_command["pytorch_lora_weights.safetensors"] == on_the_disk,
        "messages": runs.hub.repositories["me/failing"].messages(),
    }


def by_the_newer_protocol(runs: Runs) -> Observations:
    """With hf_xet the client commits in a pipeline; files small enough for git go over HTTP all the same."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_XET, runs.hub.lfs_suffixes = False, ()  # the client looks each time
    trainer = runs.trainer("pipelined", hub_strategy="every_save", num_train_epochs=1)
    trainer.train()
    runs.hub.broken = "/validate-yaml"  # which is not tried again and again
    raised = message_of(trainer.push_to_hub)
    runs.hub.broken = None
    constants.HF_HUB_DISABLE_XET = True
    return {"files": sorted(runs.hub.repositories["me/pipelined"].files()), "raised": raised}


PARTS: list[Callable[[Runs], Observations]] = [
    strategies,
    pictures_card_and_loading,
    other_forms,
    the_page,
    private_branch,
    without_having_said_so,
    refused_at_construction,
    failing_pushes,
    by_the_newer_protocol,
]


def main(directory: Path) -> None:
    hub = Hub()
    with running(hub):
        os.environ["HF_ENDPOINT"] = hub.endpoint
        runs = Runs(hub, directory)
        found: Observations = {part.__name__: part(runs) for part in PARTS}
        pushed = [content for repository in hub.repositories.values() for content in repository.files().values()]
        found["files_with_the_token"] = sum(b"hf_write" in content for content in pushed)
        trainer = runs.trainer("lost", hub_strategy="end", num_train_epochs=1)
        trainer.train()
    found["without_a_network"] = {
        "at construction": message_of(lambda: runs.trainer("a", trainer.pipeline)),
        "at the end": message_of(trainer.push_to_hub),
        "local": sorted(contents(directory / "lost")),
    }
    (directory / "found.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
