"""A mixture as an ordinary Hugging Face folder."""

import json
from dataclasses import asdict
from pathlib import Path

from rlif_lightning.errors import UserError
from rlif_lightning.mixing.weights import Pair, mix
from rlif_lightning.models.policy import Policy
from rlif_lightning.runs.atomic import replacing_folder

NOTE = "mix.json"  # in the folder: what it was mixed from


def save_mix(pair: Pair, ratio: float, folder: Path) -> Path:
    """Mix into a folder: safetensors, the base's tokenizer, both ends' end tokens; returns the folder.

    It appears complete or not at all; one that holds this very mixture already is left as it is.
    """
    note = {**asdict(pair), "ratio": ratio}
    if folder.exists():
        found = folder / NOTE
        if not found.is_file() or json.loads(found.read_text(encoding="utf-8")) != note:
            raise UserError("The folder for a mixed model holds something else", got=folder, do="give another one")
        return folder
    policy = mix(pair, ratio)
    try:
        with replacing_folder(folder) as unfinished:
            _save(policy, unfinished)
            (unfinished / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        do = "give another folder"
        raise UserError("A mixed model cannot be written", got=f"{folder}: {error}", do=do) from error
    return folder


def _save(policy: Policy, folder: Path) -> None:
    # Rollouts do not use the sampling settings, and save_pretrained refuses them without do_sample.
    unused = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))
    policy.model.generation_config.update(**unused, do_sample=False, eos_token_id=policy.end_ids)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
