"""The native sampler against plain forwards and transformers' own generate()."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from rlif_lightning.errors import UserError
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.functional.token_stats import token_stats
from rlif_lightning.models.tokenizer import end_token_ids, load_tokenizer
from rlif_lightning.sampling import NativeSampler, Sampling
from rlif_lightning.sampling.check_decoding import check_decoding, decoding_error
from rlif_lightning.sampling.decoders import PreallocatedDecoder
from rlif_lightning.sampling.llama_decoder import LlamaDecoder, decoder_for
from tests.conftest import ARCHITECTURES, completion_logits, make_model, make_tokenizer
from tests.sampling.plain_decoder import PlainDecoder

VOCABULARY = 320
END_IDS = list(range(0, VOCABULARY, 20))  # many, so that completions end at all lengths
MODELS = {name: make_model(name) for name in ARCHITECTURES}


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


RAGGED = prompts_of(3, 19, 11, 1, 26)  # beyond the sliding windows of 8, and below them


def sampler_of(model, rows=None, end_ids=END_IDS, pad_id=0):
    sampler = NativeSampler(rows)
    sampler.update(model, end_ids, pad_id)
    return sampler


def draw(
    model, prompts=RAGGED, group=4, new=24, rows=None, end_ids=END_IDS, seeds=None, progress=None, **distribution
):
    if seeds is None:
        seeds = completion_seeds(0, [(0, i) for i in range(len(prompts))], group)
    return sampler_of(model, rows, end_ids).sample(prompts, group, seeds, Sampling(new, **distribution), progress)


def completions(samples):
    """Each row's tokens, as its mask says."""
    return [r[:n] for r, n in zip(samples.completion_ids.tolist(), samples.lengths.tolist(), strict=True)]


@torch.no_grad()
def plain_logits(model, prompt, completion):
    """Logits [T, V] of an unpadded forward without a cache: one row, nothing to go wrong."""
    out = model(input_ids=torch.tensor([prompt + completion]), use_cache=False)
    return out.logits[0, len(prompt) - 1 : -1]


def assert_stats_close(samples, index, stats, atol=1e-4):
    n = int(samples.lengths[index])
    torch.testing.assert_close(samples.logprob[index, :n], stats.logprob, atol=atol, rtol=0)
    for mine, expected in zip(samples.stats[:3], stats[:3], strict=True):
        torch.testing.assert_close(mine[index, :n], expected, atol=atol, rtol=0)


def assert_same(a, b, atol=1e-5):
    """Two samples of the same completions, whatever batch they were drawn in."""
    assert completions(a) == completions(b)
    assert torch.equal(a.completion_mask, b.completion_mask) and torch.equal(a.ended, b.ended)
    mask = a.completion_mask
    pairs = [(a.logprob, b.logprob), *zip(a.stats[:3], b.stats[:3], strict=True)]
    for x, y in pairs + ([] if a.kept_mass is None else [(a.kept_mass, b.kept_mass)]):
        torch.testing.assert_close(x[mask], y[mask], atol=atol, rtol=1e-5)


