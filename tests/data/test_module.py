"""The data module: what sources share, and what is said about their conversations."""

import json
from contextlib import nullcontext

import pytest

from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.data.problems import Source
from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, SourceAnswers

SHARED = AnswerFormat(completion="last_number", several="set", relative_tolerance=0.1, unfinished_is_wrong=True)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, SHARED),
        (SourceAnswers(), SHARED),
        (SourceAnswers(compare="exact"), AnswerFormat("last_number", "exact", "set", 0.1, True)),
        (
            SourceAnswers(completion=["boxed"], relative_tolerance=0, unfinished_is_wrong=False),
            AnswerFormat(["boxed"], "math", "set", 0, False),
        ),
    ],
)
def test_a_source_says_only_what_is_different(own, expected):
    """Its other settings used to fall back to the defaults, not to data.answers."""
    data = PromptDataModule(test=Source("toy", answers=own), answers=SHARED)
    assert data.answers_of("test") == data.answers_of("predict") == expected
    assert data.answers_of("val") == data.answers_of("train") == SHARED


def test_wrong_settings_of_a_source_are_refused_before_anything_is_read():
    with pytest.raises(UserError, match="boxed"):
        PromptDataModule(test=Source("nosuch.jsonl", answers=SourceAnswers(completion="boxd")))


def test_conversations_that_keep_their_own_system_message_are_counted(tmp_path, model_folder):
    from transformers import AutoTokenizer

    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
    rows = [{"prompt": [user]}, {"prompt": [system, user]}, {"prompt": [system, user]}, {"prompt": "text"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for system_prompt in ("Be brief.", None):
        data = PromptDataModule(Source(str(tmp_path / "a.jsonl"), answer=None), system_prompt=system_prompt)
        data.tokenizer = AutoTokenizer.from_pretrained(model_folder(chat=True))
        with pytest.warns(UserWarning, match="2 of 4 problems") if system_prompt else nullcontext():
            data.setup("fit")
        assert len(data.prompts["train"]) == 4


@pytest.mark.parametrize(("split", "said"), [("train", "4 from {}"), ("train[:-1]", "3 from {}, train[:-1]")])
def test_a_part_of_the_training_problems_is_said(split, said, tmp_path, model_folder, caplog):
    """A recipe's part of its own data set also cuts the file that is given in its place."""
    from transformers import AutoTokenizer

    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(4)))
    data = PromptDataModule(Source(str(file), answer=None, split=split), template="{prompt}")
    data.tokenizer = AutoTokenizer.from_pretrained(model_folder())
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert f"Training prompts: {said.format(file)}\n" in caplog.text
