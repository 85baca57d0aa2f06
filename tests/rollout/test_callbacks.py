"""Long work shows progress on the terminal, with the reward in it."""

import re

from conftest import brightness, in_both_passes, tiny_pipeline
from ddpo_trl import DDPOTrainer


PROMPTS = ["cat", "dog", "owl"]


def shown(make_config, capfd, **settings: object) -> str:
    trainer = DDPOTrainer(make_config(**settings), brightness, PROMPTS, tiny_pipeline(), eval_prompts=PROMPTS)
    capfd.readouterr()
    trainer.train()
    trainer.generate_samples()
    return "".join(capfd.readouterr())


@in_both_passes
def test_sampling_training_and_evaluation_have_a_bar_each(make_config, one_pass, capfd):
    micro_batches = 2 if one_pass else 16
    text = shown(make_config, capfd, disable_tqdm=False, num_train_epochs=2, eval_strategy="epoch")
    assert re.search(r"Sampling, round 2: 100%.* 8/8 \[.*image/s, reward=0\.4\d*", text)
    assert re.search(rf"Training: 100%.* {micro_batches}/{micro_batches} \[.*micro-batch.*, reward=0\.4\d* ± ", text)
    assert len(re.findall(r"Evaluation: +0%.* 0/3 \[.*image/s\]", text)) == 2 * 2 + 1  # it is quicker than a bar moves


def test_a_line_of_each_round_stays(make_config, capfd):
    text = shown(make_config, capfd, disable_tqdm=False, num_train_epochs=2)
    assert re.search(r"round +1 +8 reward queries +reward 0\.4", text)
    assert re.search(r"round +2 +16 reward queries +reward 0\.4", text)


def test_nothing_is_shown_where_it_is_not_wanted(make_config, capfd):
    text = shown(make_config, capfd, disable_tqdm=True, eval_strategy="epoch")
    assert "%|" not in text and "reward queries" not in text
