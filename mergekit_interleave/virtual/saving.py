"""Save a model whose layers share tensors, with every layer stored.

transformers stores one of several tensors that share memory, and drops the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_interleave.virtual import quantized_modules


class SavesEveryLayer:
    """The part of a grown model's class that saves it. The other part is the model's own class.

    Attributes:
        record: Writes interleave.json into a directory, given the names of the files that were
            written there.
    """

    record: Callable[[Path, Collection[str]], object]

    def save_pretrained(
        self,
        save_directory: str,
        is_main_process: bool = True,  # noqa: FBT001 - the signature of transformers
        state_dict: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Save the model with interleave.json; see `PreTrainedModel.save_pretrained`."""
        if quantized_modules.is_quantized(self):
            quantized_modules.check_savable(self)
            state = None  # the quantizer makes it
        else:
            state = unshared(self, self.state_dict() if state_dict is None else state_dict)  # type: ignore[attr-defined]
        before = _files(Path(save_directory))
        super().save_pretrained(save_directory, is_main_process, state, **options)  # type: ignore[misc]
        if is_main_process:
            written = _files(Path(save_directory)) - before
            self.record(Path(save_directory), [name for name, *_ in written])

    def __reduce__(self) -> tuple[Callable[[type], Any], tuple[type], dict[str, Any]]:
        """Let pickle find the class, which is not in the module of the model's own class."""
        own = type(self).__mro__[2]
        return _blank, (own,), vars(self)


def _files(folder: Path) -> set[tuple[str, int, int]]:
    """Return the names of the files in a directory, each with what changes when it is written."""
    if not folder.is_dir():
        return set()
    files = [file for file in folder.iterdir() if file.is_file()]
    return {(file.name, (found := file.stat()).st_mtime_ns, found.st_ino) for file in files}


def saving_every_layer(model: Any, record: Callable[[Path, Collection[str]], object]) -> Any:
    """Let a model save every layer, and return it.

    Args:
        model: A model of transformers.
        record: See `SavesEveryLayer`.
    """
    model.__class__ = _saving_class(type(model))
    model.record = record
    if quantized_modules.is_quantized(model):
        model.hf_quantizer.get_state_dict_and_metadata = partial(
            _every_layer, model.hf_quantizer.get_state_dict_and_metadata
        )
    return model


def _saving_class(own: type) -> Any:
    """Return the subclass of a model's class that saves every layer; config.json has its name."""
    parts = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (SavesEveryLayer, own), parts)


def _blank(own: type) -> Any:
    """Return an object of the subclass, without attributes, for pickle."""
    found = _saving_class(own)
    return object.__new__(found)


def _every_layer(made_by_quantizer: Callable[[Any], Any], model: Any) -> tuple[Any, Any]:
    """Return the tensors of a quantized model in the form in which they are stored."""
    state, metadata = made_by_quantizer(model)
    return unshared(model, model.state_dict() if state is None else state), metadata


def unshared(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors that share no memory, except for those that the model's class ties.

    Args:
        model: The model.
        state: Its tensors by name.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    tied = model.all_tied_weights_keys
    seen: set[int] = set()
    found = {}
    for name, tensor in state.items():
        is_shared = tensor.numel() and tensor.data_ptr() in seen and name not in tied
        is_repeated = tensor.numel() > 1 and 0 in tensor.stride()
        seen.add(tensor.data_ptr())
        found[name] = (
            tensor.clone(memory_format=torch.contiguous_format)
            if is_shared or is_repeated
            else tensor
        )
    return found
