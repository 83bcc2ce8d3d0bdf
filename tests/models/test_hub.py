"""Downloads, against a local server that answers like the hub.

huggingface_hub reads its endpoint and its cache's place when it is imported, so every case runs
in a process of its own.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import unquote

import pytest

import edgekit.models as module
from edgekit.models.config import ModelConfig

TINY = Path(module.__file__).parent / "lfm2_tiny" / "config.json"
CATALOGUED = "LiquidAI/LFM2-350M"  # answered like org/mini
COMMIT = "1234567890abcdef1234567890abcdef12345678"
OLDER = "abcdef1234567890abcdef1234567890abcdef12"
LARGE = 1000  # bytes
CHUNK = 10 << 20  # huggingface_hub writes what it receives in pieces of this size


def repository(seed: int) -> dict[str, bytes]:
    return {
        "config.json": b'{"commit": %d}' % seed,
        "model.safetensors": bytes([seed]) * 1000,
        "tokenizer.json": b"{}",
        "README.md": b"not needed",
        "onnx/model.safetensors": b"not needed either",
    }


class Answer(NamedTuple):
    """What is said to every request whose path holds `to`, in the model's place."""

    status: int
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b"{}"
    to: str = "/"
    method: str = ""


class Hub(ThreadingHTTPServer):
    """One model at two commits.

    `cut` breaks that many transfers of the weights half-way; `answer` is said instead of what is
    asked for, `answer_after_cut` from the first cut on.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {COMMIT: repository(0), OLDER: repository(1)}
        self.cut = 0
        self.answer: Answer | None = None
        self.answer_after_cut: Answer | None = None
        self.stall = False
        self.stalled = threading.Event()
        self.go_on = threading.Event()
        self.requests: list[str] = []
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The endpoints that `snapshot_download` asks: model info, file tree, files."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0]).replace(f"/{CATALOGUED}", "/org/mini")
        self.server.requests.append(f"{self.command} {path}")
        answer = self.server.answer
        if answer is not None and answer.to in path and answer.method in self.command:
            return self.reply(answer.status, answer.body, "application/json", answer.headers)
        if path.startswith(("/api/models/org/former", "/org/former/")):
            headers = {"Location": self.path.replace("/org/former", "/org/mini")}
            return self.reply(307, b"", "text/plain", headers)
        if path.startswith("/api/models/org/mini"):
            return self.answer_api(path.removeprefix("/api/models/org/mini"))
        if path.startswith("/org/mini/resolve/"):
            revision, _, name = path.removeprefix("/org/mini/resolve/").partition("/")
            return self.answer_file(revision, name)
        return self.fail(404, "RepoNotFound")

    def answer_api(self, rest: str) -> None:
        kind, _, revision = rest.removeprefix("/").partition("/")
        commit = self.commit(revision or "main")
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        files = self.server.files[commit]
        if kind == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": etag(body)}
                for name, body in files.items()
            ]
            return self.reply(200, json.dumps(tree).encode(), "application/json")
        siblings = [{"rfilename": name} for name in files]
        info = {"id": "org/mini", "modelId": "org/mini", "sha": commit, "siblings": siblings}
        return self.reply(200, json.dumps(info).encode(), "application/json")

    def answer_file(self, revision: str, name: str) -> None:
        commit = self.commit(revision)
        if commit is None or name not in self.server.files[commit]:
            return self.fail(404, "EntryNotFound")
        body, start = self.server.files[commit][name], 0
        if self.headers.get("Range"):
            self.server.ranges.append(f"{name} {self.headers['Range']}")
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{etag(body)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = name == "model.safetensors" and self.command == "GET" and self.server.cut > 0
        if cut:
            self.server.cut -= 1
            self.server.answer = self.server.answer_after_cut
        return self.reply(206 if start else 200, body[start:], "binary/octet-stream", headers, cut)

    def commit(self, revision: str) -> str | None:
        return {"main": COMMIT, "v1": OLDER, COMMIT: COMMIT, OLDER: OLDER}.get(revision)

    def fail(self, status: int, code: str) -> None:
        self.reply(status, b"{}", "application/json", {"X-Error-Code": code})

    def reply(
        self,
        status: int,
        body: bytes,
        kind: str,
        headers: Mapping[str, str] | None = None,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.stall and self.command == "GET" and "model.safetensors" in self.path:
            self.server.stalled.set()
            self.server.go_on.wait()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True


def etag(body: bytes) -> str:
    """A large file is stored by its sha256, a small one as git's blob."""
    if len(body) >= LARGE:
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def start(
    hub: Hub,
    home: Path,
    code: str,
    imports: str = "",
    prefix: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen[str]:
    """Print what an expression gives in a new process, or the error that it raises."""
    program = f"""
import json, sys, {imports or "sys"}
from edgekit.errors import EdgekitError
from edgekit.models.hub import cached_bytes, download
try:
    print(json.dumps({code}, default=str))
except EdgekitError as error:
    print(f"one line: {{error}}")
    sys.exit(0 if error.exit_status == 2 else error.exit_status)
"""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", program],
        env=inherited | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    hub: Hub,
    home: Path,
    code: str,
    imports: str = "",
    prefix: Sequence[str] = (),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Start a process and wait for its end."""
    with start(hub, home, code, imports, prefix, **environment) as process:
        output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(code, process.returncode, output, errors)


def result(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout.strip()


def folder_of(process: subprocess.CompletedProcess[str]) -> Path:
    return Path(json.loads(result(process)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


def test_a_model_is_downloaded_once_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    process = run(hub, tmp_path, "download('org/mini')")
    folder = folder_of(process)
    assert process.stderr == ""  # no progress bars: this is not a terminal
    assert folder.name == COMMIT
    assert contents(folder) == {name: hub.files[COMMIT][name] for name in NEEDED}
    assert not [line for line in hub.requests if "onnx" in line or "README" in line]

    hub.requests.clear()
    assert folder_of(run(hub, tmp_path, "download('org/mini')")) == folder
    assert not [line for line in hub.requests if line.startswith("GET /org/")]

    hub.requests.clear()
    code = "[download('org/mini', offline=True), cached_bytes('org/mini')]"
    size = sum(len(hub.files[COMMIT][name]) for name in NEEDED)
    assert json.loads(result(run(hub, tmp_path, code))) == [str(folder), size]
    environment = run(hub, tmp_path, "download('org/mini')", HF_HUB_OFFLINE="1")
    assert folder_of(environment) == folder
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["v1", OLDER])
def test_a_revision_is_pinned(hub: Hub, tmp_path: Path, revision: str) -> None:
    folder = folder_of(run(hub, tmp_path, f"download('org/mini', {revision!r})"))
    assert folder.name == OLDER
    assert contents(folder)["config.json"] == hub.files[OLDER]["config.json"]


def test_a_broken_transfer_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    weights = hub.files[COMMIT]["model.safetensors"] = os.urandom(CHUNK) * 2 + b"end"
    hub.cut = 1
    folder = folder_of(run(hub, tmp_path, "download('org/mini')"))
    assert contents(folder)["model.safetensors"] == weights
    assert hub.ranges == [f"model.safetensors bytes={CHUNK}-"]


def test_a_failed_download_keeps_its_finished_files(hub: Hub, tmp_path: Path) -> None:
    hub.cut, hub.answer_after_cut = 1, Answer(404)
    text = result(run(hub, tmp_path, "download('org/mini')")).splitlines()[-1]
    assert text == (
        "one line: org/mini: the hub refuses the request (404 Not Found) (finished files are kept)"
    )
    hub.answer, done = None, {path.name for path in tmp_path.rglob("snapshots/*/*")}
    assert done < set(NEEDED)
    hub.requests.clear()
    folder = folder_of(run(hub, tmp_path, "download('org/mini')"))
    assert contents(folder) == {name: hub.files[COMMIT][name] for name in NEEDED}
    assert not [
        line for line in hub.requests if line.startswith("GET") and line.endswith(tuple(done))
    ]


def test_ctrl_c_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.stall = True
    process = start(hub, tmp_path, "download('org/mini')")
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert (
        output == "one line: org/mini: download cancelled; finished files are kept for next time\n"
    )


def test_random_weights_fetch_no_weights(hub: Hub, tmp_path: Path) -> None:
    code = "[download('org/mini', weights=False), cached_bytes('org/mini')]"
    assert json.loads(result(run(hub, tmp_path, code)))[1] is None
    assert not [line for line in hub.requests if "safetensors" in line]
    text = result(run(hub, tmp_path, "download('org/mini', offline=True)"))
    assert text.startswith("one line: org/mini: not complete in the local cache")


def test_a_damaged_cache_holds_no_model(hub: Hub, tmp_path: Path) -> None:
    reference = tmp_path / "hub" / "models--org--mini" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_bytes(b"\xbb\xff")
    assert result(run(hub, tmp_path, "cached_bytes('org/mini')")) == "null"


def test_a_hub_id_resolves_to_a_model(hub: Hub, tmp_path: Path) -> None:
    """The whole way, with the bundled model's configuration and random weights."""
    hub.files[COMMIT]["config.json"] = TINY.read_bytes()
    code = (
        "(lambda source: [source.id, source.revision, source.folder.name, "
        "source.config.hidden_size])"
        "(edgekit.models.source.resolve_model('org/mini', random_weights=True))"
    )
    process = run(hub, tmp_path, code, imports="edgekit.models.source")
    assert json.loads(result(process)) == ["org/mini", COMMIT, COMMIT, 256]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            "pytorch_model.bin, a pickle, which can run code and is not loaded: convert them once",
        ),
        (["config.json", "tf_model.h5"], "holds its weights as tf_model.h5, of another framework"),
        (["config.json", "consolidated.safetensors"], "in the layout of their authors"),
        (["config.json", "README.md"], "holds no weights as safetensors"),
        (["pytorch_model.bin"], "holds no config.json, so it is not a model folder"),
        (["tiny.gguf"], "tiny.gguf in it is a finished model for llama.cpp"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter, not a model"),
        (["model_index.json", "unet/model.safetensors"], "is a pipeline of diffusers"),
    ],
)
def test_a_repository_that_holds_no_model_is_said_to_be_what_it_is(
    hub: Hub, tmp_path: Path, names: list[str], said: str
) -> None:
    hub.files[COMMIT] = dict.fromkeys(names, b"content")
    if "config.json" in names:
        hub.files[COMMIT]["config.json"] = TINY.read_bytes()
    code = "edgekit.models.source.resolve_model('org/mini').checkpoint"
    text = result(run(hub, tmp_path, code, imports="edgekit.models.source"))
    assert text.startswith("one line: org/mini: ")
    assert said in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "commit"),
    [
        ("https://huggingface.co/org/mini/", COMMIT),
        ("hf://org/mini@v1", OLDER),
        ("org/mini@v1", OLDER),
        ("https://huggingface.co/org/mini/blob/v1/config.json", OLDER),
        (f"lfm2-350m@{OLDER}", OLDER),
    ],
)
def test_a_model_is_found_by_what_people_paste(
    hub: Hub, tmp_path: Path, name: str, commit: str
) -> None:
    hub.files[COMMIT]["config.json"] = hub.files[OLDER]["config.json"] = TINY.read_bytes()
    code = f"edgekit.models.source.resolve_model({name!r}, random_weights=True).revision"
    assert json.loads(result(run(hub, tmp_path, code, imports="edgekit.models.source"))) == commit


