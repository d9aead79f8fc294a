"""The longest batch, tried before the first step: it leaves no trace, and says what to change where it fails."""

import copy
import re
from contextlib import contextmanager

import pytest
import torch

from rlif_lightning.callbacks import MemoryCheck, memory_check
from rlif_lightning.errors import UserError
from rlif_lightning.models.policy import Policy
from rlif_lightning.sampling import NativeSampler
from rlif_lightning.sampling.llama_decoder import LlamaDecoder
from rlif_lightning.training.module import RLIFModule
from tests.short_runs import fit

LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.2}


@pytest.mark.parametrize(
    ("model", "rollout"),
    [
        ({"kl_coefficient": 0.01}, {"micro_batch_size": 4}),
        ({"lora": LORA, "kl_coefficient": 0.01}, {"micro_batch_size": 2}),
        ({"gradient_checkpointing": True, "loss": "gspo"}, {"passes": 2}),
    ],
)
def test_run_is_the_same_bit_for_bit(model, rollout, model_folder, problems_file):
    folder = model_folder()
    runs = [fit(folder, problems_file, model, rollout, callbacks=[MemoryCheck(action)]) for action in ("off", "try")]
    for name, weight in runs[0].weights().items():
        assert torch.equal(weight, runs[1].weights()[name]), name
    for name in ("train/loss", "train/ratio_mean", "rollout/reward"):
        assert runs[0].column(name) == runs[1].column(name)


def test_tries_what_is_longest(model_folder, problems_file, monkeypatch):
    """A full slice twice, since gradients of the first are there in the second; the last token of a full wave."""
    seen, decoded = [], []
    step, decode = RLIFModule.training_step, LlamaDecoder.step

    def training_step(self, batch, batch_idx):
        samples = batch["rollout"].samples
        seen.append((tuple(samples.completion_mask.shape), int(samples.completion_mask.sum()),
                     samples.prompt_ids.shape[1], any(p.grad is not None for p in self.parameters())))  # fmt: skip
        return step(self, batch, batch_idx)

    def decoder_step(self, token):
        logits = decode(self, token)
        decoded.append((len(token), self.cache.get_seq_length()))
        return logits

    monkeypatch.setattr(RLIFModule, "training_step", training_step)
    monkeypatch.setattr(LlamaDecoder, "step", decoder_step)
    probed = {}

    class After(MemoryCheck):
        def on_train_start(self, trainer, pl_module):
            seen.clear(), decoded.clear()
            super().on_train_start(trainer, pl_module)
            probed.update(seen=[*seen], decoded=[*decoded], left=[p.grad for p in pl_module.parameters()])
            lengths = [len(p.ids) for p in trainer.datamodule.prompts["train"]]
            probed["longest"] = max(lengths)

    rollout = {"micro_batch_size": 4, "sampler": NativeSampler(rows=4)}
    fit(model_folder(), problems_file, rollout=rollout, callbacks=[After("try")], steps=1)
    longest = probed["longest"]
    assert probed["seen"] == [((4, 12), 48, longest, False), ((4, 12), 48, longest, True)]
    assert probed["decoded"] == [(4, longest + 11)]  # the last token needs no step of its own
    assert all(g is None for g in probed["left"])


def test_samples_from_the_gathered_module(model_folder, problems_file, monkeypatch):
    """Where weights are shared out the rollout has a module of its own."""
    made, decoded = [], []
    own, last = Policy.inference, NativeSampler.sample_last_token

    @contextmanager
    def inference(self):
        with own(self) as policy:
            made.append(copy.deepcopy(policy))
            yield made[-1]

    monkeypatch.setattr(Policy, "inference", inference)
    monkeypatch.setattr(
        NativeSampler, "sample_last_token", lambda self, *args: decoded.append(self.policy) or last(self, *args)
    )
    fit(model_folder(), problems_file, callbacks=[MemoryCheck("try")], steps=1)
    assert len(decoded) == 1 and decoded[0] is made[0]


@pytest.mark.parametrize(
    ("method", "phase"), [("_sample", "rollout"), ("_refer", "reference"), ("_update", "update")]
)
def test_out_of_memory_names_phase_and_settings(method, phase, model_folder, problems_file, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(memory_check, method, fails)
    with pytest.raises(UserError) as caught:
        fit(model_folder(), problems_file, callbacks=[MemoryCheck("try")])
    text = str(caught.value)
    assert f"phase '{phase}'" in text and "Tried to allocate 2.00 GiB" in text and "rlif plan expects" in text
    assert "--rollout.micro_batch_size" in text


def test_out_of_memory_is_told_where_nothing_can_be_planned(model_folder, problems_file, monkeypatch):
    def ran_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def fails(*_):
        raise NotImplementedError("this operation has no fake")

    monkeypatch.setattr(memory_check, "_update", ran_out)
    monkeypatch.setattr(memory_check, "memory", fails)
    with pytest.raises(UserError, match=r"phase 'update'(.|\n)*--rollout.micro_batch_size") as caught:
        fit(model_folder(), problems_file, callbacks=[MemoryCheck("try")])
    assert "rlif plan expects" not in str(caught.value)


@pytest.mark.parametrize("action", ["auto", "off"])
def test_nothing_is_tried_on_a_cpu_unless_asked_for(action, model_folder, problems_file, monkeypatch):
    monkeypatch.setattr(memory_check, "try_longest", lambda *_: pytest.fail("tried"))
    fit(model_folder(), problems_file, callbacks=[MemoryCheck(action)], steps=1)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"), "20.00 MiB"),
        (MemoryError(), "MemoryError"),
        (None, "can't allocate memory|not enough memory"),  # what torch itself says on a CPU
        (RuntimeError("Storage size calculation overflowed with sizes=[99]"), "overflowed"),
    ],
)
def test_later_out_of_memory_is_a_message(raised, told, rlif, small_fit, monkeypatch, capsys):
    def fails(self, *_):
        if raised is None:
            torch.empty(2**58)
        raise raised

    monkeypatch.setattr(RLIFModule, "training_step", fails)
    with pytest.raises(SystemExit) as caught:
        rlif("fit", *small_fit)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "memory ran out" in error and re.search(told, error) and "--rollout.micro_batch_size" in error
