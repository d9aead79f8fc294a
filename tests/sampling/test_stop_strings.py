"""Completions that end with a string are those without it, cut after the token that completes it."""

from types import SimpleNamespace

import pytest
import torch

from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.models.stop_strings import StopStrings
from rlif_lightning.sampling import NativeSampler, Sampling, VLLMSampler
from rlif_lightning.sampling.protocol import up_to_date
from tests.conftest import make_model, make_tokenizer
from tests.sampling.test_sampling import RAGGED, assert_same, completions

TOKENIZER, MODEL = make_tokenizer(), make_model()
STRINGS = ["l", " s", "72", "\n", "a "]  # in many completions of this model, early and late
END_IDS, GROUP, NEW = [0, 17], 8, 40
SEEDS = completion_seeds(0, [(0, i) for i in range(len(RAGGED))], GROUP)


def draw(strings=STRINGS, order=(0, 1, 2, 3, 4), rows=None, every=1, **distribution):
    """Groups of the prompts in this order."""
    sampler = NativeSampler(rows)
    sampler.LOOK_EVERY_ON_CPU = every
    sampler.update(MODEL, END_IDS, 0, StopStrings(strings, TOKENIZER) if strings else None)
    seeds = SEEDS.view(-1, GROUP)[list(order)].flatten()
    return sampler.sample([RAGGED[i] for i in order], GROUP, seeds, Sampling(NEW, **distribution))


def completed_at(ids):
    """The first prefix whose text contains a string; None."""
    texts = (TOKENIZER.decode(ids[:n], skip_special_tokens=True) for n in range(1, len(ids) + 1))
    return next((n for n, text in enumerate(texts, 1) if any(s in text for s in STRINGS)), None)


@pytest.mark.parametrize("every", [1, 16])  # on a GPU what is drawn after a string is found later, and left out
@pytest.mark.parametrize("distribution", [{}, {"temperature": 0.7, "top_p": 0.9, "statistics_temperature": 1.5}])
def test_a_completion_and_its_statistics_end_with_the_string(every, distribution):
    whole, stopped = draw([], **distribution), draw(every=every, **distribution)
    lengths = []
    for i, ids in enumerate(completions(whole)):
        at = completed_at(ids)
        n = len(ids) if at is None else at
        assert completions(stopped)[i] == ids[:n]
        assert bool(stopped.ended[i]) == (at is not None or ids[-1] in END_IDS)
        pairs = [(whole.logprob, stopped.logprob), *zip(whole.stats[:3], stopped.stats[:3], strict=True)]
        for x, y in pairs + ([] if whole.kept_mass is None else [(whole.kept_mass, stopped.kept_mass)]):
            torch.testing.assert_close(x[i, :n], y[i, :n], atol=1e-5, rtol=1e-5)
            assert not y[i, n:].any()
        assert not stopped.completion_ids[i, n:].any() and not stopped.completion_mask[i, n:].any()
        lengths.append((n, at))
    assert stopped.completion_ids.shape[1] == max(n for n, _ in lengths)
    assert len({at for _, at in lengths}) > 5 and any(at is None for _, at in lengths)
    assert any(at is not None and at % 16 == 1 for _, at in lengths)


@pytest.mark.parametrize("drop", [0.0, 0.9, 1.0])
def test_the_batch_changes_nothing(monkeypatch, drop):
    """Its size, its order, when finished rows leave it, and when strings are looked for."""
    monkeypatch.setattr(NativeSampler, "DROP_BELOW", drop)
    expected = draw()
    order = [3, 0, 4, 2, 1]
    back = torch.tensor([order.index(i) * GROUP + g for i in range(len(RAGGED)) for g in range(GROUP)])
    for other in (draw(rows=GROUP), draw(rows=2 * GROUP, every=7), draw(order=order, every=3).rows(back)):
        assert_same(other, expected)


def test_no_row_reads_anothers_tokens():
    """A string of two tokens, of which one ends a prompt and one row's completion, and the other begins the next."""
    first, second = (TOKENIZER.convert_tokens_to_ids(x) for x in ("4", "8"))

    class Fixed(NativeSampler):
        def _draw_batch(self, ids, mask, first_row, group_size, numbers, drawn, progress):
            rows = torch.arange(2)
            for t, tokens in enumerate([[second, first], [first, first], [first, second]]):
                drawn.ids[rows, t], drawn.mask[rows, t] = torch.tensor(tokens), True
                drawn.stopped(rows, t, t + 1)

    sampler = Fixed()
    sampler.update(MODEL, END_IDS, 0, StopStrings(["48"], TOKENIZER))
    samples = sampler.sample([[5, first]], 2, SEEDS[:2], Sampling(3))
    assert completions(samples) == [[second, first, first], [first, first, second]]
    assert samples.ended.tolist() == [False, True]


def test_the_toy_worked_by_hand():
    """Its solutions are steps and the answer after `#`, a token a letter: `3+5=8;#8`."""
    policy = Policy.load(PolicySettings("toy", stop=["#"]))
    prompts = [policy.tokenizer.encode(f"{problem}>") for problem in ("3+5", "7-2+4")]
    sampler = NativeSampler()
    with up_to_date(sampler, policy):
        samples = sampler.sample(prompts, 16, torch.arange(32), Sampling(32))
    texts, ids = samples.texts(policy.decode), completions(samples)
    (answer,) = {own[-1] for own, text in zip(ids, texts, strict=True) if "#" in text}
    assert policy.tokenizer.decode([answer]) == "#" and samples.ended.all()
    for text, own in zip(texts, ids, strict=True):
        assert text.find("#") == (len(own) - 1 if own[-1] == answer else -1)  # else the end token came first
    assert sum(own[-1] == answer for own in ids) > 20


# -- vLLM, as far as it is not needed --------------------------------------------------------------------------


def test_what_vllm_draws_is_cut_by_the_same_rule():
    """It may stop a token late, and is believed where it stops by a string that our rule does not see."""
    sampler, ids = VLLMSampler(), TOKENIZER.convert_tokens_to_ids(["4", "8", "\u00c3", "7"])
    drawn = SimpleNamespace(token_ids=ids, stop_reason="48")
    sampler.stop = StopStrings(["48"], TOKENIZER)
    assert sampler._end(drawn) == (2, True)
    sampler.stop = StopStrings(["84"], TOKENIZER)
    assert sampler._end(drawn) == (4, True)
    assert sampler._end(SimpleNamespace(token_ids=ids, stop_reason=None)) == (4, False)
    sampler.stop = None
    assert sampler._end(SimpleNamespace(token_ids=ids, stop_reason=17)) == (4, False)
