"""The plans of a scan share what is equal in them."""

from __future__ import annotations

import pickle
from pathlib import Path

from mergekit_interleave.commands.scan_plans import Planner
from mergekit_interleave.scanning import spaces


def test_plans_share_checkpoints_and_specs(tiny: Path) -> None:
    """The model is opened once, and of equal tensor specs there is one, however many layouts."""
    planner = Planner(tiny, trusted=False)
    depth = planner.base().depth
    plans = [planner.of(each.directive) for each in spaces.candidates(["blocks"], depth)]
    assert {id(plan.first) for plan in plans} == {id(planner.base())}
    specs = [spec for plan in plans for spec in plan.specs]
    assert len({*map(id, specs)}) == len({*specs}) < len(specs) / 4


def test_a_planner_is_sent_empty(tiny: Path) -> None:
    """Another process plans again what it needs, and gets the same plan."""
    planner = Planner(tiny, trusted=False)
    plan, content = planner.of("repeat: 1:3"), pickle.dumps(planner)
    assert len(content) < 1000
    assert pickle.loads(content).of("repeat: 1:3").recipe == plan.recipe  # noqa: S301 - our own
