"""The server: what is asked and answered, as Transformers' fill-mask pipeline takes and gives it."""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

import torch

from megatron_bert.errors import UserError
from megatron_bert.inference.fill_mask import MaskFiller
from megatron_bert.inference.lines import texts_of_arguments
from megatron_bert.serving.batching import Batcher, TooBusy

__all__ = ["MaskServer"]

log = logging.getLogger(__name__)

_MOST_BYTES = 8 << 20  # of a request
_MOST_TEXTS = 4096
_MOST_ANSWERED_TOKENS = 1 << 26  # in the sequences of an answer, some 300 MB; 4096 texts of 512 tokens, 20 candidates
_IDLE_SECONDS = 60  # after which a connection without a request is closed
_LINGER_SECONDS, _LINGER_BYTES = 2, 64 << 20  # given to a client that still sends what is not read
_DEFAULT_TOP_K = 5


class _Refused(Exception):
    """What is answered in place of predictions."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class MaskServer(ThreadingHTTPServer):
    """Answers `POST /fill-mask` and `GET /health`, one thread a connection, from `start` until `stop`.

    Args:
        name: the model's, as it is told.
        top_k: the most candidates for a mask that a request can ask for.

    Raises:
        OSError: the address is taken, or not this machine's.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], filler: MaskFiller, name: str, top_k: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.filler, self.name, self.top_k = filler, name, top_k
        self.encoding = threading.Lock()  # a tokenizer is not made for several threads
        self.batcher = Batcher(filler.predictor)
        self._connections: set[socket.socket] = set()
        self._changed, self.is_ending = threading.Condition(), False
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without asking the network for this machine's name, as `HTTPServer` does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def stop(self, patience_seconds: float = 30.0) -> None:
        """Takes no more connections, and waits for the requests that have come."""
        self.is_ending = True  # answers say that the connection is closed
        self.shutdown()
        self.socket.setblocking(False)
        accepted = []
        with suppress(OSError):  # no other one waits
            while True:
                accepted.append(self.socket.accept())
        self.server_close()
        for one in accepted:
            self.process_request(*one)
        with self._changed:
            for connection in self._connections:
                with suppress(OSError):  # it ended by itself
                    connection.shutdown(socket.SHUT_RD)  # what has come can still be read
            self._changed.wait_for(lambda: not self._connections, patience_seconds)
        self.batcher.close()
        with self._changed:  # those whose answer has come with that
            self._changed.wait_for(lambda: not self._connections, 1.0)

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection; where none can be had (too many files are open), not at once again."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Of a connection; it is known until it is closed."""
        with self._changed:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection when its client has nothing more to send, or else it might not see the answer."""
        with suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(_LINGER_SECONDS)
            left = _LINGER_BYTES
            while left > 0 and (read := len(request.recv(1 << 16))):
                left -= read
        self.close_request(request)
        with self._changed:
            self._connections.discard(request)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Our mistakes are logged; that a client is gone is none."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("a connection failed")

    def answer(self, body: bytes) -> list[Any]:
        """The answer to the body of a request.

        Raises:
            _Refused: where there is none.
        """
        return self._answer(*self._read(body))

    def _read(self, body: bytes) -> tuple[list[str], int, bool]:
        """The texts, how many candidates, and whether there is one text only."""
        try:
            asked = json.loads(body)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
            raise _Refused(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from error
        except RecursionError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, "the body is not what is expected: too deep") from error
        if not isinstance(asked, dict) or not {"inputs"} <= asked.keys() <= {"inputs", "parameters"}:
            raise _Refused(HTTPStatus.BAD_REQUEST, 'expected is {"inputs": TEXT or [TEXT, ...], "parameters": '
                           '{"top_k": K}}, of which the parameters can be left out')  # fmt: skip
        inputs, parameters = asked["inputs"], asked.get("parameters", {})
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _Refused(HTTPStatus.BAD_REQUEST, "inputs is neither a text nor a list of texts")
        if len(texts) > _MOST_TEXTS:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"{len(texts)} texts; a request has {_MOST_TEXTS} at most")
        if not isinstance(parameters, dict) or not parameters.keys() <= {"top_k"}:
            raise _Refused(HTTPStatus.BAD_REQUEST, "parameters can have top_k, and nothing else")
        top_k = parameters.get("top_k", min(_DEFAULT_TOP_K, self.top_k))
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= self.top_k:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"top_k is not a whole number from 1 to {self.top_k}")
        return texts, top_k, isinstance(inputs, str)

    def _answer(self, texts: list[str], top_k: int, is_one: bool) -> list[Any]:
        try:
            named = texts_of_arguments(texts)
            with self.encoding:
                encoded = self.filler.encoder.encode(named)
        except UserError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        tokens = top_k * sum(len(text.mask_positions) * len(text.ids) for text in encoded)
        if tokens > _MOST_ANSWERED_TOKENS:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"an answer of {tokens} tokens; {_MOST_ANSWERED_TOKENS} at most: "
                           "ask for fewer texts, masks or candidates")  # fmt: skip
        try:
            found = self.batcher.predict(encoded)
        except TooBusy as error:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
        except torch.OutOfMemoryError as error:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "out of GPU memory") from error
        except UserError as error:
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from error
        answers = []
        for text, candidates in zip(encoded, found, strict=True):
            masks = [[asdict(one) for one in mask] for mask in self.filler.named(text, candidates, top_k)]
            answers.append(masks[0] if len(masks) == 1 else masks)
        return answers[0] if is_one else answers

    def health(self) -> dict[str, Any]:
        """That it works, and what it works with."""
        model = self.filler.model
        return {
            "status": "ok", "model": self.name, "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."), "max_tokens": self.filler.encoder.max_tokens,
            "top_k": self.top_k,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: MaskServer
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # its body is not read
        if self._name() == "/health":
            self._send(HTTPStatus.OK, self.server.health())
        else:
            self._refuse_path("POST" if self._name() == "/fill-mask" else None)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self._name() != "/fill-mask":
            self.close_connection = True  # its body is not read
            self._refuse_path("GET" if self._name() == "/health" else None)
            return
        try:
            body = self._body()
        except _Refused as refused:
            self.close_connection = True
            self._send(refused.status, {"error": str(refused)})
        else:
            self._send(*self._answer(body))

    def handle_expect_100(self) -> bool:
        """Tells a client that waits for it to send the body."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: no HTTP, an unknown method."""
        self.close_connection = True
        self._send(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def _name(self) -> str:
        """The path without what proxies and probes put before and behind it."""
        return re.sub(r"^https?://[^/?]*|\?.*", "", self.path)

    def _answer(self, body: bytes) -> tuple[HTTPStatus, object]:
        try:
            return HTTPStatus.OK, self.server.answer(body)
        except _Refused as refused:
            return refused.status, {"error": str(refused)}
        except Exception:
            log.exception("a request could not be answered")
            return HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "this is the server's mistake; its log says more"}

    def _body(self) -> bytes:
        lengths = {length.strip() for length in self.headers.get_all("Content-Length", [])}
        said = re.fullmatch(r"0*([0-9]{1,18})", lengths.pop()) if len(lengths) == 1 else None
        if not said or "Transfer-Encoding" in self.headers:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "a request says its Content-Length, and is not in chunks")
        length = int(said[1])
        if length > _MOST_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes; a request has {_MOST_BYTES} at most")
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the client is gone")
        return body

    def _refuse_path(self, method: str | None) -> None:
        if method:
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, {"error": f"{self.path} is asked with {method}"}, Allow=method)
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": "there are POST /fill-mask and GET /health"})

    def _send(self, status: HTTPStatus, answer: object, **headers: str) -> None:
        body = json.dumps(answer, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        self.close_connection |= self.server.is_ending
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing for each request."""
