"""The weights in a model's files: all that the model has, under its names, in its shapes, and numbers."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.models.hub import meta_model
from rlif_lightning.models.weight_names import misfit, nearest
from rlif_lightning.warnings_shown import no_bar, no_load_report, rank_zero_warn

FLOATS = ("F64", "F32", "BF16", "F16")
SUMMED = 2**24  # numbers at a time


def check_files(name: str, path: str, config: Any, *, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse files that lack weights of the model, have them twice, in another shape or packed, before any is read.

    transformers itself compares, with tensors that have a shape alone: it knows former names, and which weights are
    tied. Files that it can't compare so (quantised ones, broken ones) are left to the loading.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    stored: dict[str, Tensor] = {}
    packed: dict[str, str] = {}
    try:
        for weight, part in _slices(path, revision):
            if weight in stored:
                do = "delete the older of the files, or save the model again into an empty folder"
                raise UserError("The model's files hold a weight twice", got=f"{name}: {weight}", do=do)
            stored[weight] = torch.empty(part.get_shape(), device="meta")
            if part.get_dtype() not in FLOATS:
                packed[weight] = part.get_dtype()
        model = meta_model(config, trust_remote_code=trust_remote_code)
        _check_packed(packed, dict(model.named_parameters()), name)
        kind: Any = type(model)
        with no_bar(), no_load_report():
            _, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=stored,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except UserError:
        raise
    except Exception:  # the code of any architecture runs in there; loading it will tell
        return
    check_loaded(found, name)


def _check_packed(packed: Mapping[str, str], own: Mapping[str, Tensor], name: str) -> None:
    """Refuse stored integers, 8-bit floats and the like, which would be taken for weights without their scales."""
    taken = [(n, kind) for n, kind in packed.items() if any(f".{o}".endswith(f".{n}") for o in own)]
    if taken:
        raise UserError(
            "The model's files hold weights that are no plain floating-point numbers, and config.json names no "
            "quantization_config to read them by",
            got=f"{name}: {taken[0][0]} in {taken[0][1]}",
            expected=" | ".join(FLOATS),
            do="copy config.json from the source of the weights, or save the model with save_pretrained()",
        )


def check_loaded(found: Mapping[str, Any], name: str) -> None:
    """Refuse what transformers has found missing or of another shape, which it fills with random numbers."""
    missing, unused, other = (found[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    own: dict[str, Any] = dict.fromkeys(missing, ()) | {name: shape for name, _, shape in other}
    stored: dict[str, Any] = dict.fromkeys(unused, ()) | {name: shape for name, shape, _ in other}
    if not own:
        return
    do = "copy config.json and all files of the weights from one source, or save the model with save_pretrained()"
    first = min(missing, default="")
    near = nearest(first, unused) or ""
    if first and near.endswith(f".{first}"):
        front = near.removesuffix(first)
        do = f"save the model itself, without what puts '{front}' before its names: torch.compile, DDP or an adapter"
    raise UserError(
        "The model's files do not hold all of its weights; the others would be random numbers",
        got=f"{name}: {misfit(own, stored)}",
        expected="each weight of the model that config.json describes",
        do=do,
    )


def warn_of_unused(found: Mapping[str, Any], name: str) -> None:
    """Say in one line that files hold weights which the model does not have."""
    unused = sorted(found["unexpected_keys"])
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        rank_zero_warn(f"Weights that the model does not have are left out: {unused[0]}{more}, in {name}")


def file_weights(path: str, revision: str | None) -> Iterator[tuple[str, Tensor]]:
    """Names and weights in a model's files, one after the other."""
    return ((name, part[...]) for name, part in _slices(path, revision))


def check_finite(weights: Iterable[tuple[str, Tensor]], name: str) -> None:
    """Refuse weights that hold NaN or infinity; a sum finds both in one pass.

    In parts, as a CPU makes a float32 copy of what it sums in half precision: of a large vocabulary's embedding, more
    memory than some runs take.
    """
    for weight_name, weight in weights:
        if not weight.is_floating_point() or weight.element_size() == 1:  # packed
            continue
        weight = weight.detach()
        sums = [part.sum(dtype=torch.float32) for part in weight.flatten().split(SUMMED)]
        if not torch.stack(sums).isfinite().all() and not weight.isfinite().all():
            raise UserError(
                "The model's weights hold NaN or infinity",
                got=f"{name}: {weight_name} {list(weight.shape)}",
                do="give the model or the checkpoint from before it was damaged, or copy its files again",
            )


def _slices(path: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Names and unread weights in a model's safetensors files."""
    for file in _files(path, revision):
        with safe_open(file, framework="pt") as stored:
            yield from ((name, stored.get_slice(name)) for name in stored.keys())  # noqa: SIM118


def _files(path: str, revision: str | None) -> list[str]:
    """The safetensors files that transformers would load: one, or those that an index names."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    try:
        return [str(cached_file(path, SAFE_WEIGHTS_NAME, revision=revision))]
    except OSError:
        index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
        names = json.loads(Path(str(index)).read_text(encoding="utf-8"))["weight_map"].values()
        return [str(cached_file(path, file, revision=revision)) for file in sorted({*names})]