PLAN = "edgekit.workflows.plan.plan_export('org/mini', 'executorch', {recipe}, {context})"
UNIFORM = "edgekit.quantize.recipe.uniform(edgekit.quantize.schemes.names.parse_scheme({!r}))"


@pytest.mark.parametrize(
    ("scheme", "context", "words"),
    [
        ("w8", 1 << 20, "`context` 1048576: org/mini takes 16 to"),
        ("w8g32", None, "target executorch cannot hold w8g32"),
        ("w4g96", None, "w4g96 cannot hold it"),
    ],
)
def test_what_needs_no_weights_is_refused_before_they_are_downloaded(
    hub: Hub, tmp_path: Path, scheme: str, context: int | None, words: str
) -> None:
    hub.files[COMMIT]["config.json"] = TINY.read_bytes()
    code = PLAN.format(recipe=UNIFORM.format(scheme), context=context)
    text = result(run(hub, tmp_path, code, imports="edgekit.workflows.plan"))
    assert text.startswith("one line: ")
    assert words in text
    assert any(line.endswith("/config.json") for line in hub.requests)
    assert not [line for line in hub.requests if "safetensors" in line]


def test_the_weights_are_those_of_the_configurations_commit(hub: Hub, tmp_path: Path) -> None:
    """The branch may move between the two downloads."""
    hub.files[COMMIT]["config.json"] = TINY.read_bytes()
    code = "edgekit.models.source.resolve_model('org/mini').checkpoint"
    text = result(run(hub, tmp_path, code, imports="edgekit.models.source"))
    assert "model.safetensors: truncated, or not a safetensors file" in text
    weights = [line for line in hub.requests if line.endswith("model.safetensors")]
    assert weights
    assert all(f"/resolve/{COMMIT}/" in line for line in weights)


