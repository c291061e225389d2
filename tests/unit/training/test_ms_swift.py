"""The model types and templates of ms-swift, and their derivation from its wheel."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import ms_swift_types
import pytest

from mergekit_interleave.training.trainers import ms_swift

SOURCES = {
    "swift/model/constant.py": "class LLM:\n    a = 'a-type'\n    b = 'b'\n",
    "swift/template/constant.py": "class T:\n    chat = 'chat-ml'\n    old = 'old'\n",
    "swift/model/models/some.py": (
        "register_model(ModelMeta(LLM.a, [ModelGroup([Model('x', 'y')], T.old),\n"
        "    ModelGroup([], template=T.chat)], Loader, architectures=['AForCausalLM']))\n"
        "register_model(ModelMeta(LLM.b, [ModelGroup([])], template=T.chat,\n"
        "    architectures=['AForCausalLM', 'BForCausalLM']))\n"
        "register_model(ModelMeta('c', [], template=T.chat))\n"
    ),
    "swift/model/other.py": "ModelMeta('d', [], architectures=['D'])\n",
}


def test_the_derivation(tmp_path: Path) -> None:
    """The types of each class are read from the calls that register them."""
    wheel = tmp_path / "ms_swift-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, source in SOURCES.items():
            file.writestr(name, source)
    derived = ms_swift_types.derive(wheel)
    assert derived == {
        "release": "1.2.3",
        "classes": {
            "AForCausalLM": {"a-type": ["old", "chat-ml"], "b": ["chat-ml"]},
            "BForCausalLM": {"b": ["chat-ml"]},
        },
    }
    assert json.loads(ms_swift_types.write(derived)) == derived


def test_the_data_is_as_the_tool_writes_it() -> None:
    """The data file is not edited by hand."""
    text = ms_swift_types.DATA.read_text()
    assert ms_swift_types.write(json.loads(text)) == text


@pytest.mark.parametrize(
    ("architecture", "model_type", "expected"),
    [
        ("LlamaForCausalLM", "llama", ("llama", None)),
        ("Qwen2ForCausalLM", "qwen2", ("qwen2", None)),
        ("Gemma2ForCausalLM", "gemma2", ("gemma2", "gemma")),
        ("Gemma3ForCausalLM", "gemma3_text", ("gemma3_text", "gemma3_text")),
        ("GlmForCausalLM", "glm", (None, None)),
        ("Dots1ForCausalLM", "dots1", ("dots1", "dots1")),
        ("UnknownForCausalLM", "llama", (None, None)),
        (None, "llama", (None, None)),
    ],
)
def test_what_a_type_determines(
    architecture: str | None, model_type: str, expected: tuple[str | None, str | None]
) -> None:
    """The type is that of the same name or the only one; the template is the only one."""
    assert ms_swift.fitting(architecture, model_type) == expected
