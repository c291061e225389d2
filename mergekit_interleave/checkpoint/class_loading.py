"""Ask transformers which stored tensors the class of a config.json loads, and which it lacks.

The loader of transformers gets tensors on the meta device, which have a name, a shape and a dtype,
but no values. It renames and merges them as it does with real ones, and reports what it did.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_interleave import _dtypes
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.quantization import quantized_modules
from mergekit_interleave.errors import RefusedError

Shape = tuple[int, ...]


class Form(NamedTuple):
    """The form of a stored tensor.

    Attributes:
        dtype: The dtype, in safetensors' spelling.
        shape: The shape.
    """

    dtype: str
    shape: Shape


class Loading(NamedTuple):
    """What the class does with stored tensors. It may rename them, so the names are its own.

    Attributes:
        missing: The parameters that no stored tensor fills. transformers fills them at random.
        loaded: The parameters and buffers that stored tensors fill.
        unloaded: The stored tensors that the class does not load.
        mismatched: The parameters that a tensor of another shape fills, each with that shape and
            its own shape.
        class_name: The name of the class.
    """

    missing: tuple[str, ...]
    loaded: frozenset[str]
    unloaded: tuple[str, ...]
    mismatched: Mapping[str, tuple[Shape, Shape]]
    class_name: str


def load(path: Path, forms: Mapping[str, Form], *, trusted: bool = False) -> Loading:
    """Load tensors into the class of a config.json without their values.

    The shapes of quantized projections are not compared, because their class may store them in
    another form.

    Args:
        path: The directory that holds the config.json.
        forms: The form of each stored tensor, by name.
        trusted: Whether the model's own code may be run.

    Raises:
        RefusedError: transformers cannot build the model, or cannot load these tensors.
    """
    quantized = quantized_modules({name: form.dtype for name, form in forms.items()})
    try:
        found = _load(path, forms, trusted=trusted)
    except RefusedError:
        # The package of the quantizer may be missing. Then load the other tensors alone.
        plain = {n: form for n, form in forms.items() if n.rpartition(".")[0] not in quantized}
        if len(plain) == len(forms):
            raise
        found = _load(path, plain, trusted=trusted, quantized=False)
    return found._replace(
        missing=tuple(n for n in found.missing if not _is_part(n, quantized)),
        mismatched={n: s for n, s in found.mismatched.items() if not _is_part(n, quantized)},
    )


def _is_part(name: str, modules: Collection[str]) -> bool:
    """Whether a parameter belongs to one of the modules; its experts may be stored apart."""
    module = name.rpartition(".")[0]
    return module in modules or any(other.startswith(f"{module}.") for other in modules)


def _load(
    path: Path, forms: Mapping[str, Form], *, trusted: bool, quantized: bool = True
) -> Loading:
    with meta_model.transformers_errors("load the model"), _conversions_on_meta():
        import torch  # noqa: PLC0415 - takes seconds

        meta_model.hide_bars()
        tensors = {
            name: torch.empty(form.shape, dtype=_torch_dtype(form.dtype), device="meta")
            for name, form in forms.items()
        }
        config = meta_model.config_of(path, trusted=trusted)
        config = config if quantized else meta_model.unquantized(config)
        model = meta_model.instantiate(config, trusted=trusted)
        _, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=tensors,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return loading_of(model, report)


def loading_of(model: Any, report: Mapping[str, Any]) -> Loading:
    """Return what a class did with the tensors that it was loaded from.

    Args:
        model: The loaded model.
        report: What `from_pretrained` returned beside it.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return Loading(
        tuple(sorted(parameters.intersection(report["missing_keys"]))),
        frozenset(model.state_dict()).difference(report["missing_keys"]),
        tuple(sorted(report["unexpected_keys"])),
        {
            name: (tuple(stored), tuple(built))
            for name, stored, built in sorted(report["mismatched_keys"])
        },
        type(model).__name__,
    )


def _torch_dtype(stored: str) -> Any:
    """Return a torch dtype for a stored one; one of the same width if torch has no such dtype."""
    import torch  # noqa: PLC0415

    names = {**_TORCH_NAMES, **{dtype.stored: name for name, dtype in _dtypes.NAMED.items()}}
    return getattr(torch, names.get(stored, "uint8"), torch.uint8)


_TORCH_NAMES = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}


@contextmanager
def _conversions_on_meta() -> Iterator[None]:
    """Let transformers convert all tensors on the meta device.

    It converts very large tensors on the CPU, to which a tensor without values cannot be moved.
    """
    from transformers.core_model_loading import WeightConverter  # noqa: PLC0415

    before = vars(WeightConverter).get("force_cpu")
    if before is None:  # a version that converts no tensor there
        yield
        return
    # transformers keeps some converters, so each must still get its own value.
    WeightConverter.force_cpu = property(lambda _: False, before.__set__)
    try:
        yield
    finally:
        WeightConverter.force_cpu = before