def test_a_dry_run_of_a_catalogue_names_revision(hub: Hub, tmp_path: Path) -> None:
    """The config.json of that revision, no weights; without a revision, the hub is not asked."""
    hub.files[OLDER]["config.json"] = TINY.read_bytes()
    code = (
        "[click.testing.CliRunner().invoke(edgekit.cli.main, ['export', 'lfm2-350m', '--target', "
        "'executorch', '--dry-run', '--json', *more]).stdout "
        "for more in [[], ['--revision', 'v1']]]"
    )
    process = run(hub, tmp_path, code, imports="click.testing, edgekit.cli")
    known, older = (json.loads(text) for text in json.loads(result(process)))
    assert known["tensors"][0]["shape"] == [65536, 1024]
    assert older["tensors"][0]["shape"] == [4096, 256]
    assert {known["model"], older["model"]} == {CATALOGUED}
    assert hub.requests
    assert not [line for line in hub.requests if "safetensors" in line or "/main" in line]


def test_a_wrong_revision_is_one_line(hub: Hub, tmp_path: Path) -> None:
    text = result(run(hub, tmp_path, "download('org/mini', 'v9')"))
    assert text == "one line: org/mini: the hub has no revision 'v9' of it"


def test_an_unknown_repository_is_one_line(hub: Hub, tmp_path: Path) -> None:
    text = result(run(hub, tmp_path, "download('org/other')"))
    assert text.startswith("one line: org/other: the hub has no such model (or it is private")


