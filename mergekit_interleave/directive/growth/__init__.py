"""Growth lines, one file for each key in YAML.

To add a growth line, add a file here that defines its `LINE`, and a row to `registry.py`.
"""

from mergekit_interleave.directive.growth.append import Append
from mergekit_interleave.directive.growth.base import Growth
from mergekit_interleave.directive.growth.drop import Drop
from mergekit_interleave.directive.growth.explicit_slices import ExplicitSlices
from mergekit_interleave.directive.growth.interleave import After, Every, Spread
from mergekit_interleave.directive.growth.part import Part
from mergekit_interleave.directive.growth.repeat import Repeat
from mergekit_interleave.directive.growth.stack import Stack, Step, stack_of
from mergekit_interleave.directive.growth.windows import Windows

__all__ = [
    "After",
    "Append",
    "Drop",
    "Every",
    "ExplicitSlices",
    "Growth",
    "Part",
    "Repeat",
    "Spread",
    "Stack",
    "Step",
    "Windows",
    "stack_of",
]
