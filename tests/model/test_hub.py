"""Hub ids work with the real client against a local server."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from harness import Cli, assert_same_tensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


class Hub:
    """A model repository `org/tiny` with one commit, a branch and a tag, and a log of requests."""

    def __init__(self, root: Path, *, token: str | None = None) -> None:
        self.root = root
        self.token = token
        self.requests: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def files(self) -> list[str]:
        """The downloaded files, each once."""
        got = (r.split("/", 5)[-1] for r in self.requests if r.startswith("GET /org/tiny/resolve/"))
        return sorted(set(got))

    def answer(self, request: http.server.BaseHTTPRequestHandler, *, body: bool) -> None:
        """Answer the requests of the Hub's API that downloading a model needs."""
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return self.fail(request, 401, "RepoNotFound")
        match path.strip("/").split("/"):
            case ["api", "models", "org", "tiny", "revision", revision]:
                if revision not in ("main", "v1", COMMIT):
                    return self.fail(request, 404, "RevisionNotFound")
                names = [{"rfilename": name} for name, _ in self.entries()]
                return self.json(request, {"id": "org/tiny", "sha": COMMIT, "siblings": names})
            case ["api", "models", "org", "tiny", "tree", *_]:
                tree = [
                    {"type": "file", "path": n, "size": f.stat().st_size, "oid": self.etag(f)}
                    for n, f in self.entries()
                ]
                return self.json(request, tree)
            case ["org", "tiny", "resolve", revision, *name]:
                if revision not in ("main", "v1", COMMIT):
                    return self.fail(request, 404, "RevisionNotFound")
                file = self.root / "/".join(name)
                if not file.is_file():
                    return self.fail(request, 404, "EntryNotFound")
                request.send_response(200)
                request.send_header("X-Repo-Commit", COMMIT)
                request.send_header("ETag", f'"{self.etag(file)}"')
                request.send_header("Content-Length", str(file.stat().st_size))
                request.end_headers()
                if body:
                    request.wfile.write(file.read_bytes())
                return None
        return self.fail(request, 404, "RepoNotFound")

    def entries(self) -> Iterator[tuple[str, Path]]:
        """Yield the repository's files with their names."""
        for file in sorted(self.root.rglob("*")):
            if file.is_file():
                yield file.relative_to(self.root).as_posix(), file

    @staticmethod
    def etag(file: Path) -> str:
        """Return a hash of a file's content."""
        return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()

    @staticmethod
    def json(request: http.server.BaseHTTPRequestHandler, content: object) -> None:
        """Answer with JSON."""
        body = json.dumps(content).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    @staticmethod
    def fail(request: http.server.BaseHTTPRequestHandler, status: int, code: str) -> None:
        """Answer as the Hub does if something is missing."""
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


@pytest.fixture(scope="module")
def repository(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sharded model, with additional files that are not needed."""
    root = tmp_path_factory.mktemp("hub") / "tiny"
    shutil.copytree(sharded, root)
    for name in ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "stray.safetensors"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not needed")
    return root


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    """Serve the repository on the loopback interface."""
    hub = Hub(repository)
    yield hub
    hub.server.shutdown()


@pytest.fixture
def online(hub: Hub, shell: Shell, tmp_path: Path) -> Shell:
    """Return a shell that uses the local server as the Hub, with its own cache."""

    def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        result: subprocess.CompletedProcess[str] = shell(
            command, tmp_path, **{**settings, **environment}
        )
        return result

    return run


def test_gen_fetches_the_config_alone(hub: Hub, online: Shell) -> None:
    """`gen` downloads config.json only, and keeps the id as the user wrote it."""
    result = online("mk-interleave gen 'interleave: every 2, model: org/tiny@v1'")
    assert result.returncode == 0, result.stderr
    document = yaml.safe_load(result.stdout)
    assert [entry["sources"][0]["model"] for entry in document["slices"]] == ["org/tiny@v1"] * 4
    assert hub.files == ["config.json"]
    assert result.stderr == ""


def test_plan_needs_the_config_alone(hub: Hub, online: Shell) -> None:
    """`plan` downloads config.json only, and counts the parameters from it."""
    result = online("mk-interleave plan 'interleave: every 2, model: org/tiny'")
    assert result.returncode == 0, result.stderr
    assert "config.json" in result.stdout
    assert hub.files == ["config.json"]


def test_explain_asks_the_cache_alone(hub: Hub, online: Shell, tmp_path: Path) -> None:
    """`explain` sends no request, whether or not config.json is in the cache."""
    gen = "mk-interleave gen 'interleave: every 2, model: org/tiny' > cfg.yml"
    (tmp_path / "stated.yml").write_text("model: org/tiny\nlayers: 4\ninterleave: every 2\n")
    online("mk-interleave gen stated.yml > cfg.yml")
    result = online("mk-interleave explain cfg.yml")
    assert yaml.safe_load(result.stdout)["layers"] == 4
    assert hub.requests == []
    online(gen)
    hub.requests.clear()
    result = online("mk-interleave explain cfg.yml")
    assert yaml.safe_load(result.stdout) == {"model": "org/tiny", "interleave": "every 2"}
    assert hub.requests == []


def test_a_hub_without_an_address_is_not_waited_for(online: Shell) -> None:
    """An unknown host gives one warning for each model, without the client's long retries."""
    began = time.monotonic()
    result = online(
        "mk-interleave gen 'layout: [org/one 0:4, org/two 2:4]'",
        HF_ENDPOINT="https://no-such-host.invalid",
    )
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^warning: (org/\w+): ", result.stderr, re.MULTILINE) == [
        "org/one",
        "org/two",
    ]
    assert time.monotonic() - began < 15


