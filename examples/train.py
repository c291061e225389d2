"""Grow a model by a fifth, train only its new layers, and show the result.

OUT receives the deeper model in `expanded`, the trained one in `trained`, and a plot, `loss.png`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    get_cosine_schedule_with_warmup,
)
from transformers.utils.logging import disable_progress_bar

from mergekit_interleave import freeze_original_layers

TEXT = Path(__file__).parent / "data" / "compleat-angler.txt"
HELD_OUT = "\nCHAP. XII.\n"
"""The held-out text starts here: the last two chapters, about a tenth of the book."""
SEED = 1653
LENGTH = 256
BATCH = 2
WARMUP = 9
RATE = 2e-3
BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "bf16"))
"""Whether this CPU computes in bfloat16, which makes training more than twice as fast."""

BLUE, ORANGE, GREY = "#0b5fa5", "#c2410c", "#6b7280"


def main(base: Path, out: Path) -> int:
    """Expand BASE, train the new layers, and return 0 if all checks pass."""
    expanded, trained = out / "expanded", out / "trained"
    disable_progress_bar()
    torch.manual_seed(SEED)
    directive = "interleave: every 5, zero: [o_proj, down_proj]"
    if command("run", directive, expanded, "--model", base, "--force") != 0:
        return 1

    tokenizer = AutoTokenizer.from_pretrained(base)
    train_on, held_out = (windows(tokenizer, part) for part in split(TEXT))
    base_loss = loss_of(load(base), held_out)
    model = load(expanded)
    before = loss_of(model, held_out)

    names = freeze_original_layers(model)
    start = {name: model.get_parameter(name).detach().clone() for name in names}
    count = sum(tensor.numel() for tensor in start.values())
    print(f"\ntrains {count:,} parameters of {model.num_parameters():,}: {len(names)} tensors")
    started = time.monotonic()
    losses = train(model, train_on)
    print(f"{len(losses)} steps in {time.monotonic() - started:.0f} seconds\n")

    # In the base's dtype, untrained tensors are stored unchanged to the last bit.
    model.to(AutoConfig.from_pretrained(base).dtype).save_pretrained(trained)
    tokenizer.save_pretrained(trained)

    model = load(trained)  # evaluate the stored model
    after = loss_of(model, held_out)
    changes = [float((model.get_parameter(n) - start[n]).detach().abs().max()) for n in names]
    recipe = ["--trained", "--recipe", expanded / "interleave.json"]
    unchanged = command("verify", trained, "--against", base, *recipe) == 0
    changed = sum(change > 0 for change in changes)
    draw(out / "loss.png", losses, base_loss, before, after)

    print(f"\noriginal tensors unchanged to the last bit: {'yes' if unchanged else 'NO'}")
    print(f"new tensors changed: {changed} of {len(names)}, by at most {max(changes):.3g}")
    print(f"loss on the held-out last two chapters: base {base_loss:.4f},")
    print(f"expanded {before:.4f}, trained {after:.4f}; picture: {out / 'loss.png'}")
    good = unchanged and changed == len(names) and before == base_loss and after < before
    return 0 if good else 1


def command(*words: object) -> int:
    """Print and run a command of this project, and return its exit code."""
    line = [str(word) for word in words]
    print("$ mk-interleave", *(f"'{word}'" if " " in word else word for word in line), flush=True)
    program = [sys.executable, "-m", "mergekit_interleave"]
    return subprocess.run([*program, *line], check=False).returncode  # noqa: S603 - it runs this package


def split(text: Path) -> tuple[str, str]:
    """Split the text into training text and held-out text."""
    first, _, last = text.read_text(encoding="utf-8").partition(HELD_OUT)
    return first, last


def windows(tokenizer: Any, text: str) -> Any:
    """Tokenize a text into rows of LENGTH tokens; an incomplete last row is dropped."""
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def load(path: Path) -> Any:
    """Load a model in float32, which keeps small training steps."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def loss_of(model: Any, rows: Any) -> float:
    """Return the mean loss per token in float32; models with equal outputs have equal losses."""
    model.eval()
    with torch.no_grad():
        losses = [float(model(input_ids=row, labels=row).loss) for row in rows.split(1)]
    return sum(losses) / len(losses)


def train(model: Any, rows: Any) -> list[float]:
    """Train on each row once, and return the loss of each step."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    loader = DataLoader(rows, BATCH, shuffle=True, drop_last=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, len(loader))
    losses: list[float] = []
    for step, batch in enumerate(loader, start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 10 == 0:
            print(f"step {step} of {len(loader)}: loss {sum(losses[-10:]) / 10:.3f}", flush=True)
    return losses


def draw(file: Path, losses: list[float], base: float, before: float, after: float) -> None:
    """Plot the loss of each step, and on the held-out text before and after training."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    smooth = [sum(losses[max(0, i - 10) : i]) / min(i, 10) for i in steps]
    axes.axhline(base, color=GREY, linestyle="--", label=f"held-out text, base: {base:.3f}")
    axes.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=1, label="training, each step")
    axes.plot(steps, smooth, color=BLUE, linewidth=2, label="training, mean of 10 steps")
    ends = {0: before, len(losses): after}
    axes.plot([*ends], [*ends.values()], "o", color=ORANGE, label="held-out text, deeper model")
    for step, loss in ends.items():
        label = axes.annotate(
            f"{loss:.3f}", (step, loss), (0, 10), textcoords="offset points", ha="center"
        )
        label.set(
            color=ORANGE, weight="bold", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}
        )
    axes.set_title("A deeper model, only its new layers trained", pad=14)
    axes.set_xlabel(f"step, of {BATCH * LENGTH} tokens")
    axes.set_ylabel("loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", metavar="BASE", type=Path, help="directory of the model")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="output directory, replaced if it exists"
    )
    arguments = parser.parse_args()
    sys.exit(main(arguments.base, arguments.out))
