"""Notice a collapse without labels, and keep the weights from before it."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rlif_lightning.callbacks.logging import collected_metrics, log_now, log_table, run_folder
from rlif_lightning.callbacks.progress import say_above_bar
from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.guard.kept_weights import KeptWeights
from rlif_lightning.guard.rule import AGREEMENT, REFERENCE, SIMILARITY, CollapseRule, RuleSettings, default_rule
from rlif_lightning.models.fsdp2 import is_sharded
from rlif_lightning.models.trainable import put_weights, trainable_weights
from rlif_lightning.runs.atomic import write_text
from rlif_lightning.runs.finished import FINISHED
from rlif_lightning.runs.folder import GUARD, GUARD_WEIGHTS
from rlif_lightning.runs.signals import agreed
from rlif_lightning.training.module import RLIFModule

Signal = Literal["agreement", "similarity", "start_logprob"]
SIGNALS: dict[Signal, str] = {"agreement": AGREEMENT, "similarity": SIMILARITY, "start_logprob": REFERENCE}


class CollapseGuard(Callback):
    """Watches the rollouts for signs of collapse, and decides once.

    A rollout is measured before its update, so its signals are those of the weights in place at that moment. The
    weights of the signal's best step are kept in ``checkpoints/guard/weights.safetensors`` (trainable ones only);
    ``guard.json`` says what was seen and what was done. At the end of a run in which it has fired, the kept weights
    are evaluated as well.

    A run that the guard has ended stays ended: it is continued after ``action`` was set to warn or off, or after
    the rule was changed so that it would not have fired. With warn it decides once and then only watches.

    Args:
        action: What to do when a collapse has begun. ``off``: watch nothing. ``warn``: warn and train on. ``stop``:
            end the run after the current rollout. ``restore``: end it with the kept weights in the policy and in the
            last checkpoint.
        signals: Signals to watch: ``agreement``, ``similarity`` (of the completions in a group) and
            ``start_logprob``. The first that falls decides, and the weights of its own best step are handed back;
            until one falls, the first signal's best step counts. null: agreement, or similarity if no completion ever
            has an answer; and start_logprob if there is a frozen reference.
        drop: Drop of agreement or similarity below its best that counts, as a share of the best.
        reference_drop: Drop of the frozen reference's log-likelihood per token that counts, as a share of its mean
            over the first rollouts.
        patience: Consecutive rollouts below the threshold after which the guard acts.
        smoothing: Weight of a new value in the signal's moving average.
        warmup: Number of first rollouts that are not judged.
    """

    def __init__(
        self,
        action: Literal["off", "warn", "stop", "restore"] = "warn",
        signals: list[Signal] | None = None,
        drop: float = RuleSettings.drop,
        reference_drop: float = RuleSettings.reference_drop,
        patience: int = RuleSettings.patience,
        smoothing: float = RuleSettings.smoothing,
        warmup: int = RuleSettings.warmup,
    ) -> None:
        check_ranges(
            "guard",
            ("action", action, action in ("off", "warn", "stop", "restore"), "off, warn, stop or restore"),
            ("signals", signals, signals is None or 0 < len(signals) == len({*signals}), "null, or each signal once"),
            ("drop", drop, 0 < drop < 1, "above 0 and below 1, such as 0.05 for 5 per cent"),
            ("reference_drop", reference_drop, reference_drop > 0, "above 0, such as 0.15 for 15 per cent"),
            ("patience", patience, patience >= 1, "1 or more"),
            ("smoothing", smoothing, 0 < smoothing <= 1, "above 0 and up to 1"),
            ("warmup", warmup, warmup >= 0, "0 or more"),
        )
        for signal in signals or ():
            if signal not in SIGNALS:
                raise UserError("guard.signals names an unknown signal", got=signal, expected=", ".join(SIGNALS))
        self.settings = RuleSettings(drop, reference_drop, patience, smoothing, warmup)
        self.action, self.signals = action, signals
        self.rule = CollapseRule([])  # what has been seen and decided; without watches where the guard is off
        self.accuracy: dict[str, dict[str, float]] = {}  # val/* of the start, handed_back and end, as far as known
        self.taken = "none"
        self._kept = KeptWeights()
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Find the signals that this run has."""
        signals = self._available(pl_module) if stage == "fit" and self.action != "off" else []
        self.rule = default_rule(signals, self.settings)
        self.accuracy, self.taken, self._kept = {}, "none", KeptWeights()

    def _available(self, module: RLIFModule) -> list[str]:
        """The metrics to watch; one that this run won't have is refused."""
        frozen = "frozen" in module.needs
        if self.signals is None:
            return [AGREEMENT, SIMILARITY, *([REFERENCE] if frozen else [])]
        if "start_logprob" in self.signals and not frozen:
            raise UserError(
                "The guard is to watch start_logprob, and nothing loads the frozen reference",
                got=f"model.kl_coefficient {module.loss.kl_coefficient}, model.reference {module.reference}",
                do="set model.kl_coefficient above 0 with model.reference frozen, or leave the signal out",
            )
        return [SIGNALS[signal] for signal in self.signals]

    def state_dict(self) -> dict[str, Any]:
        """What was seen and done so far; weights are in a file of their own."""
        own = {"accuracy": self.accuracy, "taken": self.taken}
        return self.rule.state_dict() | own if self.rule.watches else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        if not self.rule.watches or not state_dict:
            return
        self.rule.load_state_dict(state_dict)
        self.accuracy = dict(state_dict["accuracy"]) if "accuracy" in state_dict else {"start": state_dict["start"]}
        if self.rule.fired is not None:
            done = state_dict.get("taken", "restored" if self.action == "restore" else "stopped")
            self.taken = done if done == {"restore": "restored", "stop": "stopped"}.get(self.action) else "recorded"

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a run that the guard has ended (UserError); an ending that was interrupted is done again."""
        if self.rule.fired is None or self.action == "warn":
            return
        if (run_folder(trainer) / FINISHED).exists():
            got = f"guard.action {self.action}; {self.rule.fired.reason}"
            do = "set --guard.action warn to continue the training anyway"
            raise UserError("The collapse guard has ended this run", got=got, do=do)
        trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note the start's accuracy; take up the weights that were kept before."""
        if not self.rule.watches:
            return
        self._folder = run_folder(trainer)
        if trainer.global_step == 0 and pl_module.evaluation is not None:
            self.accuracy["start"] = pl_module.evaluation.evaluate(trainer, pl_module)
        if self.taken == "restored" and self.accuracy.get("end"):  # of weights that are gone
            pl_module.evaluation.take_over(trainer, self.accuracy["end"])
        if not trainer.is_global_zero:
            return
        if trainer.ckpt_path:
            self._read_kept(Path(trainer.ckpt_path).parent / Path(GUARD_WEIGHTS).parent.name)
        if (self._folder / GUARD).exists():  # it may tell of steps that this run has gone back behind
            self._write_decision()

    def _read_kept(self, folder: Path) -> None:
        """Read what the checkpoint's state asks for; files of later steps have no place in this run."""
        others = self._kept.read(folder, self.rule.needed_steps)
        missing = self.rule.needed_steps - set(self._kept.steps)
        if others:
            rank_zero_info(
                f"Collapse guard: kept weights of step {_listed(others)} don't belong to this checkpoint: ignored"
            )
        if missing:
            rank_zero_warn(
                f"Collapse guard: weights of step {_listed(missing)} are not in {folder} and can't be handed back."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Judge a rollout that was just collected, with the weights that it came from still in place."""
        if not self.rule.watches or batch["slice"]:
            return
        known, model = collected_metrics(batch), pl_module.policy.model
        values = {w.signal: known[w.signal] for w in self.rule.watches if w.signal in known}
        if not values.get(AGREEMENT):
            values.pop(AGREEMENT, None)  # no completion holds an answer: with labels that is logged as 0
            if not self.rule.steps and "agreement" in (self.signals or ()):
                raise UserError(
                    "The guard is to watch agreement, and no completion of the first rollout holds an answer",
                    do="say in data.answers.completion where an answer stands, or let the guard watch similarity",
                )
        decision = self.rule.update(trainer.global_step, values)
        if trainer.is_global_zero or is_sharded(model):
            self._kept.keep(self.rule.needed_steps, trainer.global_step, model, trainer.is_global_zero)
        shown = {f"guard/{w.signal.split('/')[-1]}": w.smoothed[-1] for w in self.rule.watches if w.steps}
        shown["guard/fired"] = float(self.rule.fired is not None)
        if self.rule.best_step is not None:
            shown["guard/best_step"] = float(self.rule.best_step)
        log_now(trainer, shown)
        if decision.verdict == "fired":
            self.taken = "recorded"
            self._say(trainer, pl_module, decision.reason)

    def _say(self, trainer: Trainer, module: RLIFModule, reason: str) -> None:
        """Tell what was decided wherever a reader may look."""
        then = {"warn": "Training continues", "stop": "The run ends after this rollout"}
        then["restore"] = f"{then['stop']}, with the weights of that step"
        best = self.rule.best_step
        where = f"kept in {self._folder / GUARD_WEIGHTS}" if best in self._kept.steps else "lost"
        text = (
            f"Collapse guard: {reason}. The weights of step {best} are {where}. "
            f"{then[self.action]} (guard.action {self.action})."
        )
        say_above_bar(text, warning=True)
        log_table(trainer, "guard/decision", [{"step": trainer.global_step, "decision": text}], text)
        if trainer.is_global_zero:
            self._write_weights(module)
            self._write_decision()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the run where that was decided: between two rollouts, before the checkpoint is written."""
        if self.rule.fired is not None and self.action != "warn" and batch["last"]:
            self._end(trainer, pl_module)

    def _end(self, trainer: Trainer, module: RLIFModule) -> None:
        restored = self.action == "restore" and self._hand_back(trainer, module, stay=True)
        if self.action == "restore" and not restored and agreed():  # left to the continued run
            return
        self.taken = "restored" if restored else "stopped"
        trainer.should_stop, module.is_replaced = True, restored
        say_above_bar(f"Stopped by the collapse guard after step {trainer.global_step}.")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Bring the weights to the disk first: after a kill in between, the continued run comes to them again."""
        if self.rule.watches and trainer.is_global_zero:
            self._write_weights(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Evaluate what is handed back; write it all down."""
        if self.rule.fired is not None:
            if self.action == "restore" and self.taken == "recorded":  # training ended within the rollout
                self._end(trainer, pl_module)
            elif self.action != "restore":
                self._hand_back(trainer, pl_module, stay=False)
            elif pl_module.evaluation is not None and not self.accuracy.get("handed_back"):  # a signal came before
                self.accuracy["handed_back"], _ = pl_module.evaluation.held_out(trainer, pl_module)
        if self.rule.watches and trainer.is_global_zero:
            self._write_weights(pl_module)
            self._write_decision()

    def _hand_back(self, trainer: Trainer, module: RLIFModule, stay: bool) -> bool:
        """Put the kept weights into the policy and evaluate them; unless they stay, the current ones return.

        Not after a signal. Returns whether there were weights to put there.
        """
        evaluation = module.evaluation
        if evaluation is None and not stay:
            return False
        if evaluation is not None and not agreed():
            self.accuracy["end"] = evaluation.evaluate(trainer, module)  # if that has not been done yet
        if agreed():
            return False
        model, first, end, handed = module.policy.model, trainer.is_global_zero, None, self.rule.best_step
        if not stay and (first or is_sharded(model)):
            end = trainable_weights(model, keep=first) or None
        kept = None if handed is None else self._kept.steps.get(handed)
        if not trainer.strategy.broadcast(kept is not None):  # the first process has them, for all
            say_above_bar(f"Collapse guard: the weights of step {handed} are not there to hand back.", warning=True)
            return False
        put_weights(model, kept)
        try:
            if evaluation is not None:
                self.accuracy["handed_back"], _ = evaluation.held_out(trainer, module)
        finally:
            if not stay:
                put_weights(model, end)
        return True

    def _write_weights(self, module: RLIFModule) -> None:
        handed = self.rule.best_step
        signals = {w.signal: w.smoothed[w.steps.index(handed)] for w in self.rule.watches if handed in w.steps}
        folder = (self._folder / GUARD_WEIGHTS).parent
        self._kept.write(folder, handed, **module.policy.identity.to_facts(), **signals)

    def _write_decision(self) -> None:
        """What was seen, decided and done, as ``guard.json``: one key per line."""
        rule, handed = self.rule, self.rule.best_step
        decision = {
            "action": self.action,
            "settings": asdict(self.settings),
            "fired": None if rule.fired is None else {**asdict(rule.fired), "reason": rule.fired.reason},
            "best_step": handed,
            "handed_back_step": handed,
            "weights": GUARD_WEIGHTS if handed in self._kept.steps else None,
            "taken": self.taken,
            "accuracy": {name: values for name, values in self.accuracy.items() if values},
            "signals": {
                w.signal: {"steps": w.steps, "raw": w.raw, "smoothed": w.smoothed} for w in rule.watches if w.steps
            },
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in decision.items()]
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / GUARD, "{\n" + ",\n".join(lines) + "\n}\n")


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps)))
