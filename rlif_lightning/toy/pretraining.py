"""Pre-training of the toy base model: tokenizer, weights and a plain training loop."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm

from rlif_lightning.errors import UserError
from rlif_lightning.toy import arithmetic, recipe
from rlif_lightning.toy.problems import draw_document
from rlif_lightning.toy.recipe import BOS, EOS, PAD, PROMPT_END, VOCABULARY, Phase
from rlif_lightning.warnings_shown import no_bar

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_IDS: dict[str, Any] = {f"{name}_token_id": VOCABULARY[f"<{name}>"] for name in ("pad", "bos", "eos")}


def build_toy(
    folder: Path,
    phases: Sequence[Phase],
    seed: int,
    *,
    task: Any = arithmetic,
    base: Path | None = None,
    progress: bool = True,
) -> None:
    """Train a toy by some phases, and save it in an existing folder as a Hugging Face model.

    The result depends on the arguments alone; the caller's random state, threads, default device and dtype are left
    as they were. It is the same bit for bit on one kind of machine and one version of torch only. ``base`` is the
    folder of a model to continue, in place of random weights; ``task`` is as in ``problems``.
    """
    from transformers import GenerationConfig

    with _isolated():
        model = untrained_model(seed)
        if base is not None:
            model.load_state_dict(load_file(base / "model.safetensors"))
        for phase in phases:
            _train(model, phase, seed, task, progress)
        model.generation_config = GenerationConfig(**SPECIAL_IDS)
        with no_bar():
            model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


@torch.no_grad()
def untrained_model(seed: int) -> "LlamaForCausalLM":
    """Every matrix is drawn under a generator of our own; the norms are at one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": len(VOCABULARY), "max_position_embeddings": recipe.MAX_LENGTH}
    config = LlamaConfig(dtype="float32", use_cache=True, **sizes, **SPECIAL_IDS, **recipe.ARCHITECTURE)
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(seed)
    stds = {"model.embed_tokens.weight": recipe.EMBEDDING_STD, "lm_head.weight": recipe.HEAD_STD}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = stds.get(name, recipe.FAN_IN_GAIN / math.sqrt(parameter.shape[1]))
            parameter.normal_(std=std, generator=generator)
    return model


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character; a beginning-of-sequence token is added in front, nothing at the end.

    Characters outside the vocabulary read as ``?``, the toy's "I don't know".
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    start = [(BOS, VOCABULARY[BOS])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=start)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=recipe.MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def draw_batch(phase: Phase, rng: random.Random, task: Any = arithmetic) -> tuple[Tensor, Tensor]:
    """Draw token ids and labels [documents, tokens] of a phase's corpus, padded on the right.

    Labels are -100 in prompts and padding, where no loss is taken.
    """
    rows, labels = [], []
    for _ in range(recipe.BATCH_SIZE):
        question, solution = draw_document(phase.styles, phase.slip, rng, task)
        prompt = [VOCABULARY[token] for token in (BOS, *question, PROMPT_END)]
        completion = [VOCABULARY[token] for token in (*solution, EOS)]
        rows.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([-100] * len(prompt) + completion))
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(rows, padding_value=VOCABULARY[PAD]), pad(labels, padding_value=-100)


def _train(model: "LlamaForCausalLM", phase: Phase, seed: int, task: Any, progress: bool) -> None:
    rng = random.Random(f"{phase.name} corpus {seed}")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.lr, betas=recipe.BETAS, weight_decay=recipe.WEIGHT_DECAY, fused=True
    )
    running, goal = math.inf, phase.until_loss
    with tqdm(
        total=phase.steps if goal is None else None,  # a cap is no estimate: without a total the bar counts up
        desc=f"Building the toy model, once: {phase.name}",
        unit=" steps",
        disable=not progress,
    ) as bar:
        for step in range(phase.steps):
            optimizer.param_groups[0]["lr"] = phase.lr * _schedule(step, phase)
            ids, labels = draw_batch(phase, rng, task)
            # Causal attention and padding on the right: no mask is needed.
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.MAX_GRAD_NORM)
            optimizer.step()
            decay = recipe.LOSS_DECAY
            running = decay * running + (1 - decay) * loss.item() if step else loss.item()
            bar.update()
            bar.set_postfix_str(
                f"loss {running:.3f}" + (f" (until {goal}, after a plateau)" if goal else ""), refresh=False
            )
            if goal is not None and running < goal:
                return
    if goal is not None:
        raise UserError(
            f"The toy base model of seed {seed} did not learn its task.",
            got=f"loss {running:.3f} after {phase.steps} steps",
            expected=f"loss below {goal}",
            do=f"take another seed, such as {seed + 1}; if that fails too, please report it",
        )


def _schedule(step: int, phase: Phase) -> float:
    """Linear warm-up times a cosine from 1 to ``final_lr``."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / phase.steps))
    return min(1.0, (step + 1) / recipe.WARMUP) * (phase.final_lr + (1 - phase.final_lr) * cosine)


@contextmanager
def _isolated() -> Iterator[None]:
    """A fixed numerical environment, whatever the caller has set up, and the caller's own again afterwards.

    One thread, because the number of threads decides the order of summation; Lightning may have set a default
    device or dtype around the loading of a model, or be in inference mode.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
