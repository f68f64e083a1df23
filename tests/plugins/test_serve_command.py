"""`lens serve` as a process: its start, its stop by a signal, and what it refuses before a model is read."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from lens_serve import commands
from lens_serve.app import make_app
from lens_serve.commands import LimitOptions, parse_offered, read_token, serve
from lens_serve.engine import Engine
from lens_serve.server import ServerOptions, make_server
from openai import OpenAI

from lens_core.inference.pipeline import LensPipeline
from lens_core.types import ConfigError

START = "import sys; from cyclopts import App; from lens_serve.commands import serve; a = App(); a.default(serve); "
START += "sys.exit(a(sys.argv[1:], result_action='return_value', exit_on_error=False))"
TOKEN = "a-token-of-some-length"


@contextmanager
def process(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lens serve` at a free port, and its address, once it listens. It has ended afterwards."""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    started = subprocess.Popen(
        [sys.executable, "-c", START, "--port", "0", *words], stderr=subprocess.PIPE, text=True, env=here
    )
    try:
        assert started.stderr is not None
        line = started.stderr.readline()
        address = re.search(r"http://[^ ,;]+", line)
        assert address is not None, line + started.stderr.read()
        yield started, address[0]
    finally:
        started.kill()
        started.wait(20)
        assert started.stderr is not None
        started.stderr.close()


def test_a_signal_finishes_what_runs_and_refuses_what_is_new(tmp_path: Path) -> None:
    words = ("--output", str(tmp_path / "outputs"))
    with process(*words, LENS_SERVE_TOKEN=TOKEN) as (server, url), ThreadPoolExecutor(2) as pool:
        assert url.startswith("http://127.0.0.1:")
        with OpenAI(base_url=url, api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with OpenAI(base_url=url, api_key=TOKEN, max_retries=0, timeout=300) as client:
            assert client.models.list().data[0].id == "tiny:"
            small = {"steps": 1}
            first = client.images.generate(prompt="a star", size="64x64", response_format="url", extra_body=small)
            assert first.data is not None and Path(str(first.data[0].url)).name in os.listdir(tmp_path / "outputs")
            long = pool.submit(client.images.generate, prompt="a red ring", size="64x64", extra_body={"steps": 30})
            waiting = pool.submit(client.images.generate, prompt="a star", size="96x64", extra_body={"steps": 2})
            time.sleep(0.3)  # both have arrived; nothing is wrong if the first is finished
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with (
                OpenAI(base_url=url, api_key=TOKEN, max_retries=0) as late,
                pytest.raises((openai.APIConnectionError, openai.InternalServerError)),
            ):
                late.images.generate(prompt="too late", size="64x64", extra_body=small)
            assert long.result(300).data and waiting.result(300).data
        assert server.wait(60) == 0
        assert server.stderr is not None
        log = server.stderr.read()
        assert "Traceback" not in log and TOKEN not in log
    assert len(os.listdir(tmp_path / "outputs")) == 3


def test_a_second_signal_drops_what_runs(pipeline: LensPipeline) -> None:
    engine = Engine(pipeline)
    server = make_server(make_app(engine), engine, ServerOptions())
    server.handle_exit(signal.SIGTERM, None)
    assert engine.closing and server.should_exit and not server.force_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit and engine.close(10)


def test_the_token_of_a_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}-2\n")
    monkeypatch.delenv(commands.TOKEN, raising=False)
    assert read_token(None) is None and read_token(file) == f"{TOKEN}-2"
    monkeypatch.setenv(commands.TOKEN, TOKEN)
    assert read_token(None) == TOKEN and read_token(file) == f"{TOKEN}-2"
    file.write_text("")
    with pytest.raises(ConfigError, match="16 characters or more"):
        read_token(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_what_cannot_be_served_is_refused_before_a_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(commands.TOKEN, raising=False)
    monkeypatch.setattr("lens_serve.engine.Engine.load", lambda *_, **__: pytest.fail("the model was read"))
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org"):
        with pytest.raises(ConfigError, match="a token is needed; set LENS_SERVE_TOKEN or use --token-file"):
            serve(host=host)
    in_use = r"cannot listen at 127.0.0.1 port \d+ \(Address already in use\)"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=in_use):
        serve(port=taken.getsockname()[1])
    with pytest.raises(ConfigError, match="port: must be at least 0 and at most 65535, not 70000"):
        serve(port=70_000)
    with pytest.raises(ConfigError, match="max_queue: must be at least 1, not 0"):
        serve(limits=LimitOptions(max_queue=0))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be the outputs folder"):
        serve(output=tmp_path / "file")
    with pytest.raises(ConfigError, match="grace"):
        serve(grace=-1.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ConfigError, match=r"needs uvicorn: pip install 'lens-t2i\[serve\]'"):
        serve()


def test_loras_to_offer_are_named_once_and_are_there(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    path = tmp_path / "a.safetensors"
    assert parse_offered([f"style={path}", f"other={path}"]) == {"style": path, "other": path}
    assert parse_offered(None) == {}
    for options, message in (
        ([str(path)], "must be NAME=PATH"),
        ([f"={path}"], "must be NAME=PATH"),
        ([f"a={path}", f"a={path}"], "each name once"),
        (["a=nowhere"], "nowhere: there is no such LoRA"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_offered(options)
