"""Save a model whose layers share tensors, with every layer stored.

transformers stores one of several tensors that share memory, and drops the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_interleave.virtual import quantized_modules


class SavesEveryLayer:
    """The part of a grown model's class that saves it. The other part is the model's own class.

    Attributes:
        record: Writes the files beside the weights into a directory.
    """

    record: Callable[[Path], object]

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
        super().save_pretrained(save_directory, is_main_process, state, **options)  # type: ignore[misc]
        if is_main_process:
            self.record(Path(save_directory))


def saving_every_layer(model: Any, record: Callable[[Path], object]) -> Any:
    """Let a model save every layer, and return it.

    Args:
        model: A model of transformers.
        record: See `SavesEveryLayer`.
    """
    own = type(model)
    parts = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    model.__class__ = type(
        own.__name__, (SavesEveryLayer, own), parts
    )  # its name is in config.json
    model.record = record
    if quantized_modules.is_quantized(model):
        model.hf_quantizer.get_state_dict_and_metadata = partial(
            _every_layer, model.hf_quantizer.get_state_dict_and_metadata
        )
    return model


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
