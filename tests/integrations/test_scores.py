"""Scores of given completions against float64 loops over the model's own logits, and what is refused."""

import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, GPT2Config, MambaConfig

from rlif_lightning import score
from rlif_lightning.errors import UserError
from rlif_lightning.rewards import (
    InternalReward,
    Length,
    MajorityVote,
    ProbabilityMargin,
    SelfCertainty,
    Shuffled,
    TokenEntropy,
)
from tests.conftest import ARCHITECTURES, CHAT_TEMPLATE, make_model, make_tokenizer

PROMPTS = ["How many clips?", "Solve for $x$: 36", "How many clips?", "1"]
COMPLETIONS = [" 72 in all.", " The answer is 18", " 24", " She sold half as many in May, 48 / 2."]


def loop(model, prompt, completion, temperature=1.0):
    """Log-probability, entropy and self-certainty of each token, from one row's logits as plain numbers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
    rows = []
    for z, token in zip(logits[len(prompt) - 1 :].tolist(), completion, strict=False):
        total = math.fsum(math.exp(x - max(z)) for x in z)
        logp = [x - max(z) - math.log(total) for x in z]
        entropy = -math.fsum(math.exp(x) * x for x in logp)
        rows.append((logp[token], entropy, -math.fsum(logp) / len(z) - math.log(len(z))))
    return rows


def means(rows):
    return [sum(x) / len(rows) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2", "bloom"])
def test_equal_to_a_loop(architecture, temperature):
    tokenizer = make_tokenizer()
    others = {
        "gpt2": GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4),
        "bloom": BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=2),
    }
    if architecture in others:
        model = AutoModelForCausalLM.from_config(others[architecture])
    else:
        model = make_model(architecture, len(tokenizer))
    model.train()  # GPT-2 has dropout, which must not show
    found = score(model, tokenizer, PROMPTS, COMPLETIONS, temperature=temperature, batch_size=3)
    assert model.training and all(module.training for module in model.modules())
    model.eval()
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = tokenizer(completion)["input_ids"]
        want = loop(model, tokenizer(prompt)["input_ids"], ids, temperature)
        got = [x[row, : len(ids)].tolist() for x in found.tokens[:3]]
        assert list(zip(*got, strict=True)) == [pytest.approx(x, abs=2e-5) for x in want]
        mean = [float(x[row]) for x in (found.logprob, found.entropy, found.self_certainty)]
        assert mean == pytest.approx(means(want), abs=2e-5)
        assert found.lengths[row] == len(ids) and not found.tokens.logprob[row, len(ids) :].any()
    assert found.rollout.texts == COMPLETIONS
    assert not found.rollout.samples.ended.any() and not found.logprob.requires_grad


def test_ids_texts_and_conversations_agree():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    model, template = make_model(), tokenizer.apply_chat_template
    talks = [[{"role": "user", "content": text}] for text in PROMPTS]
    written = [template(x, add_generation_prompt=True, tokenize=False) for x in talks]
    of_talks = score(model, tokenizer, talks, COMPLETIONS)
    of_texts = score(model, tokenizer, written, COMPLETIONS)
    before, after = ([tokenizer(x)["input_ids"] for x in texts] for texts in (written, COMPLETIONS))
    of_ids = score(model, None, [torch.tensor(x) for x in before], after)
    for found in (of_talks, of_texts):
        assert torch.equal(found.tokens.logprob, of_ids.tokens.logprob)
    ended = score(model, tokenizer, before, [[*ids, tokenizer.eos_token_id] for ids in after])
    assert ended.rollout.samples.ended.all() and torch.equal(ended.lengths, of_ids.lengths + 1)
    assert ended.rollout.texts == COMPLETIONS


def test_a_name_is_loaded(model_folder):
    folder = str(model_folder())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    by_name, loaded = (score(*x, PROMPTS, COMPLETIONS) for x in ((folder, None), (model, tokenizer)))
    assert torch.equal(by_name.tokens.logprob, loaded.tokens.logprob)


class Gini(InternalReward):
    def statistic(self, logp):
        p, v = logp.exp().sort(-1).values, logp.shape[-1]
        return (2 * (p * torch.arange(1, v + 1, device=p.device)).sum(-1) - v - 1) / v


def test_rewards_apply():
    tokenizer, model, other = make_tokenizer(), make_model(), make_model(seed=1)
    rewards = [
        SelfCertainty(),
        Gini(),
        Shuffled(ProbabilityMargin()),
        Length("short"),
        TokenEntropy(annotator="reference"),
    ]
    found = score(model, tokenizer, PROMPTS, COMPLETIONS, rewards=rewards, reference=other, group_size=2)
    assert list(found.rewards) == [r.name for r in rewards]
    assert torch.equal(found.rewards["self_certainty"], found.self_certainty)
    assert torch.equal(TokenEntropy()(found.rollout), -found.entropy)
    theirs = score(other, tokenizer, PROMPTS, COMPLETIONS)
    assert torch.equal(found.rewards["token_entropy_reference"], -theirs.entropy)
    with pytest.raises(UserError, match=r"without the statistic of the reward .*ProbabilityMargin"):
        ProbabilityMargin()(theirs.rollout)


@pytest.mark.parametrize(
    "reward", [SelfCertainty("bottom_q"), ProbabilityMargin(), Gini("sum")], ids=lambda r: r.name
)
def test_rewards_of_plain_tensors(reward):
    """Logits, ids and mask in place of a rollout: as many tokens, the same numbers."""
    tokenizer, model = make_tokenizer(), make_model()
    found = score(model, tokenizer, PROMPTS, COMPLETIONS, rewards=[reward])
    ids, mask = found.rollout.samples.completion_ids, found.rollout.samples.completion_mask
    logits = torch.randn(*ids.shape, model.config.vocab_size)  # at padding anything
    for row, prompt in enumerate(PROMPTS):
        before, n = tokenizer(prompt)["input_ids"], int(found.lengths[row])
        with torch.no_grad():
            out = model(input_ids=torch.tensor([before + ids[row, :n].tolist()])).logits[0]
        logits[row, :n] = out[len(before) - 1 : -1]
    got = reward.of_logits(logits.requires_grad_(), ids, mask)
    torch.testing.assert_close(got, found.rewards[reward.name], rtol=0, atol=1e-5)
    assert not got.requires_grad
    with pytest.raises(ValueError, match="ids do not match"):
        reward.of_logits(logits, ids[:, 1:], mask)


@pytest.mark.parametrize(
    ("prompts", "completions", "said"),
    [
        (PROMPTS, COMPLETIONS[:3], "4 prompts, 3 completions"),
        ([], [], "0 prompts"),
        (PROMPTS[:2], ["1", ""], "completion of row 1 has no tokens"),
        (["", "1"], ["1", "2"], "prompt of row 0 has no tokens"),
        ([[1]], [[400]], "token 400 in row 0"),
        ([[1] * 500], [[1] * 13], "at most 512"),
        ([[1]], ["a"], "tokenizer"),
        ([[{"role": "user", "content": "a"}]], [[1]], "tokenizer"),
    ],
)
def test_what_is_refused(prompts, completions, said):
    with pytest.raises(UserError, match=said):
        score(make_model(), None if "tokenizer" in said else make_tokenizer(), prompts, completions)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rewards": [MajorityVote()]}, "MajorityVote lacks something here\n.*answers"),
        ({"rewards": [SelfCertainty(annotator="reference")]}, "give the reference"),
        ({"rewards": [SelfCertainty(), SelfCertainty()]}, "Two rewards have one name"),
        ({"group_size": 3}, "group_size does not fit"),
        ({"group_size": 0}, "group_size does not fit"),
        ({"batch_size": 0}, "batch_size does not fit"),
        ({"reference": make_model(vocab_size=40)}, "can't be scored"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        score(make_model(), make_tokenizer(), PROMPTS, COMPLETIONS, **options)


def test_a_text_is_no_list_and_a_fraction_no_token():
    with pytest.raises(UserError, match="lists of texts"):
        score(make_model(), make_tokenizer(), "ab", "cd")
    with pytest.raises(TypeError):
        score(make_model(), None, [[1.5]], [[2]])


def test_other_forwards_are_refused():
    """Mamba has no keys and values; the other changes its logits after the head, as Falcon-H1 does."""
    small = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match="'mamba' can't be scored"):
        score(AutoModelForCausalLM.from_config(small), make_tokenizer(), PROMPTS, COMPLETIONS)
    scaled = make_model()
    scaled.register_forward_hook(lambda module, inputs, output: output.__setitem__("logits", output.logits * 2))
    with pytest.raises(UserError, match="'qwen2' is scored differently from its own forward"):
        score(scaled, make_tokenizer(), PROMPTS, COMPLETIONS)


def test_neither_lightning_nor_trl_is_imported(model_folder):
    """Neither by the name nor by a score of a model given by name, which takes the package's own loader."""
    code = (
        "import sys, rlif_lightning, rlif_lightning.integrations.trl; rlif_lightning.score\n"
        f"rlif_lightning.score({str(model_folder())!r}, None, ['1 +'], [' 2'])\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning', 'trl')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
