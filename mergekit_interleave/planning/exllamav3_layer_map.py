"""Convert a layout to exllamav3's `layer_map`, the order in which it runs the layers of a model.

exllamav3 builds the modules of the base, also of layers that the map leaves out, and runs them in
the order of the map; everything before and after the layers runs once. Each occurrence of a layer
has its own cache. A layer keeps its kind, such as sliding attention, because it is built from the
base's config.json. The facts are from the source of exllamav3 1.4.1 (`Config`,
`Model.prepare_layer_map`, `prefill_ls`, `_load_autosplit`, `parse_int_list`):

- A range includes its end: `0..15,11..31` are the layers 0 to 15, and then 11 to 31.
- A prompt passes only the layers up to the last occurrence of the base's last layer. The cache of
  later ones stays empty.
- The default loader runs each layer once with the cache. It fails at a layer without one, which is
  a layer that the map leaves out.
- The map also applies to a vision tower or an MTP module of the same checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout.layout import Slice
from mergekit_interleave.planning import mergekit_support, plain_layers
from mergekit_interleave.planning.resolve import Expansion

CLASSES = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Afmoe", "Apertus", "Arcee", "Cohere", "Cohere2", "Dots1", "Ernie4_5_Moe", "Exaone4",
        "Gemma2", "Gemma3", "Glm4", "Glm4Moe", "GptOss", "HyperCLOVAX", "Laguna", "Llama",
        "MiniMaxM2", "Ministral3", "Mistral", "Mixtral", "Olmo3", "Phi3", "Qwen2", "Qwen3",
        "Qwen3Moe", "SeedOss", "SmolLM3", "SolarOpen",
    )
)  # fmt: skip
"""The classes in `architectures` of config.json that exllamav3 1.4.1 builds as text models, whose
layers are attention with an MLP or experts, and pass nothing but the hidden state to each other.

Left out are linear attention, Mamba, convolutions, MLA, and classes with another module, whose
repeated layers were not followed through the source.
"""

_TOOL = "exllamav3's layer_map"


def layer_map(expansion: Expansion) -> str:
    """Return the `layer_map` of a layout, as one line.

    Args:
        expansion: The directive and its layout.

    Raises:
        RefusedError: exllamav3 would compute something else, or was not checked for the class.
    """
    ranges = plain_layers.ranges(expansion, _TOOL)
    mergekit_support.placed_keys(expansion)  # refuses what no config.json can represent
    reason = _reason_against(expansion)
    if reason is not None:
        raise RefusedError(f"{_TOOL} cannot {reason}", hint=plain_layers.BY_RUN)
    return written(ranges) + "\n"


def written(ranges: Iterable[Slice]) -> str:
    """Return ranges of layers in the form of `layer_map`, whose ranges include their ends."""
    bounds = ((part.start, part.stop - 1) for part in ranges)
    return ",".join(f"{first}..{last}" if first < last else f"{first}" for first, last in bounds)


def _reason_against(expansion: Expansion) -> str | None:
    """Return what exllamav3 cannot do, as words that follow `cannot`; None if it can."""
    first = expansion.first
    if first is None:
        return f"be checked for {expansion.layout.models[0]}, whose config.json cannot be read"
    name = _class_of(first)
    if name not in CLASSES:
        return f"be relied on for class {name}, which was not checked in its source"
    depth, sources = first.depth, [layer.source for layer in expansion.layout.layers]
    missing = sorted({*range(depth)} - {*sources})
    if missing:
        return (
            f"leave out layer {missing[0]}: the loader runs every layer once with a cache, and "
            "this layer has none"
        )
    if sources[-1] != depth - 1:
        return (
            f"end with layer {sources[-1]}: a prompt fills the cache only up to the last "
            f"occurrence of layer {depth - 1}, the last layer of the base"
        )
    return None


def _class_of(model: Checkpoint) -> str | None:
    """Return the class that exllamav3 builds, which config.json must state; None if it does not."""
    named = model.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and len(named) == 1 else None
