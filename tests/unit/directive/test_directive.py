"""Files, inline text and flags give one `Directive` or one error."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from directive_texts import BAD_TEXT, GROWTHS
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import Directive, from_flags, load, parse
from mergekit_interleave.directive.growth import (
    Append,
    Every,
    ExplicitSlices,
    Growth,
    Repeat,
    Stack,
)
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import DirectiveError


@pytest.mark.parametrize(("text", "flags", "growth"), GROWTHS, ids=[case[0] for case in GROWTHS])
class TestGrowthLines:
    """Tests of each growth line and the flag with the same meaning."""

    def test_block_style(self, text: str, flags: dict[str, str], growth: Growth) -> None:
        """A growth line is read from a YAML document."""
        del flags
        assert parse(f"{text}\ndtype: bfloat16\n", "x").growth == growth

    def test_one_line(self, text: str, flags: dict[str, str], growth: Growth) -> None:
        """A growth line is read from `key: value, key: value` without braces."""
        del flags
        zero = "none" if growth.damping > 1 else "[a, b]"
        directive = parse(f"model: org/m, {text}, zero: {zero}, dtype: bfloat16", "x")
        assert directive.growth == growth
        assert directive.zero == ("none" if growth.damping > 1 else ("a", "b"))
        assert directive.mergekit == {"dtype": "bfloat16"}
        assert directive.model == ModelRef(ModelPath("org/m"))

    def test_flag(self, text: str, flags: dict[str, str], growth: Growth) -> None:
        """The flag has the same meaning as the growth line."""
        del text
        assert from_flags(**flags).growth == growth

    def test_written_and_read_again(self, text: str, flags: dict[str, str], growth: Growth) -> None:
        """`parse` reads what `to_document` writes."""
        del flags
        directive = parse(f"model: org/m, layers: 32, {text}, zero: none, dtype: float16", "x")
        again = parse(yaml.safe_dump(directive.to_document()), "x")
        assert again == directive
        assert again.growth == growth


class TestDocuments:
    """Tests of valid documents."""

    def test_mergekits_own_keys_pass_through_in_their_order(self) -> None:
        """Mergekit's keys keep their values and their order."""
        text = (
            "tokenizer: {source: union}\nout_dtype: float16\nappend: 1\n"
            "base_model: org/b\nchat_template: auto\nparameters: {scale: 1.5}\n"
        )
        assert list(parse(text, "x").mergekit.items()) == [
            ("tokenizer", {"source": "union"}),
            ("out_dtype", "float16"),
            ("base_model", "org/b"),
            ("chat_template", "auto"),
            ("parameters", {"scale": 1.5}),
        ]

    def test_a_mergekit_config_is_a_directive(self) -> None:
        """The slices of a mergekit config are the directive's growth."""
        slices: Any = [{"sources": [{"model": "m", "layer_range": [0, 2]}]}]
        text = yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": "float16"})
        directive = parse(text, "x")
        assert directive.growth == ExplicitSlices({"slices": slices})
        assert directive.mergekit == {"dtype": "float16"}

    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("interleave: every 4", "auto"),
            ("interleave: after [3]", "auto"),
            ("append: 1", "auto"),
            ("repeat: [0, 2]", "none"),
            ("stack: [[0, 2], [1, 3]]", "none"),
            ("interleave: every 4, zero: none", "none"),
            ("repeat: [0, 2], zero: auto", "auto"),
        ],
    )
    def test_zero_is_auto_for_identities_and_none_for_copies(self, text: str, rule: str) -> None:
        """The default of `zero` depends on the growth line, and a stated `zero` replaces it."""
        assert parse(text, "x").zero_rule == rule

    def test_flags_win(self) -> None:
        """A growth flag replaces the growth line, and other keys are kept."""
        written = parse("model: org/a, interleave: every 4, zero: [x], dtype: float16", "x")
        flags = from_flags(repeat="2:4", model="org/b", dtype="bfloat16")
        assert written.replaced_by(flags) == Directive(
            growth=Repeat((2, 4)),
            model=ModelRef(ModelPath("org/b")),
            zero=("x",),
            mergekit={"dtype": "bfloat16"},
        )

    def test_several_models_by_short_names(self) -> None:
        """`models` is a mapping or a list named a, b, c, and full names work without it."""
        two = [ModelRef(ModelPath("org/m", f"v{i}")) for i in (1, 2)]
        for models in ("{a: org/m@v1, b: org/m@v2}", "[org/m@v1, org/m@v2]"):
            growth = parse(f"models: {models}\nlayout: [a 0:4, b 2:6]", "x").growth
            assert isinstance(growth, Stack)
            assert list(growth.models) == two
        assert growth == parse("layout: [org/m@v1 0:4, org/m@v2 2:6]", "x").growth
        step = "{model: {model: {path: org/m, revision: v2}}, layers: [2, 6]}"
        assert growth == parse(f"layout: [org/m@v1 0:4, {step}]", "x").growth

    @pytest.mark.parametrize(
        "text",
        [
            "layout: [a 0:4, {layers: [a 4:8, b 4:8x2@block], scale: {q_proj: 0.84}}, b 8:end]",
            "layout: [a 0:4, {layers: b -4:end, zero: [o_proj, down_proj]}]",
            "layout: [a windows 4:2@0:8, {model: b, windows: 2:1, zero: auto}]",
            "layout: [{model: a}, {model: b, layers: [0, 50%], times: 2, as: block}]",
            "layout: [a 0:4, {layers: b 4:8, scale: [{filter: q_proj, value: 0.5}]}]",
            "layout: [a 0:4, b 4:8], scale: {q_proj: 0.5}, apply_to: last",
        ],
    )
    def test_steps_written_and_read_again(self, text: str) -> None:
        """`parse` reads the steps that `to_document` writes, in every form."""
        directive = parse(f"models: {{a: org/one, b: org/two}}, {text}", "x")
        assert parse(yaml.safe_dump(directive.to_document()), "x") == directive
        assert parse(yaml_io.write_lines(directive.to_document()), "x") == directive
        assert parse(yaml_io.write_inline(directive.to_document()), "x") == directive

    def test_a_growth_flag_needs_one_model(self) -> None:
        """A growth flag replaces a layout of several models only with a model flag."""
        written = parse("models: {a: org/one, b: org/two}, layout: [a 0:4, b 4:8]", "x")
        with pytest.raises(DirectiveError, match=r"one model.* 2"):
            written.replaced_by(from_flags(every="4"))
        replaced = written.replaced_by(from_flags(every="4", model="org/two"))
        assert replaced == Directive(growth=Every(4), model=ModelRef(ModelPath("org/two")))

    def test_keys_that_mergekit_ignores(self) -> None:
        """A key that mergekit ignores may occur twice and gives one warning that names it."""
        text = (
            "const_tag: &A org/one\nconst_tag: &S 0.5\nslices:\n- sources:\n"
            "  - {model: *A, layer_range: [0, 2], parameters: {scale: *S}}\n"
        )
        directive = parse(text, "x")
        assert isinstance(directive.growth, ExplicitSlices)
        assert "org/one" in str(directive.growth.document)
        assert "0.5" in str(directive.growth.document)
        (warning,) = directive.warnings
        assert "const_tag" in warning
        assert dataclasses.replace(directive, warnings=()) == directive
        assert directive.replaced_by(from_flags(model="org/two")).warnings == (warning,)
        with pytest.raises(DirectiveError, match="`dtype`"):
            parse(f"{text}dtype: float16\ndtype: float16", "x")

    def test_comments_and_blank_lines_may_surround_the_one_line(self) -> None:
        """The one-line form may be in a file with comments and blank lines."""
        text = "# grow it\n\ninterleave: every 4, zero: [o_proj, down_proj] # as published\n"
        assert parse(text, "x").growth == Every(4)


