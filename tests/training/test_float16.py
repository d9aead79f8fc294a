"""Training in float16 with a gradient scaler, which needs no GPU to be tested."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from rlif_lightning.errors import UserError
from rlif_lightning.training.slice_loss import slice_loss
from tests.short_runs import fit

LORA = {"lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, "kl_coefficient": 0.05}


def float16(scale=2.0**16):
    """A Trainer on a CPU takes bfloat16 instead of it, unless it gets the plugin itself."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]}


class Step(pl.Callback):
    """The slices of a step, and its gradient before it is clipped."""

    def on_train_start(self, trainer, module):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(dict(batch))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.grads = {n: p.grad.clone() for n, p in module.policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", [LORA, {"kl_coefficient": 0.05}, {"loss": "gspo"}], ids=["lora", "full", "gspo"])
def test_a_gradient_is_that_of_float32(model, model_folder, problems_file):
    step = Step()
    run = fit(model_folder(), problems_file, model, trainer=float16(), callbacks=[step], steps=1)
    assert run.trainer.precision == "16-mixed"
    dtypes = {p.dtype for p in run.module.policy.model.parameters() if not p.requires_grad}
    assert dtypes == ({torch.float16} if "lora" in model else set())
    assert run.column("train/kl") == ([0] if "kl_coefficient" in model else [])
    assert run.column("train/ratio_mean") == pytest.approx([1], abs=2e-3)
    assert run.column("train/skipped_steps") == [0] and run.column("train/loss_scale") == [2.0**16]
    policy = run.start.float()
    for batch in step.batches:
        slice_loss(policy, batch["rollout"], batch["denominator"], None, run.module.loss).loss.backward()
    want = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert want.keys() == step.grads.keys()
    got, want = (torch.cat([x[n].flatten() for n in sorted(x)]) for x in (step.grads, want))
    assert (got - want).norm() < 0.02 * want.norm()


def test_frozen_weights_in_4_bits_multiply_in_float16(model_folder, problems_file):
    run = fit(model_folder(), problems_file, {**LORA, "quantization": "nf4"}, trainer=float16())
    layers = [m for m in run.module.policy.model.modules() if hasattr(m, "compute_dtype")]
    assert layers and {m.compute_dtype for m in layers} == {torch.float16}
    assert run.column("train/kl")[0] == 0 and run.column("train/skipped_steps") == [0, 0]


def test_an_overflow_halves_the_scale_and_is_counted(model_folder, problems_file):
    """From a scale that overflows in any case; more skipped steps in a row than end a run in float32."""
    run = fit(model_folder(), problems_file, LORA, trainer=float16(2.0**40), steps=24)
    skipped, scales = run.column("train/skipped_steps"), run.column("train/loss_scale")
    assert 3 < skipped[-1] < 24 and skipped[:3] == [1, 2, 3]
    for i in range(1, 24):
        assert scales[i] == 2.0 ** (40 - skipped[i - 1])


def test_a_gradient_that_is_not_finite_at_any_scale_ends_the_run(model_folder, problems_file):
    model = {**LORA, "kl_coefficient": 1e38}
    with pytest.raises(UserError, match="steps in a row had a gradient that is not finite"):
        fit(model_folder(), problems_file, model, trainer=float16(4.0), optimizer=sgd, steps=30)


def test_a_run_goes_on_with_its_scale(model_folder, problems_file, tmp_path):
    whole, parts = [], []
    for parts_of_it, steps in ((whole, [4]), (parts, [2, 4])):
        resume = None
        for last in steps:
            keep = ModelCheckpoint(tmp_path / f"{len(steps)}", save_last=True, every_n_train_steps=1, save_top_k=0)
            trainer = {**float16(2.0**40), "enable_checkpointing": True}
            settings = {"trainer": trainer, "callbacks": [keep], "steps": last, "resume": resume}
            run = fit(model_folder(), problems_file, LORA, **settings)
            parts_of_it += run.column("train/loss_scale")
            resume = tmp_path / f"{len(steps)}" / "last.ckpt"
    assert parts == whole == [2.0**40, 2.0**39, 2.0**38, 2.0**37]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-3)
