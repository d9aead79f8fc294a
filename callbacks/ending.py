"""The beginning of a run's loop, and the end of one whose steps are all done and whose ending was interrupted."""

from lightning.pytorch import Trainer

from rlif_lightning.callbacks.logging import run_logger


def end_again(trainer: Trainer) -> None:
    """Let a fit that has no step left come to its end all the same, which Lightning would skip.

    Its callbacks then do what they do after the last step: evaluate, decide, write. The logs are cut first: with
    every strategy the checkpoint has been accepted here, and nothing is written yet.
    """
    loop = trainer.fit_loop
    train = loop.run

    def run() -> None:
        logger = run_logger(trainer)
        if logger is not None:
            logger.begin()
        loop.setup_data()
        if loop.skip:
            loop.on_run_start()
            loop.on_run_end()
        else:
            train()

    loop.run = run  # type: ignore[method-assign]
