"""Which tokens carry the answer: against a decoding of every prefix, and cases worked by hand."""

import json
import random
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, Grader
from rlif_lightning.models.token_text import answer_mask
from rlif_lightning.rollout import Samples
from tests.conftest import CORPUS, make_tokenizer

ADDED = ["{7", "2}$", "is C", "[1,", "}}"]


def sentencepiece(pre_tokenizer, decoder, normalizer=None):
    """A SentencePiece BPE with byte fallback, as `tokenizers` has those of Llama 2 and Gemma."""
    learnt = Tokenizer(models.BPE())
    learnt.normalizer, learnt.pre_tokenizer = normalizer, pre_tokenizer
    learnt.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {name: place for place, name in enumerate(names)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama_2():
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return sentencepiece(pre_tokenizers.Metaspace(), decoders.Sequence(parts))


def gemma():
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = pre_tokenizers.Split(" ", "merged_with_previous")
    return sentencepiece(spaces, decoders.Sequence(parts), normalizers.Replace(" ", "\u2581"))


def metaspace():
    parts = [decoders.ByteFallback(), decoders.Metaspace()]
    return sentencepiece(pre_tokenizers.Metaspace(), decoders.Sequence(parts))


def llama_3():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    return tokenizer


KINDS = {"qwen": make_tokenizer, "llama_2": llama_2, "llama_3": llama_3, "gemma": gemma, "metaspace": metaspace}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    made = KINDS[request.param]()
    made.add_tokens(ADDED)
    return made


def collected(tokenizer, rows):
    """Samples of token ids, and their texts."""
    width = max(map(len, rows)) + 2
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    samples = Samples(ids[:, :0], mask[:, :0], ids, mask, mask[:, 0])
    return samples, tokenizer.batch_decode(rows, skip_special_tokens=True)


def marked(tokenizer, ids, where):
    """The names of the tokens that carry the answer."""
    samples, texts = collected(tokenizer, [ids])
    spans = Grader(AnswerFormat(where, "exact")).answer_spans([(texts[0], True)])
    mask = answer_mask(samples, texts, spans, tokenizer)
    assert mask.shape == samples.completion_ids.shape and not mask[~samples.completion_mask].any()
    return [x.replace("\u2581", " ") for x in tokenizer.convert_ids_to_tokens(samples.completion_ids[mask].tolist())]


def pieces(tokenizer, *texts):
    """Ids of texts that are encoded one by one; `<...>` and those of ADDED are one token each."""
    ids = []
    for text in texts:
        whole = text in ADDED or text.startswith("<")
        ids += [tokenizer.convert_tokens_to_ids(text)] if whole else tokenizer.encode(text, add_special_tokens=False)
    return ids


def slow_tokens(tokenizer, ids, text, start, end):
    """The tokens that carry characters [start, end): each prefix decoded, an open character ends in U+FFFD."""
    found = []
    for place in (i for i, token in enumerate(ids) if token not in tokenizer.all_special_ids):
        before, after = tokenizer.batch_decode([ids[:place], ids[: place + 1]], skip_special_tokens=True)
        left, right = (sum(1 for _ in common(x, text)) for x in (before, after))
        if left < end and right + (len(after) > right) > start:
            found.append(place)
    return found


def common(a, b):
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


def resampled(tokenizer, text, generator):
    """Other tokens that spell the same text: some in single letters or bytes, special ones between."""
    vocabulary, ids = tokenizer.get_vocab(), []
    for token in tokenizer.encode(text, add_special_tokens=False):
        letters = tokenizer.convert_ids_to_tokens(token)
        parts = [[x] if x in vocabulary else [f"<0x{byte:02X}>" for byte in x.encode()] for x in letters]
        alone = letters[0] == "<" or generator.random() < 0.5
        ids += [token] if alone else [vocabulary[name] for part in parts for name in part]
        if generator.random() < 0.2:
            ids.append(generator.choice(tokenizer.all_special_ids))
    return ids


TEXTS = [
    (r"so it is \boxed{\frac{1}{2} x}. Natalia", "boxed"),
    (r"\boxed{1}, no: \boxed{ {48} clips }}", "boxed"),
    (r"she sold \fbox{ä€😀} in May", "boxed"),
    ("ä€ 😀 so 48 / 2 = $1,234.50 €", "last_number"),
    ("#### 5\n😀#### é7 ", r"####\s*(.+)"),
    ("The answer is (C).", "choice"),
    ("in May [ANSWER] [1, 'ä€'] [/ANSWER] 24", "literal"),
    ("  clips and ä ", "whole"),
    ("no answer here", "boxed"),
]


@pytest.mark.parametrize(("text", "where"), TEXTS)
def test_marked_as_a_decoding_of_every_prefix_says(tokenizer, text, where):
    generator = random.Random(0)
    rows = [tokenizer.encode(text), *(resampled(tokenizer, text, generator) for _ in range(8))]
    samples, texts = collected(tokenizer, rows)
    spans = Grader(AnswerFormat(where, "exact")).answer_spans([(text, True) for text in texts])
    mask = answer_mask(samples, texts, spans, tokenizer)
    for ids, written, span, got in zip(rows, texts, spans, mask, strict=True):
        wanted = slow_tokens(tokenizer, ids, written, *span) if span else []
        assert got.nonzero().flatten().tolist() == wanted
        assert bool(wanted) is (text != "no answer here")


def test_a_token_that_straddles_a_brace_belongs_to_the_answer(tokenizer):
    assert marked(tokenizer, pieces(tokenizer, r"so \boxed", "{7", "2}$"), "boxed") == ["{7", "2}$"]
    nested = pieces(tokenizer, r"\boxed", "{", "{7", "}}", ".")
    assert marked(tokenizer, nested, "boxed")[-2:] == ["{7", "}}"]
    assert marked(tokenizer, pieces(tokenizer, "it ", "is C"), "choice") == ["is C"]
    assert marked(tokenizer, pieces(tokenizer, r"\boxed", "{7", "}}", "then"), "boxed") == ["{7"]


def test_a_special_token_within_the_answer_is_not_marked(tokenizer):
    special = tokenizer.all_special_tokens[-1]
    ids = [*pieces(tokenizer, r"\boxed", "{7"), tokenizer.convert_tokens_to_ids(special), *pieces(tokenizer, "2}$")]
    assert marked(tokenizer, ids, "boxed") == ["{7", "2}$"]


def test_no_answer_no_token(tokenizer):
    assert marked(tokenizer, pieces(tokenizer, r"\boxed", "{7", "then"), "boxed") == []


def test_bytes_that_are_no_text():
    """Byte-level BPE makes one unknown character of a cut one, byte fallback one of each byte of its run."""
    qwen, llama = make_tokenizer(), llama_2()
    for tokenizer in (qwen, llama):
        tokenizer.add_tokens(ADDED)
    cut = [*qwen.convert_tokens_to_ids(["â", "Ĥ"])]  # the first two bytes of a euro sign
    ids = [*pieces(qwen, "x"), *cut, *pieces(qwen, "{7", r"#"), *cut]
    assert qwen.decode(ids) == "x\ufffd{7#\ufffd"
    assert marked(qwen, ids, r"#(.)") == ["â", "Ĥ"]
    assert marked(qwen, ids, r"(.)#") == ["{7"]
    assert marked(qwen, ids, r"(.)\{") == ["â", "Ĥ"]
    ids = pieces(llama, "x", "<0xE2>", "<0x82>", "{7", "<0xE2>", "</s>", "<0x82>", "<0xAC>", "<0x31>", "2}$")
    assert llama.decode(ids, skip_special_tokens=True) == "x\ufffd\ufffd{7€12}$"
    assert marked(llama, ids, r"x.(.)") == ["<0x82>"]
    assert marked(llama, ids, r"(\d+)") == ["<0x31>", "2}$"]
    assert marked(llama, ids, r"(€)") == ["<0xE2>", "<0x82>", "<0xAC>"]
    ids = pieces(llama, "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "x")  # one wrong byte spoils the run
    assert marked(llama, ids, r"...(.)") == ["<0xFF>"]
    assert marked(llama, ids, r"^(.)") == ["<0xE2>"]


def test_a_decoder_that_writes_something_else_is_refused():
    tokenizer = make_tokenizer()
    samples, _ = collected(tokenizer, [tokenizer.encode("is it , so")])
    with pytest.raises(UserError, match="clean_up_tokenization_spaces"):
        answer_mask(samples, ["is it, so"], [(0, 2)], tokenizer)
    assert not answer_mask(samples, ["is it, so"], [None], tokenizer).any()


def test_tokens_outside_the_vocabulary_spell_nothing():
    """Models have more rows than their tokenizer has tokens."""
    tokenizer = make_tokenizer()
    ids = [*tokenizer.encode(r"\boxed{1"), len(tokenizer) + 5, *tokenizer.encode("2}")]
    assert len(marked(tokenizer, ids, "boxed")) == 2


def test_a_rollout_costs_well_under_a_second():
    """256 completions of 1,000 tokens; linear: 4 times the tokens take about 4 times as long."""
    tokenizer = make_tokenizer()
    line = tokenizer.encode("How many clips did Natalia sell altogether? ") * 40
    rows = [line[: 1_000 - 12] + tokenizer.encode(rf"\boxed{{{i}}}") for i in range(256)]
    samples, texts = collected(tokenizer, rows)
    spans = Grader(AnswerFormat()).answer_spans([(text, True) for text in texts])
    start = time.process_time()
    mask = answer_mask(samples, texts, spans, tokenizer)
    assert time.process_time() - start < 2.0  # 0.1 s alone on a core
    assert mask.any(1).all()
