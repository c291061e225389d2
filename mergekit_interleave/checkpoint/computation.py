"""Record what a model class computes from a config, without memory for weights.

The class builds the model and runs it on the meta device. Every tensor operation is recorded with
its numbers: the epsilon of a norm, the base of the rotary embedding, the window of a mask. Two
configs with equal records compute the same from equal weights, whatever else the configs differ in.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mergekit_interleave.checkpoint import layer_names, meta_model
from mergekit_interleave.errors import RefusedError

TOKENS = 40
"""The number of tokens that the model is run on, unless a config names larger lengths."""

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Computation:
    """What a model class computes from a config.

    Attributes:
        layer_shapes: The shapes of the tensors of the layers, by name.
        layers: The operations of building the model, and of running it up to the last layer.
        outer_shapes: The shapes of the other tensors, by name.
        ties: The names of the tensors that each tensor is tied to, by its name.
        after: The operations after the last layer.
        by_layer: The operations of each layer by its index, if every layer is run only once.
        first_use: When each tensor outside the layers is first used: -1 before the first layer, 0
            between the layers or inside them, 1 after the last one. Unused tensors are absent.
    """

    layer_shapes: _Shapes
    layers: tuple[object, ...]
    outer_shapes: _Shapes
    ties: Mapping[str, frozenset[str]]
    after: tuple[object, ...]
    by_layer: Mapping[int, tuple[object, ...]]
    first_use: Mapping[str, int]


def record(config: Any, depth: int, *, tokens: int = TOKENS, trusted: bool = False) -> Computation:
    """Record what the class of a config computes.

    Args:
        config: The config object.
        depth: Its number of layers.
        tokens: The number of tokens to run the model on.
        trusted: Whether the model's own code may be run.

    Raises:
        RefusedError: The class cannot be built, or cannot be run on the meta device.
    """
    try:
        building = _recorder()
        model = _built(config, building, trusted=trusted)
        stacks = layer_names.stacks_of(model.state_dict(), depth, config.to_dict())
        running, bounds, is_single = _run(model, stacks, tokens)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RefusedError(
            f"transformers cannot run the model without weights: {reason}"
        ) from error
    state = model.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    inside = {*layer_names.within(shapes, stacks, range(depth))}
    tied = names_by_id(model)
    start = min((first for first, _ in bounds.values()), default=0)
    stop = max((last for _, last in bounds.values()), default=len(running.operations))
    return Computation(
        {name: shape for name, shape in shapes.items() if name in inside},
        (*building.operations, *running.operations[:stop]),
        {name: shape for name, shape in shapes.items() if name not in inside},
        {name: frozenset(tied.get(id(tensor), ())) - {name} for name, tensor in state.items()},
        tuple(running.operations[stop:]),
        {
            index: tuple(running.operations[begin:end])
            for index, (begin, end) in bounds.items()
            if is_single
        },
        {
            name: -1 if use < start else int(use >= stop)
            for name, use in running.first_use.items()
            if name not in inside
        },
    )


def names_by_id(model: Any) -> dict[int, list[str]]:
    """Return the names of each parameter by its id; tied parameters have several."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _built(config: Any, recorder: Any, *, trusted: bool) -> Any:
    import torch  # noqa: PLC0415 - takes seconds
    import transformers  # noqa: PLC0415
    from transformers.initialization import no_init_weights  # noqa: PLC0415

    meta_model.leave_out_kernels(config)
    named = meta_model.named_class(config)
    # The eager implementation builds every mask in full, so that its window is seen.
    # The dtype of the weights is not part of the computation.
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    with torch.device("meta"), no_init_weights(), recorder:
        if named is not None:
            model = named._from_config(config, **options)  # noqa: SLF001 - as in `meta_model`
        else:
            make = transformers.AutoModelForCausalLM.from_config
            model = make(config, trust_remote_code=trusted, **options)
    model.tie_weights()
    with suppress(Exception):  # not every class has experts
        model.set_experts_implementation("batched_mm")
    return model.eval()


