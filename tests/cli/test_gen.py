"""Test `gen`: every way to pass a directive, and every place that a model can come from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness import Cli, Result, make_llama
from mergekit.config import MergeConfiguration

EXAMPLES = Path(__file__).parents[2] / "examples"
ZEROED = {
    "scale": [
        {"filter": "o_proj", "value": 0.0},
        {"filter": "down_proj", "value": 0.0},
        {"value": 1.0},
    ]
}


def slices(text: str) -> list[tuple[str, list[int], object]]:
    """Check that mergekit accepts the YAML, and return its slices: model, range, parameters."""
    document = yaml.safe_load(text)
    MergeConfiguration.model_validate(yaml.safe_load(text))
    assert document["merge_method"] == "passthrough"
    sources = [source for entry in document["slices"] for source in entry["sources"]]
    return [(s["model"], s["layer_range"], s.get("parameters")) for s in sources]


def ranges(result: Result) -> list[list[int]]:
    """Return the layer ranges that `gen` wrote."""
    assert result.status == 0, result.err
    return [bounds for _, bounds, _ in slices(result.out)]


def config_only(path: Path, layers: int = 32, **config: object) -> Path:
    """Create a model directory with a config and no weights."""
    path.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "mistral", "num_hidden_layers": layers, **config}
    (path / "config.json").write_text(json.dumps(content))
    return path


OPENCHAT = [
    ("openchat/openchat-3.5-0106", bounds, parameters)
    for i in range(0, 32, 4)
    for bounds, parameters in (([i, i + 4], None), ([i + 3, i + 4], ZEROED))
]
CATPPT = [
    ("rishiraj/CatPPT-base", bounds, None)
    for bounds in [[0, 8], *([i, i + 1] for i in range(8, 24) for _ in range(2)), [24, 32]]
]
PUBLISHED = [
    pytest.param(
        "openchat-block-expansion",
        "model: openchat/openchat-3.5-0106, interleave: every 4, zero: [o_proj, down_proj], "
        "dtype: bfloat16",
        ["--model", "openchat/openchat-3.5-0106", "--every", "4", "--zero", "o_proj,down_proj"],
        OPENCHAT,
        id="openchat",
    ),
    pytest.param(
        "catppt-interwoven",
        "model: rishiraj/CatPPT-base, repeat: [8, 24], dtype: bfloat16",
        ["--model", "rishiraj/CatPPT-base", "--repeat", "8:24"],
        CATPPT,
        id="catppt",
    ),
]


@pytest.mark.parametrize(("example", "inline", "flags", "expected"), PUBLISHED)
class TestPublished:
    """`gen` reproduces the two published configurations slice for slice."""

    def test_from_every_input(
        self, mk: Cli, example: str, inline: str, flags: list[str], expected: list[object]
    ) -> None:
        """A file, standard input, inline text and flags give the same bytes."""
        file = EXAMPLES / f"{example}.yml"
        results = [
            mk("gen", file, "--layers", "32"),
            mk("gen", "-", "--layers", "32", stdin=file.read_text()),
            mk("gen", inline, "--layers", "32"),
            mk("gen", *flags, "--dtype", "bfloat16", "--layers", "32"),
        ]
        assert {result.status for result in results} == {0}
        assert {result.out for result in results} == {results[0].out}
        assert slices(results[0].out) == expected
        assert yaml.safe_load(results[0].out)["dtype"] == "bfloat16"

    def test_the_expanded_yaml_beside_the_example_is_current(
        self, mk: Cli, example: str, inline: str, flags: list[str], expected: list[object]
    ) -> None:
        """The YAML file beside the example is what `gen` writes."""
        del inline, flags, expected
        written = mk("gen", EXAMPLES / f"{example}.yml", "--layers", "32").out
        assert written == (EXAMPLES / f"{example}.mergekit.yml").read_text()


def test_the_published_sizes() -> None:
    """The published configurations have 16 and 34 slices, as their cards show."""
    assert (len(OPENCHAT), len(CATPPT)) == (16, 34)


class TestFindingTheModel:
    """`gen` looks for the model in the documented places, in the documented order."""

    def test_the_current_directory_by_its_absolute_path(self, mk: Cli, tiny: Path) -> None:
        """If the model is the current directory, `gen` writes its absolute path."""
        result = mk("gen", "--every", "4", cwd=tiny)
        assert {model for model, _, _ in slices(result.out)} == {str(tiny)}
        assert result.err == ""

    def test_the_environment_wins_over_the_current_directory(
        self, mk: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """MK_INTERLEAVE_MODEL overrides the current directory, and a named model overrides both."""
        monkeypatch.setenv("MK_INTERLEAVE_MODEL", str(config_only(tmp_path / "env", 4)))
        assert len(ranges(mk("gen", "--every", "4", cwd=tiny))) == 2
        named = config_only(tmp_path / "named", 12)
        assert len(ranges(mk("gen", "--every", "4", "--model", named, cwd=tiny))) == 6
        assert len(ranges(mk("gen", f"append: 1, model: {named}", cwd=tiny))) == 2
        other = config_only(tmp_path / "other", 16)
        result = mk("gen", f"interleave: every 4, model: {named}", "--model", other, cwd=tiny)
        assert len(ranges(result)) == 8

    def test_interleave_yml_where_there_is_no_checkpoint(self, mk: Cli, tmp_path: Path) -> None:
        """interleave.yml names the model, and is the directive if no other is given."""
        config_only(tmp_path / "base", 8)
        (tmp_path / "interleave.yml").write_text("model: base\ninterleave: every 4\n")
        assert ranges(mk("gen", cwd=tmp_path)) == [[0, 4], [3, 4], [4, 8], [7, 8]]
        assert ranges(mk("gen", "--append", "1", cwd=tmp_path)) == [[0, 8], [7, 8]]
        assert ranges(mk("gen", "append: 1", cwd=tmp_path)) == [[0, 8], [7, 8]]

    def test_interleave_yml_may_be_a_mergekit_config(self, mk: Cli, tmp_path: Path) -> None:
        """If interleave.yml is a mergekit config, `gen` prints it and refuses --zero."""
        base = config_only(tmp_path / "base", 8)
        text = mk("gen", "--append", "1", "--model", base).out
        (tmp_path / "interleave.yml").write_text(text)
        assert mk("gen", cwd=tmp_path).out == text
        result = mk("gen", "--zero", "none", cwd=tmp_path)
        assert result.status == 2
        assert "--zero" in result.err

    def test_no_model_anywhere(self, mk: Cli, tmp_path: Path) -> None:
        """The error for a missing model lists all ways to name one."""
        result = mk("gen", "--every", "4", cwd=tmp_path)
        assert result.status == 2
        assert result.err.startswith("error: no model: ")
        for way in ("model:", "--model", "MK_INTERLEAVE_MODEL", "directory", "interleave.yml"):
            assert way in result.err

    def test_relative_names_are_kept_as_written(self, mk: Cli, tmp_path: Path) -> None:
        """`gen` writes a relative path exactly as the user wrote it."""
        config_only(tmp_path / "base", 8)
        result = mk("gen", "--append", "1", "--model", "./base/", cwd=tmp_path)
        assert {model for model, _, _ in slices(result.out)} == {"./base/"}

    def test_a_path_that_mergekit_would_misread(self, mk: Cli, tmp_path: Path) -> None:
        """`gen` writes a path that contains + or @ as a mapping."""
        base = config_only(tmp_path / "a+b@c", 8)
        result = mk("gen", "--append", "1", "--model", base)
        source = yaml.safe_load(result.out)["slices"][0]["sources"][0]
        assert source["model"] == {"model": {"path": str(base)}}
        config = MergeConfiguration.model_validate(yaml.safe_load(result.out))
        assert config.slices is not None
        assert config.slices[0].sources[0].model.model.path == str(base)

    def test_flags_replace_the_growth_line(self, mk: Cli, tmp_path: Path) -> None:
        """A growth flag replaces the growth line and keeps the rest of the directive."""
        base = config_only(tmp_path / "base", 8)
        text = f"model: {base}, interleave: every 4, dtype: float16"
        result = mk("gen", text, "--append", "1")
        assert ranges(result) == [[0, 8], [7, 8]]
        assert yaml.safe_load(result.out)["dtype"] == "float16"

    def test_a_mergekit_config_comes_out_as_it_is(self, mk: Cli, tmp_path: Path) -> None:
        """`gen` copies a mergekit config unchanged; a growth flag replaces its slices."""
        base = config_only(tmp_path / "base", 8)
        first = mk("gen", "--every", "4", "--model", base, "--dtype", "float16").out
        assert mk("gen", "-", stdin=first).out == first
        result = mk("gen", "-", "--append", "1", stdin=first)
        assert ranges(result) == [[0, 8], [7, 8]]

    def test_a_growth_flag_beside_a_mergekit_config(
        self, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """A growth flag uses the config's only model, and is refused if the config names two."""
        one, two = config_only(tmp_path / "one", 4), config_only(tmp_path / "two", 6)
        text = f"models: [{{model: {one}}}]"
        result = mk("gen", "-", "--every", "2", cwd=tiny, stdin=text)
        assert {model for model, _, _ in slices(result.out)} == {str(one)}
        both = "\n".join(f"- sources: [{{model: {m}, layer_range: [0, 2]}}]" for m in (one, two))
        result = mk("gen", "-", "--every", "2", cwd=tiny, stdin=f"slices:\n{both}\n")
        assert result.status == 2
        assert "mergekit config" in result.err
        assert "--model" in result.err

    def test_model_takes_the_place_of_the_only_one_everywhere(
        self, mk: Cli, tmp_path: Path
    ) -> None:
        """--model also replaces base_model and the tokenizer source, and needs no old model."""
        new = config_only(tmp_path / "new", 8)
        text = (
            "slices: [{sources: [{model: /nowhere/old, layer_range: [0, 8]}]}]\n"
            "base_model: /nowhere/old\ntokenizer_source: /nowhere/old\n"
        )
        result = mk("gen", "-", "--model", new, stdin=text)
        assert result.status == 0, result.err
        assert "nowhere" not in result.out

    def test_interleave_yml_is_taken_whole(self, mk: Cli, tmp_path: Path) -> None:
        """If interleave.yml names the model, its other keys apply as well."""
        config_only(tmp_path / "base", 8)
        (tmp_path / "interleave.yml").write_text("model: base\nappend: 1\ndtype: bfloat16\n")
        text = mk("gen", "--every", "4", cwd=tmp_path).out
        assert yaml.safe_load(text)["dtype"] == "bfloat16"


