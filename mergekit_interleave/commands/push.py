"""`push`: verify a model, and send it to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import iterate_tensors
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import ModelLike, StrPath
from mergekit_interleave.commands.verify import verify
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.engines import registry
from mergekit_interleave.engines.sharding import OutShard
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.gguf.model import open_model, split_stem
from mergekit_interleave.output import gguf_card, hub_upload, upload_forecast, upload_pieces
from mergekit_interleave.output.hub_upload import Target
from mergekit_interleave.output.upload_forecast import Upload
from mergekit_interleave.output.upload_pieces import Origin, Span
from mergekit_interleave.verification.gguf import GgufVerifyReport
from mergekit_interleave.verification.report import VerifyReport

_NOT_SENT = (".git", ".cache")
"""The directories that the Hub accepts no files in."""

_CARD = "README.md"
"""The name of a model card in a repository."""

_LARGE = 10**7
"""The size from which the Hub keeps a file in its storage for large files, whatever its type."""


@dataclass(frozen=True)
class PushReport:
    """What `push` sends, and where.

    Attributes:
        target: The repository and the branch.
        files: The files, by their names in the repository.
        sizes: Their sizes in bytes.
        weights: The forecast for the weights; None if hf_xet is missing, and they are sent whole.
        stored: The names of the files of the weights.
        verified: The result of `verify`, as lines of text.
        url: The address of the commit; None if nothing was sent.
        warnings: Warnings, one sentence each.
    """

    target: Target
    files: Mapping[str, Path]
    sizes: Mapping[str, int]
    weights: Upload | None
    stored: frozenset[str]
    verified: tuple[str, ...]
    url: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(self.sizes.values())

    @property
    def others(self) -> int:
        """The bytes of the files that are sent whole: those that are small, encoded in base64."""
        small = (n for name, n in self.sizes.items() if name not in self.stored and n < _LARGE)
        return sum(-(-size // 3) * 4 for size in small)

    @property
    def sent(self) -> int:
        """The forecast of the bytes that are sent."""
        if self.weights is None:
            return self.others + sum(self.sizes[name] for name in self.stored)
        return self.others + self.weights.new

    def lines(self) -> list[str]:
        """Return what is sent as lines of text."""
        return list(_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `push --json` prints it."""
        return {
            "repo": self.target.repo,
            "revision": self.target.revision,
            "private": self.target.private,
            "files": dict(self.sizes),
            "nbytes": self.nbytes,
            "weights": self.weights and {"nbytes": self.weights.nbytes, "new": self.weights.new},
            "sent": self.sent,
            "url": self.url,
            "warnings": list(self.warnings),
        }


def _lines(report: PushReport) -> Iterator[str]:
    target = report.target
    yield from report.verified
    visible = "private" if target.private else "public if it is new"
    yield f"to {target.repo}, branch {target.revision}, {visible}: {amount(report.nbytes)}"
    for name, size in report.sizes.items():
        yield f"    {name}  {amount(size)}"
    sent, weights = f"about {amount(report.sent)} will be sent", report.weights
    if weights is None:
        yield f"{sent}: the weights as a whole, because hf_xet is missing or too old"
    else:
        yield (
            f"{sent}, if the Hub holds the base: {amount(weights.new)} of "
            f"{amount(weights.nbytes)} of weights, and {amount(report.others)} of other files"
        )
    if report.url is not None:
        yield f"sent: {report.url}"


