"""A chat endpoint of the standard library that records what it is asked and answers as a test says."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest


@dataclasses.dataclass
class Reply:
    """A response; ``cut`` closes the connection after so many bytes of the body, ``wait`` seconds go before it."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    cut: int | None = None
    wait: float = 0.0


def chat(text: str, finish: str = "stop") -> Reply:
    """A response as the protocol has it."""
    message = {"role": "assistant", "content": text}
    values = {
        "id": "x",
        "object": "chat.completion",
        "model": "served-name",
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 320},
    }
    return Reply(json.dumps(values).encode())


def sentence(request: dict[str, Any]) -> Reply:
    """An English sentence that is another one for every request."""
    return chat(
        f"There is a picture of number {request['seed']} on the table and it is {request['seed'] % 7} feet high."
    )


def fitting(request: dict[str, Any]) -> Reply:
    """What the prompt asks for, another text for every request."""
    content, number = request["messages"][0]["content"], request["seed"]
    asked = content if isinstance(content, str) else content[1]["text"]
    if "keywords" in asked:
        return chat(f"table, window, number {number}")
    text = f"There is a picture of number {number} on the table in the room."
    if "German" in asked:
        text = f"Auf dem Tisch ist ein Bild der Zahl {number} und eine Tasse."
    if "Question:" in asked:
        return chat(f"Question: {text[:-1]}?\nAnswer: yes, {number}")
    return chat(
        text + (f" The cup next to it is of the colour {number % 97} and has a lid." if "Describe" in asked else "")
    )


class ChatServer:
    """``answer`` gets a request's values and gives a reply; ``requests`` are all of them, ``most`` at a time."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply] = sentence):
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most = self._now = 0
        self.ended = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append(values)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.paths.append(self.path)
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    reply = outer.answer(values)
                    outer.ended.wait(reply.wait)
                    self.send_response(reply.status)
                    for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(reply.body)))
                    self.end_headers()
                    self.wfile.write(reply.body[: reply.cut])
                    self.close_connection = reply.cut is not None
                except OSError:
                    self.close_connection = True  # the client has gone
                finally:
                    with outer._lock:
                        outer._now -= 1

            def log_message(self, format: str, *given: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    made = ChatServer()
    yield made
    made.close()


@pytest.fixture(scope="session")
def reply() -> Callable[..., Reply]:
    return Reply


@pytest.fixture(scope="session")
def chatted() -> Callable[..., Reply]:
    return chat


@pytest.fixture(scope="session")
def fits() -> Callable[..., Reply]:
    return fitting


@pytest.fixture(scope="session")
def said() -> Callable[..., Reply]:
    return sentence


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in two folders, one of them large; not to be written to."""
    folder = tmp_path_factory.mktemp("some") / "photos"
    for i in range(12):
        path = folder / f"{i % 2}" / f"{i}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        colours = np.random.default_rng(i).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        size = (800, 600) if i == 0 else (40, 30)
        PIL.Image.fromarray(colours).resize(size, PIL.Image.Resampling.NEAREST).save(path)
    return folder
