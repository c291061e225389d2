"""Name the tools that `gen` writes for; the command line lists them at every start."""

MERGEKIT, PEFT = TOOLS = ("mergekit", "peft")
