"""Name the tools that `gen` writes for; the command line lists them at every start."""

MERGEKIT, PEFT, EXLLAMAV3 = TOOLS = ("mergekit", "peft", "exllamav3")
