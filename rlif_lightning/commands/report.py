"""``rlif report``: redraw a run's curves and table, or lay several runs over each other."""

from pathlib import Path

from rlif_lightning.cli.command_table import COMMANDS
from rlif_lightning.errors import UserError
from rlif_lightning.runs.curves import CURVES, draw_curves, write_report
from rlif_lightning.runs.summary import summary_table


def main(args: list[str]) -> None:
    """Run the command and print the tables.

    Of one run curves.png and summary.txt are replaced; of several, one picture shows the curves of all.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    about = COMMANDS["report"].description
    parser = ArgumentParser("rlif report", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run folder: runs/<recipe>/<n>.")
    picture_help = f"Picture of several runs (default: {CURVES}), or an additional picture of one run."
    parser.add_argument("--output", metavar="FILE", help=picture_help)
    try:
        parsed = parser.parse_args(args)
    except ArgumentError as error:
        got, expected = f"{' '.join(args) or 'nothing'} ({error})", "rlif report RUN... [--output FILE]"
        raise UserError("rlif report does not understand its arguments.", got=got, expected=expected) from error
    runs = [Path(run) for run in parsed.runs]
    tables = [summary_table(run) for run in runs]  # a mistake in the last run shows before anything is written
    written = list(write_report(runs[0], *tables)) if len(runs) == 1 else []
    if len(runs) > 1 or parsed.output is not None:
        written.append(Path(parsed.output or CURVES))
        draw_curves(runs, written[-1])
    print("\n".join([*tables, *(f"written: {path}" for path in written)]))
