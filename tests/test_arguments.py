"""What a trainer is given: of another kind or under another name, it is refused with what makes the right one."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from transformers import TrainerCallback, TrainingArguments

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.suggestions import OTHER_WORDS, did_you_mean, plain
from test_config import OF_OLDER_VERSIONS


PROMPTS = Dataset.from_dict({"prompt": ["cat", "dog"], "x": [1, 2]})


def plateau() -> Any:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    return optimizer, ReduceLROnPlateau(optimizer)


def refusal(make_config: Any, **given: Any) -> str:
    arguments = {"config": make_config(), "reward_fn": brightness, "prompt_fn": ["cat"], "pipeline": tiny_pipeline()}
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        DDPOTrainer(**{**arguments, **given})
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reward_fn": "brightness"}, "reward_fn is the string 'brightness'; pass the function itself"),
        ({"reward_fn": ["brightness"]}, "reward_fn[0] is 'brightness', which can't be called"),
        ({"eval_reward_fn": "brightness"}, "eval_reward_fn is the string 'brightness'"),
        ({"prompt_fn": "prompts.csv"}, "`ddpo_trl.prompts.load_prompts('prompts.csv')`"),
        ({"eval_prompts": "prompts.csv"}, "eval_prompts is str; give"),
        ({"prompt_fn": DatasetDict(test=Dataset.from_dict({"prompt": ["a"]}))}, "its splits, test: `dataset['test']`"),
        (
            {"prompt_fn": Dataset.from_dict({"prompt": ["cat", None, "owl"]})},
            "prompt_fn[1]['prompt'] is None; the prompt column must hold texts",
        ),
        ({"pipeline": StableDiffusionPipeline}, "`StableDiffusionPipeline.from_pretrained(...)`"),
        ({"pipeline": torch.nn.Linear(1, 1)}, "pipeline is Linear; give a pipeline of diffusers"),
        ({"config": {"eta": 1.0}}, "config is dict; give a DDPOConfig"),
        ({"config": TrainingArguments(use_cpu=True)}, "config is TrainingArguments; give a DDPOConfig"),
        ({"peft_config": {"r": 4}}, "peft_config is dict; give a `peft.LoraConfig(...)`"),
        ({"optimizers": torch.optim.AdamW}, "optimizers is type; give a pair"),
        ({"optimizers": (torch.optim.AdamW, None)}, "by optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-3})"),
        ({"optimizers": (None, lambda step: 1.0)}, "is not a schedule of a learning rate"),
        ({"optimizers": plateau()}, "ReduceLROnPlateau, which acts after evaluations only. Set eval_strategy='epoch'"),
        ({"callbacks": TrainerCallback()}, "callbacks is TrainerCallback; give a list"),
        ({"callbacks": [print]}, "callbacks[0] is <built-in function print>; give a `transformers.TrainerCallback`"),
        ({"prompt_fn": iter(()).__next__}, "prompt_fn raised StopIteration: it has no more prompts"),
        ({"prompt_fn": PROMPTS.with_format("pandas")}, "prompt_fn is a dataset with the format 'pandas'"),
        ({"prompt_fn": PROMPTS.with_format("torch", columns=["x"])}, "`dataset.with_format(None)`"),
        ({"prompt_key_fn": lambda prompt, metadata: 3}, "prompt_key_fn returned 3 for ('cat', {}); it must"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_an_argument_of_another_kind_is_refused_with_the_remedy(make_config, given, said):
    assert said in refusal(make_config, **given)


def test_a_pipeline_may_be_given_as_the_folder_it_is_loaded_from(make_config, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    trainer = DDPOTrainer(make_config(), brightness, ["cat"], tmp_path)
    own = tiny_pipeline().unet.state_dict()
    assert all(
        torch.equal(own[name], value) for name, value in trainer.pipeline.unet.state_dict().items() if name in own
    )
    with pytest.raises(OSError, match="no/such-model"):
        DDPOTrainer(make_config(), brightness, ["cat"], "no/such-model")


def test_an_output_dir_that_cannot_be_made_is_refused_by_name(make_config, tmp_path):
    (tmp_path / "file").touch()
    for folder in ("", str(tmp_path / "file"), str(tmp_path / "file" / "run")):
        assert f"output_dir is {folder!r}, which can't be created" in refusal(
            make_config, config=make_config(output_dir=folder)
        )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    {
        "reward_function": "reward_fn", "reward_funcs": "reward_fn", "prompt_function": "prompt_fn",
        "train_dataset": "prompt_fn", "sd_pipeline": "pipeline", "model": "pipeline", "args": "config",
        "eval_dataset": "eval_prompts", "lora_config": "peft_config", "eval_promts": "eval_prompts",
    }.items(),
)  # fmt: skip
def test_an_argument_by_another_librarys_name_is_refused_with_ours(theirs, ours):
    with pytest.raises(TypeError, match=f"DDPOTrainer has no {theirs}. Did you mean {ours}?"):
        DDPOTrainer(**dict[str, Any]({theirs: None}))


def test_what_has_no_counterpart_is_refused_with_what_to_do():
    with pytest.raises(
        TypeError, match="no image_samples_hook. Use log_images_rounds; `ddpo_trl.trl_0_23.DDPOTrainer`"
    ):
        DDPOTrainer(None, None, None, None, image_samples_hook=print)  # type: ignore
    with pytest.raises(TypeError, match="DDPOConfig has no sample_num_steps. Did you mean num_inference_steps?"):
        DDPOConfig(sample_num_steps=3)
    with pytest.raises(TypeError, match="DDPOConfig has no tracker_kwargs. .*ddpo_trl.trl_0_23.convert_config"):
        DDPOConfig(tracker_kwargs={})
    with pytest.raises(TypeError, match="DDPOConfig has no lr. Did you mean learning_rate?"):
        DDPOConfig(lr=3)


def test_every_suggested_word_stands_for_one_name_only():
    """Among names that stand side by side, such as the settings, the same word must not be listed twice."""
    known = [name for name in DDPOConfig.__dataclass_fields__ if name not in OF_OLDER_VERSIONS]
    for meant, others in OTHER_WORDS.items():
        for word in others.split():
            assert plain(word) not in known or meant not in known, f"{word} is a setting itself"
            if meant in known:
                assert did_you_mean(f"--{word}", [f"--{name}" for name in known]) == f" Did you mean --{meant}?"


def test_a_schedule_of_another_optimizer_is_refused(make_config):
    pipeline = tiny_pipeline()
    other = torch.optim.SGD(pipeline.unet.parameters(), lr=1.0)
    said = refusal(make_config, pipeline=pipeline, optimizers=(None, StepLR(other, 1)))
    assert "optimizers[1] is the schedule of another optimizer than optimizers[0]" in said


def test_an_optimizer_may_be_made_by_a_function_of_the_parameters(make_config):
    def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.5)

    by = (sgd, {"lr": 0.25})
    trainer = DDPOTrainer(make_config(), brightness, ["cat"], tiny_pipeline(), optimizer_cls_and_kwargs=by)  # type: ignore[arg-type]
    trainer.train()
    assert [group["momentum"] for group in trainer.optimizer.param_groups][0] == 0.5
    assert trainer.state.log_history[0]["learning_rate"] == 0.25


# ---- What the pipeline needs of each prompt ----


def img2img(**inputs: Any) -> StableDiffusionImg2ImgPipeline:
    return StableDiffusionImg2ImgPipeline(**tiny_pipeline().components, requires_safety_checker=False)


PICTURE = Image.new("RGB", (16, 16), "red")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt_fn": [("a", {"image": PICTURE}), ("b", {"picture": PICTURE})]}, "prompt_fn[1] has picture"),
        ({"eval_prompts": ["owl"]}, "eval_prompts[0] has no metadata"),
        ({"eval_prompts": Dataset.from_dict({"prompt": ["a"], "mask": [1]})}, "eval_prompts has prompt, mask"),
    ],
)
def test_every_prompt_must_bring_the_pipelines_inputs(make_config, given, said):
    config = make_config(pipeline_inputs=["image"], pipeline_kwargs={"strength": 0.75})
    arguments = {"config": config, "pipeline": img2img(), "prompt_fn": [("cat", {"image": PICTURE})], **given}
    assert f"pipeline_inputs names 'image', but {said}" in refusal(make_config, **arguments)


def test_an_evaluation_asked_for_later_checks_its_prompts_too(make_config):
    config = make_config(pipeline_inputs=["image"], pipeline_kwargs={"strength": 0.75})
    trainer = DDPOTrainer(config, brightness, [("cat", {"image": PICTURE})], img2img())
    with pytest.raises(ValueError, match=r"pipeline_inputs names 'image', but prompts\[1\] has no metadata"):
        trainer.generate_samples([("cat", {"image": PICTURE}), "owl"])


def test_objects_in_pipeline_kwargs_survive_saving_and_resuming_and_other_ones_are_named(make_config, caplog):
    def run(colour: str, rounds: int) -> DDPOTrainer:
        kwargs = {"image": Image.new("RGB", (16, 16), colour), "strength": np.float64(0.75)}
        config = make_config(pipeline_kwargs=kwargs, save_strategy="epoch", num_train_epochs=rounds)
        trainer = DDPOTrainer(config, brightness, ["cat", "owl"], img2img())
        trainer.train(resume_from_checkpoint=rounds > 1)
        trainer.save_model()
        trainer.create_model_card()
        return trainer

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if "pipeline_kwargs" in record.getMessage()]

    run("red", 1)
    assert run("red", 2).state.global_step == 2 and said() == []
    run("blue", 3)
    assert len(said()) == 1 and "from here on this is another run" in said()[0] and "RGB image of 16x16" in said()[0]
