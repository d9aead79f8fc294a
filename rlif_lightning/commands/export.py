"""``rlif export``: write a run's weights as a Hugging Face folder or a PEFT adapter, with a model card."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from rlif_lightning.cli.parser import RecipeFile
from rlif_lightning.cli.recipe_objects import RecipeObjects
from rlif_lightning.cli.run_objects import RunObjects, run_settings
from rlif_lightning.cli.strangers import add_trust
from rlif_lightning.errors import UserError
from rlif_lightning.evaluation.results import versions
from rlif_lightning.exporting.card import named_classes, portable_name, write_card
from rlif_lightning.exporting.check import ExportDiffers, LogitCheck
from rlif_lightning.exporting.folder import check_export_folder, export_folder
from rlif_lightning.exporting.hub import check_hub, is_on_hub, push
from rlif_lightning.exporting.prompt import probe_prompts, save_tokenizer
from rlif_lightning.exporting.weights import Format, load_trained, save_adapter, save_generation_config
from rlif_lightning.models.checkpoints import read_checkpoint
from rlif_lightning.models.hub import resolve_model
from rlif_lightning.models.merging import merge
from rlif_lightning.models.policy import Policy
from rlif_lightning.models.precision import precision_name
from rlif_lightning.runs import folder as runs


def main(args: list[str]) -> None:
    """Run the command."""
    objects = ExportCLI("export", run_settings(args), _add_options)
    folder = Export(objects).write()
    print(f"written: {folder}")
    if objects.options.push_to_hub is not None:
        print(f"pushed: {push(folder, objects.options.push_to_hub)}")


def _add_options(parser: Any) -> None:
    dtypes = Literal["float32", "bfloat16", "float16"] | None
    for name, kind, default, text in (
        ("format", Format, "merged", "A whole model with any adapter merged in, or the adapter alone for PEFT."),
        ("dtype", dtypes, None, "Precision of a merged model's weights. null: that of the run, else float32."),
        ("output", str | None, None, "Folder, where it replaces an earlier export. null: <run>/export/<format>."),
        ("push_to_hub", str | None, None, "Hub repository to upload to, such as you/model; a new one is private."),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    add_trust(parser)


class ExportCLI(RunObjects):
    """The run that is exported."""

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Any machine can export: the run's GPU is not looked for."""
        self.device, self.precision = torch.device("cpu"), precision_name(self.config_init.trainer.precision)


