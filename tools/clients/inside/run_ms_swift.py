"""Read the arguments that `train` prints with ms-swift. Usage: ARGUMENTS-FILE TEMPLATE.

The template is added if the file does not state one.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

from swift.arguments import SftArguments
from swift.utils import parse_args

text = Path(sys.argv[1]).read_text(encoding="utf-8")
words = [*shlex.split(text.replace("\\\n", " ")), "--dataset", "unused", "--use_hf", "true"]
words += [] if "--template" in words else ["--template", sys.argv[2]]
arguments, left = parse_args(SftArguments, words)
arguments = arguments[0] if isinstance(arguments, tuple) else arguments
prefixes = arguments.trainable_parameters or []
print(
    json.dumps(
        {
            "model_type": arguments.model_type,
            "template": getattr(arguments, "template", None),
            "trainable": [int(re.findall(r"\.layers\.(\d+)\.", prefix)[0]) for prefix in prefixes],
            "left": left,
        }
    )
)