class TestBadInput:
    """Every mistake gives one error with exit code 2 that names the key."""

    @pytest.mark.parametrize(("text", "reason"), BAD_TEXT, ids=[t[:40] for t, _ in BAD_TEXT])
    def test_text(self, text: str, reason: str) -> None:
        """A mistake in a document is refused and named."""
        with pytest.raises(DirectiveError, match=reason) as error:
            parse(text, "the directive")
        assert error.value.exit_code == 2

    @pytest.mark.parametrize(
        ("flags", "reason"),
        [
            ({"every": "banana"}, "every: .*'banana'"),
            ({"every": "0"}, r"every: .*\b1\b.*0$"),
            ({"after": ""}, "after: .*''"),
            ({"after": "3,-1"}, r"after: .*\b0\b.*-1$"),
            ({"after": "3,9,3"}, r"after: .*\b3\b"),
            ({"after": "3:9"}, "after: .*'3:9'"),
            ({"after": "4", "every": "4"}, r"every\b.* and .*after\b"),
            ({"repeat": "24:8"}, r"repeat: \[24, 8\]"),
            ({"repeat": "8"}, "repeat: .*START:STOP.*'8'"),
            ({"repeat": "8:24x1"}, r"repeat\.times: 1\b"),
            ({"repeat": "a 8:24"}, "repeat: .*'a8'"),
            ({"windows": "20"}, "windows: .*'20'"),
            ({"windows": "20:10", "drop": "1:2"}, r"windows\b.* and .*drop\b"),
            ({"drop": "5"}, r"drop: .*\[START, STOP\]"),
            ({"scale": "o_proj=x"}, r"scale\.o_proj: .*'x'"),
            ({"apply_to": "some"}, r"apply.to: .*copies, first, last, all.*'some'"),
            ({"stack": "0:2,2"}, r"stack\[1\]: .*START:STOP.*'2'"),
            ({"every": "4", "append": "2"}, r"every\b.* and .*append\b"),
            ({"zero": ""}, "zero: .*`none`"),
            ({"layers": "many"}, "layers: .*'many'"),
            ({"model": ""}, "model: .*Hub id"),
            ({"dtype": "bfloat"}, "dtype: .*'bfloat'"),
        ],
    )
    def test_flags(self, flags: dict[str, str], reason: str) -> None:
        """A mistake in a flag is refused and named."""
        with pytest.raises(DirectiveError, match=reason) as error:
            from_flags(**flags)
        assert error.value.exit_code == 2

    def test_only_a_repeat_is_damped(self) -> None:
        """`damped` modifies the repeat of the flags or of the directive, and is true or false."""
        damped = from_flags(damped="true")
        repeat = Repeat((0, 2), damped=True)
        assert parse("repeat: [0, 2]", "").replaced_by(damped).growth == repeat
        assert damped.replaced_by(from_flags(repeat="0:2")).damped
        with pytest.raises(DirectiveError, match=r"^damped: "):
            parse("append: 1", "").replaced_by(damped)
        with pytest.raises(DirectiveError, match=r"^damped: "):
            from_flags(damped="true", every="4")
        with pytest.raises(DirectiveError, match=r"^damped: .*'maybe'"):
            from_flags(repeat="0:2", damped="maybe")
        assert from_flags(repeat="0:2", damped="false").growth == Repeat((0, 2))

    def test_the_hint_for_two_growth_flags_names_both(self) -> None:
        """The hint says to keep one of the two flags."""
        with pytest.raises(DirectiveError) as error:
            from_flags(every="5", append="2")
        assert "keep" in str(error.value.hint)
        assert {"--every", "--append"} <= set(str(error.value.hint).split())

    @pytest.mark.parametrize(
        ("text", "right"), [("repeat: [12, 8]", "[8, 12]"), ("repeat: 50%:25%", "25%:50%")]
    )
    def test_the_hint_for_a_reversed_range_is_the_right_range(self, text: str, right: str) -> None:
        """The hint has the form in which the range was written."""
        with pytest.raises(DirectiveError, match="reversed") as error:
            parse(text, "x")
        assert right in str(error.value.hint)

    def test_a_typo_gets_a_suggestion(self) -> None:
        """The hint suggests the right key or dtype."""
        with pytest.raises(DirectiveError) as error:
            parse("interleave: every 4, zeros: auto", "x")
        assert "`zero`" in str(error.value.hint)
        with pytest.raises(DirectiveError) as error:
            parse("append: 1, dtype: bf16", "x")
        assert "bfloat16" in str(error.value.hint)
        assert "float32" not in str(error.value.hint)

    @given(st.text(max_size=60) | st.from_regex(r"(interleave|repeat|stack|zero): .{0,40}"))
    def test_any_text_is_a_directive_or_an_error(self, text: str) -> None:
        """No text raises another exception than DirectiveError."""
        with contextlib.suppress(DirectiveError):
            assert isinstance(parse(text, "x"), Directive)