class TestDepth:
    """`gen` needs the model's depth only for some growth lines."""

    def test_a_stack_needs_none(self, mk: Cli) -> None:
        """`gen --stack` works for an unreachable model, with one warning."""
        result = mk("gen", "--stack", "0:24,8:32", "--model", "org/unreachable")
        assert ranges(result) == [[0, 24], [8, 32]]
        assert len(result.err.splitlines()) == 1
        assert result.err.startswith("warning: org/unreachable")

    @pytest.mark.parametrize("growth", ["interleave: every 4", "append: 1", "repeat: [8, 24]"])
    def test_elsewhere_an_unreadable_model_is_an_error(self, mk: Cli, growth: str) -> None:
        """Other growth lines need a readable model, and the hint names --layers."""
        result = mk("gen", f"{growth}, model: org/unreachable")
        assert (result.status, result.out) == (1, "")
        assert "org/unreachable" in result.err
        assert "--layers N" in result.err
        assert mk("gen", f"{growth}, model: org/unreachable", "--layers", "32").status == 0

    def test_layers_must_not_contradict_the_config(self, mk: Cli, tmp_path: Path) -> None:
        """--layers may repeat the depth in config.json but not contradict it."""
        base = config_only(tmp_path / "base", 8)
        assert mk("gen", "--append", "1", "--model", base, "--layers", "8").status == 0
        result = mk("gen", "--append", "1", "--model", base, "--layers", "9")
        assert result.status == 1
        assert result.err.startswith("error: layers: 9 ")
        assert f"{base} has 8 " in result.err

    def test_layers_help_where_the_config_states_none(self, mk: Cli, tmp_path: Path) -> None:
        """If config.json has no layer count, `gen` needs --layers."""
        (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
        result = mk("gen", "--every", "4", cwd=tmp_path)
        assert result.status == 1
        assert result.err.startswith(f"error: {tmp_path / 'config.json'}: ")
        assert "--layers" in result.err
        assert len(ranges(mk("gen", "--every", "4", "--layers", "8", cwd=tmp_path))) == 4


class TestZero:
    """`gen` zeroes the right tensors and checks the names that it is given."""

    def test_auto_takes_the_familys_own(self, mk: Cli, tmp_path: Path) -> None:
        """`zero: auto` uses the output projections of a known type without a warning."""
        base = config_only(tmp_path / "base", 8)
        result = mk("gen", "--append", "1", "--model", base)
        assert slices(result.out)[-1][2] == ZEROED
        assert result.err == ""

    def test_auto_knows_other_families(self, mk: Cli, tmp_path: Path) -> None:
        """`zero: auto` knows other types, and `gen` warns if mergekit-yaml alone is not enough."""
        base = config_only(tmp_path / "base", 8, model_type="minicpm3")
        result = mk("gen", "--append", "1", "--model", base)
        assert slices(result.out)[-1][2] == ZEROED
        (warning,) = result.err.splitlines()
        assert warning.startswith("warning: ")
        for named in ("mergekit-yaml", "config.json", "minicpm3", "fix-config"):
            assert named in warning
        base = config_only(tmp_path / "other", 8, model_type="gpt2")
        result = mk("gen", "--append", "1", "--model", base)
        assert slices(result.out)[-1][2] == {
            "scale": [{"filter": "c_proj", "value": 0.0}, {"value": 1.0}]
        }
        assert result.err == ""

    def test_auto_refuses_what_zeroing_cannot_do(self, mk: Cli, tmp_path: Path) -> None:
        """`gen` refuses a post-norm type, for zeroed and for plain copies."""
        base = config_only(tmp_path / "base", 8, model_type="bert")
        result = mk("gen", "--append", "1", "--model", base)
        copies = mk("gen", "--repeat", "2:4", "--model", base)
        for refused in (result, copies):
            assert (refused.status, refused.out) == (1, "")
            assert refused.err.startswith(f"error: {base}: ")
            assert "model type bert" in refused.err
            assert "post-norm" in refused.err
            assert "plain copies are not supported" in refused.err

    def test_auto_says_when_it_assumes(self, mk: Cli, tmp_path: Path) -> None:
        """`zero: auto` warns if it assumes Llama's names for an unknown or unreadable model."""
        base = config_only(tmp_path / "base", 8, model_type="novel")
        for model, named in ((base, "'novel'"), ("org/x", "model")):
            result = mk("gen", "--append", "1", "--model", model, "--layers", "8")
            assert slices(result.out)[-1][2] == ZEROED
            (warning,) = (line for line in result.err.splitlines() if "zero: auto" in line)
            assert warning.startswith("warning: ")
            assert named in warning
            assert "Llama" in warning
            assert warning.endswith("o_proj, down_proj")

    def test_none_makes_plain_copies(self, mk: Cli, tmp_path: Path) -> None:
        """`--zero none` writes no scales."""
        base = config_only(tmp_path / "base", 8)
        result = mk("gen", "--append", "1", "--zero", "none", "--model", base)
        assert slices(result.out)[-1][2] is None

    def test_names_are_not_checked_without_a_model(self, mk: Cli) -> None:
        """If the model cannot be read, `gen` warns that it does not check the names to zero."""
        result = mk("gen", "append: 1, model: org/x, zero: [a]", "--layers", "4")
        assert result.status == 0
        assert "warning: zero: " in result.err

    def test_more_than_the_writers_is_warned_of(self, mk: Cli, tiny: Path) -> None:
        """Zeroing a tensor besides the residual writers gives a warning."""
        result = mk("gen", "append: 1, zero: [o_proj, mlp.]", "--model", tiny)
        assert result.status == 0
        assert result.err.startswith("warning: zero: mlp.gate_proj.weight ")
        plain = mk("gen", "append: 1, zero: [o_proj, down_proj]", "--model", tiny)
        assert plain.err == ""

    def test_a_name_that_matches_nothing(self, mk: Cli, tiny: Path) -> None:
        """`gen` refuses a name that matches no tensor, and the hint lists the right names."""
        result = mk("gen", "--every", "4", "--zero", "o_proj,dwon_proj", "--model", tiny)
        assert (result.status, result.out) == (1, "")
        error, hint = result.err.splitlines()
        assert error.startswith("error: zero: 'dwon_proj' ")
        assert "zero: [o_proj, down_proj]" in hint

    @pytest.mark.parametrize("weights", [True, False])
    def test_a_list_that_omits_a_writer(
        self, mk: Cli, tiny: Path, tmp_path: Path, weights: bool
    ) -> None:
        """Without --allow-non-identity, `gen` refuses a list that omits a residual writer."""
        model = tiny if weights else config_only(tmp_path / "base", 8)
        result = mk("gen", "--every", "4", "--zero", "o_proj", "--model", model)
        assert result.status == 1
        error, hint = result.err.splitlines()
        assert error.startswith("error: zero: [o_proj] ")
        assert "down_proj" in error
        assert "--allow-non-identity" in hint
        allowed = mk(
            "gen", "--every", "4", "--zero", "o_proj", "--model", model, "--allow-non-identity"
        )
        assert allowed.status == 0

    def test_longer_names(self, mk: Cli, tmp_path: Path) -> None:
        """A name to zero may be any part of a tensor's name."""
        base = config_only(tmp_path / "base", 8)
        names = "self_attn.o_proj,mlp.down_proj"
        assert mk("gen", "--every", "4", "--zero", names, "--model", base).status == 0

    def test_an_unknown_family_is_checked_by_its_tensors(self, mk: Cli, own_tiny: Path) -> None:
        """For an unknown type, names are checked against its tensors, which the hint lists."""
        config = json.loads((own_tiny / "config.json").read_text())
        (own_tiny / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))
        result = mk("gen", "--every", "4", "--zero", "dense", "--model", own_tiny)
        assert result.status == 1
        error, hint = result.err.splitlines()
        assert error.startswith("error: zero: 'dense' ")
        assert "input_layernorm.weight, mlp.down_proj.weight" in hint

    def test_a_lfs_pointer_does_not_stop_gen(self, mk: Cli, own_tiny: Path) -> None:
        """`gen` warns about an LFS pointer, and succeeds because it needs no weights."""
        (own_tiny / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        result = mk("gen", "--every", "4", "--model", own_tiny)
        assert result.status == 0
        assert result.err.startswith(f"warning: {own_tiny / 'model.safetensors'}: ")


BAD_INPUT = [
    (["interleav: every 4"], 2, ["key 'interleav'"]),
    (["--every", "4", "--append", "2"], 2, ["every", "append", "growth"]),
    (["--every", "0"], 2, ["every: ", "at least 1", "0"]),
    (["--every", "-1"], 2, ["every: ", "at least 1", "-1"]),
    (["--every", "banana"], 2, ["every: ", "'banana'"]),
    (["--evry", "4"], 2, ["--evry"]),
    (["--every"], 2, ["'--every' requires"]),
    (["--repeat", "4:4"], 2, ["repeat: [4, 4] is empty"]),
    (["--repeat", "5:4"], 2, ["repeat: [5, 4] is reversed"]),
    (["--repeat", "4:9"], 1, ["[4, 9] ", "/tiny", "8 layers"]),
    (["--every", "4", "--every", "2"], 2, ["--every", "twice"]),
    (["interleave:every 4"], 2, ["error: 'interleave:every 4' "]),
    (["--stack", "0:4,2:9"], 1, ["[2, 9] ", "/tiny", "8 layers"]),
    (["--every", "9"], 1, ["every 9: ", "8 layers"]),
    (["--add", "9"], 1, ["9 layers: ", "only 8"]),
    (["--after", "3,8"], 1, ["interleave: after 8: ", "/tiny", "8 layers"]),
    (["--after", "3,3"], 2, ["after: ", "layer 3", "twice"]),
    (["--after", "last"], 2, ["after: ", "'last'"]),
    (["--after", "-1"], 2, ["after: ", "at least 0", "-1"]),
    (["interleave: after [3, 8], zero: none"], 1, ["interleave: after 8: ", "8 layers"]),
    (["--stack", "0:8"], 1, ["changes nothing", "8 layers"]),
    ([""], 2, ["directive is empty"]),
    (["[1, 2]"], 2, ["error: [1, 2]: "]),
    (["a: [1, 2"], 2, ["YAML: line 2, column 1"]),
    (["append: !!python/object/apply:os.system [ls]"], 2, ["python/object/apply:os.system"]),
    (["missing.yml"], 2, ["error: missing.yml: "]),
    (["append: 1", "append: 2"], 2, ["(append: 2)"]),
    (["append: 1", "--model", "a" * 5000], 1, [f"error: {'a' * 500}", ": no such directory"]),
    (["append: 1, tokenizer: banana"], 2, ["tokenizer: ", "'banana'"]),
    (["append: 1, parameters: &a {x: *a}"], 2, ["YAML", "aliases"]),
    ([], 2, ["growth line"]),
]


def test_lists_may_come_in_several_flags(mk: Cli, tiny: Path) -> None:
    """--stack, --after and --zero may be repeated, since their values are lists."""
    result = mk("gen", "--stack", "0:6", "--stack", "2:8", "--model", tiny)
    assert ranges(result) == [[0, 6], [2, 8]]
    result = mk("gen", "--after", "5", "--after", "0,7", "--model", tiny)
    assert ranges(result) == [[0, 1], [0, 1], [1, 6], [5, 6], [6, 8], [7, 8]]
    names = ("--zero", "o_proj", "--zero", "down_proj")
    result = mk("gen", "--every", "8", *names, "--model", tiny)
    assert slices(result.out)[1][2] == ZEROED


def test_help_shows_how_to_call(mk: Cli) -> None:
    """The help shows the usage; without a command it is printed with exit code 2."""
    text = mk("run", "--help").out
    assert "mk-interleave run [OPTIONS] [DIRECTIVE] OUT" in " ".join(text.split())
    assert "<bool>" not in text
    nothing = mk()
    assert nothing.status == 2
    assert "gen" in nothing.out


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("mk-interleave gen --every 4 > /dev/full", "standard output: No space left"),
        ("mk-interleave gen --every 4 >&-", "standard output is closed"),
    ],
)
def test_standard_output_that_takes_nothing(
    shell: Callable[..., subprocess.CompletedProcess[str]], tiny: Path, command: str, reason: str
) -> None:
    """If standard output is full or closed, `gen` prints one error line."""
    result = shell(command, cwd=tiny)
    assert result.returncode == 1
    (error,) = result.stderr.splitlines()
    assert error.startswith(f"error: {reason}")


