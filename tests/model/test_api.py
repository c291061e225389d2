"""The commands as Python functions print nothing and leave the process unchanged."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Cli, assert_same_tensors

import mergekit_interleave as api
from mergekit_interleave.cli.app import COMMANDS

RELEASE = Path(__file__).parents[1] / "fixtures" / "data" / "release-0.1.0"
NAMES = [name.replace("-", "_") for name in COMMANDS]
REPORTS = ("Plan", "RunReport", "VerifyReport", "CardReport", "TrainerSettings", "FixConfigReport")


@pytest.fixture
def unchanged(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Check that nothing is printed, and that logging, signals and environment stay unchanged."""
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

    def state() -> Any:
        loggers = [logging.getLogger(name) for name in ("", "mergekit", "mergekit_interleave")]
        return (
            [(log.level, list(log.handlers), log.propagate) for log in loggers],
            [signal.getsignal(number) for number in signals],
            {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        )

    before = state()
    yield
    assert state() == before
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.fixture
def grown(tiny: Path, tmp_path: Path) -> Path:
    """Return a model that `run` wrote."""
    api.run(out=tmp_path / "grown", model=tiny, every=4, engine="stream")
    return tmp_path / "grown"


class TestPackage:
    """The names that `import mergekit_interleave` provides."""

    def test_it_lists_every_command(self) -> None:
        """`dir()` and `__all__` list every command, and each name exists."""
        assert {*NAMES, *REPORTS, "Recipe", "Directive", "freeze_original_layers"} <= {*dir(api)}
        assert sorted(api.__all__) == dir(api)
        for name in api.__all__:
            assert getattr(api, name) is not None
            assert getattr(api, name, None).__doc__ or name == "__version__"

    def test_importing_it_imports_nothing_else(self, tiny: Path) -> None:
        """The import loads neither slow libraries nor other modules of the package."""
        script = (
            "import sys\nbefore = {*sys.modules}\nimport mergekit_interleave\n"
            "print(*sorted({*sys.modules} - before))\n"
            "mergekit_interleave.gen(every=2)\n"
            "print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
        )
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=tiny, capture_output=True, text=True, check=True
        )
        own = {m for m in result.stdout.split() if m.startswith("mergekit_interleave")}
        assert own == {"mergekit_interleave", "mergekit_interleave._version"}
        heavy = {
            "torch",
            "transformers",
            "mergekit",
            "numpy",
            "huggingface_hub",
            "pydantic",
            "typer",
        }
        assert not heavy & set(result.stderr.splitlines()[-1].split())

    def test_unknown_names_are_attribute_errors(self) -> None:
        """An unknown name is an AttributeError that names it."""
        with pytest.raises(AttributeError, match="nonsense"):
            api.nonsense  # type: ignore[attr-defined]  # noqa: B018

    def test_types_are_found(self) -> None:
        """The marker for type checkers is part of the package."""
        assert (Path(api.__file__).parent / "py.typed").exists()

    @pytest.mark.parametrize("name", REPORTS)
    def test_reports_are_frozen(self, name: str) -> None:
        """Reports are frozen dataclasses that have warnings and the content of `--json`."""
        report = getattr(api, name)
        assert dataclasses.is_dataclass(report)
        assert report.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert "warnings" in {field.name for field in dataclasses.fields(report)}
        assert callable(report.as_dict)

    def test_errors_are_one_family(self) -> None:
        """All errors derive from InterleaveError."""
        errors = [getattr(api, name) for name in dir(api) if name.endswith("Error")]
        assert len(errors) > 5
        assert all(issubclass(error, api.InterleaveError) for error in errors)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_command_line_has_the_same_words(self, name: str) -> None:
        """Each option is a keyword of the function, some negated or with a Python name."""
        import typer

        from mergekit_interleave.cli.app import application

        commands = typer.main.get_command(application()).commands  # type: ignore[attr-defined]
        options = {
            param.opts[0].lstrip("-").replace("-", "_").removeprefix("no_")
            for param in commands[name.replace("_", "-")].params
            if param.param_type_name == "option" and param.name != "help"
        } - {"json", "svg"}
        keywords = {
            {"trainer": "for", "tool": "as", "from_": "from"}.get(word, word)
            for function in (name, *_MORE.get(name, ()))
            for word in _keywords(getattr(api, function))
        } | _CHOOSES.get(name, set())
        assert options == keywords - {"progress", "base"}


_MORE = {"scan": ("scan_for_training",)}
"""Other functions that a command calls."""

_CHOOSES = {"scan": {"for", "report"}}
"""Options that choose the function."""


def _keywords(function: Callable[..., Any]) -> Iterator[str]:
    from mergekit_interleave.commands.inputs import Words

    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            yield from Words.__annotations__
        elif parameter.kind == inspect.Parameter.KEYWORD_ONLY:
            yield parameter.name


