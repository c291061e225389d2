"""Compute the scores of many layouts of one loaded model, layer by layer.

The model's own forward pass runs once per batch. It gives the first state and, for each layer, the
arguments beside the state: masks, positions and what else the model's type passes. Then each layer
is applied to the states of all layouts that pass it next. A layout shares the states of its
beginning with the others. For the last state of a layout, the forward pass of the model runs with
its layers left out, which applies the final norm, the head and what else the type does.

This is right for models whose layers pass nothing but the state to each other. `agreement` measures
whether it is.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.scanning import likelihood, paths
from mergekit_interleave.scanning.batches import Batch
from mergekit_interleave.scanning.paths import Node, Path, Step

Tick = Callable[[int], object]


class NotLayerMajorError(Exception):
    """The layers of a model pass more than a state to each other."""


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
        edited: The layers for steps that edit weights.
        at_work: Returns a context in which a layer can be applied.
    """

    model: Any
    edited: Mapping[Step, Any] = field(default_factory=dict)
    at_work: Callable[[Any], AbstractContextManager[object]] = nullcontext

    @cached_property
    def layers(self) -> list[Any]:
        """The layers.

        Raises:
            NotLayerMajorError: They are not one stack of modules.
        """
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        depth = self.model.config.get_text_config().num_hidden_layers
        try:
            stacks = layer_names.stacks_of(names, depth, self.model.config.to_dict())
        except RefusedError as error:
            raise NotLayerMajorError(str(error)) from error
        if len(stacks) > 1:
            raise NotLayerMajorError(f"the layers are spread over {' and '.join(stacks)}")
        return [self.model.get_submodule(f"{stacks[0]}.{index}") for index in range(depth)]

    @cached_property
    def _forwards(self) -> list[Callable[..., Any]]:
        return [layer.forward for layer in self.layers]

    @cached_property
    def _returns(self) -> list[int | None]:
        """How many values each layer returns in a tuple; None if it returns the state alone."""
        import torch  # noqa: PLC0415 - takes seconds to import

        found: dict[int, int | None] = {}

        def note(index: int) -> Callable[..., None]:
            def hook(_: Any, __: Any, result: Any) -> None:
                found[index] = len(result) if isinstance(result, tuple) else None

            return hook

        hooks = [
            layer.register_forward_hook(note(index)) for index, layer in enumerate(self.layers)
        ]
        try:
            with torch.inference_mode():
                self.model(
                    torch.zeros((1, 2), dtype=int, device=self.model.device), use_cache=False
                )
        finally:
            for hook in hooks:
                hook.remove()
        return [found[index] for index in range(len(self.layers))]

    def scores(
        self, batch: Batch, wanted: Mapping[int, Path], tick: Tick = lambda _: None
    ) -> dict[int, list[float]]:
        """Return the scores of each sequence of a batch for each path.

        Args:
            batch: The sequences.
            wanted: The paths by number.
            tick: Called with the number of layers that were computed.

        Raises:
            NotLayerMajorError: The layers pass more than a state to each other.
        """
        import torch  # noqa: PLC0415 - takes seconds to import

        found: dict[int, list[float]] = {}
        with torch.inference_mode(), self._taken_apart() as parts:
            tokens = torch.tensor(batch.rows(), device=self.model.device)
            first, calls = parts.calls_of(tokens)
            for ends, state in self._walk(paths.tree(wanted), first, calls, tick):
                scores = likelihood.scores(self.model, batch, parts.ending_with(state))
                found.update(dict.fromkeys(ends, scores))
        return found

    def _walk(
        self, nodes: Mapping[Step, Node], first: Any, calls: Sequence[_Call], tick: Tick
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
                            tick(1)
                            for child in node.children.values():
                                waiting[child.step].append((child, after))
                            if node.ends:
                                yield node.ends, after
                    del waiting[step]

    @contextmanager
    def _taken_apart(self) -> Iterator[_Parts]:
        """Let the model's forward pass leave out its layers within the block."""
        parts = _Parts(self.model, self._returns)
        forwards = self._forwards
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = parts.stand_in(index, type(layer))
            yield parts
        finally:
            for layer, forward in zip(self.layers, forwards, strict=True):
                del layer.forward  # the one of its class is behind it
                if layer.forward != forward:
                    layer.forward = forward


class _Parts:
    """What a model computes before and after its layers."""

    def __init__(self, model: Any, returns: Sequence[int | None]) -> None:
        self._model = model
        self._returns = returns
        self._calls: dict[int, _Call] = {}
        self._states: list[Any] = []
        self._last: Any = None

    def stand_in(self, index: int, own: type) -> Callable[..., Any]:
        """Return the forward pass of a layer that returns its state."""
        name = _first_parameter(own)

        def forward(*arguments: Any, **keywords: Any) -> Any:
            key = None if arguments else name
            state = keywords.pop(key) if key else arguments[0]
            if self._last is None:
                if index in self._calls:
                    raise NotLayerMajorError(f"layer {index} is applied more than once")
                if self._states and self._states[-1] is not state:
                    raise NotLayerMajorError(f"the state changes before layer {index}")
                self._calls[index] = _Call(arguments[1:], keywords, key)
                self._states.append(state)
            elif index == 0:
                state = self._last
            count = self._returns[index]
            return state if count is None else (state, *[None] * (count - 1))

        return forward

    def calls_of(self, tokens: Any) -> tuple[Any, list[_Call]]:
        """Return the state before the first layer, and how the model calls each layer.

        Raises:
            NotLayerMajorError: It calls one not at all, or more than once.
        """
        self._last = None
        self._calls, self._states = {}, []
        self._model(input_ids=tokens, use_cache=False)
        if [*self._calls] != [*range(len(self._returns))]:
            raise NotLayerMajorError("the layers are not applied one after another")
        return self._states[0], [*self._calls.values()]

    def ending_with(self, state: Any) -> Callable[..., Any]:
        """Return a forward pass that applies what follows the layers to rows of a state."""

        def forward(rows: slice, tokens: Any, **options: Any) -> Any:
            self._last = state[rows]
            return self._model(input_ids=tokens, use_cache=False, **options).logits

        return forward


def _first_parameter(own: type) -> str:
    return [*inspect.signature(own.forward).parameters][1]  # type: ignore[attr-defined]
