"""A real model that the user has on disk, with word problems in its chat template."""

import json
from pathlib import Path
from typing import Any

QUESTIONS = (
    "A baker fills 7 trays with 12 rolls each and sells 58 of the rolls. How many rolls are left?",
    "Mira reads 24 pages a day. Her book has 312 pages. How many days does she need for it?",
    "A bus starts with 35 people. At the first stop 9 get off and 14 get on. How many people are on the bus?",
    "Tickets cost 8 euros for adults and 5 euros for children. What do 3 adults and 4 children pay together?",
    "Jonas saves 15 euros a week. After 6 weeks he buys a lamp for 48 euros. How much money is left?",
    "A rope of 36 metres is cut into pieces of 4 metres, and every piece costs 3 euros. What do all pieces cost?",
    "In a class of 28 pupils, a quarter plays an instrument, half of those the piano. How many play the piano?",
    "A tank holds 240 litres. A pump fills 16 litres a minute. How long does it take until the tank is half full?",
    "Lena has three times as many stamps as Tom. Tom has 19 stamps. How many stamps do they have together?",
    "A farmer puts 150 eggs into boxes of 6 and sells each box for 2 euros. How much does he earn?",
    "A train covers 80 kilometres in one hour. How far does it get in two and a half hours?",
    "Nora buys 4 notebooks for 3 euros each and pays with a note of 20 euros. How much change does she get?",
    "A garden is 9 metres long and 6 metres wide. How many metres of fence does it need all around?",
    "Each of 5 shelves holds 18 books. 27 of the books are lent out. How many books are on the shelves now?",
    "A recipe for 4 people needs 300 grams of flour. How many grams are needed for 10 people?",
    "Paul walks 4 kilometres on each of 5 days. His sister walks 3 kilometres less in total. How far does she walk?",
)


def link(model: Path, target: Path, questions: Path | None = None) -> str:
    """A folder with links to the model's files, and the prompts; returns its name.

    Args:
        model: Folder with weights, tokenizer and chat template; nothing is written into it.
        target: The folder to make.
        questions: JSON lines with ``question``; null: ``QUESTIONS``.

    Raises:
        ValueError: The sides would encode the prompts differently.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    target.mkdir()
    for file in model.resolve().iterdir():
        (target / file.name).symlink_to(file)
    asked = (
        QUESTIONS if questions is None else [json.loads(x)["question"] for x in questions.read_text().splitlines()]
    )
    with (target / "prompts.jsonl").open("w") as lines:
        for question in asked:
            chat = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokenizer(text)["input_ids"] != ids:
                raise ValueError(
                    f"{model.name}'s tokenizer adds tokens to a text that its chat template has rendered"
                )
            lines.write(json.dumps({"question": text, "ids": ids}) + "\n")
    return str(target)
