"""Small random-weight models with real tokenizers, small data, and the command line in-process."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import draw_blank

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # tiny models: more threads only wait for each other

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether? She sold 48 / 2 = 24 clips in May, 72 in all.",
    r"The answer is \boxed{72}. Solve for $x$: $\frac{1}{2} x = 36$.",
]
ARCHITECTURES = ("qwen2", "qwen3", "llama", "gemma3", "mistral")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ever written to the user's home; the built toy is shared by the session."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "rlif-cache"  # one for all processes
    monkeypatch.setenv("RLIF_CACHE", os.environ.get("RLIF_TEST_CACHE", str(root)))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw the curves at the end of a tiny fit takes longer than the fit; what is about them is marked."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("rlif_lightning.runs.curves.draw_curves", draw_blank)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests first: one that starts last would be waited for by the other processes."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True, scope="session")
def signals_are_taken() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would the commands that tests start."""
    for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if getattr(signal, name, None) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
            signal.signal(getattr(signal, name), default)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A strategy that is set up in this process names a port to those that come after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def load_model(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The weights of a policy.

    Args:
        name: Of the model.
        dtype: Of frozen weights.
        settings: Others of ``PolicySettings``.
    """
    from rlif_lightning.models.loading import PolicySettings
    from rlif_lightning.models.policy import Policy

    return Policy.load(PolicySettings(name, **settings), dtype=dtype).model


def completion_logits(model: Any, samples: Any) -> torch.Tensor:
    """Logits [N, T, V] that predict each completion token, by Hugging Face's own forward."""
    from rlif_lightning.models.scoring import positions

    ids = torch.cat([samples.prompt_ids, samples.completion_ids], 1)  # [N, L+T]
    mask = torch.cat([samples.prompt_mask, samples.completion_mask], 1)
    start = samples.prompt_ids.shape[1] - 1  # the last prompt token predicts the first completion token
    # Indices, not a number: with a number the head gets a view, which torch multiplies by another kernel where
    # the head is frozen, and the divergence from a frozen copy would not start at exactly 0.
    keep = torch.arange(start, ids.shape[1] - 1, device=ids.device)
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions(mask),
        use_cache=False,
        logits_to_keep=keep,
    )
    return out.logits


def make_tokenizer(chat_template: str | None = None) -> Any:
    """A byte-level BPE tokenizer as Qwen's are: no BOS, an end token, a chat end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:],
        chat_template=chat_template,
    )


def make_config(architecture: str, vocab_size: int, **changes: Any) -> Any:
    """A tiny configuration of a tested architecture; sliding windows are small enough to matter."""
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    own: dict[str, tuple[Any, dict[str, Any]]] = {
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 8}),
        "llama": (LlamaConfig, {}),
        "gemma3": (Gemma3TextConfig, {"head_dim": 8, "sliding_window": 8}),
        "mistral": (MistralConfig, {"sliding_window": 8}),
    }
    cls, special = own[architecture]
    return cls(**{**common, **special, **changes})


def make_model(architecture: str = "qwen2", vocab_size: int = 320, seed: int = 0, **changes: Any) -> Any:
    """A random-weight model in eval mode."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(make_config(architecture, vocab_size, **changes)).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model_folder("qwen2", chat=True)``: an ordinary Hugging Face folder, made once per session."""
    made: dict[Any, Path] = {}

    def make(architecture: str = "qwen2", chat: bool = False, seed: int = 0) -> Path:
        key = (architecture, chat, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-{chat}-{seed}") / "model"
            tokenizer = make_tokenizer(CHAT_TEMPLATE if chat else None)
            make_model(architecture, len(tokenizer), seed).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def problems_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty problems in GSM8K's format."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [
        {"question": f"What is {i} + {3 * i % 7}?", "answer": f"It is <<{i}>>.\n#### {i + 3 * i % 7}"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def rlif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``rlif("fit", ...)``: run a command in-process in a folder of its own; returns that folder."""
    from rlif_lightning.main import main

    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Path:
        main([str(a) for a in args])
        return tmp_path

    return run


@pytest.fixture
def small_fit(model_folder: Callable[..., Path], problems_file: Path) -> list[str]:
    """Arguments of a fit that takes a second or two: tiny Qwen2, GSM8K format, 2 prompts x 4 completions."""
    return [
        "--model.name", str(model_folder()),
        "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.003",
        "--model.kl_coefficient=0.01",
        "--data.train.path", str(problems_file), "--data.train.gold", r"[#]{4}\s*(.+)",
        "--data.answers.completion=last_number",
        "--data.template={prompt} ",
        "--rollout.prompts_per_step=2", "--rollout.group_size=4", "--rollout.max_new_tokens=8",
        "--evaluation.max_new_tokens=8",
        "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.gradient_clip_val=1.0",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
