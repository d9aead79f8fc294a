"""A fit from a mixture, and what it gains."""

from pathlib import Path

import yaml

from rlif_lightning.cli.trainer import RLIFCLI
from rlif_lightning.mixing.results import Row
from rlif_lightning.models.checkpoints import read_checkpoint
from rlif_lightning.runs.atomic import write_text
from rlif_lightning.runs.folder import CHECKPOINTS, LAST_CHECKPOINT, METRICS, latest_run_folder
from rlif_lightning.runs.metrics_csv import read_metrics
from rlif_lightning.runs.signals import Stopped
from rlif_lightning.runs.story import ACCURACIES, best_step

FIT = "fit"  # a ratio's fit: <output>/<ratio>/fit.yaml, and its run <output>/<ratio>/fit/<n>
NOT_OF_FIT = {"base", "tuned", "ratios", "steps", "prompts", "save", "output", "config", "ckpt_path"}


def measure_gain(folder: Path, model: Path, settings: Path, steps: int) -> Row:
    """Fit from a mixture, or continue a fit that was interrupted; its held-out accuracy.

    In the ratio's folder, by the settings (YAML) of ``rlif mix``. KeyboardInterrupt: Ctrl-C stopped the fit.
    """
    run = latest_run_folder(folder, FIT)
    done = 0 if run is None else read_checkpoint(run / CHECKPOINTS / LAST_CHECKPOINT)["global_step"]
    if done < steps:
        recipe = _write_recipe(folder, model, settings, steps)
        try:
            cli = RLIFCLI.run(["fit", "--config", str(recipe), *(["--ckpt_path", str(run)] if run else [])])
        except Stopped:
            raise
        except SystemExit as end:  # so the Trainer ends after Ctrl-C before the fit's first rollout
            raise KeyboardInterrupt from end
        if cli.trainer.global_step < steps:  # Ctrl-C: the fit has saved a checkpoint and ended
            raise KeyboardInterrupt
        run = latest_run_folder(folder, FIT)
    assert run is not None
    curves = read_metrics(run / METRICS)
    curve = next((curves[name] for name in ACCURACIES if curves.get(name)), {})
    best = best_step(curve)
    if best is None:
        return {}
    return {"before": curve[0], "best": curve[best], "best_step": float(best), "after": curve[max(curve)]}


def _write_recipe(folder: Path, model: Path, settings: Path, steps: int) -> Path:
    """A recipe of ``rlif fit`` for one mixture, on one device."""
    config = yaml.safe_load(settings.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in NOT_OF_FIT}
    config["runs"], config["model"]["name"] = str(folder), str(model.absolute())
    devices = config["trainer"]["devices"]
    devices = devices[:1] if isinstance(devices, list) else 1
    alone = {"devices": devices, "num_nodes": 1, "strategy": "auto"}
    config["trainer"] |= {"max_steps": steps, "max_epochs": -1, **alone}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{FIT}.yaml"
    write_text(path, yaml.safe_dump(config, sort_keys=False))
    return path