def _run(
    model: Any, stacks: Collection[str], tokens: int
) -> tuple[Any, Mapping[int, tuple[int, int]], bool]:
    """Run the model.

    Returns:
        The record, the positions of each layer's operations in it, and whether each layer was run
        only once.
    """
    import torch  # noqa: PLC0415

    layers = {
        module: int(name.rpartition(".")[2])
        for name, module in model.named_modules()
        if name.rpartition(".")[0] in stacks and name.rpartition(".")[2].isdigit()
    }
    accepted = inspect.signature(model.forward).parameters
    ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": ids, "use_cache": False}
    given["output_router_logits"] = False  # they are only for a loss
    given = {name: value for name, value in given.items() if name in accepted}
    # First a number is used that shows the scaling of long texts; some classes cannot count so far.
    for number in (2**30, 1):
        recorder = _recorder(names_by_id(model), number)
        runs: dict[int, list[tuple[int, int]]] = {}
        with _bounded(layers, recorder, runs), torch.no_grad(), recorder:
            try:
                model(**given)
            except Exception:
                if number == 1:
                    raise
                continue
        break
    bounds = {index: (found[0][0], found[-1][1]) for index, found in runs.items()}
    return recorder, bounds, all(len(found) == 1 for found in runs.values())


@contextmanager
def _bounded(
    layers: Mapping[Any, int], recorder: Any, runs: dict[int, list[tuple[int, int]]]
) -> Iterator[None]:
    """Note the positions of the operations of each layer, each time that it is run."""
    begun: list[int] = []

    def start(*_: object) -> None:
        begun.append(len(recorder.operations))

    def stop(layer: Any, *_: object) -> None:
        runs.setdefault(layers[layer], []).append((begun.pop(), len(recorder.operations)))

    handles = [layer.register_forward_pre_hook(start) for layer in layers]
    handles += [layer.register_forward_hook(stop) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_ALLOCATIONS = ("aten.empty", "aten.zeros", "aten.ones")
"""Operations without numbers; the shapes of their results are compared by themselves."""


def _plain(value: Any) -> object:
    """Return an argument of an operation without its tensors."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, int | float | bool | str | None):
        return value
    return "tensor" if hasattr(value, "dtype") else str(value)


def _invented(operation: Any, tensor: Any, number: int) -> Any:
    """Return a result for an operation whose result depends on data, or None for any other."""
    import torch  # noqa: PLC0415

    aten = torch.ops.aten
    if operation is aten._local_scalar_dense.default:  # noqa: SLF001
        if tensor.dtype is torch.bool:
            return False
        return 1.0 if tensor.is_floating_point() else number
    if operation is aten.equal.default:
        return True
    if operation is aten.nonzero.default:
        return torch.empty((2, tensor.dim()), dtype=torch.long, device="meta")
    return None


def _recorder(names: Mapping[int, Collection[str]] | None = None, number: int = 1) -> Any:
    """Return a context that records all operations in it.

    Args:
        names: The names of the parameters by id. If None, the model is being built: operations on
            its parameters only set their first values, and are left out.
        number: The whole number that stands for one computed from tokens, such as their count.
    """
    import torch  # noqa: PLC0415
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC0415
    from torch.utils._pytree import tree_leaves  # noqa: PLC0415

    class Recorder(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.operations: list[object] = []
            self.first_use: dict[str, int] = {}
            self._initial: dict[int, Any] = {}

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            for tensor in tensors:
                for name in (names or {}).get(id(tensor), ()):
                    self.first_use.setdefault(name, len(self.operations))
            result = _invented(func, args[0] if args else None, number)
            if result is None:
                result = func(*args, **(kwargs or {}))
            if names is None and any(map(self._is_initial, tensors)):
                self._initial[id(result)] = result
            elif not str(func).startswith(_ALLOCATIONS):
                # The third argument of an embedding is its padding token, for gradients only.
                is_embedding = func is torch.ops.aten.embedding.default
                stated = _plain(args[:2] if is_embedding else args)
                self.operations.append((str(func), stated, _plain(sorted((kwargs or {}).items()))))
            return result

        def _is_initial(self, tensor: Any) -> bool:
            return isinstance(tensor, torch.nn.Parameter) or id(tensor) in self._initial

    return Recorder()
