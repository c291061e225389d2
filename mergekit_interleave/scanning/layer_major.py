"""Compute the scores of many layouts of one loaded model, layer by layer.

The model's own forward pass runs once per batch. It gives the first state and, for each layer, the
arguments beside the state: masks, positions and what else the model's type passes. Then each layer
is applied to the states of all layouts that pass it next. A layout shares the states of its
beginning with the others. For the last state of a layout, the forward pass of the model runs with
its layers left out, which applies the final norm, the head and what else the type does.

This is right for models whose layers pass nothing but the state to each other. `LayerMajor.check`
finds out whether they do.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.scanning import likelihood, paths
from mergekit_interleave.scanning.batches import Batch
from mergekit_interleave.scanning.paths import Node, Path, Step
from mergekit_interleave.virtual.model import layers_of


class NotLayerMajorError(Exception):
    """The layers of a model cannot be applied one by one."""


_WITHHELD = object()
"""What a layer that is left out returns beside the state, where the layer itself returns something.
No other layer may be given it."""

_ROUNDING = 16
"""The largest difference that is due to rounding, in units of the last place of the largest number
of a state."""


@dataclass(frozen=True)
class _Call:
    """How a model calls one of its layers, beside the state.

    Attributes:
        arguments: The arguments after the state.
        keywords: The keyword arguments.
        key: The keyword of the state; None if it is the first argument.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    key: str | None

    def apply(self, forward: Callable[..., Any], state: Any) -> Any:
        """Apply a layer to a state, and return the next state."""
        if self.key is None:
            found = forward(state, *self.arguments, **self.keywords)
        else:
            found = forward(*self.arguments, **{self.key: state}, **self.keywords)
        return found[0] if isinstance(found, tuple) else found


