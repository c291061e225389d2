"""Grow language models deeper with mergekit: one line in, a verified model out.

Every command of `mk-interleave` is a function here; options become keyword arguments.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergekit_interleave._version import __version__

if TYPE_CHECKING:
    from mergekit_interleave.commands.card import card as card
    from mergekit_interleave.commands.card_report import CardReport as CardReport
    from mergekit_interleave.commands.evaluate import evaluate as evaluate
    from mergekit_interleave.commands.evaluation_report import EvaluationReport as EvaluationReport
    from mergekit_interleave.commands.explain import explain as explain
    from mergekit_interleave.commands.fix_config import FixConfigReport as FixConfigReport
    from mergekit_interleave.commands.fix_config import fix_config as fix_config
    from mergekit_interleave.commands.gen import gen as gen
    from mergekit_interleave.commands.load import load as load
    from mergekit_interleave.commands.plan import Plan as Plan
    from mergekit_interleave.commands.plan import plan as plan
    from mergekit_interleave.commands.push import PushReport as PushReport
    from mergekit_interleave.commands.push import push as push
    from mergekit_interleave.commands.recipe import Recipe as Recipe
    from mergekit_interleave.commands.run import run as run
    from mergekit_interleave.commands.run_report import RunReport as RunReport
    from mergekit_interleave.commands.sample import SampleReport as SampleReport
    from mergekit_interleave.commands.sample import sample as sample
    from mergekit_interleave.commands.scan import ScanReport as ScanReport
    from mergekit_interleave.commands.scan import scan as scan
    from mergekit_interleave.commands.scan import scanned as scanned
    from mergekit_interleave.commands.scan_for_training import RankedLayer as RankedLayer
    from mergekit_interleave.commands.scan_for_training import (
        TrainingScanReport as TrainingScanReport,
    )
    from mergekit_interleave.commands.scan_for_training import (
        scan_for_training as scan_for_training,
    )
    from mergekit_interleave.commands.schema import schema as schema
    from mergekit_interleave.commands.train import TrainerSettings as TrainerSettings
    from mergekit_interleave.commands.train import train as train
    from mergekit_interleave.commands.verify import verify as verify
    from mergekit_interleave.directive.directive import Directive as Directive
    from mergekit_interleave.errors import CheckpointError as CheckpointError
    from mergekit_interleave.errors import DirectiveError as DirectiveError
    from mergekit_interleave.errors import InterleaveError as InterleaveError
    from mergekit_interleave.errors import LayoutError as LayoutError
    from mergekit_interleave.errors import OutputError as OutputError
    from mergekit_interleave.errors import RefusedError as RefusedError
    from mergekit_interleave.errors import RequirementError as RequirementError
    from mergekit_interleave.errors import UnreachableError as UnreachableError
    from mergekit_interleave.training.freeze import freeze_original_layers as freeze_original_layers
    from mergekit_interleave.verification.report import VerifyReport as VerifyReport

_MODULES = {
    "commands.card": ("card",),
    "commands.card_report": ("CardReport",),
    "commands.evaluate": ("evaluate",),
    "commands.evaluation_report": ("EvaluationReport",),
    "commands.explain": ("explain",),
    "commands.fix_config": ("fix_config", "FixConfigReport"),
    "commands.gen": ("gen",),
    "commands.load": ("load",),
    "commands.plan": ("plan", "Plan"),
    "commands.push": ("push", "PushReport"),
    "commands.recipe": ("Recipe",),
    "commands.run": ("run",),
    "commands.run_report": ("RunReport",),
    "commands.sample": ("sample", "SampleReport"),
    "commands.scan": ("scan", "scanned", "ScanReport"),
    "commands.scan_for_training": ("scan_for_training", "RankedLayer", "TrainingScanReport"),
    "commands.schema": ("schema",),
    "commands.train": ("train", "TrainerSettings"),
    "commands.verify": ("verify",),
    "directive.directive": ("Directive",),
    "errors": (
        "CheckpointError",
        "DirectiveError",
        "InterleaveError",
        "LayoutError",
        "OutputError",
        "RefusedError",
        "RequirementError",
        "UnreachableError",
    ),
    "training.freeze": ("freeze_original_layers",),
    "verification.report": ("VerifyReport",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 - every element is a name


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package stays fast."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted(__all__)
