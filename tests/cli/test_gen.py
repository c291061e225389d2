"""`gen`: from every door, in every order of precedence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness import Cli, Result
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
    """The slices of YAML that mergekit accepts: model, range, parameters."""
    document = yaml.safe_load(text)
    MergeConfiguration.model_validate(yaml.safe_load(text))
    assert document["merge_method"] == "passthrough"
    sources = [source for entry in document["slices"] for source in entry["sources"]]
    return [(s["model"], s["layer_range"], s.get("parameters")) for s in sources]


def ranges(result: Result) -> list[list[int]]:
    """The layer ranges of what `gen` wrote."""
    assert result.status == 0, result.err
    return [bounds for _, bounds, _ in slices(result.out)]


def config_only(path: Path, layers: int = 32, **config: object) -> Path:
    """A model directory with a config and no weights."""
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
    """The two published configurations come out slice for slice."""

    def test_from_every_door(
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
        """What `gen` writes is what stands there."""
        del inline, flags, expected
        written = mk("gen", EXAMPLES / f"{example}.yml", "--layers", "32").out
        assert written == (EXAMPLES / f"{example}.mergekit.yml").read_text()


def test_the_published_sizes() -> None:
    """16 slices and 34 slices, as the cards show them."""
    assert (len(OPENCHAT), len(CATPPT)) == (16, 34)


class TestFindingTheModel:
    """The model is found where the design says, in that order."""

    def test_the_current_directory_by_its_absolute_path(self, mk: Cli, tiny: Path) -> None:
        """The one name that is not kept as written: nothing was written."""
        result = mk("gen", "--every", "4", cwd=tiny)
        assert {model for model, _, _ in slices(result.out)} == {str(tiny)}
        assert result.err == ""

    def test_the_environment_wins_over_the_current_directory(
        self, mk: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And a named model over the environment."""
        monkeypatch.setenv("MK_INTERLEAVE_MODEL", str(config_only(tmp_path / "env", 4)))
        assert len(ranges(mk("gen", "--every", "4", cwd=tiny))) == 2
        named = config_only(tmp_path / "named", 12)
        assert len(ranges(mk("gen", "--every", "4", "--model", named, cwd=tiny))) == 6
        assert len(ranges(mk("gen", f"append: 1, model: {named}", cwd=tiny))) == 2
        other = config_only(tmp_path / "other", 16)
        result = mk("gen", f"interleave: every 4, model: {named}", "--model", other, cwd=tiny)
        assert len(ranges(result)) == 8

    def test_interleave_yml_where_there_is_no_checkpoint(self, mk: Cli, tmp_path: Path) -> None:
        """It names the model, and is the directive where none is given."""
        config_only(tmp_path / "base", 8)
        (tmp_path / "interleave.yml").write_text("model: base\ninterleave: every 4\n")
        assert ranges(mk("gen", cwd=tmp_path)) == [[0, 4], [3, 4], [4, 8], [7, 8]]
        assert ranges(mk("gen", "--append", "1", cwd=tmp_path)) == [[0, 8], [7, 8]]
        assert ranges(mk("gen", "append: 1", cwd=tmp_path)) == [[0, 8], [7, 8]]

    def test_interleave_yml_may_be_a_mergekit_config(self, mk: Cli, tmp_path: Path) -> None:
        """Then flags that have no place beside one are errors, as elsewhere."""
        base = config_only(tmp_path / "base", 8)
        text = mk("gen", "--append", "1", "--model", base).out
        (tmp_path / "interleave.yml").write_text(text)
        assert mk("gen", cwd=tmp_path).out == text
        result = mk("gen", "--zero", "none", cwd=tmp_path)
        assert result.status == 2
        assert "--zero" in result.err

    def test_no_model_anywhere(self, mk: Cli, tmp_path: Path) -> None:
        """The error lists the ways to name one."""
        result = mk("gen", "--every", "4", cwd=tmp_path)
        assert result.status == 2
        assert result.err.startswith("error: no model")
        for way in ("model:", "--model", "MK_INTERLEAVE_MODEL", "directory", "interleave.yml"):
            assert way in result.err

    def test_relative_names_are_kept_as_written(self, mk: Cli, tmp_path: Path) -> None:
        """`./base/` stays `./base/`."""
        config_only(tmp_path / "base", 8)
        result = mk("gen", "--append", "1", "--model", "./base/", cwd=tmp_path)
        assert {model for model, _, _ in slices(result.out)} == {"./base/"}

    def test_a_path_that_mergekit_would_misread(self, mk: Cli, tmp_path: Path) -> None:
        """Is written in the mapping form."""
        base = config_only(tmp_path / "a+b@c", 8)
        result = mk("gen", "--append", "1", "--model", base)
        source = yaml.safe_load(result.out)["slices"][0]["sources"][0]
        assert source["model"] == {"model": {"path": str(base)}}
        config = MergeConfiguration.model_validate(yaml.safe_load(result.out))
        assert config.slices is not None
        assert config.slices[0].sources[0].model.model.path == str(base)

    def test_flags_replace_the_growth_line(self, mk: Cli, tmp_path: Path) -> None:
        """The rest of the directive stays."""
        base = config_only(tmp_path / "base", 8)
        text = f"model: {base}, interleave: every 4, dtype: float16"
        result = mk("gen", text, "--append", "1")
        assert ranges(result) == [[0, 8], [7, 8]]
        assert yaml.safe_load(result.out)["dtype"] == "float16"

    def test_a_mergekit_config_comes_out_as_it_is(self, mk: Cli, tmp_path: Path) -> None:
        """`gen` of YAML that `gen` wrote changes nothing; a growth flag replaces its slices."""
        base = config_only(tmp_path / "base", 8)
        first = mk("gen", "--every", "4", "--model", base, "--dtype", "float16").out
        assert mk("gen", "-", stdin=first).out == first
        result = mk("gen", "-", "--append", "1", stdin=first)
        assert ranges(result) == [[0, 8], [7, 8]]

    def test_a_growth_flag_beside_a_mergekit_config(
        self, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """Takes the model that the config names, never one that happens to be around."""
        one, two = config_only(tmp_path / "one", 4), config_only(tmp_path / "two", 6)
        text = f"models: [{{model: {one}}}]"
        result = mk("gen", "-", "--every", "2", cwd=tiny, stdin=text)
        assert {model for model, _, _ in slices(result.out)} == {str(one)}
        both = "\n".join(f"- sources: [{{model: {m}, layer_range: [0, 2]}}]" for m in (one, two))
        result = mk("gen", "-", "--every", "2", cwd=tiny, stdin=f"slices:\n{both}\n")
        assert result.status == 2
        assert "the mergekit config names 2" in result.err

    def test_model_takes_the_place_of_the_only_one_everywhere(
        self, mk: Cli, tmp_path: Path
    ) -> None:
        """In base_model and the tokenizer's source, too; an old model need not be there."""
        new = config_only(tmp_path / "new", 8)
        text = (
            "slices: [{sources: [{model: /nowhere/old, layer_range: [0, 8]}]}]\n"
            "base_model: /nowhere/old\ntokenizer_source: /nowhere/old\n"
        )
        result = mk("gen", "-", "--model", new, stdin=text)
        assert result.status == 0, result.err
        assert "nowhere" not in result.out

    def test_interleave_yml_is_taken_whole(self, mk: Cli, tmp_path: Path) -> None:
        """Where it names the model, what else it says holds as well."""
        config_only(tmp_path / "base", 8)
        (tmp_path / "interleave.yml").write_text("model: base\nappend: 1\ndtype: bfloat16\n")
        text = mk("gen", "--every", "4", cwd=tmp_path).out
        assert yaml.safe_load(text)["dtype"] == "bfloat16"


class TestDepth:
    """The depth is asked for only where it is needed."""

    def test_a_stack_needs_none(self, mk: Cli) -> None:
        """One warning, and the YAML."""
        result = mk("gen", "--stack", "0:24,8:32", "--model", "org/unreachable")
        assert ranges(result) == [[0, 24], [8, 32]]
        assert len(result.err.splitlines()) == 1
        assert result.err.startswith("warning: org/unreachable")

    @pytest.mark.parametrize("growth", ["interleave: every 4", "append: 1", "repeat: [8, 24]"])
    def test_elsewhere_an_unreadable_model_is_an_error(self, mk: Cli, growth: str) -> None:
        """The hint names --layers, which helps."""
        result = mk("gen", f"{growth}, model: org/unreachable")
        assert (result.status, result.out) == (1, "")
        assert "org/unreachable" in result.err
        assert "--layers N" in result.err
        assert mk("gen", f"{growth}, model: org/unreachable", "--layers", "32").status == 0

    def test_layers_must_not_contradict_the_config(self, mk: Cli, tmp_path: Path) -> None:
        """Stating what is true is allowed."""
        base = config_only(tmp_path / "base", 8)
        assert mk("gen", "--append", "1", "--model", base, "--layers", "8").status == 0
        result = mk("gen", "--append", "1", "--model", base, "--layers", "9")
        assert result.status == 1
        assert "layers: 9 " in result.err

    def test_layers_help_where_the_config_states_none(self, mk: Cli, tmp_path: Path) -> None:
        """And without them it is an error."""
        (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
        result = mk("gen", "--every", "4", cwd=tmp_path)
        assert result.status == 1
        assert "states no layer count" in result.err
        assert "--layers" in result.err
        assert len(ranges(mk("gen", "--every", "4", "--layers", "8", cwd=tmp_path))) == 4


class TestZero:
    """What is zeroed, and that it is right."""

    def test_auto_takes_the_familys_own(self, mk: Cli, tmp_path: Path) -> None:
        """Silently where the family is known."""
        base = config_only(tmp_path / "base", 8)
        result = mk("gen", "--append", "1", "--model", base)
        assert slices(result.out)[-1][2] == ZEROED
        assert result.err == ""

    def test_auto_knows_other_families(self, mk: Cli, tmp_path: Path) -> None:
        """And says where plain mergekit-yaml is not enough."""
        base = config_only(tmp_path / "base", 8, model_type="minicpm3")
        result = mk("gen", "--append", "1", "--model", base)
        assert slices(result.out)[-1][2] == ZEROED
        assert "mergekit-yaml alone may leave a wrong config.json for model type minicpm3" in (
            result.err
        )
        base = config_only(tmp_path / "other", 8, model_type="gpt2")
        result = mk("gen", "--append", "1", "--model", base)
        assert slices(result.out)[-1][2] == {
            "scale": [{"filter": "c_proj", "value": 0.0}, {"value": 1.0}]
        }
        assert result.err == ""

    def test_auto_refuses_what_zeroing_cannot_do(self, mk: Cli, tmp_path: Path) -> None:
        """With the reason, and so are plain copies: `run` would refuse them."""
        base = config_only(tmp_path / "base", 8, model_type="bert")
        result = mk("gen", "--append", "1", "--model", base)
        assert (result.status, result.out) == (1, "")
        assert "model type bert is refused" in result.err
        assert "is refused" in mk("gen", "--repeat", "2:4", "--model", base).err

    def test_auto_says_when_it_assumes(self, mk: Cli, tmp_path: Path) -> None:
        """For a type that is not known, and for a model that cannot be read."""
        base = config_only(tmp_path / "base", 8, model_type="novel")
        for model, words in ((base, "'novel' is not known"), ("org/x", "cannot be read")):
            result = mk("gen", "--append", "1", "--model", model, "--layers", "8")
            assert slices(result.out)[-1][2] == ZEROED
            assert words in result.err
            assert "Llama's names are assumed: o_proj, down_proj" in result.err

    def test_none_makes_plain_copies(self, mk: Cli, tmp_path: Path) -> None:
        """No scales at all."""
        base = config_only(tmp_path / "base", 8)
        result = mk("gen", "--append", "1", "--zero", "none", "--model", base)
        assert slices(result.out)[-1][2] is None

    def test_names_are_not_checked_against_nothing(self, mk: Cli) -> None:
        """Where no model can be read, that is said."""
        result = mk("gen", "append: 1, model: org/x, zero: [a]", "--layers", "4")
        assert result.status == 0
        assert "the names are not checked" in result.err

    def test_more_than_the_writers_is_warned_of(self, mk: Cli, tiny: Path) -> None:
        """Two zeros in a row give each other no gradient."""
        result = mk("gen", "append: 1, zero: [o_proj, mlp.]", "--model", tiny)
        assert result.status == 0
        assert "warning: zero: mlp.gate_proj.weight is zeroed too" in result.err
        plain = mk("gen", "append: 1, zero: [o_proj, down_proj]", "--model", tiny)
        assert plain.err == ""

    def test_a_name_that_matches_nothing(self, mk: Cli, tiny: Path) -> None:
        """Is checked where the weights are at hand; the hint is the right list."""
        result = mk("gen", "--every", "4", "--zero", "o_proj,dwon_proj", "--model", tiny)
        assert (result.status, result.out) == (1, "")
        assert "'dwon_proj' matches no tensor" in result.err
        assert "zero: [o_proj, down_proj]" in result.err

    @pytest.mark.parametrize("weights", [True, False])
    def test_a_list_that_leaves_a_writer_standing(
        self, mk: Cli, tiny: Path, tmp_path: Path, weights: bool
    ) -> None:
        """With and without the weights; --allow-non-identity insists."""
        model = tiny if weights else config_only(tmp_path / "base", 8)
        result = mk("gen", "--every", "4", "--zero", "o_proj", "--model", model)
        assert result.status == 1
        assert "down_proj" in result.err
        assert "would not be identities" in result.err
        insisted = mk(
            "gen", "--every", "4", "--zero", "o_proj", "--model", model, "--allow-non-identity"
        )
        assert insisted.status == 0

    def test_longer_names_do_as_well(self, mk: Cli, tmp_path: Path) -> None:
        """A filter is any part of a tensor's name."""
        base = config_only(tmp_path / "base", 8)
        names = "self_attn.o_proj,mlp.down_proj"
        assert mk("gen", "--every", "4", "--zero", names, "--model", base).status == 0

    def test_an_unknown_family_is_checked_by_its_tensors(self, mk: Cli, own_tiny: Path) -> None:
        """The hint lists what there is."""
        config = json.loads((own_tiny / "config.json").read_text())
        (own_tiny / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))
        result = mk("gen", "--every", "4", "--zero", "dense", "--model", own_tiny)
        assert result.status == 1
        assert "input_layernorm.weight, mlp.down_proj.weight" in result.err

    def test_a_lfs_pointer_does_not_stop_gen(self, mk: Cli, own_tiny: Path) -> None:
        """It never needs the weights."""
        (own_tiny / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        result = mk("gen", "--every", "4", "--model", own_tiny)
        assert result.status == 0
        assert result.err.startswith("warning: ")


BAD_INPUT = [
    (["interleav: every 4"], 2, "unknown key 'interleav'"),
    (["--every", "4", "--append", "2"], 2, "`every` and `append`"),
    (["--every", "0"], 2, "must be at least 1"),
    (["--every", "-1"], 2, "must be at least 1"),
    (["--every", "banana"], 2, "expected a whole number"),
    (["--evry", "4"], 2, "No such option: --evry"),
    (["--every"], 2, "requires an argument"),
    (["--repeat", "4:4"], 2, "is empty"),
    (["--repeat", "5:4"], 2, "is reversed"),
    (["--repeat", "4:9"], 1, "[4, 9] ends past the last layer"),
    (["--every", "4", "--every", "2"], 2, "--every is given twice"),
    (["interleave:every 4"], 2, "no such file"),
    (["--stack", "0:4,2:9"], 1, "ends past the last layer"),
    (["--every", "9"], 1, "only 8 layers"),
    (["--add", "9"], 1, "8 layers"),
    (["--stack", "0:8"], 1, "changes nothing"),
    ([""], 2, "the directive is empty"),
    (["[1, 2]"], 2, "no such file"),
    (["a: [1, 2"], 2, "not valid YAML"),
    (["append: !!python/object/apply:os.system [ls]"], 2, "could not determine a constructor"),
    (["missing.yml"], 2, "missing.yml: no such file"),
    (["append: 1", "append: 2"], 2, "unexpected extra argument"),
    (["append: 1", "--model", "a" * 5000], 1, "no such directory"),
    (["append: 1, tokenizer: banana"], 2, "tokenizer: expected a mapping"),
    (["append: 1, parameters: &a {x: *a}"], 2, "aliases"),
    ([], 2, "no growth line"),
]


def test_lists_may_come_in_several_flags(mk: Cli, tiny: Path) -> None:
    """For --stack and --zero, whose values are lists."""
    result = mk("gen", "--stack", "0:6", "--stack", "2:8", "--model", tiny)
    assert ranges(result) == [[0, 6], [2, 8]]
    names = ("--zero", "o_proj", "--zero", "down_proj")
    result = mk("gen", "--every", "8", *names, "--model", tiny)
    assert slices(result.out)[1][2] == ZEROED


def test_help_shows_how_to_call(mk: Cli) -> None:
    """And takes 2 for an answer where no command is given."""
    text = mk("run", "--help").out
    assert "mk-interleave run [OPTIONS] [DIRECTIVE] OUT" in " ".join(text.split())
    assert "<bool>" not in text
    nothing = mk()
    assert nothing.status == 2
    assert "gen" in nothing.out


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("mk-interleave gen --every 4 > /dev/full", "standard output: No space left on device"),
        ("mk-interleave gen --every 4 >&-", "standard output is closed"),
    ],
)
def test_standard_output_that_takes_nothing(
    shell: Callable[..., subprocess.CompletedProcess[str]], tiny: Path, command: str, reason: str
) -> None:
    """One error line."""
    result = shell(command, cwd=tiny)
    assert result.returncode == 1
    assert result.stderr == f"error: {reason}\n"


