"""What a run has written for TensorBoard."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.util.tensor_util import make_ndarray


def events(folder: Path) -> Any:
    """Everything, read anew."""
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0, "images": 0}).Reload()


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Tag to step to number, as TensorBoard itself reads them: steps before which a run went back are left out."""
    found = PluginEventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    tags = [t for t in found.Tags()["tensors"] if found.SummaryMetadata(t).plugin_data.plugin_name == "scalars"]
    return {tag: {e.step: make_ndarray(e.tensor_proto).item() for e in found.Tensors(tag)} for tag in tags}


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Metric to step to number, by the names that metrics.csv has."""
    return {tag.partition(" ")[2] or tag: curve for tag, curve in curves(folder).items()}


def texts(folder: Path, name: str) -> dict[int, str]:
    """Step to Markdown."""
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events(folder).Tensors(f"{name}/text_summary")}
