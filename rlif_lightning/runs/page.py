"""``report.html``: a run on one page that needs no other file and no network."""

import base64
from html import escape
from pathlib import Path

from rlif_lightning.runs.atomic import write_text
from rlif_lightning.runs.folder import CONFIG
from rlif_lightning.runs.held_out import load_held_out, mark
from rlif_lightning.runs.metrics_csv import Curves
from rlif_lightning.runs.pictures import BAD, GOOD
from rlif_lightning.runs.story import fired, headline, moments
from rlif_lightning.runs.summary import load_guard, load_run, run_labels

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{name}</title>
<style>
body {{ max-width: 75rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222 }}
img {{ width: 100% }}
pre {{ background: #f6f6f6; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; width: 100% }}
td {{ border-top: 1px solid #ddd; padding: .4rem; vertical-align: top; white-space: pre-wrap }}
td {{ overflow-wrap: anywhere }}
.right {{ color: {good} }} .wrong {{ color: {bad} }}
</style>
<h1>{name}</h1>
<p><strong>{headline}</strong></p>
<pre>{summary}</pre>
<img alt="Curves of the run" src="data:image/png;base64,{picture}">
{answers}
<details><summary>Settings</summary><pre>{settings}</pre></details>
</html>
"""


def write_page(folder: Path, summary: str, picture: Path, target: Path) -> None:
    """Write what the run's curves say, the curves, answers to held-out problems, and the settings."""
    config, curves = folder / CONFIG, load_run(folder)
    text = PAGE.format(
        name=escape(run_labels([folder])[0]),
        headline=escape(headline(curves)),
        summary=escape(summary),
        picture=base64.b64encode(picture.read_bytes()).decode(),
        answers=_answers(folder, curves),
        good=GOOD,
        bad=BAD,
        settings=escape(config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""),
    )
    write_text(target, text)


def _answers(folder: Path, curves: Curves) -> str:
    """A table per evaluation that is shown."""
    held_out, guard = load_held_out(folder), fired(load_guard(folder))
    if not held_out:
        return ""
    parts = ["<h2>Answers to held-out problems</h2>"]
    for step, when in moments(held_out, curves, guard).items():
        rows = []
        for row in held_out[step]:
            kind = "" if "correct" not in row else "right" if row["correct"] else "wrong"
            cells = (mark(row), row["problem"], row["completion"], row.get("gold", ""))
            rows.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
        parts.append(f"<h3>Step {step}, {when}</h3><table>{''.join(rows)}</table>")
    return "\n".join(parts)