@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-"])
def test_standard_error_that_takes_nothing(
    shell: Callable[..., subprocess.CompletedProcess[str]], tiny: Path, redirection: str
) -> None:
    """If standard error is full or closed, results and exit codes stay the same."""
    warned = "mk-interleave gen 'append: 1, zero: [o_proj, mlp.]'"
    for command in (warned, "mk-interleave gen --every 80"):
        whole, cut = shell(command, cwd=tiny), shell(f"{command} {redirection}", cwd=tiny)
        assert whole.stderr
        assert (cut.returncode, cut.stdout, cut.stderr) == (whole.returncode, whole.stdout, "")


class TestBadInput:
    """A mistake gives one error, at most one hint, the documented exit code and no output."""

    @pytest.mark.parametrize(
        ("args", "status", "named"),
        BAD_INPUT,
        ids=[" ".join(a)[:60] or "-" for a, _, _ in BAD_INPUT],
    )
    def test_words(
        self, mk: Cli, tiny: Path, args: list[str], status: int, named: list[str]
    ) -> None:
        """An invalid command line is refused, and the error names the word at fault."""
        result = mk("gen", *args, cwd=tiny)
        lines = result.err.splitlines()
        assert (result.status, result.out) == (status, "")
        assert lines[0].startswith("error: ")
        assert all(part in lines[0] for part in named)
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            (None, [": ", "checkpoint"]),
            ("{", ["/config.json: ", "JSON", "line 1 column 2"]),
            ("[]", ["/config.json: ", "JSON object"]),
            ("{}", ["/config.json: ", "layer count"]),
            ('{"num_hidden_layers": 1000000000000}', ["/config.json: ", "10000"]),
        ],
    )
    def test_models(self, mk: Cli, tmp_path: Path, content: str | None, named: list[str]) -> None:
        """An invalid model is refused, and the error names its path."""
        model = tmp_path / "model"
        model.mkdir()
        if content is not None:
            (model / "config.json").write_text(content)
        result = mk("gen", "--every", "4", "--model", model)
        assert (result.status, result.out) == (1, "")
        error = result.err.splitlines()[0]
        assert error.startswith(f"error: {model}{named[0]}")
        assert all(part in error for part in named[1:])
        assert "Traceback" not in result.err

    def test_debug_shows_the_traceback(self, tmp_path: Path) -> None:
        """Only --debug shows the traceback."""
        command = [sys.executable, "-m", "mergekit_interleave"]
        for flags, shown in (([], False), (["--debug"], True)):
            result = subprocess.run(
                [*command, *flags, "gen", "--every", "0"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            assert ("Traceback" in result.stderr) == shown

    def test_a_closed_pipe_is_no_error(self, shell: Callable[..., object], tiny: Path) -> None:
        """`gen | head` prints no error about the closed pipe."""
        result = shell("set +o pipefail; mk-interleave gen --repeat 0:8x1000 | head -1", cwd=tiny)
        assert (result.stdout, result.stderr) == ("slices:\n", "")  # type: ignore[attr-defined]


class TestStartUp:
    """`gen` starts quickly."""

    def test_it_imports_nothing_heavy(self, tiny: Path) -> None:
        """`gen` does not import torch, transformers, mergekit, the Hub client or pydantic."""
        script = (
            "import sys\nfrom mergekit_interleave.cli import main as cli\n"
            "try: cli.main(['gen', '--every', '4'])\nexcept SystemExit: pass\n"
            "print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
        )
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=tiny, capture_output=True, text=True, check=True
        )
        heavy = {"torch", "transformers", "mergekit", "numpy", "huggingface_hub", "pydantic"}
        assert not heavy & set(result.stderr.split())
        assert "merge_method: passthrough" in result.stdout


def test_python_m_is_the_same_command() -> None:
    """`python -m mergekit_interleave` runs the same command line."""
    command = [sys.executable, "-m", "mergekit_interleave", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("mk-interleave ")
    assert shutil.which("mk-interleave", path=str(Path(sys.executable).parent))


class TestWarnings:
    """A warning names what plain mergekit-yaml needs, and following it removes the warning."""

    def test_a_name_that_looks_like_a_hub_id(self, mk: Cli, own_tiny: Path) -> None:
        """A relative directory is written with `./`, as the warning says."""
        result = mk("gen", "append: 1", "--model", own_tiny.name, cwd=own_tiny.parent)
        assert f"write ./{own_tiny.name} instead" in result.err
        again = mk("gen", "append: 1", "--model", f"./{own_tiny.name}", cwd=own_tiny.parent)
        assert (again.status, again.err) == (0, "")

    def test_models_of_several_types(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """Mergekit asks for --allow-crimes where the warning says so, and only there."""
        from mergekit.architecture import get_architecture_info
        from mergekit.config import MergeConfiguration
        from mergekit.options import MergeOptions

        for name, mistral in (("llama", False), ("mistral", True)):
            other = make_llama(tmp_path / name, mistral=mistral)
            result = mk("gen", f"layout: [{tiny} 0:8, {other} 4:8]")
            config = MergeConfiguration.model_validate(yaml.safe_load(result.out))
            assert ("--allow-crimes" in result.err) is mistral
            get_architecture_info(config, MergeOptions(allow_crimes=mistral))
            if mistral:
                with pytest.raises(RuntimeError, match="allow-crimes"):
                    get_architecture_info(config, MergeOptions())
