"""`push` verifies, says what it sends, and sends it: the real client against a local Hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
import xet_store
from gguf_files import make_gguf
from harness import Cli, set_keys
from hub_server import HubServer

import mergekit_interleave as api
from mergekit_interleave.errors import OutputError

ID = "org/deeper"


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a grown model, which no test may change."""
    out = tmp_path_factory.mktemp("made") / "out"
    api.run("interleave: every 4", out, model=str(tiny))
    return out


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """Return a grown model that the test may change."""
    return Path(shutil.copytree(made, tmp_path / "own"))


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serve a Hub whose storage holds the base; the client has a token for it."""
    from huggingface_hub import constants

    store = tmp_path / "store"
    store.mkdir()
    xet_store.send(store, tiny.glob("*.safetensors"))
    with hub_server.serving(store) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield hub


def content(model: Path) -> dict[str, bytes | str]:
    """Return the files of a model as a repository holds them."""
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.iterdir()}
    return {
        name: hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else data
        for name, data in files.items()
    }


def test_a_model_arrives(hub: HubServer, made: Path, tiny: Path) -> None:
    """All files arrive in one commit, and the forecast was within a fifth of what was sent."""
    before = xet_store.nbytes(hub.store)
    announced: list[tuple[api.PushReport, list[str]]] = []
    report = api.push(
        made, ID, against=str(tiny), progress=lambda r: announced.append((r, [*hub.requests]))
    )
    assert hub.branches[ID, "main"] == content(made)
    assert len(hub.commits) == 1
    assert not hub.private[ID]
    sent = hub.received + xet_store.nbytes(hub.store) - before
    assert report.sent == pytest.approx(sent, rel=0.2)
    assert report.weights is not None
    assert report.weights.nbytes == (made / "model.safetensors").stat().st_size
    assert report.url == f"{hub.url}/{ID}/commit/{hub_server.COMMIT}"
    ((first, requests),) = announced
    assert requests == [], "nothing was sent before"
    assert first.url is None
    assert first.sizes == {path.name: path.stat().st_size for path in made.iterdir()}


def test_the_command(hub: HubServer, made: Path, tiny: Path, mk: Cli) -> None:
    """The command shows the check, the place and the files, and then the address."""
    result = mk("push", made, ID, "--against", tiny)
    assert result.status == 0, result.err
    check, *_, last = result.out.splitlines()
    assert "10 layers" in check
    assert last == f"sent: {hub.url}/{ID}/commit/{hub_server.COMMIT}"
    for path in made.iterdir():
        assert f"    {path.name}  " in result.out
    assert result.err == ""


def test_a_dry_run(hub: HubServer, made: Path, mk: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run needs no network and no token, and changes nothing."""
    from huggingface_hub import constants

    before = content(made)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    result = mk("push", made, ID, "--dry-run", "--json", "--private", "--revision", "v2")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert found["files"] == {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    assert found["nbytes"] == sum(found["files"].values())
    assert 0 < found["weights"]["new"] <= found["weights"]["nbytes"]
    assert found["sent"] > found["weights"]["new"]
    assert (found["repo"], found["revision"], found["private"]) == (ID, "v2", True)
    assert found["url"] is None
    assert hub.requests == []
    assert content(made) == before


class TestRefused:
    """What is sent nowhere."""

    def test_a_damaged_model(self, hub: HubServer, own: Path, mk: Cli) -> None:
        """A model that `verify` refuses is refused with the same error."""
        set_keys(own / "config.json", num_hidden_layers=9)
        verified = mk("verify", own)
        for options in ((), ("--dry-run",)):
            result = mk("push", own, ID, *options)
            assert result.status == verified.status == 1
            assert result.err.splitlines()[0] == verified.err.splitlines()[-1]
        assert hub.requests == []

    def test_a_damaged_original(self, hub: HubServer, own: Path, tiny: Path, mk: Cli) -> None:
        """With the base, a flipped bit of an original layer is found."""
        weights = own / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        result = mk("push", own, ID, "--against", tiny)
        assert result.status == 1
        assert "mk-interleave verify" in result.err
        assert hub.requests == []

    @pytest.mark.parametrize("name", ["tiny", "nothing"])
    def test_no_grown_model(
        self, name: str, hub: HubServer, tiny: Path, tmp_path: Path, mk: Cli
    ) -> None:
        """A directory that was not grown, and one that does not exist, are refused."""
        place = tiny if name == "tiny" else tmp_path / name
        result, verified = mk("push", place, ID), mk("verify", place)
        assert (result.status, result.err) == (verified.status, verified.err)
        assert result.status == 1
        assert hub.requests == []

    @pytest.mark.parametrize(
        "words",
        [
            ("org/name/x",),
            ("name",),
            ("org/na me",),
            ("org/",),
            (ID, "--revision", "a b"),
            (ID, "--revision", "../x"),
            (ID, "--revision", "a//b"),
            (ID, "--revision", hub_server.COMMIT),
            (ID, "--trained"),
        ],
        ids=" ".join,
    )
    def test_malformed_names(
        self, words: tuple[str, ...], hub: HubServer, made: Path, mk: Cli
    ) -> None:
        """Names that the Hub accepts for no model are wrong usage."""
        for options in ((), ("--dry-run",)):
            assert mk("push", made, *words, *options).status == 2
        assert hub.requests == []

    def test_the_metadata_of_the_card(self, hub: HubServer, made: Path, mk: Cli) -> None:
        """A card that the Hub does not accept is refused before anything else is sent."""
        hub.metadata_errors.append('"license" must be one of [mit]')
        result = mk("push", made, ID)
        assert result.status == 1
        assert '"license" must be one of [mit]' in result.err
        assert hub.branches[ID, "main"] == {}
        assert not hub.commits


class TestTheHubRefuses:
    """Each refusal is one error with a remedy; following the remedy succeeds."""

    def test_no_token(
        self, hub: HubServer, made: Path, mk: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a token, nothing is verified and nothing is sent."""
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(made / "no-token"))
        result = mk("push", made, ID)
        assert (result.status, result.out) == (1, "")
        assert "HF_TOKEN" in result.err.splitlines()[-1]
        assert hub.requests == []
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        assert mk("push", made, ID).status == 0

    def test_another_token(
        self, hub: HubServer, made: Path, mk: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token that the Hub does not know is refused, and appears in no message."""
        monkeypatch.setenv("HF_TOKEN", "hf_unknown")
        result = mk("push", made, ID)
        assert result.status == 1
        assert "HF_TOKEN" in result.err.splitlines()[-1]
        assert "hf_unknown" not in result.err + result.out
        assert not hub.private

    def test_another_organization(self, hub: HubServer, made: Path, mk: Cli) -> None:
        """A token without the right to write there is refused."""
        result = mk("push", made, "other/deeper")
        assert result.status == 1
        assert "other/deeper" in result.err.splitlines()[0]
        assert not hub.private

    def test_offline(
        self, hub: HubServer, made: Path, mk: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In offline mode nothing is sent; a dry run works."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        result = mk("push", made, ID)
        assert result.status == 1
        assert "--dry-run" in result.err.splitlines()[-1]
        assert mk("push", made, ID, "--dry-run").status == 0
        assert hub.requests == []

    def test_nothing_listens(
        self, hub: HubServer, made: Path, mk: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A Hub that is not reached is one error, and the command can be repeated."""
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
            result = mk("push", made, ID)
        assert result.status == 1
        assert "HF_ENDPOINT" in result.err.splitlines()[-1]
        assert len(result.err.splitlines()) == 2
        assert mk("push", made, ID).status == 0
        assert hub.commits

    @pytest.mark.parametrize("status", [503, 409])
    def test_repeated_after_an_error(
        self, status: int, hub: HubServer, made: Path, mk: Cli
    ) -> None:
        """After an error of the Hub, the same command sends no chunk again."""
        hub.failures.append(status)
        result = mk("push", made, ID)
        assert result.status == 1
        assert "repeat the command" in result.err.splitlines()[-1]
        assert hub.branches[ID, "main"] == {}
        stored = xet_store.nbytes(hub.store)
        assert mk("push", made, ID).status == 0
        assert hub.branches[ID, "main"] == content(made)
        assert xet_store.nbytes(hub.store) == stored

    def test_a_storage_that_fails(self, hub: HubServer, made: Path, mk: Cli) -> None:
        """An error of the storage is one error, and the command can be repeated."""
        hub.storage = "local:///dev/null/store"
        result = mk("push", made, ID)
        assert result.status == 1
        assert "repeat the command" in result.err.splitlines()[-1]
        hub.storage = None
        assert mk("push", made, ID).status == 0
        assert hub.branches[ID, "main"] == content(made)


class TestRepositories:
    """Repositories and branches that exist, and those that do not."""

    def test_a_branch(self, hub: HubServer, made: Path, mk: Cli) -> None:
        """`--revision` creates a branch, or adds to it, and leaves `main` as it is."""
        for _ in range(2):
            assert mk("push", made, ID, "--revision", "v2/a").status == 0
        assert hub.branches[ID, "v2/a"] == content(made)
        assert hub.branches[ID, "main"] == {}

    def test_a_second_time(self, hub: HubServer, own: Path, mk: Cli) -> None:
        """A file that has changed is sent again, and other files of the repository stay."""
        hub.add(ID)
        hub.branches[ID, "main"]["notes.txt"] = b"mine"
        assert mk("push", own, ID).status == 0
        (own / "README.md").write_text("---\nlicense: mit\n---\nmine\n", encoding="utf-8")
        assert mk("push", own, ID).status == 0
        assert hub.branches[ID, "main"] == {**content(own), "notes.txt": b"mine"}

    def test_private(self, hub: HubServer, made: Path, mk: Cli) -> None:
        """`--private` creates a private repository, or uses one."""
        for _ in range(2):
            assert mk("push", made, ID, "--private").status == 0
        assert hub.private[ID]

    def test_a_public_one(self, hub: HubServer, made: Path, mk: Cli) -> None:
        """`--private` sends nothing to a repository that is public."""
        hub.add(ID)
        result = mk("push", made, ID, "--private")
        assert result.status == 1
        assert "--private" in result.err.splitlines()[-1]
        assert hub.branches[ID, "main"] == {}
        assert mk("push", made, ID).status == 0

    def test_hidden_directories(self, hub: HubServer, own: Path, mk: Cli) -> None:
        """What git and the client keep in a directory is not sent; other files are."""
        for name in (".git/config", ".cache/x", "logs/x.txt"):
            (own / name).parent.mkdir()
            (own / name).write_text("x")
        assert mk("push", own, ID).status == 0
        sent = hub.branches[ID, "main"].keys() - {path.name for path in own.iterdir()}
        assert sent == {"logs/x.txt"}


def test_a_trained_model(hub: HubServer, own: Path, tiny: Path, mk: Cli) -> None:
    """A model whose new layers were trained is sent with `--trained`, as new bytes."""
    from safetensors.torch import load_file, save_file

    weights = load_file(own / "model.safetensors")
    weights["model.layers.4.mlp.up_proj.weight"] += 0.25
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    words = ("push", own, ID, "--against", tiny)
    refused = mk(*words)
    assert refused.status == 1
    assert "--trained" in refused.err.splitlines()[-1]
    result = mk(*words, "--trained")
    assert result.status == 0, result.err
    assert hub.branches[ID, "main"] == content(own)


def test_a_file_that_changes(hub: HubServer, own: Path) -> None:
    """A file that changes while it is sent is an error; repeating sends the new one."""
    changed = own / "LICENSE"
    hub.before_commit = lambda: changed.write_text("another")
    with pytest.raises(OutputError, match=r"LICENSE"):
        api.push(own, ID)
    hub.before_commit = lambda: None
    api.push(own, ID)
    assert hub.branches[ID, "main"]["LICENSE"] == b"another"


def test_an_interrupt(hub: HubServer, made: Path, tmp_path: Path) -> None:
    """Ctrl-C while the Hub is waited for ends the command with 130 and one line."""
    waiting = tmp_path / "waiting"
    hub.before_commit = lambda: (waiting.touch(), time.sleep(5))
    command = subprocess.Popen(
        [sys.executable, "-m", "mergekit_interleave", "push", str(made), ID],
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not waiting.exists():
        assert command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=20)
    assert command.returncode == 130
    assert errors.splitlines() == ["error: interrupted"]


class TestGguf:
    """GGUF files are sent with their card."""

    @pytest.mark.parametrize("limit", [None, 40_000])
    def test_files(self, limit: int | None, hub: HubServer, tmp_path: Path, mk: Cli) -> None:
        """One file or all splits are sent, and the card under its name on the Hub."""
        base = make_gguf(tmp_path / "toy.gguf", kind="Q8_0")
        report = api.run(
            "interleave: every 2", tmp_path / "out.gguf", model=str(base), out_shard_size=limit
        )
        (tmp_path / "other.gguf").write_bytes(b"not of the model")
        result = mk("push", report.out, ID, "--against", base)
        assert result.status == 0, result.err
        files = sorted(path.name for path in tmp_path.glob("out*.gguf"))
        assert len(files) == 1 if limit is None else len(files) > 1
        sent = hub.branches[ID, "main"]
        assert sorted(sent) == ["README.md", *files]
        assert sent["README.md"] == (tmp_path / "out.md").read_bytes()
        pushed = api.push(report.out, ID, dry_run=True)
        assert pushed.weights is not None
        assert pushed.weights.new <= pushed.weights.nbytes

    def test_a_damaged_file(self, hub: HubServer, tmp_path: Path, mk: Cli) -> None:
        """A GGUF file that `verify` refuses is refused."""
        base = make_gguf(tmp_path / "toy.gguf", kind="Q8_0")
        out = tmp_path / "out.gguf"
        api.run("append: 1", out, model=str(base))
        data = bytearray(out.read_bytes())
        data[-1] ^= 1
        out.write_bytes(data)
        assert mk("push", out, ID, "--against", base).status == 1
        assert hub.requests == []


def test_without_the_client(made: Path, mk: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hf_xet, weights are sent as a whole, and `push` says so."""
    monkeypatch.setitem(sys.modules, "hf_xet", None)
    result = mk("push", made, ID, "--dry-run", "--json")
    found = json.loads(result.out)
    assert found["weights"] is None
    assert found["sent"] > (made / "model.safetensors").stat().st_size
    assert "hf_xet" in mk("push", made, ID, "--dry-run").out