class Export:
    """One export: what is asked for, checked before weights are loaded."""

    def __init__(self, objects: RecipeObjects) -> None:
        self.model_settings, self.objects = objects.policy_settings, objects
        options = objects.options
        self.settings: dict[str, Any] = yaml.safe_load(objects.parser.dump(objects.config, skip_none=False))
        if "rollout.rewards" in RecipeFile.strange:  # not imported; the card names them
            self.settings["rollout"]["rewards"] = named_classes(RecipeFile.strange["rollout.rewards"])
        self.source, self.form = Path(options.ckpt_path), options.format
        self.run = runs.run_folder_of(self.source)
        name = self.model_settings.name
        self.base = name if is_on_hub(name) else str(Path(resolve_model(name)).absolute())
        if self.form == "adapter":
            self._check_adapter(options)
        if options.push_to_hub is not None:
            check_hub(options.push_to_hub)
        self.folder = Path(options.output or (self.run or Path()) / "export" / self.form).expanduser()
        check_export_folder(self.folder, self.base)
        runs.writable_folder(self.folder, "--output")
        precision = objects.precision.partition("-")[0]
        dtype = options.dtype or {"bf16": "bfloat16", "16": "float16"}.get(precision, "float32")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.may_widen = options.dtype is None and self.form == "merged" and self.dtype != torch.float32
        if self.source.is_dir():
            raise UserError("A checkpoint in shards cannot be exported", got=self.source)
        self.checkpoint = read_checkpoint(self.source)
        step = int(self.checkpoint["global_step"])
        by_guard = self.source.as_posix().endswith(runs.GUARD_WEIGHTS)
        origin = f"what the collapse guard hands back (step {step})" if by_guard else f"those of step {step}"
        self.facts = {"form": self.form, "dtype": dtype, "step": step, "origin": origin, "versions": versions()}
        self.facts |= {"repository": options.push_to_hub, "base_on_hub": is_on_hub(name)}

    def _check_adapter(self, options: Any) -> None:
        settings, do = self.model_settings, "take --format merged"
        if settings.lora is None and settings.adapter is None:
            got = "--format adapter, model.lora null"
            raise UserError("The run trained all weights: there is no adapter to export", got=got, do=do)
        if options.push_to_hub is not None and not is_on_hub(settings.name):
            wrong = "Others could not load this adapter: its base model is not on the hub"
            raise UserError(wrong, got=settings.name, do=do)
        if options.dtype is not None:
            raise UserError("An adapter is always written in float32", do="leave out --dtype")

    def write(self) -> Path:
        """Load, write, read again, compare; the folder appears only if all is well.

        Where nobody asked for the half precision that is refused, float32 takes its place.
        """
        print(f"weights: {self.source}, {self.facts['origin']}")
        if self.source.as_posix().endswith(runs.GUARD_WEIGHTS):
            print("         --ckpt_path last takes those of the last step")
        try:
            self._write_compared()
        except ExportDiffers as refused:
            if not self.may_widen:
                raise
            print(f"not in {self.facts['dtype']}, the run's precision: {refused}".partition("\n  do:")[0])
            print("         so it is written in float32, which takes twice the space")
            self.dtype, self.facts["dtype"] = torch.float32, "float32"
            self._write_compared()
        return self.folder

    def _write_compared(self) -> None:
        tokenizer, template = self.objects.module.tokenizer, self.objects.data.template
        policy = load_trained(self.model_settings, self.checkpoint, self.dtype, tokenizer)
        vocabulary = policy.model.get_input_embeddings().weight.shape[0]
        check = LogitCheck(probe_prompts(template, tokenizer, vocabulary), self.form, self.dtype)
        check.take_policy(policy.model)
        if self.model_settings.quantization is not None:
            # The adapter is merged into the weights as they were before they were quantised: the steps between 4-bit
            # values are larger than what it changes.
            del policy
            policy = load_trained(self.model_settings, self.checkpoint, self.dtype, tokenizer, quantized=False)
            check.take_policy(policy.model, instead_of=self.model_settings.quantization)
        facts = {"format": self.form, "step": self.facts["step"], "checkpoint": self.source.name}
        with export_folder(self.folder, facts | {"base": portable_name(self.model_settings.name)}) as folder:
            self._write_files(folder, policy)
            del policy
            result = check.read_again(folder, self.model_settings, self.base)
            print(result)
            write_card(folder, self.settings, self.run, self.facts | {"check": result})

    def _write_files(self, folder: Path, policy: Policy) -> None:
        """Weights, then what must not be overwritten with the base's: generation settings and tokenizer."""
        base_generation = policy.model.generation_config
        if self.form == "merged":
            merge(policy.model, self.dtype).save_pretrained(folder, max_shard_size="4GB")
        else:
            save_adapter(policy.model, folder, self.base if self.facts["base_on_hub"] else Path(self.base).name)
        evaluation = self.settings["evaluation"]
        temperature = evaluation["temperature"] if evaluation["samples"] else None
        save_generation_config(base_generation, policy, temperature, folder)
        self.facts["end_tokens"] = policy.tokenizer.convert_ids_to_tokens(policy.end_ids)
        self.facts["stop"] = [json.dumps(text, ensure_ascii=False) for text in policy.settings.stop]
        self.facts["prompt_differs"] = save_tokenizer(self.objects.data.template, policy.tokenizer, folder)
