"""With which token a text contains a string: against a decoding of every prefix, Hugging Face, and by hand."""

import random

import pytest
import torch
from transformers import StopStringCriteria

from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, Grader
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy
from rlif_lightning.models.stop_strings import StopStrings
from rlif_lightning.models.token_text import answer_mask
from rlif_lightning.models.tokenizer import special_tokens
from tests.conftest import make_tokenizer
from tests.models.test_token_text import ADDED, KINDS, collected, resampled

TEXT = "She sold \u4f60\u597d clips, \U0001f600 and 48 / 2 = 24 in May.\n\nQuestion: How many {7, 1}$?\nAnswer: 7"


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    made = KINDS[request.param]()
    made.add_tokens(ADDED)
    return made


def completed_at(tokenizer, ids, strings):
    """The first prefix, decoded whole after a letter of the prompt, that contains a string; None."""
    (letter,) = tokenizer.encode("a", add_special_tokens=False)[-1:]
    start = len(tokenizer.decode([letter]))
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode([letter, *ids[:count]], skip_special_tokens=True)[start:]
        if any(s in text for s in strings):
            return count
    return None


def some_of(text, generator, most=9):
    """One or two pieces of a text, or of one that resembles it."""
    strings = []
    for _ in range(generator.randint(1, 2)):
        start = generator.randrange(len(text))
        piece = text[start : start + generator.randint(1, most)]
        strings.append(piece if generator.random() < 0.8 else piece[::-1])
    return strings


def in_parts(stop, ids, generator):
    """As `find` over all ids, called with a few of them at a time."""
    place, kept = 0, b""
    while place < len(ids):
        part = ids[place : place + generator.randint(1, 4)]
        found, kept = stop.find(part, kept)
        if found is not None:
            return place + found
        place += len(part)
    return None


def test_it_is_the_first_prefix_whose_text_contains_a_string(tokenizer):
    """Texts in all kinds of tokens: characters in several, special tokens between, tokens that say more."""
    generator, found = random.Random(0), 0
    for _ in range(300):
        ids = resampled(tokenizer, TEXT, generator)
        strings = some_of(TEXT, generator)
        stop, expected = StopStrings(strings, tokenizer), completed_at(tokenizer, ids, strings)
        assert stop.find(ids)[0] == in_parts(stop, ids, generator) == expected, strings
        found += expected is not None
    assert 200 < found < 300


def test_it_is_the_first_prefix_of_arbitrary_tokens():
    """What a model draws at a high temperature: bytes that are not UTF-8, end tokens in the middle."""
    tokenizer, generator, found = make_tokenizer(), random.Random(1), 0
    for _ in range(300):
        ids = [generator.randrange(len(tokenizer)) for _ in range(40)]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        strings = [s for s in some_of(text, generator, 3) if "\ufffd" not in s] or ["e"]
        expected = completed_at(tokenizer, ids, strings)
        assert StopStrings(strings, tokenizer).find(ids)[0] == expected
        found += expected is not None
    assert found > 100


def test_it_is_the_token_at_which_hugging_face_stops(tokenizer):
    generator, known = random.Random(2), set(tokenizer.all_special_ids)
    for _ in range(12):
        strings = some_of(TEXT, generator)
        try:
            theirs = StopStringCriteria(tokenizer, strings)
        except ValueError:  # no token contains a part of the string
            continue
        ours = StopStrings(strings, tokenizer)
        for _ in range(10):
            ids = [i for i in resampled(tokenizer, TEXT, generator) if i not in known]
            stops = (n for n in range(1, len(ids) + 1) if theirs(torch.tensor([ids[:n]]), None))
            assert ours.find(ids)[0] == next(stops, None), strings


def test_worked_by_hand():
    """Across tokens, inside of one, before half a character, with a character in two tokens, past a special one."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(ADDED)
    cases = [
        (["4", "8", "\u0120"], "48", 2),
        (["is C", "."], "s C", 1),
        (["4", "{7", "8"], "4{", 2),
        (["4", "8"], "84", None),
        (["a", "b", "a", "b", "a", "c"], "abac", 6),
        (["7", "<|im_end|>", "2"], "72", 3),
        (["\u00c3", "\u00a9", "!"], "\u00e9", 2),  # the bytes C3 A9
        (["7", "\u00c3"], "7", 1),
    ]
    for names, string, expected in cases:
        ids = tokenizer.convert_tokens_to_ids(names)
        assert None not in ids and StopStrings([string], tokenizer).find(ids)[0] == expected, names


def test_the_space_that_continues_the_prompt_counts():
    """Llama 2's decoder drops it at the start of a text; the first token says it all the same."""
    tokenizer = KINDS["llama_2"]()
    ids = tokenizer.convert_tokens_to_ids(["\u2581", "7"])
    assert tokenizer.decode(ids) == "7" and StopStrings([" 7"], tokenizer).find(ids)[0] == 2


def test_a_text_ends_with_the_string_that_is_complete_first():
    stop = StopStrings(["Question:", "\n\n", "n\nQ"], make_tokenizer())
    assert stop.cut("42 in\nQuestion: 7") == "42 in\nQ"
    assert stop.cut("42\n\n\n\n7\nQuestion:") == "42\n\n"
    assert stop.cut("42") == "42"


def test_no_answer_is_read_from_after_the_string(model_folder):
    """The last token says more than the string: its number belongs to what follows. The answer's tokens are found."""
    policy = Policy.load(PolicySettings(str(model_folder()), stop=["\nQ"]))
    policy.tokenizer.add_tokens(["Q9. 8"])
    ids = policy.tokenizer.convert_tokens_to_ids(["7", "2", "\u010a", "Q9. 8"])
    assert policy.stop.find(ids)[0] == len(ids)
    samples, _ = collected(policy.tokenizer, [ids])
    (text,) = texts = samples.texts(policy.decode)
    grader = Grader(AnswerFormat("last_number"))
    assert text == "72\nQ" and grader.extract_answers([(text, True)]) == ["72"]
    mask = answer_mask(samples, texts, grader.answer_spans([(text, True)]), policy.tokenizer)
    assert mask[0, : len(ids)].tolist() == [True, True, False, False]


@pytest.mark.parametrize("wrong", ["\n\n", [""], ["a", 1], {"a": 1}, [None]])
def test_what_is_no_list_of_texts_is_refused(wrong):
    """A text alone would be a list of its letters."""
    with pytest.raises(UserError, match=r"rollout\.stop can't be used\n  got: .*\n  expected: a list of texts"):
        StopStrings(wrong, make_tokenizer())


def test_special_tokens_are_no_strings(model_folder):
    """The text of a completion never contains one: it would stop nothing. Said before weights are loaded."""
    settings = PolicySettings(str(model_folder()), stop=["a", "b<|im_end|>"])
    with pytest.raises(UserError, match=r"special token.*\n.*b<.*\n.*model.end_tokens: \[\"<\|im_end\|>\"\]"):
        Policy.load(settings)
    assert "<|im_end|>" in special_tokens(make_tokenizer())
