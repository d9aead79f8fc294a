"""TensorBoard's HPARAMS: settings of a run next to the newest values of its metrics."""

from collections.abc import Mapping

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

SHOWN = 5  # columns of settings that TensorBoard shows unasked


def settings_table(settings: Mapping[str, float | str], metrics: Mapping[str, str]) -> tuple[Summary, Summary]:
    """The table's columns, and the row of this run.

    Args:
        settings: By name, those first that are to be seen first.
        metrics: Names to show for tags; their values are looked up among the curves.
    """
    kinds = {True: api_pb2.DATA_TYPE_STRING, False: api_pb2.DATA_TYPE_FLOAT64}
    columns = [  # sorted there by name, after those that are said to differ between runs
        api_pb2.HParamInfo(name=name, type=kinds[isinstance(value, str)], differs=number < SHOWN)
        for number, (name, value) in enumerate(settings.items())
    ]
    results = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=name) for name, tag in metrics.items()
    ]
    table = HParamsPluginData(
        version=metadata.PLUGIN_DATA_VERSION,
        experiment=api_pb2.Experiment(hparam_infos=columns, metric_infos=results),
    )
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=table.SerializeToString())
    about = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=about)]), hparams(dict(settings), {})[1]
