"""Whose weights a checkpoint holds: in those of a Trainer, and in the guard's files."""

import pytest
import torch

from rlif_lightning.errors import UserError
from rlif_lightning.models.checkpoints import identity_of, read_checkpoint, weights_of
from rlif_lightning.models.identity import Identity
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy
from rlif_lightning.models.trainable import save_trainable, trainable

LORA = {"r": 4, "target_modules": ["q_proj"]}
OWN = Identity("toy", "abc", LORA, "someone/adapter", "def", "nf4")


def test_texts_say_the_same():
    facts = OWN.to_facts()
    assert facts["model"] == "toy" and facts["lora"] == '{"r": 4, "target_modules": ["q_proj"]}'
    assert Identity.from_facts({**facts, "step": "3", "rollout/entropy": "nan"}) == OWN


def test_a_checkpoint_says_whose_it_is():
    assert identity_of({"rlif": {**vars(OWN), "versions": {}}}) == OWN
    with pytest.raises(UserError, match="not written by rlif_lightning"):
        identity_of({"state_dict": {}})


@pytest.mark.parametrize("prefix", ["model.", "policy."])
def test_weights_have_the_names_of_the_model(prefix):
    """A decoder's own name begins with `model.` as well."""
    names = ["model.layers.0.mlp.weight", "lm_head.weight", "base_model.model.model.layers.0.lora_A.weight"]
    stored = {"state_dict": {prefix + name: torch.zeros(1) for name in names}}
    assert list(weights_of(stored)) == names


def test_a_policy_takes_its_own_weights_and_no_others(model_folder, tmp_path):
    settings = PolicySettings(str(model_folder()), lora={**LORA, "init_lora_weights": False})
    policy, other = Policy.load(settings), Policy.load(settings)
    path = tmp_path / "step=3.safetensors"
    save_trainable(trainable(policy.model), path, step=3, **policy.identity.to_facts())
    other.restore(read_checkpoint(path))
    for own, weight in zip(trainable(policy.model).values(), trainable(other.model).values(), strict=True):
        assert torch.equal(own, weight)
    for changed in (LORA, None):
        with pytest.raises(UserError, match="other trainable weights"):
            Policy.load(PolicySettings(settings.name, lora=changed and {"r": 2})).restore(read_checkpoint(path))
    with pytest.raises(UserError, match="belongs to another model"):
        Policy.load(PolicySettings(str(model_folder(seed=1)), lora=LORA)).restore(read_checkpoint(path))