@pytest.mark.usefixtures("unchanged")
class TestCommands:
    """Every command prints nothing and leaves logging, signals and environment unchanged."""

    def test_gen(self, tiny: Path) -> None:
        """The returned YAML is a `str` that can be pickled."""
        recipe = api.gen("interleave: every 4", model=tiny)
        assert isinstance(recipe, str)
        assert yaml.safe_load(recipe)["merge_method"] == "passthrough"
        assert json.loads(json.dumps(recipe.as_dict()))["text"] == recipe
        copy = pickle.loads(pickle.dumps(recipe))  # noqa: S301 - its own
        assert (copy, copy.warnings) == (recipe, recipe.warnings)

    def test_gen_of_several_documents(self, tiny: Path, tmp_path: Path) -> None:
        """`gen` expands a file for mergekit-multi, but refuses keywords for it."""
        file = tmp_path / "multi.yml"
        file.write_text(
            f"name: one\nmodel: {tiny}\nappend: 1\n---\nname: two\nmodel: one\ndrop: 2:3\n"
        )
        assert len(list(yaml.safe_load_all(api.gen(file)))) == 2
        with pytest.raises(api.DirectiveError, match="multi-document"):
            api.gen(file, every=4)

    def test_plan(self, tiny: Path) -> None:
        """A plan has the new layers, a fingerprint and a layer map that a notebook shows."""
        plan = api.plan({"append": 2}, model=tiny)
        assert len(plan.layout) == 10
        assert plan._repr_svg_() == plan.svg()
        assert plan.svg().startswith("<svg")
        found = json.loads(json.dumps(plan.as_dict()))
        assert found["new_layers"] == [8, 9]
        assert found["fingerprint"] == plan.fingerprint
        assert "8 → 10" in str(plan)
        assert hash(plan.names) is not None

    @pytest.mark.parametrize("engine", ["stream", "auto"])
    def test_run_and_verify(self, tiny: Path, tmp_path: Path, engine: str) -> None:
        """The report states what was written, and `verify` finds no differences."""
        out = tmp_path / "out"
        report = api.run("append: 1", out, model=tiny, engine=engine, out_shard_size=10**6)
        assert (report.out, len(report.layout)) == (out, 9)
        found = json.loads(json.dumps(report.as_dict()))
        assert (found["layers"], found["new_layers"], found["out"]) == (9, [8], str(out))
        assert found["engine"] == ("stream" if engine == "stream" else "mergekit")
        checked = api.verify(out, against=tiny)
        assert checked.is_exact
        checked.check()
        assert json.loads(json.dumps(checked.as_dict()))["differences"] == []

    def test_progress(self, tiny: Path, tmp_path: Path) -> None:
        """The progress callback receives the number of all bytes."""
        from contextlib import contextmanager

        told: list[int] = []

        @contextmanager
        def progress(total: int) -> Iterator[Callable[[int], object]]:
            yield told.append
            assert sum(told) == total

        report = api.run(
            "append: 1", tmp_path / "out", model=tiny, engine="stream", progress=progress
        )
        assert sum(told) == report.written.nbytes

    def test_differences_are_no_exception(self, grown: Path, tiny: Path) -> None:
        """Differences are part of the report; only `check` raises an error."""
        config = json.loads((grown / "config.json").read_text())
        (grown / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
        report = api.verify(grown, against=[tiny])
        assert not report.is_exact
        assert any("hidden_act" in str(difference) for difference in report.differences)
        with pytest.raises(api.RefusedError):
            report.check()

    def test_verify_forward(self, grown: Path, tiny: Path) -> None:
        """The result of the forward pass is part of the report."""
        report = api.verify(grown, against=tiny, forward=True, max_memory="1GB")
        assert report.is_exact
        assert report.forward is not None
        assert report.forward["exact"]
        assert json.loads(json.dumps(report.as_dict()))["forward"]["exact"]

    def test_explain(self, grown: Path) -> None:
        """`explain` accepts a directory, a file or an open file."""
        directive = api.explain(grown)
        assert "interleave: every 4" in directive
        assert "interleave: every 4" in api.explain(grown / "mergekit_config.yml")
        with (grown / "mergekit_config.yml").open(encoding="utf-8") as file:
            assert api.explain(file) == api.explain(grown / "mergekit_config.yml")

    def test_card(self, grown: Path) -> None:
        """The report states the suggested name, and an unchanged card stays equal."""
        before = (grown / "README.md").read_text()
        report = api.card(grown)
        assert report.name
        assert json.loads(json.dumps(report.as_dict()))["name"] == report.name
        assert (grown / "README.md").read_text() == before

    def test_train(self, grown: Path) -> None:
        """The settings contain the trainer's text."""
        settings = api.train(grown, trainer="axolotl")
        assert yaml.safe_load(settings.text)["unfrozen_parameters"]
        assert json.loads(json.dumps(settings.as_dict()))["text"] == settings.text

    def test_fix_config(self, grown: Path, tiny: Path) -> None:
        """The report states the changes, and a second call makes none."""
        shutil.copy(tiny / "config.json", grown / "config.json")
        report = api.fix_config(grown, model=tiny)
        assert report.changes["num_hidden_layers"] == (8, 10)
        found = json.loads(json.dumps(report.as_dict()))
        assert found["config"]["num_hidden_layers"] == {"from": 8, "to": 10}
        assert not api.fix_config(grown, model=tiny).changes

    def test_schema(self) -> None:
        """`schema` returns a JSON Schema."""
        assert json.loads(json.dumps(api.schema()))["$schema"]

    @pytest.mark.parametrize(
        ("command", "error"),
        [
            (lambda tiny, _: api.gen("interleave: every 0", model=tiny), api.DirectiveError),
            (lambda tiny, _: api.gen("repeat: 4:99", model=tiny), api.LayoutError),
            (lambda _, out: api.plan(every=4, model=out), api.CheckpointError),
            (lambda tiny, _: api.run("append: 1", tiny, model=tiny), api.OutputError),
            (lambda tiny, _: api.run("append: 1", model=tiny), api.DirectiveError),
            (
                lambda tiny, out: api.run("append: 1", out, model=tiny, engine="x"),
                api.DirectiveError,
            ),
            (
                lambda tiny, out: api.run("append: 1", out, model=tiny, mergekit={"nonsense": 1}),
                api.DirectiveError,
            ),
            (lambda tiny, _: api.verify(tiny), api.CheckpointError),
            (lambda tiny, _: api.verify(tiny, forward=True), api.DirectiveError),
            (lambda tiny, _: api.train(tiny, trainer="nonsense"), api.DirectiveError),
            (lambda _, out: api.explain(out), api.DirectiveError),
            (lambda _, out: api.card(out), api.InterleaveError),
            (lambda tiny, _: api.fix_config(tiny), api.DirectiveError),
        ],
    )
    def test_errors_are_raised(
        self,
        tiny: Path,
        tmp_path: Path,
        command: Callable[[Path, Path], object],
        error: type[Exception],
    ) -> None:
        """Each error has its class, and nothing is written."""
        with pytest.raises(error):
            command(tiny, tmp_path / "out")
        assert os.listdir(tmp_path) == []


class TestCommandLine:
    """The command line prints the same reports."""

    def test_json(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """Each command with a report prints it as JSON with `--json`."""
        out = tmp_path / "out"
        words = {
            "plan": ["append: 1", "--model", tiny],
            "run": ["append: 1", out, "--model", tiny, "--engine", "stream"],
            "card": [out],
            "train": [out, "--for", "axolotl"],
            "fix-config": [out, "--model", tiny],
            "verify": [out],
        }
        for command, given in words.items():
            result = mk(command, *given, "--json")
            assert result.status == 0, result.err
            assert isinstance(json.loads(result.out), dict), command
        assert json.loads(mk("train", *words["train"], "--json").out)["text"]

    def test_it_writes_what_the_function_writes(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """The command and the function write the same files."""
        api.run("append: 1", tmp_path / "a" / "out", model=tiny, engine="stream")
        words = ("append: 1", tmp_path / "b" / "out", "--model", tiny, "--engine", "stream")
        assert mk("run", *words).status == 0
        assert_same_tensors(tmp_path / "a/out", tmp_path / "b/out")
        for file in sorted((tmp_path / "a/out").iterdir()):
            other = tmp_path / "b/out" / file.name
            assert file.read_bytes() == other.read_bytes(), file.name

    @pytest.mark.parametrize("name", ["mk-interleave", "mergekit-interleave"])
    def test_both_names_are_the_same_program(self, name: str) -> None:
        """Both program names run the same code, and the usage shows the name that was called."""
        script = (
            f"import sys; sys.argv[0] = '/bin/{name}'\n"
            "from mergekit_interleave.__main__ import main\nmain()"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=True
        )
        assert f"Usage: {name} " in result.stdout
        pyproject = Path(__file__).parents[2] / "pyproject.toml"
        assert f'\n{name} = "mergekit_interleave.__main__:main"' in pyproject.read_text()


class TestRelease:
    """A model that release 0.1.0 wrote can still be read."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        """Return a copy of the model."""
        return Path(shutil.copytree(RELEASE, tmp_path / "deeper"))

    def test_verify(self, model: Path) -> None:
        """`verify` finds the layout and no differences."""
        report = api.verify(model)
        assert report.is_exact, report.lines()
        assert [layer.index for layer in report.expected.layout.new_layers] == [2, 5]

    def test_card(self, model: Path) -> None:
        """`card` rewrites the card without --force."""
        assert api.card(model).name == "tiny-llama_2.5K_6Layers-Interleaved"
        assert (model / "README.md").read_text(encoding="utf-8").startswith("---\n")

    def test_train(self, model: Path) -> None:
        """`train` selects the model's new layers."""
        settings = api.train(model, trainer="axolotl")
        assert "model.layers.(2|5)." in settings.text

    def test_explain(self, model: Path) -> None:
        """`explain` returns the directive of the model."""
        directive = yaml.safe_load(api.explain(model))
        assert directive["interleave"] == "every 2"
        assert directive["model"] == "tiny-llama"