@dataclass
class LayerMajor:
    """A loaded model, taken apart.

    Attributes:
        model: The model.
        depth: Its number of layers.
        edited: The layers for steps that edit weights.
        at_work: Returns a context in which a layer can be applied.
        most: The maximum bytes of states and logits; None for any number. One layout is always
            computed.
    """

    model: Any
    depth: int
    edited: Mapping[Step, Any] = field(default_factory=dict)
    at_work: Callable[[Any], AbstractContextManager[object]] = nullcontext
    most: int | None = None

    @cached_property
    def layers(self) -> list[Any]:
        """The layers.

        Raises:
            NotLayerMajorError: They are not one stack of modules.
        """
        try:
            stacks = layers_of(self.model, self.depth)
        except RefusedError as error:
            raise NotLayerMajorError(str(error)) from error
        if len(stacks) > 1:
            raise NotLayerMajorError(f"the layers are spread over {' and '.join(stacks)}")
        (layers,) = stacks.values()
        return layers

    @cached_property
    def _forwards(self) -> list[Callable[..., Any]]:
        return [layer.forward for layer in self.layers]

    @cached_property
    def _beside(self) -> list[tuple[Any, ...] | None]:
        """What each layer returns beside the state if it is left out; None if nothing.

        Raises:
            NotLayerMajorError: A layer is not applied to text, or returns something else.
        """
        import torch  # noqa: PLC0415 - takes seconds to import

        found: dict[int, Any] = {}

        def note(index: int) -> Callable[..., None]:
            def hook(_: Any, __: Any, result: Any) -> None:
                found[index] = _form(result)

            return hook

        hooks = [
            layer.register_forward_hook(note(index)) for index, layer in enumerate(self.layers)
        ]
        tokens = torch.zeros((1, 2), dtype=int, device=self.model.device)
        try:
            with torch.inference_mode():
                self.model(input_ids=tokens, use_cache=False)
        finally:
            for each in hooks:
                each.remove()
        for index in range(self.depth):
            if index not in found:
                raise NotLayerMajorError(f"layer {index} is not applied to text")
            if isinstance(found[index], str):
                raise NotLayerMajorError(f"layer {index} returns a {found[index]}")
        return [found[index] for index in range(self.depth)]

    def check(self, batch: Batch) -> None:
        """Find out whether what each layer computes depends on its state alone.

        Each layer is applied to its own state, in reverse order and after all layers were applied
        to other states. So a layer that reads what another one left behind computes something else.

        Raises:
            NotLayerMajorError: It does not.
        """
        import torch  # noqa: PLC0415 - takes seconds to import

        self._check_weights()
        with torch.inference_mode(), self._taken_apart() as parts:
            tokens = torch.tensor(batch.rows(), device=self.model.device)
            first, calls = parts.calls_of(tokens)
            for index, call in enumerate(calls):
                if any(each is _WITHHELD for each in _leaves((call.arguments, call.keywords))):
                    raise NotLayerMajorError(f"layer {index} is given more than a state")
            state, states = first, [first.clone()]
            for index, call in enumerate(calls):
                state = self._applied(index, call, state)
                states.append(state.clone())
            backwards = [*reversed(range(self.depth))]
            for index, other in zip(backwards, range(self.depth), strict=True):
                self._applied(index, calls[index], states[other].clone())
            for index in backwards:
                own = states[index].clone()
                if not _is_same(self._applied(index, calls[index], own), states[index + 1]):
                    raise NotLayerMajorError(f"layer {index} depends on more than its state")
                if not _is_same(own, states[index]):
                    raise NotLayerMajorError(f"layer {index} changes the state that it is given")

    def _check_weights(self) -> None:
        """Check that no layer uses the weights of another, without which it cannot be written."""
        owners: dict[int, int] = {}
        for index, layer in enumerate(self.layers):
            for parameter in layer.parameters():
                owner = owners.setdefault(id(parameter), index)
                if owner != index:
                    raise NotLayerMajorError(f"layers {owner} and {index} share their weights")

    def _applied(self, index: int, call: _Call, state: Any) -> Any:
        with self.at_work(self.layers[index]):
            return call.apply(self._forwards[index], state)

    def scores(self, batch: Batch, wanted: Mapping[int, Path]) -> dict[int, list[float]]:
        """Return the scores of each sequence of a batch for each path.

        Args:
            batch: The sequences.
            wanted: The paths by number.

        Raises:
            NotLayerMajorError: The layers pass more than a state to each other.
        """
        import torch  # noqa: PLC0415 - takes seconds to import

        found: dict[int, list[float]] = {}
        with torch.inference_mode(), self._taken_apart() as parts:
            tokens = torch.tensor(batch.rows(), device=self.model.device)
            first, calls = parts.calls_of(tokens)
            numbers, at_once = [*wanted], len(wanted)
            if self.most is not None:
                at_once = (self.most - likelihood.room(self.most)) // first.nbytes
            for group in paths.groups(len(numbers), max(1, at_once)):
                nodes = paths.tree({numbers[at]: wanted[numbers[at]] for at in group})
                for ends, state in self._walk(nodes, first, calls):
                    scores = likelihood.scores(
                        self.model, batch, parts.ending_with(state), self.most
                    )
                    found.update(dict.fromkeys(ends, scores))
        return found

    def _walk(
        self, nodes: Mapping[Step, Node], first: Any, calls: Sequence[_Call]
    ) -> Iterator[tuple[list[int], Any]]:
        """Yield the last state of each path.

        Each round over the layers applies each of them to all states that wait for it.
        """
        waiting: defaultdict[Step, list[tuple[Node, Any]]] = defaultdict(list)
        for step, node in nodes.items():
            waiting[step].append((node, first))
        while waiting:
            for index, call in enumerate(calls):
                for step in [step for step in waiting if step.source == index]:
                    states = waiting[step]
                    layer = self.edited[step] if step.edit else self.layers[index]
                    forward = layer.forward if step.edit else self._forwards[index]
                    with self.at_work(layer):
                        while states:
                            node, state = states.pop()
                            after = call.apply(forward, state)
                            for child in node.children.values():
                                waiting[child.step].append((child, after))
                            if node.ends:
                                yield node.ends, after
                    del waiting[step]

    @contextmanager
    def _taken_apart(self) -> Iterator[_Parts]:
        """Let the model's forward pass leave out its layers within the block."""
        parts = _Parts(self.model, self._beside)
        own = [vars(layer).get("forward") for layer in self.layers]  # the one of a class is not
        names = [_first_parameter(forward) for forward in self._forwards]
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = parts.stand_in(index, names[index])
            yield parts
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                vars(layer).pop("forward", None)
                if forward is not None:
                    layer.forward = forward


