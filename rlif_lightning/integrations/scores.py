"""What a language model says of completions that somebody else made. No Lightning here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import index
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlif_lightning.errors import UserError, said_by_python
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.functional.token_stats import Statistic, TokenStats, token_logprobs
from rlif_lightning.models.loading import PolicySettings, load_model
from rlif_lightning.models.references import ANNOTATORS
from rlif_lightning.models.scoring import DECODERS, FAILURES, CompletionScores, tolerance
from rlif_lightning.models.tokenizer import end_token_ids, load_tokenizer
from rlif_lightning.rewards.base import Reward, statistics_of
from rlif_lightning.rollout import Rollout, Samples, pad_left

Text = str | Sequence[int] | Sequence[Mapping[str, Any]]  # a text, its token ids, or messages for the chat template


@dataclass(frozen=True)
class Scores:
    """N completions under a model; means are over the tokens of a completion."""

    rollout: Rollout  # all that a reward may ask for: ``SelfCertainty()(scores.rollout)`` is [N]

    @property
    def tokens(self) -> TokenStats:
        """Statistics of each token [N, T] in nats, 0 behind a completion's last."""
        return self.rollout.statistics()

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion [N]; times a mean it is the sum."""
        return self.rollout.samples.lengths

    @property
    def logprob(self) -> Tensor:
        """Mean log-probability [N] in nats, at most 0."""
        return self.tokens.logprob.sum(1) / self.lengths

    @property
    def entropy(self) -> Tensor:
        """Mean entropy [N] of the next-token distributions in nats, from 0 to log V."""
        return self.tokens.entropy.sum(1) / self.lengths

    @property
    def self_certainty(self) -> Tensor:
        """Mean KL(U || p) [N] in nats, at least 0; see :func:`rlif_lightning.functional.token_stats.token_stats`."""
        return self.tokens.self_certainty.sum(1) / self.lengths

    @property
    def rewards(self) -> dict[str, Tensor]:
        """The rewards that were asked for [N], by name."""
        return self.rollout.rewards


def score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    completions: Sequence[str | Sequence[int]],
    *,
    rewards: Sequence[Reward] = (),
    reference: nn.Module | None = None,
    temperature: float = 1.0,
    group_size: int = 1,
    batch_size: int = 16,
) -> Scores:
    """Score completions under a causal language model of Hugging Face.

    The model is put back as it was; dropout is off meanwhile, and nothing has a gradient. A completion is scored as
    it stands: its end token only counts if it is there.

    Args:
        model: Loaded, on any device and in any dtype; or a folder, a hub name or ``toy``, in float32 on the CPU.
        tokenizer: Loaded, or by name; None for that of a model given by name, or where all texts are token ids.
        prompts: N texts, lists of token ids, or conversations for the chat template.
        completions: N texts or lists of token ids.
        rewards: What to compute as well. A statistic of your own is only taken if its reward stands here.
        reference: A second model of the same vocabulary, for rewards whose annotator is ``reference``.
        temperature: Divides the logits first.
        group_size: Completions of one prompt that stand next to each other, for rewards that compare them.
        batch_size: Completions that go through the model together. More takes more memory.

    Raises:
        UserError: The lists do not match, a text is empty or too long for the model, the tokenizer is missing or
            another model's, a reward needs what is not given, or the architecture can't be scored.
    """
    for name, size, whole in (("batch_size", batch_size, 0), ("group_size", group_size, len(completions))):
        if size < 1 or whole % size:
            expected = f"a divisor of the {whole} completions" if whole else "1 or more"
            raise UserError(f"{name} does not fit", got=size, expected=expected)
    names = [reward.name for reward in rewards]
    if len({*names}) < len(names):
        raise UserError("Two rewards have one name", got=", ".join(names), do="score them one after the other")
    for reward in rewards:
        lacking = ", ".join(reward.requires - (set() if reference is None else {ANNOTATORS["frozen"]}))
        if lacking:
            do = "give the reference" if lacking == ANNOTATORS["frozen"] else "choose another reward"
            raise UserError(f"The reward {reward.class_path} lacks something here", got=lacking, do=do)
    if isinstance(model, str):
        tokenizer = tokenizer or model
        model = load_model(PolicySettings(model), torch.float32, None, torch.device("cpu"))
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    samples = samples_of(model, tokenizer, prompts, completions)
    how = (temperature, statistics_of(rewards), batch_size)
    for each in (model, reference):
        if each is not None:
            check_forward(each, samples)
    stats = stats_of(model, samples, *how)
    annotations = {} if reference is None else {"reference": stats_of(reference, samples, *how)}
    samples = replace(samples, logprob=stats.logprob, stats=stats)
    texts = [] if tokenizer is None else samples.texts(lambda x: tokenizer.batch_decode(x, skip_special_tokens=True))
    seeds = completion_seeds(0, [(row,) for row in range(len(completions))], 1)
    rollout = Rollout(samples, group_size, temperature, seeds, texts, annotations=annotations)
    return Scores(replace(rollout, rewards={reward.name: reward(rollout) for reward in rewards}))


def samples_of(
    model: Any, tokenizer: Any, prompts: Sequence[Text], completions: Sequence[str | Sequence[int]], **template: Any
) -> Samples:
    """Prompts and completions as tensors on the model's device, without statistics; errors as :func:`score`.

    ``template`` goes to the chat template of conversations.
    """
    if isinstance(prompts, str) or isinstance(completions, str):
        raise UserError("Prompts and completions are lists of texts", got="a text", do="write [prompt], [completion]")
    if not 0 < len(prompts) == len(completions):
        got, expected = f"{len(prompts)} prompts, {len(completions)} completions", "as many of both, 1 or more"
        raise UserError("Each completion needs its prompt", got=got, expected=expected)
    before = [token_ids(tokenizer, text, True, **template) for text in prompts]
    after = [token_ids(tokenizer, text, False) for text in completions]
    embedding, config = model.get_input_embeddings().weight, model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    for row, (first, second) in enumerate(zip(before, after, strict=True)):
        if not first or not second:
            do = "give the prompt at least one token, which the first one of the completion follows"
            do = do if second else "leave the completion out"
            raise UserError(f"The {'completion' if first else 'prompt'} of row {row} has no tokens", do=do)
        if not 0 <= min(first + second) <= max(first + second) < len(embedding):
            got, expected = f"token {max(first + second)} in row {row}", f"ids from 0 to {len(embedding) - 1}"
            raise UserError("The tokens do not belong to the model", got=got, expected=expected)
        if most is not None and len(first) + len(second) > most:
            got = f"{len(first)} + {len(second)} tokens in row {row}"
            wrong = "Prompt and completion are longer than the positions of the model (max_position_embeddings)"
            raise UserError(wrong, got=got, expected=f"at most {most} in all")
    device = embedding.device
    ids = pad_sequence([torch.tensor(x, device=device) for x in after], batch_first=True)
    mask = pad_sequence([torch.ones(len(x), dtype=torch.bool, device=device) for x in after], batch_first=True)
    ends = end_token_ids(tokenizer, getattr(model, "generation_config", None), ())
    ended = torch.tensor([x[-1] in ends for x in after], device=device)
    return Samples(*pad_left(before, 0, device), ids, mask, ended)


def token_ids(tokenizer: Any, text: Text, prompt: bool, **template: Any) -> list[int]:
    """The token ids of a text; a prompt gets the tokenizer's special tokens, or the chat template's."""
    first: Any = next(iter(text), None)
    if tokenizer is None and isinstance(first, str | Mapping):
        raise UserError("Texts need a tokenizer", got="None", do="give the model's tokenizer, or token ids")
    if isinstance(text, str):
        return list(tokenizer(text, add_special_tokens=prompt)["input_ids"]) if tokenizer else []
    if prompt and isinstance(first, Mapping):
        found = tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=True, **template)
        return list(found["input_ids"])
    return [index(token) for token in cast(Sequence[int], text)]


def stats_of(
    model: nn.Module, samples: Samples, temperature: float, statistics: Mapping[str, Statistic], batch_size: int
) -> TokenStats:
    """Statistics [N, T] of the completions under a model, in nats, 0 behind each one's last token."""
    stats = TokenStats.zeros(samples.completion_ids.shape, statistics, samples.completion_ids.device)
    with evaluating(model):
        for rows in torch.arange(len(samples.completion_ids)).split(batch_size):
            part = samples.rows(rows)
            # The head is called, not its weight multiplied: whoever lent the model may have changed its forward.
            found = CompletionScores(model, part, head_weight_only=False).stats(temperature, statistics)
            for store, values in zip(stats.tensors, found.tensors, strict=True):
                store[rows, : part.completion_ids.shape[1]] = values.to(store.dtype)
    return stats


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and gradients off, until each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def check_forward(model: Any, samples: Samples) -> None:
    """Refuse a model that is more than a body and a head, or that reads padding: its scores would be wrong.

    The row with the shortest prompt, padded and its prompt shared, against the model's own forward.
    """
    lengths = samples.prompt_mask.sum(1)
    short, kind = int(lengths.argmin()), model.config.model_type
    one = samples.rows(torch.tensor([short]))
    three = samples.rows(torch.tensor([short, short, int(lengths.argmax())]))
    ids, start = torch.cat([one.prompt_ids, one.completion_ids], 1), one.prompt_ids.shape[1] - 1
    try:
        with evaluating(model):
            plain = token_logprobs(model(input_ids=ids, use_cache=False).logits[:, start:-1], one.completion_ids)
            ours = CompletionScores(model, three, head_weight_only=False).logprobs(1.0)[0, : ids.shape[1] - start - 1]
    except FAILURES as error:
        raise UserError(f"'{kind}' can't be scored", got=said_by_python(error), expected=DECODERS) from error
    off = float((plain - ours).abs().max())
    if not off <= tolerance(model):
        got = f"log-probabilities off by {off:.3g} nats"
        raise UserError(f"'{kind}' is scored differently from its own forward", got=got)
