"""One export from the beginning to the end: load, write, read again, compare."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rlif_lightning.callbacks.evaluation import versions
from rlif_lightning.cli.recipe_objects import RecipeObjects
from rlif_lightning.commands.export_cli import ExportCLI
from rlif_lightning.data.problems import Problem
from rlif_lightning.errors import UserError
from rlif_lightning.exporting.card import Export, base_label, model_card
from rlif_lightning.exporting.folder import check_target, writing
from rlif_lightning.exporting.generation import generation_config
from rlif_lightning.exporting.hub import check_hub
from rlif_lightning.exporting.prompt import PROBES, chat_template, differing
from rlif_lightning.exporting.weights import (
    Difference,
    compare,
    merge,
    probe_logits,
    reload,
    save_adapter,
    save_merged,
)
from rlif_lightning.models.checkpoints import read_checkpoint, weights_of
from rlif_lightning.models.hub import is_local, resolve_model
from rlif_lightning.models.lora import adapter_off
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.models.trainable import put_weights
from rlif_lightning.runs.folder import GUARD_WEIGHTS, LAST_CHECKPOINT, run_folder_of
from rlif_lightning.runs.report import CURVES
from rlif_lightning.toy import parse_toy_name


class Exporting:
    """One export.

    Args:
        objects: Of the command.

    Raises:
        UserError: Something can be seen to be wrong without weights.
    """

    def __init__(self, objects: RecipeObjects) -> None:
        self.objects, self.options, self.policy = objects, objects.options, objects.module.policy_settings
        self.recipe: dict[str, Any] = yaml.safe_load(
            objects.cli.parser.dump(objects.cli.config, skip_none=False)  # as the recipe has them
        )
        assert isinstance(objects.cli, ExportCLI)
        self.source, self.asked = Path(self.options.ckpt_path), objects.cli.asked
        self.run = run_folder_of(self.source)
        self.form = self.options.format
        if self.form == "adapter" and self.policy.lora is None and self.policy.adapter is None:
            raise UserError(
                "The run trained all weights: there is no adapter to export",
                got="--format adapter, model.lora null",
                do="take --format merged",
            )
        name = self.policy.name
        local = parse_toy_name(name) is not None or is_local(name)
        self.base = str(Path(resolve_model(name)).absolute()) if local else name
        if self.options.push_to_hub is not None:
            check_hub(self.options.push_to_hub)
            if self.form == "adapter" and local:
                raise UserError(
                    "Others could not load this adapter: its base model is not on the hub",
                    got=name,
                    do="take --format merged",
                )
        given = self.options.output
        self.folder = Path(given).expanduser() if given else (self.run or Path()) / "export" / self.form
        check_target(self.folder, self.base)
        precision = objects.precision
        usual = "bfloat16" if precision.startswith("bf16") else "float16" if precision.startswith("16") else "float32"
        self.dtype: torch.dtype = getattr(torch, self.options.dtype or usual)
        if self.form == "adapter" and self.options.dtype is not None:
            raise UserError("An adapter is always written in float32", do="leave out --dtype")
        if self.source.is_dir():
            raise UserError("A checkpoint in shards cannot be exported", got=self.source)
        self.checkpoint = read_checkpoint(self.source, mmap=True)
        self.step = int(self.checkpoint["global_step"])

    def write(self) -> Path:
        """Load, write, read again, compare; the folder appears if all is well.

        Raises:
            UserError: The checkpoint is another model's, or the export can't be written or differs.
        """
        print(f"weights: {self.source}, {self._source_in_words()}")
        if self.source.name != LAST_CHECKPOINT and self.asked is None:
            print("         --ckpt_path last takes those of the last step")
        loaded = self._load(self.policy)
        policy, end_ids = loaded.model, loaded.end_ids
        prompts = self._probes(policy)
        expected, base_logits = self._logits(policy, prompts)
        in_4_bit = None
        if self.policy.quantization is not None:
            # An adapter is merged into the weights that were quantised, not into the 4-bit ones: their steps are
            # larger than what it changes.
            in_4_bit = expected
            del policy, loaded
            loaded = self._load(replace(self.policy, quantization=None))
            policy = loaded.model
            expected, base_logits = self._logits(policy, prompts)
        del loaded
        base = base_label(self.policy.name)
        facts = {"format": self.form, "step": self.step, "checkpoint": self.source.name, "base": base}
        with writing(self.folder, facts) as folder:
            base_settings = policy.generation_config
            if self.form == "merged":
                policy = merge(policy, self.dtype)
                save_merged(policy, folder)
            else:
                save_adapter(policy, folder, self.base)
            del policy
            differs = self._write_tokenizer(folder)
            self._write_generation(folder, base_settings, end_ids)
            found = self._compare(folder, prompts, expected, base_logits)
            if in_4_bit is not None:
                found += self._quantised(float((expected - in_4_bit).abs().max()))
            print(found)
            self._write_card(folder, found, differs, end_ids)
        return self.folder

    # -- weights ---------------------------------------------------------------------------------------------

    def _load(self, settings: PolicySettings) -> Policy:
        """The policy with the weights of the checkpoint, on the CPU.

        Args:
            settings: As in training, so that the checkpoint can be known for one of this model; or not quantised.
        """
        dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        policy = Policy.load(replace(settings, gradient_checkpointing=False), dtype=dtype, tokenizer=self.tokenizer)
        if settings.quantization == self.policy.quantization:
            policy.check_checkpoint(self.checkpoint)
        put_weights(policy.model, weights_of(self.checkpoint))
        policy.model.requires_grad_(False)
        return policy

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.objects.module.tokenizer

    def _probes(self, policy: Any) -> list[list[int]]:
        """Prompts of training and arbitrary tokens, some dozens in all."""
        tokenizer = self.tokenizer
        prompts = [list(self.objects.data.template.encode(Problem(t, None), tokenizer).ids)[:64] for t in PROBES]
        ids = torch.randint(len(tokenizer.get_vocab()), (16,), generator=torch.Generator().manual_seed(0))
        rows = policy.get_input_embeddings().weight.shape[0]
        return [*prompts, ids.clamp(max=rows - 1).tolist()]

    def _logits(self, policy: Any, prompts: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """The policy's logits, and those without its adapter."""
        expected = probe_logits(policy, prompts)
        if self.policy.lora is None and self.policy.adapter is None:
            return expected, None
        with adapter_off(policy) as base_logits:
            return expected, probe_logits(base_logits, prompts)

    def _compare(self, folder: Path, prompts: list[list[int]], expected: Tensor, base_logits: Tensor | None) -> str:
        """Read the folder again by other libraries; says in words how close it is."""
        module = self.policy
        settings = {"trust_remote_code": module.trust_remote_code, "attn_implementation": module.attn_implementation}
        if self.form == "adapter":
            settings |= {"pretrained_model_name_or_path": self.base, "revision": module.revision}
        found = compare(
            probe_logits(reload(folder, self.form, self.dtype, settings), prompts),
            expected,
            base_logits,
            self.dtype,
        )
        return self._in_words(found)

    def _quantised(self, difference: float) -> str:
        into = "merged into" if self.form == "merged" else "compared on"
        return (
            f" The base was held in 4 bits while training ({self.policy.quantization}); for this folder the adapter "
            f"was {into} the base in {_name(self.dtype)}, as merging into 4-bit weights would round much of it away. "
            f"That policy's logits differ from those of the 4-bit policy by up to {difference:.2g}."
        )

    def _in_words(self, found: Difference) -> str:
        library = "transformers" if self.form == "merged" else "transformers and PEFT"
        text = (
            f"Read again by {library} in {_name(self.dtype)}: over {found.tokens} tokens the logits differ from the "
            f"policy's by at most {found.largest:.2g} (up to {found.tolerance:.2g} is rounding)."
        )
        if found.adapter is not None:
            text += f" The adapter changes them by up to {found.adapter:.2g}."
            if found.largest > 0.1 * found.adapter:
                text += (
                    " So rounding has cost much of what was learned; --dtype float32 and --format adapter keep it."
                )
        return text

    # -- what goes with them ---------------------------------------------------------------------------------

    def _write_tokenizer(self, folder: Path) -> bool:
        """The tokenizer with the prompt of training as its chat template; whether its tokens differ."""
        template, tokenizer = self.objects.data.template, self.tokenizer
        exported = copy.deepcopy(tokenizer)
        exported.chat_template = chat_template(template, tokenizer)
        exported.save_pretrained(folder)
        probes = differing(template, tokenizer, exported)
        if probes:
            print(
                "warning: apply_chat_template of the export gives other tokens than training did, because this "
                f"tokenizer reads a text in one piece differently: {probes[0]!r}"
            )
        return bool(probes)

    def _write_generation(self, folder: Path, base: Any, end_ids: list[int]) -> None:
        generation_config(base, self.tokenizer, end_ids, self.objects.evaluation).save_pretrained(folder)

    def _source_in_words(self) -> str:
        if self.source.as_posix().endswith(GUARD_WEIGHTS):
            return f"what the collapse guard hands back (step {self.step})"
        return f"those of step {self.step}"

    def _write_card(self, folder: Path, check: str, differs: bool, end_ids: list[int]) -> None:
        picture = self.run / CURVES if self.run is not None else None
        has_picture = picture is not None and picture.is_file()
        if picture is not None and has_picture:
            shutil.copyfile(picture, folder / CURVES)
        export = Export(
            settings=self.recipe,
            run=self.run,
            step=self.step,
            source=self._source_in_words(),
            form=self.form,
            dtype=_name(self.dtype),
            check=check,
            end_tokens=[str(self.tokenizer.convert_ids_to_tokens(i)) for i in end_ids],
            prompt_differs=differs,
            versions=versions(),
            picture=CURVES if has_picture else None,
        )
        card = model_card(export, self.options.push_to_hub)
        (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