# -- the distribution ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_are_those_of_a_plain_and_of_a_training_forward(architecture):
    model = MODELS[architecture]
    samples = draw(model, temperature=0.8)
    assert 3 < samples.lengths.float().mean() < 24  # the comparison covers ended and open rows
    mask = samples.completion_mask
    with torch.no_grad():
        training = token_stats(completion_logits(model, samples), samples.completion_ids, 0.8)
    for mine, expected in zip(samples.stats[:3], training[:3], strict=True):
        torch.testing.assert_close(mine[mask], expected[mask], atol=1e-4, rtol=0)
    for i, completion in enumerate(completions(samples)):
        logits = plain_logits(model, RAGGED[i // 4], completion)
        assert_stats_close(samples, i, token_stats(logits, torch.tensor(completion), 0.8))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_the_generate_of_transformers(architecture):
    model = MODELS[architecture]
    samples = draw(model, group=1, new=20, temperature=0.0)
    for prompt, ours, ended in zip(RAGGED, completions(samples), samples.ended.tolist(), strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=END_IDS, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert ours == theirs
        assert ended == (theirs[-1] in END_IDS)


def test_greedy_statistics_are_those_of_temperature_one():
    model = MODELS["qwen2"]
    samples = draw(model, group=1, new=6, temperature=0.0)
    for i, completion in enumerate(completions(samples)):
        logits = plain_logits(model, RAGGED[i], completion)
        assert completion == logits.argmax(-1).tolist()
        assert_stats_close(samples, i, token_stats(logits, torch.tensor(completion)))


def test_a_statistics_temperature_never_enters_the_log_probability():
    model = MODELS["llama"]
    base = draw(model, temperature=0.7)
    other = draw(model, temperature=0.7, statistics_temperature=1.3)
    assert torch.equal(base.completion_ids, other.completion_ids) and torch.equal(base.logprob, other.logprob)
    for i, completion in enumerate(completions(other)):
        logits = plain_logits(model, RAGGED[i // 4], completion)
        ids = torch.tensor(completion)
        for mine, expected in zip(other.stats[:3], token_stats(logits, ids, 1.3)[:3], strict=True):
            torch.testing.assert_close(mine[i, : len(ids)], expected, atol=1e-4, rtol=0)
    mask = base.completion_mask
    assert ((base.stats.entropy - other.stats.entropy)[mask].abs() > 1e-3).all()


def test_the_first_token_follows_the_model():
    """4,000 draws of one token: a chi-square test against the softmax of the plain forward."""
    model, prompt = MODELS["qwen3"], RAGGED[:1]
    samples = draw(model, prompt, group=4000, new=1, temperature=0.9)
    p = (plain_logits(model, prompt[0], [5])[0] / 0.9).softmax(-1)
    expected, counts = 4000 * p, samples.completion_ids.flatten().bincount(minlength=VOCABULARY)
    large = expected >= 5
    expected = torch.cat([expected[large], expected[~large].sum()[None]]).double()
    counts = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2) > 0.001


# -- filters ---------------------------------------------------------------------------------------------------


def naive_kept(logits, top_k, top_p, min_p):
    """Ids that the filters keep, in their order, from one row of tempered logits."""
    p = logits.double().softmax(-1)
    ids = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    total, mass, kept = sum(float(p[i]) for i in ids), 0.0, []
    for i in ids:
        if mass < top_p * total:
            kept.append(i)
        mass += float(p[i])
    return [i for i in kept if p[i] >= min_p * p[kept[0]]], p


def test_filtered_sampling_draws_inside_the_kept_set_and_reports_its_mass():
    model = MODELS["gemma3"]
    distribution = {"top_k": 9, "top_p": 0.85, "min_p": 0.1}
    samples = draw(model, temperature=1.5, **distribution)
    assert samples.kept_mass is not None
    sizes = set()
    for i, completion in enumerate(completions(samples)):
        logits = plain_logits(model, RAGGED[i // 4], completion) / 1.5
        for t, token in enumerate(completion):
            kept, p = naive_kept(logits[t], **distribution)
            sizes.add(len(kept))
            assert token in kept
            assert float(samples.kept_mass[i, t]) == pytest.approx(sum(float(p[k]) for k in kept), abs=1e-4)
            # The log-probability is that of the whole distribution.
            assert float(samples.logprob[i, t]) == pytest.approx(float(p[token].log()), abs=1e-4)
        assert_stats_close(samples, i, token_stats(logits, torch.tensor(completion)))
    assert len(sizes) > 2 and max(sizes) <= 9
    assert (samples.kept_mass[~samples.completion_mask] == 0).all()
    plain = draw(model, temperature=1.5)
    assert plain.kept_mass is None and completions(plain) != completions(samples)


# -- ends ------------------------------------------------------------------------------------------------------


def test_every_end_id_ends_a_completion_and_nothing_follows():
    samples = draw(MODELS["qwen2"], group=16)
    seen = set()
    for i, completion in enumerate(completions(samples)):
        assert not set(completion[:-1]) & set(END_IDS)
        assert bool(samples.ended[i]) == (completion[-1] in END_IDS)
        assert samples.ended[i] or len(completion) == 24
        seen |= set(completion[-1:]) & set(END_IDS)
    assert len(seen) > 5
    mask = samples.completion_mask
    assert torch.equal(mask.cumprod(1).bool(), mask)  # a prefix: nothing after the end
    outside = ~mask
    assert outside.any() and (samples.completion_ids[outside] == 0).all()
    for x in (samples.logprob, *samples.stats[:3]):
        assert (x[outside] == 0).all()
    assert samples.completion_ids.shape[1] == samples.lengths.max()


def test_a_cut_completion_is_not_ended_and_an_end_at_the_limit_is():
    model = MODELS["llama"]
    open_rows = draw(model, new=7, end_ids=[VOCABULARY + 5])
    assert not open_rows.ended.any() and (open_rows.lengths == 7).all()
    last = open_rows.completion_ids[0, 6]
    closed = draw(model, new=7, end_ids=[int(last)])
    assert closed.ended[0] and closed.lengths[0] <= 7
    if int(last) not in open_rows.completion_ids[0, :6].tolist():
        assert closed.lengths[0] == 7


def test_all_rows_may_end_at_the_first_token():
    samples = draw(MODELS["mistral"], end_ids=list(range(VOCABULARY)))
    assert samples.ended.all() and samples.completion_ids.shape == (20, 1)
    assert torch.equal(samples.completion_mask, torch.ones(20, 1, dtype=torch.bool))


def test_a_padding_token_that_also_ends_completions_stays_inside_the_mask():
    """Qwen's base tokenizers pad with the end token: a mask made from ids would drop the end itself."""
    samples = draw(MODELS["qwen2"], group=64, end_ids=[0, 7])
    ended = [c for c in completions(samples) if c[-1] == 0]
    assert ended and all(c.count(0) == 1 for c in ended)


def test_end_ids_come_from_generation_config_tokenizer_and_recipe():
    tokenizer = make_tokenizer()
    names = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    own, start, end = names.values()

    def ids(listed, *extra):
        return end_token_ids(tokenizer, SimpleNamespace(eos_token_id=listed), extra)

    assert end_token_ids(tokenizer, None, []) == ids(None) == [own]
    assert ids(17) == sorted({own, 17})
    assert ids([17, start]) == sorted({own, 17, start})
    assert ids([17], "<|im_end|>") == sorted({own, 17, end})
    with pytest.raises(UserError, match=r"model\.end_tokens names a token .*\n.*<\|nothing\|>"):
        ids(None, "<|nothing|>")
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's: the end token was taken for an unknown one
    assert ids(None, "<|endoftext|>", "<|im_end|>") == sorted({own, end})
    with pytest.raises(UserError, match="nothing"):
        ids(None, "<|nothing|>")


def test_the_module_ends_completions_on_all_of_its_end_ids(model_folder, tmp_path):
    """Through the folder's own generation config, as a list, and the recipe's end_tokens."""
    import json
    import shutil

    from rlif_lightning.training.module import RLIFModule

    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    listed = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**listed, "eos_token_id": [11, 12]}))
    module = RLIFModule(str(folder), end_tokens=["<|im_end|>"])
    module.configure_model()
    chat_end = load_tokenizer(str(folder)).convert_tokens_to_ids("<|im_end|>")
    assert module.policy.end_ids == sorted({module.tokenizer.eos_token_id, 11, 12, chat_end})
    with pytest.raises(UserError, match="end_tokens"):
        RLIFModule(str(folder), end_tokens=["<|no_such|>"]).configure_model()


# -- batches never matter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2"])
@pytest.mark.parametrize("rows", [1, 4, 8, 13, 1000])
def test_batches_of_prompts_change_nothing(architecture, rows):
    model = MODELS[architecture]
    whole, batches = (draw(model, rows=r, top_k=100) for r in (None, rows))
    assert_same(whole, batches)
    assert torch.equal(whole.prompt_ids, batches.prompt_ids) and torch.equal(whole.prompt_mask, batches.prompt_mask)
    for i, prompt in enumerate(RAGGED):
        for g in range(4):
            mask = batches.prompt_mask[4 * i + g]
            assert batches.prompt_ids[4 * i + g, mask].tolist() == prompt and mask[-len(prompt) :].all()
    outside = ~batches.completion_mask
    assert (batches.completion_ids[outside] == 0).all() and (batches.kept_mass[outside] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropping_finished_rows_changes_nothing(architecture, monkeypatch):
    results, select = [], PreallocatedDecoder.select_rows
    for keep in (0.0, 0.9, 1.0):  # never, the default, after every token
        monkeypatch.setattr(NativeSampler, "DROP_BELOW", keep)
        sizes = []
        model = MODELS[architecture]
        with monkeypatch.context() as patch:
            patch.setattr(
                PreallocatedDecoder,
                "select_rows",
                lambda self, rows, s=sizes: (s.append(len(rows)), select(self, rows)),
            )
            results.append(draw(model))
        assert sizes[0] == 20 and (len(sizes) > 1) == (keep > 0)  # shared out to the groups, then dropped or not
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("prompts", [RAGGED, prompts_of(7, 7, 7)], ids=["ragged", "even"])
@pytest.mark.parametrize(
    "distribution", [{}, {"temperature": 0.0}, {"temperature": 0.7, "statistics_temperature": 1.3}]
)
def test_the_plain_decoder_draws_the_same(architecture, prompts, distribution, monkeypatch):
    got = draw(MODELS[architecture], prompts, **distribution)
    monkeypatch.setattr("rlif_lightning.sampling.native.decoder_for", PlainDecoder)
    assert_same(got, draw(MODELS[architecture], prompts, **distribution), atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_growing_caches_and_prompts_in_pieces_change_nothing(architecture, monkeypatch):
    from rlif_lightning.sampling import decoders, kv_cache

    expected = draw(MODELS[architecture])
    monkeypatch.setattr(kv_cache, "STEP", 1)
    monkeypatch.setattr(decoders, "PREFILL", 5)
    assert_same(draw(MODELS[architecture]), expected, atol=1e-4)


def test_known_architectures_are_decoded_layer_by_layer():
    kinds = {name: type(decoder_for(model)) for name, model in MODELS.items()}
    assert kinds == {
        "qwen2": LlamaDecoder,
        "qwen3": LlamaDecoder,
        "llama": LlamaDecoder,
        "gemma3": PreallocatedDecoder,
        "mistral": PreallocatedDecoder,  # its windows are left to the model
    }


@pytest.mark.parametrize("architecture", ["mistral", "qwen3"])
def test_a_completion_depends_on_its_own_seed_only(architecture):
    model, group = MODELS[architecture], 4
    seeds = completion_seeds(7, [(0, i) for i in range(len(RAGGED))], group)
    whole = completions(draw(model, seeds=seeds))
    assert len({tuple(c) for c in whole}) > 15  # different seeds, different texts
    for i, prompt in enumerate(RAGGED):  # alone, without the other prompts
        mine = slice(group * i, group * (i + 1))
        assert completions(draw(model, [prompt], seeds=seeds[mine])) == whole[mine]
    order = torch.tensor([2, 0, 3, 1])
    turned = draw(model, RAGGED[::-1], seeds=seeds.view(-1, group).flip(0)[:, order].flatten())
    flat = [whole[group * i + g] for i in reversed(range(len(RAGGED))) for g in order.tolist()]
    assert completions(turned) == flat
    longer = completions(draw(model, seeds=seeds, new=30))
    assert [c[:24] for c in longer] == whole  # a higher limit only continues
    changed = seeds.clone()
    changed[5] += 1
    other = completions(draw(model, seeds=changed))
    assert other[5] != whole[5] and other[:5] + other[6:] == whole[:5] + whole[6:]


def test_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    one = draw(MODELS["qwen2"])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert_same(one, draw(MODELS["qwen2"]), atol=0)


def test_progress_is_told_token_by_token():
    calls = []
    samples = draw(MODELS["qwen2"], new=24, progress=lambda t, of: calls.append((t, of)))
    width = samples.completion_ids.shape[1]
    assert calls == [(t, 24) for t in range(1, width + 1)]


def test_the_sampler_sees_the_current_weights():
    """Weights are used in place: a step of the optimiser shows in the next rollout, without a copy to forget."""
    model = make_model("qwen2", seed=3)
    sampler = sampler_of(model)
    distribution, seeds = Sampling(10), completion_seeds(0, [(0, 0)], 4)
    before = sampler.sample(RAGGED[:1], 4, seeds, distribution)
    with torch.no_grad():
        for p in model.model.layers[0].parameters():
            p.add_(0.05)
    sampler.update(model, END_IDS, 0)
    after = sampler.sample(RAGGED[:1], 4, seeds, distribution)
    assert (before.logprob[:, 0] - after.logprob[:, 0]).abs().max() > 1e-3
    completion = completions(after)[0]
    assert_stats_close(after, 0, token_stats(plain_logits(model, RAGGED[0], completion), torch.tensor(completion)))


def test_slices_of_samples_hold_their_rows():
    samples = draw(MODELS["qwen2"], top_k=50)
    index = samples.lengths.argsort()[:6]
    part = samples.rows(index)
    assert completions(part) == [completions(samples)[i] for i in index.tolist()]
    assert part.completion_ids.shape[1] == samples.lengths[index].max() < samples.completion_ids.shape[1]
    assert part.prompt_mask.any(0).all()
    for i, row in enumerate(index.tolist()):
        assert part.prompt_ids[i, part.prompt_mask[i]].tolist() == RAGGED[row // 4]
    mask = part.completion_mask
    whole = samples.completion_mask[index]
    for field in fields(samples):
        if field.name in ("logprob", "kept_mass"):
            assert torch.equal(getattr(part, field.name)[mask], getattr(samples, field.name)[index][whole])
    assert torch.equal(part.stats.entropy[mask], samples.stats.entropy[index][whole])
    with torch.no_grad():  # trimmed rows score as they did
        torch.testing.assert_close(
            token_stats(completion_logits(MODELS["qwen2"], part), part.completion_ids).logprob[mask],
            part.logprob[mask],
            atol=1e-4,
            rtol=0,
        )


# -- the check at load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_accepts_the_tested_architectures(architecture, dtype):
    model = make_model(architecture, initializer_range=0.05).to(dtype)
    check_decoding(model, [0], 0)
    if dtype == torch.float32:
        assert decoding_error(MODELS[architecture], [0], 0) < 1e-4


def test_the_check_refuses_wrong_positions(monkeypatch):
    """Every token of the prompt at one position."""
    from rlif_lightning.sampling import decoders

    monkeypatch.setattr(decoders, "positions", lambda mask: torch.zeros_like(mask, dtype=torch.long))
    with pytest.raises(UserError, match=r"(?s)'llama' differently .*nats.*expected: at most 0.001.*Qwen2"):
        check_decoding(MODELS["llama"], [0], 0)


def test_the_check_refuses_a_mask_that_is_not_heard(monkeypatch):
    """A model that ignores the attention mask sees the padding."""
    model = make_model("qwen2")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda attention_mask, **rest: forward(**rest))
    with pytest.raises(UserError, match="'qwen2'"):
        check_decoding(model, [0], 0)


def test_the_check_refuses_a_model_without_such_a_cache():
    from transformers import AutoModelForCausalLM, MambaConfig

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="'mamba'"):
        check_decoding(model, [0], 0)


def test_diverged_weights_are_named(tmp_path):
    """NaN logits used to end in an index error of the token search."""
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    sampler = NativeSampler()
    sampler.update(model, [0], 0)
    with pytest.raises(UserError, match="diverged"):
        sampler.sample([[3, 4]], 2, torch.arange(2), Sampling(4))


def test_the_check_runs_under_another_default_device():
    """Lightning loads models under `with device:`, where a CPU generator met a factory call of the GPU."""
    from rlif_lightning.sampling.token_sampling import uniforms

    model = make_model()
    expected = uniforms(torch.arange(3), 5)
    with torch.device("meta"):
        assert uniforms(torch.arange(3, device="cpu"), 5).equal(expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert uniforms(torch.arange(3), 5).equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)
    drawn = []
    original = torch.randint

    def on_the_cpu(*args, **kwargs):
        drawn.append(kwargs.get("device"))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", on_the_cpu)
        check_decoding(model, [0], 0)
    assert drawn and set(drawn) == {"cpu"}


def test_the_memory_of_a_cache_is_known(monkeypatch):
    """What is said to be needed is what a layer holds; prompts that do not fit at once come in batches."""
    from rlif_lightning.sampling import kv_cache, native

    for model in MODELS.values():
        decoder = PreallocatedDecoder(model)
        decoder.prefill(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
        held = sum(x[:, :, :3].nbytes for layer in decoder.cache.layers for x in (layer.keys, layer.values))
        assert held == 3 * kv_cache.bytes_per_token(model.config, torch.float32)
    model, batches = MODELS["qwen2"], []
    expected = draw(model)
    batch = NativeSampler._draw_batch
    monkeypatch.setattr(
        NativeSampler, "_draw_batch", lambda self, ids, *rest: (batches.append(len(ids)), batch(self, ids, *rest))[1]
    )
    row = (26 + 24) * kv_cache.bytes_per_token(model.config, torch.float32)
    monkeypatch.setattr(native, "free_memory", lambda device: 2 * 9 * row)  # half of it: nine rows, two groups of 4
    assert_same(draw(model), expected)
    assert batches == [2, 2, 1]


def test_under_autocast_keys_take_no_more_memory_than_values(model_folder):
    from rlif_lightning.sampling.decoders import PreallocatedDecoder
    from tests.conftest import load_model

    policy = load_model(str(model_folder("qwen2")))
    ids = torch.randint(20, (2, 5))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder = PreallocatedDecoder(policy)
        decoder.prefill(ids, torch.ones_like(ids, dtype=torch.bool))
        decoder.step(ids[:, 0])
    assert {x.dtype for layer in decoder.cache.layers for x in (layer.keys, layer.values)} == {torch.bfloat16}