class TestBadInput:
    """One error line, at most one hint line, the exit code of the design, nothing on stdout."""

    @pytest.mark.parametrize(
        ("args", "status", "reason"), BAD_INPUT, ids=[" ".join(a) or "-" for a, _, _ in BAD_INPUT]
    )
    def test_words(self, mk: Cli, tiny: Path, args: list[str], status: int, reason: str) -> None:
        """Mistakes in the words."""
        result = mk("gen", *args, cwd=tiny)
        lines = result.err.splitlines()
        assert (result.status, result.out) == (status, "")
        assert lines[0].startswith("error: ")
        assert reason in lines[0]
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (None, "not a checkpoint"),
            ("{", "not valid JSON"),
            ("[]", "expected a JSON object"),
            ("{}", "states no layer count"),
            ('{"num_hidden_layers": 1000000000000}', "limit 10000"),
        ],
    )
    def test_models(self, mk: Cli, tmp_path: Path, content: str | None, reason: str) -> None:
        """Models that are none, named by their path."""
        model = tmp_path / "model"
        model.mkdir()
        if content is not None:
            (model / "config.json").write_text(content)
        result = mk("gen", "--every", "4", "--model", model)
        assert (result.status, result.out) == (1, "")
        assert reason in result.err
        assert "Traceback" not in result.err

    def test_debug_shows_the_traceback(self, tmp_path: Path) -> None:
        """And nothing else does."""
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
        """`gen | head` says nothing about it."""
        result = shell("set +o pipefail; mk-interleave gen --repeat 0:8x1000 | head -1", cwd=tiny)
        assert (result.stdout, result.stderr) == ("slices:\n", "")  # type: ignore[attr-defined]


class TestStartUp:
    """`gen` answers at once."""

    def test_it_imports_nothing_heavy(self, tiny: Path) -> None:
        """No torch, transformers, mergekit or Hub client; typer's pydantic adapters neither."""
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
    """For an environment whose scripts are not on the path."""
    command = [sys.executable, "-m", "mergekit_interleave", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("mk-interleave ")
    assert shutil.which("mk-interleave", path=str(Path(sys.executable).parent))
