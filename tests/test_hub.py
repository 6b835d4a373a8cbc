"""Hub ids: what is fetched from a hub, what is not, and what is said when it gives nothing."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import huggingface_hub.constants
import jax
import numpy as np
import pytest
from flax import nnx

from dmattn_jax.io import HubError, load_pretrained, load_pretrained_tokenizer, save_pretrained, train_tokenizer
from dmattn_jax.models import LlamaConfig, LlamaForCausalLM

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = LlamaConfig(
    vocab_size=270, hidden_size=10, intermediate_size=14, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=6
)


class Hub(http.server.ThreadingHTTPServer):
    """The routes of a hub that reading a model takes, over the files of folders. asked: the files that were fetched."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.repositories = repositories
        self.asked: list[str] = []
        self.cut = ""


class Routes(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        for name, folder in self.server.repositories.items():
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            if path == f"api/models/{name}/revision/main":
                return self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
            if path == f"api/models/{name}/tree/{COMMIT}":
                sizes = {file: path.stat().st_size for file, path in files.items()}
                return self._json(
                    [{"type": "file", "path": f, "size": s, "oid": f"{s:040x}"} for f, s in sizes.items()]
                )
            wanted = path.removeprefix(f"{name}/resolve/{COMMIT}/")
            if wanted in files:
                return self._file(wanted, files[wanted].read_bytes())
        self.send_error(404)
        return None

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str, content: bytes) -> None:
        self.server.asked.append(name)
        self.send_response(200)
        self.send_header("ETag", f'"{len(content):040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if name == self.server.cut else content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    tokenizer = train_tokenizer(["some text, some more text"] * 3, 270, tmp_path / "tokenizer.json")
    save_pretrained(LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0)), folder, tokenizer=tokenizer, shard_bytes=9000)
    for name in ("pytorch_model.bin", "modeling_evil.py", "README.md", "onnx/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    server = Hub({"owner/name": folder})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    before = constants.ENDPOINT
    for field, value in vars(constants).items():
        if isinstance(value, str) and value.startswith(before):
            monkeypatch.setattr(constants, field, value.replace(before, address))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def assert_equal(model, here):
    assert model.config == here.config
    for one, other in zip(*(jax.tree.leaves(nnx.state(each)) for each in (model, here)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_by_its_hub_id(hub, tmp_path):
    here = load_pretrained(tmp_path / "there")
    assert_equal(load_pretrained("owner/name"), here)
    assert load_pretrained_tokenizer("owner/name", vocab_size=270).encode("some text")
    assert {name.split(".")[-1] for name in hub.asked} == {"json", "safetensors"}
    assert not any("/" in name for name in hub.asked)
    with pytest.raises(HubError, match=r"owner/other is no local path, and the hub did not give it .*: check the name"):
        load_pretrained("owner/other")
    hub.shutdown()
    hub.server_close()
    # What was fetched once needs no network.
    assert_equal(load_pretrained("owner/name"), here)
    with pytest.raises(HubError, match=r"owner/other is no local path, .* check the name and the network"):
        load_pretrained("owner/other")


def test_a_download_that_breaks_off_is_one_clear_error(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut = "model-00001-of-00002.safetensors"
    with pytest.raises(HubError, match="owner/name is no local path, and the hub did not give it"):
        load_pretrained("owner/name")
    hub.cut = ""
    assert_equal(load_pretrained("owner/name"), load_pretrained(tmp_path / "there"))