class _Parts:
    """What a model computes before and after its layers."""

    def __init__(self, model: Any, beside: Sequence[tuple[Any, ...] | None]) -> None:
        self._model = model
        self._beside = beside
        self._calls: dict[int, _Call] = {}
        self._states: list[Any] = []
        self._last: Any = None

    def stand_in(self, index: int, name: str) -> Callable[..., Any]:
        """Return the forward pass of a layer that returns its state.

        Args:
            index: The index of the layer.
            name: The name of its first parameter.
        """

        def forward(*arguments: Any, **keywords: Any) -> Any:
            key = None if arguments else name
            state = arguments[0] if arguments else keywords.pop(name, None)
            if self._last is None:
                self._note(index, _Call(arguments[1:], keywords, key), state)
            elif index == 0:
                state = self._last
            beside = self._beside[index]
            return state if beside is None else (state, *beside)

        return forward

    def _note(self, index: int, call: _Call, state: Any) -> None:
        if not hasattr(state, "shape"):
            raise NotLayerMajorError(f"layer {index} is given a state that is not a tensor")
        if index in self._calls:
            raise NotLayerMajorError(f"layer {index} is applied more than once")
        if self._states and self._states[-1] is not state:
            raise NotLayerMajorError(f"the state changes before layer {index}")
        self._calls[index] = call
        self._states.append(state)

    def calls_of(self, tokens: Any) -> tuple[Any, list[_Call]]:
        """Return the state before the first layer, and how the model calls each layer.

        Raises:
            NotLayerMajorError: It calls one not at all, or more than once.
        """
        self._last = None
        self._calls, self._states = {}, []
        self._model(input_ids=tokens, use_cache=False)
        if [*self._calls] != [*range(len(self._beside))]:
            raise NotLayerMajorError("the layers are not applied one after another")
        if len(self._states[0]) != len(tokens):
            raise NotLayerMajorError("the first axis of a state is not that of the sequences")
        return self._states[0], [*self._calls.values()]

    def ending_with(self, state: Any) -> Callable[..., Any]:
        """Return a forward pass that applies what follows the layers to rows of a state."""

        def forward(rows: slice, tokens: Any, **options: Any) -> Any:
            self._last = state[rows]
            return self._model(input_ids=tokens, use_cache=False, **options).logits

        return forward


def _first_parameter(forward: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(forward).parameters), "")


def _form(result: Any) -> Any:
    """Return what stands for the values beside the state, or the name of an unknown type."""
    if type(result) is tuple:
        return tuple(None if each is None else _WITHHELD for each in result[1:])
    return None if hasattr(result, "shape") else type(result).__name__


def _leaves(values: Any) -> Iterator[Any]:
    """Yield the values in nested containers."""
    if isinstance(values, Mapping):
        values = [*values.values()]
    if not isinstance(values, list | tuple):
        yield values
        return
    for each in values:
        yield from _leaves(each)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two states are the same but for rounding."""
    import torch  # noqa: PLC0415 - takes seconds to import

    most = _ROUNDING * torch.finfo(other.dtype).eps * float(other.abs().max().nan_to_num())
    return bool(torch.allclose(one, other, rtol=0, atol=most, equal_nan=True))