def test_a_fault_of_our_own_is_not_blamed_on_a_login_page() -> None:
    from edgekit.models.hub_reasons import reason  # reads the hub's settings, so not above

    with pytest.raises((AttributeError, TypeError)) as caught:
        ModelConfig.from_dict(None)  # type: ignore[arg-type]
    assert reason(caught.value, "org/mini", None).startswith("download failed: ")


HTML = {"Content-Type": "text/html"}
PAGE = b"<html><body>Welcome to the hotel: log in</body></html>"
NO_HUB = "what answers is not the hub: its answer describes no model."


@pytest.mark.parametrize(
    ("answer", "token", "message"),
    [
        (Answer(403, {"X-Error-Code": "GatedRepo"}), "", "access is restricted; accept its lic"),
        (Answer(403, {"X-Error-Code": "GatedRepo"}), "hf_a", "with the account that HF_TOKEN is"),
        (
            Answer(403, {"X-Error-Message": "Access to this resource is disabled."}),
            "",
            "the hub has disabled it, for everybody",
        ),
        (
            Answer(403, body=b'{"error": "This repository has been disabled by its owner"}'),
            "",
            "the hub has disabled it, for everybody",
        ),
        (Answer(403, {"X-Error-Message": "Not for you."}), "hf_a", "the hub forbids it (403: Not"),
        (Answer(401), "", "the hub has no such model (or it is private: `hf auth login` or set"),
        (Answer(401), "hf_a", "no such model (or it is private: the token of HF_TOKEN"),
        (
            Answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            "hf_a",
            "the hub rejects the token of HF_TOKEN: it is wrong or has expired",
        ),
        (
            Answer(401, body=b'{"error": "User Access Token \\"mine\\" is expired"}'),
            "hf_a",
            "the hub rejects the token of HF_TOKEN: it is wrong or has expired",
        ),
        (Answer(429), "", "the hub allows no more requests for now (429): try again later; with a"),
        (Answer(429, {"Retry-After": "3600"}), "hf_a", "(429): try again in 3,600 s"),
        (
            Answer(429, {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"api";q=500;w=300'}),
            "",
            "(429): try again in 55 s; with a token",
        ),
        (Answer(500), "", "the hub is in trouble (500 Internal Server Error): try again later"),
        (Answer(502, HTML, PAGE), "", "the hub is in trouble (502 Bad Gateway): try again later"),
        (Answer(503), "", "the hub is in trouble (503 Service Unavailable): try again later"),
        (Answer(599), "", "the hub is in trouble (599): try again later"),
        (Answer(418), "", "the hub refuses the request (418 I'm a Teapot)"),
        (Answer(200, HTML, PAGE), "", NO_HUB),
        (Answer(200, body=b'{"login": true}'), "", NO_HUB),
        (Answer(200, body=b"[]"), "", NO_HUB),
        (Answer(200, HTML, PAGE, to="/resolve/"), "", NO_HUB),
        (Answer(302, {"Location": "/login"}), "", "what answers sends the request in circles"),
    ],
)
def test_a_refusal_is_one_line(
    hub: Hub, tmp_path: Path, answer: Answer, token: str, message: str
) -> None:
    """And it comes at once: what the hub said is not asked for again and again."""
    hub.answer = answer
    done = run(hub, tmp_path, "download('org/mini')", HF_TOKEN=token)
    text = result(done)
    assert text.startswith("one line: org/mini: ")
    assert message in text
    assert text.count("\n") == 0
    assert done.stderr == ""
    if token:
        assert token not in text


def test_a_login_page_of_another_host_is_one_line(hub: Hub, tmp_path: Path) -> None:
    other = Hub()
    thread = threading.Thread(target=other.serve_forever, args=(0.05,))
    thread.start()
    try:
        other.answer = Answer(200, HTML, PAGE)
        for place in ("/", "/resolve/"):
            hub.answer = Answer(302, {"Location": f"{other.url}/login"}, to=place)
            text = result(run(hub, tmp_path, "download('org/mini')"))
            assert text.startswith(f"one line: org/mini: {NO_HUB}")
            assert hub.url in text
    finally:
        other.shutdown()
        other.server_close()
        thread.join()


@pytest.mark.parametrize("token", ["hf_ä", "hf_\u200b"])
def test_a_token_that_is_none_is_one_line(hub: Hub, tmp_path: Path, token: str) -> None:
    """In the environment or in the file of `hf auth login`; it is not shown."""
    in_file = tmp_path / "home"
    in_file.mkdir()
    (in_file / "token").write_text(token, encoding="utf-8")
    for home, place, environment in (
        (tmp_path, "HF_TOKEN", {"HF_TOKEN": token}),
        (in_file, str(in_file / "token"), {}),
    ):
        done = run(hub, home, "download('org/mini')", **environment)
        text = result(done)
        assert text.startswith(f"one line: org/mini: the token of {place} has letters that no")
        assert "hf_" not in text + done.stderr
    assert not [line for line in hub.requests if "org/mini" in line]


def test_a_token_file_that_is_no_text_is_one_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"hf_\xff\xfe")
    text = result(run(hub, tmp_path, "download('org/mini')"))
    assert text.startswith(f"one line: org/mini: the token of {tmp_path / 'token'} has letters")


@pytest.mark.parametrize(
    "answer",
    [Answer(429), Answer(500), Answer(200, HTML, PAGE), Answer(403), Answer(401), None],
)
def test_what_is_cached_needs_no_answer(hub: Hub, tmp_path: Path, answer: Answer | None) -> None:
    folder = folder_of(run(hub, tmp_path, "download('org/mini')"))
    hub.answer = answer
    endpoint = {"HF_ENDPOINT": "http://127.0.0.1:9"} if answer is None else {}
    assert folder_of(run(hub, tmp_path, "download('org/mini')", **endpoint)) == folder


def test_offline_without_the_name_of_a_branch_the_commits_are_named(
    hub: Hub, tmp_path: Path
) -> None:
    """What was downloaded by its commit alone has no refs/, and so no `main`."""
    folder = folder_of(run(hub, tmp_path, f"download('org/mini', {OLDER!r})"))
    offline = {"HF_HUB_OFFLINE": "1"}
    text = result(run(hub, tmp_path, "download('org/mini')", **offline))
    assert text == (
        "one line: org/mini: the local cache does not say which commit 'main' is, and the hub is "
        f"out of reach (offline mode); name one that is there, as in org/mini@{OLDER}"
    )
    again = run(hub, tmp_path, f"download('org/mini', {OLDER!r})", **offline)
    assert folder_of(again) == folder
    text = result(run(hub, tmp_path, f"download('org/mini', {COMMIT!r})", **offline))
    assert "does not say which commit" in text


def test_a_model_that_was_renamed_is_found(hub: Hub, tmp_path: Path) -> None:
    folder = folder_of(run(hub, tmp_path, "download('org/former')"))
    assert contents(folder) == {name: hub.files[COMMIT][name] for name in NEEDED}


def test_a_file_that_arrives_damaged_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    """The cache would give it back for ever."""
    damaged = bytes(len(hub.files[COMMIT]["model.safetensors"]) - 1) + b"!"
    headers = {"Accept-Ranges": "bytes"}
    hub.answer = Answer(200, headers, damaged, to="/model.safetensors", method="GET")
    text = result(run(hub, tmp_path, "download('org/mini')"))
    assert text.startswith("one line: org/mini: model.safetensors arrived damaged: its sha256")
    hub.answer = None
    folder = folder_of(run(hub, tmp_path, "download('org/mini')"))
    assert contents(folder) == {name: hub.files[COMMIT][name] for name in NEEDED}


def test_a_file_of_another_length_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.answer = Answer(200, HTML, PAGE, to="/model.safetensors", method="GET")
    text = result(run(hub, tmp_path, "download('org/mini')"))
    assert text == (
        "one line: org/mini: a file arrived in another length than the hub states: try again"
    )


@pytest.mark.parametrize(
    ("endpoint", "proxy", "message"),
    [
        ("http://127.0.0.1:9", "", "out of reach (no connection: [Errno 111] Connection refused)"),
        ("http://nowhere.invalid", "", "the host of http://nowhere.invalid is not found"),
        ("", "http://127.0.0.1:9", "out of reach (no connection"),
        ("nonsense", "", "HF_ENDPOINT 'nonsense' is no address such as https://HOST"),
    ],
)
def test_no_connection_is_one_line(
    hub: Hub, tmp_path: Path, endpoint: str, proxy: str, message: str
) -> None:
    environment = {"HF_ENDPOINT": endpoint or hub.url, "HTTP_PROXY": proxy, "NO_PROXY": ""}
    done = run(hub, tmp_path, "download('org/mini')", **environment)
    text = result(done)
    assert text.startswith("one line: org/mini: ")
    assert message in text
    assert done.stderr == ""


def test_a_proxy_that_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    """Of an https address, which is asked for through a tunnel."""
    hub.answer = Answer(407)
    environment = {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": hub.url}
    text = result(run(hub, tmp_path, "download('org/mini')", **environment))
    assert text.startswith("one line: org/mini: the proxy does not let it through (")


def test_a_certificate_of_nobody_is_one_line(hub: Hub, tmp_path: Path) -> None:
    """A server that does not speak TLS, or one whose certificate nobody signed."""
    environment = {"HF_ENDPOINT": hub.url.replace("http:", "https:")}
    text = result(run(hub, tmp_path, "download('org/mini')", **environment))
    assert text.startswith("one line: org/mini: the connection cannot be trusted (")


@pytest.mark.parametrize("refused", ["", "weights"])
def test_an_export_that_gets_no_model_leaves_nothing(
    hub: Hub, tmp_path: Path, refused: str
) -> None:
    """Neither before the plan nor, with the weights, after it."""
    hub.files[COMMIT]["config.json"] = TINY.read_bytes()
    hub.files[COMMIT]["tokenizer.json"] = TINY.with_name("tokenizer.json").read_bytes()
    hub.answer = Answer(403, to="/model.safetensors" if refused else "/")
    out = tmp_path / "out" / "artifact"
    out.parent.mkdir()
    arguments = ["export", "org/mini", "--target", "gguf", "-o", str(out)]
    code = f"click.testing.CliRunner().invoke(edgekit.cli.main, {arguments!r}).stderr"
    text = json.loads(result(run(hub, tmp_path, code, imports="click.testing, edgekit.cli")))
    assert text.startswith("edgekit: org/mini: the hub forbids it (403)")
    assert text.count("\n") == 1
    assert list(out.parent.iterdir()) == []


def test_no_server_and_no_cache_is_one_line(hub: Hub, tmp_path: Path) -> None:
    expected = "one line: org/mini: not complete in the local cache, and the hub is out of reach ("
    offline = run(hub, tmp_path, "download('org/mini', offline=True)")
    assert result(offline).startswith(expected)
    assert hub.requests == []
    gone = run(hub, tmp_path, "download('org/mini')", HF_ENDPOINT="http://127.0.0.1:9")
    assert result(gone).startswith(expected)


def test_an_unwritable_cache_is_one_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = result(run(hub, tmp_path / "file", "download('org/mini')"))
    assert text.startswith("one line: org/mini: ")
    assert "\n" not in text


def test_a_full_disk_is_one_line(hub: Hub, tmp_path: Path) -> None:
    """A real one: a file system of 300 kB, mounted for that process alone."""
    mount = f'mount -t tmpfs -o size=300k none "{tmp_path}" && exec "$@"'
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("this system lets no user mount a file system of their own")
    hub.files[COMMIT]["model.safetensors"] = bytes(600_000)
    process = run(hub, tmp_path, "download('org/mini')", prefix=prefix)
    assert result(process).startswith("one line: org/mini: the disk is full; free some space")
    assert process.stderr == ""