def push(  # noqa: PLR0913 - one parameter for each option
    directory: StrPath,
    repo: str,
    *,
    against: ModelLike | Sequence[ModelLike] | None = None,
    trained: bool = False,
    layers: str | None = None,
    also: Sequence[str] = (),
    recipe: StrPath | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Callable[[PushReport], object] | None = None,
) -> PushReport:
    """Verify a model, and send it to the Hugging Face Hub in one commit.

    huggingface_hub does the transfer, with its token and its settings. An upload that failed
    resumes when it is repeated: the storage asks only for the chunks that it does not hold.

    Args:
        directory: A model that `verify` accepts: a directory, or a GGUF file with its card.
        repo: The Hub id of the repository, which is created if it does not exist.
        against: See `verify`. Without it, the forecast assumes that the base has its tensors in
            the order in which transformers writes them.
        trained: See `verify`.
        layers: See `verify`.
        also: See `verify`.
        recipe: See `verify`.
        allow_pickle: See `verify`.
        trust_remote_code: See `verify`.
        private: Create a private repository; a public one is refused.
        revision: The branch, which is created if it does not exist; `main` by default.
        dry_run: Verify and forecast, and send nothing. This needs no network and no token.
        progress: Called with the report before anything is sent; the progress bars of
            huggingface_hub are shown then, too.

    Returns:
        The files, the forecast and, unless `dry_run`, the address of the commit.

    Raises:
        DirectiveError: `repo` or `revision` is no valid name, or see `verify`.
        RefusedError: The model is not what its layout says; nothing is sent.
        CheckpointError: The model cannot be read, or the Hub cannot be reached.
        OutputError: There is no token, the Hub refuses it or the files, or a file has changed.
    """
    target = Target(repo, revision or hub_upload.MAIN, private)
    target.check()
    if not dry_run:
        hub_upload.check_online()
    report = verify(
        directory,
        against=against,
        trained=trained,
        layers=layers,
        also=also,
        recipe=recipe,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    _check(report)
    found = _report(report, target)
    if dry_run:
        return found
    if progress is not None:
        progress(found)
    with restored_settings(bars=progress is not None):
        return replace(found, url=hub_upload.send(found.files, target))


def _check(report: VerifyReport | GgufVerifyReport) -> None:
    """Check that a model is what its layout says, as `verify` does.

    Raises:
        RefusedError: It is not; the hint says how to see the differences.
    """
    try:
        report.check()
    except RefusedError as error:
        if error.hint is None:
            error.hint = (
                f"`mk-interleave verify {report.out}` lists the differences; pass --trained "
                "--against BASE if the model was trained"
            )
        raise


def _report(report: VerifyReport | GgufVerifyReport, target: Target) -> PushReport:
    tensors, origin, files = (
        _gguf(report) if isinstance(report, GgufVerifyReport) else _directory(report)
    )
    stored = frozenset({tensor.file for tensor in tensors.values()})
    sizes = {name: path.stat().st_size for name, path in files.items()}
    names = frozenset(name for name, path in files.items() if path in stored)
    pieces = upload_pieces.stored(tensors, origin)
    return PushReport(
        target=target,
        files=files,
        sizes=sizes,
        weights=upload_forecast.forecast(pieces, sum(sizes[name] for name in names)),
        stored=names,
        verified=tuple(report.lines()),
        warnings=report.warnings,
    )


def _directory(report: VerifyReport) -> tuple[Mapping[str, Tensor], Origin, Mapping[str, Path]]:
    """Return the tensors of a model directory, where the base has them, and its files."""
    is_compared = report.expected.plan is not None
    origin = upload_pieces.in_sources(report.expected.specs) if is_compared else _assumed(report)
    files = {
        path.relative_to(report.out).as_posix(): path
        for path in sorted(report.out.rglob("*"))
        if path.is_file() and not set(path.relative_to(report.out).parts) & {*_NOT_SENT}
    }
    return dict(iterate_tensors(report.out)), origin, files


def _assumed(report: VerifyReport) -> Origin:
    """Return where the base of a model is assumed to hold its tensors.

    Other writers than the stream engine, which keeps the order of the base, sort the tensors of a
    file by their names, and so does transformers.
    """
    model = Models().open(ModelRef(ModelPath(str(report.out))))
    specs, layers = report.expected.specs, report.expected.layout.layers
    originals = [
        spec
        if spec.layer is None
        else replace(spec, name=model.renamed(spec.name, layers[spec.layer].source))
        for spec in upload_pieces.originals_of(specs)
    ]
    if report.own is None or report.own.content.get("engine") != registry.STREAM:
        originals.sort(key=lambda spec: (-spec.tensor.width, spec.name))
    header = OutShard("base", originals, 8).header() if originals else b""
    return upload_pieces.in_itself(
        specs, [replace(spec, name=spec.source) for spec in originals], header
    )


def _gguf(report: GgufVerifyReport) -> tuple[Mapping[str, Tensor], Origin, Mapping[str, Path]]:
    """Return the tensors of a GGUF model, where the base has them, and its files with the card."""
    model = open_model(ModelRef(ModelPath(str(report.out))))
    if report.plan is not None:
        origin = upload_pieces.in_sources(report.specs)
    else:
        # The metadata of the base is not known; it is about as long as that of the model.
        originals = upload_pieces.originals_of(report.specs)
        first = originals[0].tensor if originals else None
        header = Span(first.file, 8, first.start - 8) if first else b""
        origin = upload_pieces.in_itself(report.specs, originals, header)
    files = {path.name: path for path in sorted({t.file for t in model.tensors.values()})}
    stem = split_stem(report.out.name) or report.out.stem
    card = gguf_card.path_of(report.out.with_name(f"{stem}{report.out.suffix}"))
    if card.is_file():
        files[_CARD] = card
    return model.tensors, origin, files