class TestLoad:
    """Tests of the three sources: a file, standard input and inline text."""

    def test_a_file_wins_over_inline_text(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An existing file is read even if its name is a valid directive."""
        monkeypatch.chdir(tmp_path)
        Path("append: 1").write_text("append: 7")
        assert load("append: 1", io.StringIO()).growth == Append(7)
        assert load("append: 2", io.StringIO()).growth == Append(2)

    def test_standard_input(self) -> None:
        """`-` reads standard input."""
        assert load("-", io.StringIO("append: 3")).growth == Append(3)

    def test_text_without_a_colon_is_a_missing_file(self) -> None:
        """Text without a colon is a missing file, and the error names it."""
        with pytest.raises(DirectiveError, match=r"recipe\.yml: "):
            load("recipe.yml", io.StringIO())

    @pytest.mark.parametrize(
        ("text", "right"),
        [
            ("interleave every 5", "interleave: every 5"),
            ("interleave:every 5", "interleave: every 5"),
            ("interleave after [3, 9]", "interleave: after [3, 9]"),
            ("repeat 8:24", "repeat: 8:24"),
            ("zero:none", "zero: none"),
        ],
    )
    def test_a_missing_colon_is_named(self, text: str, right: str) -> None:
        """The hint for inline text without a colon and a space shows the right text."""
        with pytest.raises(DirectiveError, match=re.escape(repr(text))) as error:
            load(text, io.StringIO())
        assert f"'{right}'" in str(error.value.hint)

    def test_a_file_name_gets_no_hint_about_colons(self) -> None:
        """A name that does not start with a key is taken as the name of a missing file."""
        with pytest.raises(DirectiveError, match=r"notes/repeat 8") as error:
            load("notes/repeat 8", io.StringIO())
        assert error.value.hint is None

    def test_a_directory(self, tmp_path: Path) -> None:
        """A directory is refused, and the hint names the flag that accepts it."""
        with pytest.raises(DirectiveError, match=re.escape(f"{tmp_path}: ")) as error:
            load(str(tmp_path), io.StringIO())
        assert "--model" in str(error.value.hint)

    def test_a_binary_file(self, tmp_path: Path) -> None:
        """A file that is not UTF-8 is refused."""
        (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DirectiveError, match=re.escape(f"{tmp_path}/x: ") + ".*UTF-8"):
            load(str(tmp_path / "x"), io.StringIO())

    def test_inline_text_may_be_long(self) -> None:
        """Inline text may be longer than the longest file name."""
        names = ", ".join(f"name{i}" for i in range(2000))
        assert len(directives.load(f"append: 1, zero: [{names}]", io.StringIO()).zero or ()) == 2000
