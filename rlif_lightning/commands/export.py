"""``rlif export``: write a run's weights as a Hugging Face folder or a PEFT adapter, with a model card.

``rlif export RUN`` takes a run folder, ``rlif export --config RECIPE`` the newest run of a recipe.
"""

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from rlif_lightning.errors import UserError
from rlif_lightning.run_folder import (
    CHECKPOINTS,
    CONFIG,
    GUARD_WEIGHTS,
    LAST_CHECKPOINT,
    find_checkpoint,
    latest_run_folder,
    run_folder_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from rlif_lightning.commands.objects import Objects
    from rlif_lightning.exporting.weights import Difference

Dtype = Literal["float32", "bfloat16", "float16"]


def main(args: list[str]) -> None:
    """Run the command.

    Args:
        args: The words after ``rlif export``.

    Raises:
        UserError: The words are wrong, there are no such weights, or the export does not compute what the policy does.
    """
    words = _run_words(args)  # before torch is imported
    from rlif_lightning.commands.objects import load
    from rlif_lightning.exporting.cli import ExportCLI

    description = "Write a run's weights as a folder that transformers, PEFT and vLLM load. " + (
        "rlif export RUN takes a run folder, rlif export --config RECIPE the recipe's newest run."
    )
    objects = load("export", words, _options, description, ExportCLI)
    export = Exporting(objects)
    folder = export.write()
    print(f"written: {folder}")
    name = objects.options.push_to_hub
    if name is not None:
        from rlif_lightning.exporting.hub import push

        print(f"pushed: {push(folder, name)}")


def _run_words(args: list[str]) -> list[str]:
    """A run folder as the settings that it holds."""
    if not args or args[0].startswith("-"):
        return args
    run = Path(args[0]).expanduser()
    if not (run / CONFIG).is_file():
        inside = sorted(p.parent for depth in ("*", "*/*") for p in run.glob(f"{depth}/{CONFIG}"))
        raise UserError(
            f"This is not a run folder: it has no {CONFIG}" if run.is_dir() else "The run folder does not exist",
            got=run,
            expected="a run folder such as runs/quickstart/1",
            do=f"name one of {', '.join(map(str, inside[:8]))}" if inside else "correct the path; rlif fit makes runs",
        )
    # A continued run's settings name the checkpoint that it began with.
    return ["--config", str(run / CONFIG), "--ckpt_path=null", *args[1:]]


def choose_checkpoint(asked: str | None, run: Path | None, root: Path, recipe: str) -> Path:
    """The file that holds the weights to export.

    Args:
        asked: ``last``, a path, or None: what the collapse guard hands back, else the last checkpoint.
        run: A run's folder; None: the newest run of the recipe.
        root: The folder of all runs.
        recipe: The recipe's name.

    Raises:
        UserError: There are no such weights.
    """
    if asked not in (None, "last"):
        path = Path(str(asked)).expanduser()
        if not (path / CHECKPOINTS).is_dir():
            return find_checkpoint(str(asked), root, recipe)
        asked, run = None, path
    if run is None:
        run = latest_run_folder(root, recipe)
        if run is None:
            find_checkpoint("last", root, recipe)  # says what there is
    assert run is not None
    kept = run / GUARD_WEIGHTS
    if asked is None and kept.is_file():
        return kept
    return find_checkpoint(str(run), root, recipe)


def _options(parser: Any) -> None:
    from rlif_lightning.exporting.weights import Format

    parser.add_argument(
        "--format",
        type=Format,
        default="merged",
        help="A whole model with any adapter merged in, or the adapter alone as PEFT writes it.",
    )
    parser.add_argument(
        "--dtype",
        type=Dtype | None,
        default=None,
        help="Of a merged model's weights. null: that of the run's precision.",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Folder of the export; an earlier export there is replaced. null: <run>/export/<format>.",
    )
    parser.add_argument(
        "--push_to_hub",
        type=str | None,
        default=None,
        help="Also upload the folder to this repository, such as you/model; a new one is private.",
    )


class Exporting:
    """One export.

    Args:
        objects: Of the command.

    Raises:
        UserError: Something can be seen to be wrong without weights.
    """

    def __init__(self, objects: "Objects") -> None:
        import torch

        from rlif_lightning.callbacks.checkpoint import read_checkpoint
        from rlif_lightning.exporting.cli import ExportCLI
        from rlif_lightning.exporting.folder import check_target
        from rlif_lightning.exporting.hub import check_hub
        from rlif_lightning.hub import is_local, resolve_model
        from rlif_lightning.toy import parse_toy_name

        self.objects, self.options, self.module = objects, objects.options, objects.module
        self.settings: dict[str, Any] = yaml.safe_load(
            objects.cli.parser.dump(objects.cli.config, skip_none=False)  # as the recipe has them
        )
        assert isinstance(objects.cli, ExportCLI)
        self.source, self.asked = Path(self.options.ckpt_path), objects.cli.asked
        self.run = run_folder_of(self.source)
        self.form = self.options.format
        if self.form == "adapter" and self.module.lora is None:
            raise UserError(
                "The run trained all weights: there is no adapter to export",
                got="--format adapter, model.lora null",
                do="take --format merged",
            )
        name = self.module.name
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
        precision = str(objects.cli.precision)
        half = {"b": "bfloat16", "1": "float16"}.get(precision[0]) if precision.startswith(("bf16", "16")) else None
        self.dtype: torch.dtype = getattr(torch, self.options.dtype or half or "float32")
        if self.form == "adapter" and self.options.dtype is not None:
            raise UserError("An adapter is always written in float32", do="leave out --dtype")
        self.checkpoint = read_checkpoint(self.source, mmap=True)
        self.step = int(self.checkpoint["global_step"])

    def write(self) -> Path:
        """Load, write, read again, compare; the folder appears if all is well.

        Raises:
            UserError: The checkpoint is another model's, or the export can't be written or differs.
        """
        from rlif_lightning.exporting.folder import writing
        from rlif_lightning.exporting.weights import merge, save_adapter, save_merged

        print(f"weights: {self.source}, {self._source_in_words()}")
        if self.source.name != LAST_CHECKPOINT and self.asked is None:
            print("         --ckpt_path last takes those of the last step")
        policy: Any = self._policy()
        end_ids = self.module.end_ids
        prompts = self._probes()
        expected, bare = self._logits(policy, prompts)
        facts = {"format": self.form, "step": self.step, "checkpoint": self.source.name, "base": self.module.name}
        with writing(self.folder, facts) as folder:
            base_settings = policy.generation_config
            if self.form == "merged":
                self.module.policy = None
                policy = merge(policy, self.dtype)
                save_merged(policy, folder)
            else:
                save_adapter(policy, folder, self.base)
                self.module.policy = None
            del policy
            differs = self._write_tokenizer(folder)
            self._write_generation(folder, base_settings, end_ids)
            found = self._compare(folder, prompts, expected, bare)
            self._write_card(folder, found, differs, end_ids)
        return self.folder

    # -- weights ---------------------------------------------------------------------------------------------

    def _policy(self) -> Any:
        """The policy with the weights of the checkpoint, on the CPU."""
        import torch

        from rlif_lightning.policy import fingerprint, load_policy

        module = self.module
        module.policy = load_policy(
            module.name,
            dtype=torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32,
            lora=module.lora,
            revision=module.revision,
            attn_implementation=module.attn_implementation,
            trust_remote_code=module.trust_remote_code,
        )
        module.fingerprint = fingerprint(module.policy)
        module.on_load_checkpoint(self.checkpoint)
        module.load_state_dict(self.checkpoint["state_dict"], strict=False)
        return module.policy.requires_grad_(False)

    def _probes(self) -> list[list[int]]:
        """Prompts of training and arbitrary tokens, some dozens in all."""
        import torch

        from rlif_lightning.exporting.prompt import PROBES
        from rlif_lightning.records import Problem

        tokenizer = self.module.tokenizer
        prompts = [list(self.objects.data.template.encode(Problem(t, None), tokenizer).ids)[:64] for t in PROBES]
        ids = torch.randint(len(tokenizer.get_vocab()), (16,), generator=torch.Generator().manual_seed(0))
        rows = self.module.policy.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, operator]
        return [*prompts, ids.clamp(max=rows - 1).tolist()]

    def _logits(self, policy: Any, prompts: list[list[int]]) -> tuple["Tensor", "Tensor | None"]:
        """The policy's logits, and those without its adapter."""
        from rlif_lightning.exporting.weights import probe_logits
        from rlif_lightning.policy import adapter_off

        expected = probe_logits(policy, prompts)
        if self.module.lora is None:
            return expected, None
        with adapter_off(policy) as bare:
            return expected, probe_logits(bare, prompts)

    def _compare(self, folder: Path, prompts: list[list[int]], expected: "Tensor", bare: "Tensor | None") -> str:
        """Read the folder again by other libraries; says in words how close it is."""
        from rlif_lightning.exporting.weights import compare, probe_logits, reload

        module = self.module
        settings = {"trust_remote_code": module.trust_remote_code, "attn_implementation": module.attn_implementation}
        if self.form == "adapter":
            settings |= {"pretrained_model_name_or_path": self.base, "revision": module.revision}
        found = compare(
            probe_logits(reload(folder, self.form, self.dtype, settings), prompts), expected, bare, self.dtype
        )
        text = self._in_words(found)
        print(text)
        return text

    def _in_words(self, found: "Difference") -> str:
        library = "transformers" if self.form == "merged" else "transformers and PEFT"
        text = (
            f"Read again by {library} in {str(self.dtype).removeprefix('torch.')}: over {found.tokens} tokens the "
            f"logits differ from the policy's by at most {found.largest:.2g} (up to {found.tolerance:.2g} is rounding)."
        )
        if found.adapter is not None:
            text += f" The adapter changes them by up to {found.adapter:.2g}."
            if found.largest > 0.1 * found.adapter:
                text += (
                    " So rounding has cost a good part of what was learned: --dtype float32 or --format adapter keep it."
                )
        return text

    # -- what goes with them ---------------------------------------------------------------------------------

    def _write_tokenizer(self, folder: Path) -> bool:
        """The tokenizer with the prompt of training as its chat template; whether its tokens differ."""
        from rlif_lightning.exporting.prompt import chat_template, differing

        template, tokenizer = self.objects.data.template, self.module.tokenizer
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
        from rlif_lightning.exporting.generation import generation_config

        generation_config(base, self.module.tokenizer, end_ids, self.objects.evaluation).save_pretrained(folder)

    def _source_in_words(self) -> str:
        if self.source.as_posix().endswith(GUARD_WEIGHTS):
            return f"what the collapse guard hands back (step {self.step})"
        return f"those of step {self.step}"

    def _write_card(self, folder: Path, check: str, differs: bool, end_ids: list[int]) -> None:
        from rlif_lightning.callbacks.evaluation import versions
        from rlif_lightning.exporting.card import Export, model_card
        from rlif_lightning.report import CURVES

        picture = self.run / CURVES if self.run is not None else None
        if picture is not None and picture.is_file():
            shutil.copyfile(picture, folder / picture.name)
        else:
            picture = None
        export = Export(
            settings=self.settings,
            run=self.run,
            step=self.step,
            source=self._source_in_words(),
            form=self.form,
            dtype=str(self.dtype).removeprefix("torch."),
            check=check,
            end_tokens=self.module.tokenizer.convert_ids_to_tokens(end_ids),
            prompt_differs=differs,
            versions=versions(),
            picture=picture and picture.name,
        )
        card = model_card(export, self.options.push_to_hub)
        (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