def test_run_fetches_what_it_needs(
    hub: Hub, online: Shell, mk: Cli, sharded: Path, tmp_path: Path
) -> None:
    """`run` downloads the indexed shards and the small files, and then works offline."""
    command = "mk-interleave run 'interleave: every 2, model: org/tiny' "
    result = online(command + "out")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    wanted = {file.name for file in sharded.iterdir()}
    assert set(hub.files) == wanted
    assert mk("run", "interleave: every 2", tmp_path / "local", "--model", sharded).status == 0
    assert_same_tensors(tmp_path / "out", tmp_path / "local")

    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/tiny\n" in card
    manifest = json.loads((tmp_path / "out" / "interleave.json").read_text())
    [own] = manifest["models"]
    assert (own["model"], own["layers"], own["commit"]) == ("org/tiny", 4, COMMIT)

    hub.requests.clear()
    result = online(command + "again", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert hub.requests == []
    assert_same_tensors(tmp_path / "again", tmp_path / "out")


def test_the_token_is_sent(hub: Hub, online: Shell) -> None:
    """A private repository can be read with HF_TOKEN only."""
    hub.token = "secret"  # noqa: S105 - of the test's own server
    command = "mk-interleave gen 'append: 1, model: org/tiny'"
    result = online(command)
    assert result.returncode == 1
    assert result.stderr.startswith("error: org/tiny: ")
    assert "HF_TOKEN" in result.stderr
    assert online(command, HF_TOKEN="secret").returncode == 0


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("org/tiny@nowhere", "@revision"),
        ("org/nothing", "HF_TOKEN"),
        ("a/b/c", "org/name"),
        ("./org/tiny", "org/name"),
    ],
)
def test_what_the_hub_does_not_have(online: Shell, model: str, named: str) -> None:
    """A missing repository, revision or directory is one error that names it."""
    result = online(f"mk-interleave gen 'append: 1, model: {model}'")
    assert (result.returncode, result.stdout) == (1, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith(f"error: {model}: ")
    assert hint.startswith("hint: ")
    assert named in hint


def test_with_layers_stated_the_network_is_never_asked(hub: Hub, online: Shell) -> None:
    """With `--layers`, only the cache is read, and a wrong number is an error."""
    command = "mk-interleave gen 'append: 1, model: org/tiny'"
    result = online(f"{command} --layers 4")
    assert result.returncode == 0
    assert result.stderr.startswith("warning: org/tiny: ")
    assert hub.requests == []
    assert online(command).returncode == 0
    hub.requests.clear()
    result = online(f"{command} --layers 5")
    assert re.search(r"^error: layers: 5\b.*\borg/tiny\b.*\b4\b", result.stderr), result.stderr
    assert hub.requests == []


@pytest.mark.slow  # huggingface_hub tries several times, and waits in between
def test_a_server_that_is_down(online: Shell) -> None:
    """A server that does not answer is one error, without a traceback."""
    result = online(
        "mk-interleave gen 'append: 1, model: org/tiny'", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert result.returncode == 1
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: org/tiny: ")
    assert "HF_ENDPOINT" in hint


def test_an_unsupported_type_is_refused_before_its_weights_are_fetched(
    hub: Hub, online: Shell, tmp_path: Path
) -> None:
    """An unknown model type is refused before the weights are downloaded."""
    config = hub.root / "config.json"
    original = config.read_text()
    config.write_text(json.dumps({**json.loads(original), "model_type": "novel"}))
    try:
        result = online("mk-interleave run 'append: 1, model: org/tiny' out")
    finally:
        config.write_text(original)
    assert result.returncode == 1
    assert re.search(r"^error: org/tiny: .*'novel'", result.stderr), result.stderr
    assert hub.files == ["config.json"]
    assert "out" not in os.listdir(tmp_path)


def test_a_model_of_the_hubs_is_frozen_by_its_own_manifest(
    online: Shell, mk: Cli, sharded: Path, tmp_path: Path
) -> None:
    """The interleave.json of a repository tells its new layers, and its lineage if grown again."""
    deeper = tmp_path / "deeper"
    words = ("run", "interleave: every 2", deeper, "--model", sharded, "--engine", "stream")
    assert mk(*words).status == 0
    other = Hub(deeper)
    program = (
        "from transformers import AutoModelForCausalLM as A\n"
        "from mergekit_interleave import freeze_original_layers\n"
        "names = freeze_original_layers(A.from_pretrained('org/tiny'))\n"
        "print(sorted({name.split('.')[2] for name in names}))\n"
    )
    (tmp_path / "program.py").write_text(program)
    try:
        command = f"python {tmp_path / 'program.py'}"
        result = online(command, HF_ENDPOINT=other.url)
        assert result.stdout == "['2', '5']\n", result.stderr
        assert "interleave.json" in other.files
        result = online(command, HF_ENDPOINT=other.url, HF_HUB_OFFLINE="1")
        assert result.stdout == "['2', '5']\n", result.stderr
        again = "mk-interleave run 'append: 1, model: org/tiny' again --engine stream"
        assert online(again, HF_ENDPOINT=other.url).returncode == 0
        assert mk("verify", tmp_path / "again", "--against", sharded, "--trained").status == 0
    finally:
        other.server.shutdown()
