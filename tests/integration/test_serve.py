"""serve: over HTTP, what Transformers' fill-mask pipeline answers, whatever else is asked at the same time."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socketserver import TCPServer
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers

from megatron_bert.cli.main import main
from megatron_bert.errors import UserError
from megatron_bert.inference.fill_mask import load_mask_filler
from megatron_bert.inference.predictor import Candidates
from megatron_bert.inference.texts import MaskedText
from megatron_bert.serving import http as serving
from megatron_bert.serving.batching import Batcher, TooBusy
from megatron_bert.serving.http import MaskServer
from tests.integration.tiny_model import write_tiny_model

TEXTS = [
    "Paris is the [MASK] of France.",
    "[MASK]",
    "the [MASK] [MASK] of the old river thames",
    "植物通过[MASK]合作用产生能量",
    "Seine, Thames: [MASK]?",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    model = transformers.MegatronBertForMaskedLM.from_pretrained(folder)
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    return transformers.FillMaskPipeline(model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[MaskServer]:
    filler = load_mask_filler(folder, device="cpu", dtype="float32", top_k=7)
    server = MaskServer(("127.0.0.1", 0), filler, "tiny", top_k=7)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stop()


def asked(server: MaskServer, body: Any, path: str = "/fill-mask", method: str = "POST", **headers: str) -> Any:
    """Status, headers and answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, response.headers, answer


def same(ours: Any, theirs: Any) -> None:
    """The scores within what a batch's shape rounds in float32, all else to the letter."""
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        assert ours == {**theirs, "score": pytest.approx(theirs["score"], rel=1e-4)}


def test_answers_are_the_pipelines(server: MaskServer, pipeline: Any) -> None:
    for text in TEXTS:
        same(asked(server, {"inputs": text})[2], pipeline(text))
    same(asked(server, {"inputs": TEXTS, "parameters": {"top_k": 7}})[2], pipeline(TEXTS, top_k=7))
    assert asked(server, {"inputs": []})[2] == []
    assert asked(server, b"", "/health", "GET")[2] == {
        "status": "ok", "model": "tiny", "device": "cpu", "dtype": "float32",
        "max_tokens": server.filler.encoder.max_tokens, "top_k": 7,
    }  # fmt: skip


def test_requests_that_wait_are_predicted_together(server: MaskServer, pipeline: Any) -> None:
    """Sixty-four at once; the first batch is held until all are there, and all but it make one more."""
    predictor, batches, gate = server.filler.predictor, [], threading.Event()
    predict = predictor.predict

    def counted(texts: Any) -> Any:
        batches.append(len(texts))
        assert gate.wait(60)
        return predict(texts)

    with patch.object(predictor, "predict", counted), ThreadPoolExecutor(64) as clients:
        answers = [clients.submit(asked, server, {"inputs": TEXTS[at % 5]}) for at in range(64)]
        for _ in range(6000):
            if server.batcher._num_waiting == 64:
                break
            threading.Event().wait(0.01)
        gate.set()
        for at, answer in enumerate(answers):
            same(answer.result()[2], pipeline(TEXTS[at % 5]))
    assert batches[0] + batches[1] == 64


def test_what_is_refused_is_refused_alone(server: MaskServer) -> None:
    long = "the [MASK] " + "river " * server.filler.encoder.max_tokens
    cases: list[tuple[Any, str]] = [
        (b"{", "the body is not JSON"), (b"\xff", "the body is not JSON"), (b"[" * 100_000, "too deep"),
        ([], "expected is"), ({"text": "a"}, "expected is"), ({"inputs": "[MASK]", "more": 1}, "expected is"),
        ({"inputs": [["[MASK]"]]}, "neither a text"), ({"inputs": None}, "neither a text"),
        ({"inputs": ["[MASK]", "none"]}, "text 2: no mask"), ({"inputs": long}, "tokens, and the model takes"),
        ({"inputs": "\ud800 [MASK]"}, "not UTF-8"), ({"inputs": ["[MASK]"] * 5000}, "4096 at most"),
        ({"inputs": "[MASK]", "parameters": {"top_k": 8}}, "from 1 to 7"),
        ({"inputs": "[MASK]", "parameters": {"top_k": True}}, "from 1 to 7"),
        ({"inputs": "[MASK]", "parameters": {"targets": ["a"]}}, "top_k, and nothing else"),
        ({"inputs": "[MASK]", "parameters": []}, "top_k, and nothing else"),
    ]  # fmt: skip
    for body, said in cases:
        status, _, answer = asked(server, body)
        assert (status, said in answer["error"]) == (400, True), answer
    assert asked(server, b"", "/elsewhere")[0] == asked(server, b"", "/", "GET")[0] == 404
    status, headers, _ = asked(server, b"", "/fill-mask", "GET")
    assert (status, headers["Allow"]) == (405, "POST")
    assert asked(server, b"a" * 12_000_000)[0] == 413
    with patch.object(serving, "_MOST_ANSWERED_TOKENS", 10):
        assert "ask for fewer texts" in asked(server, {"inputs": "[MASK] [MASK]"})[2]["error"]
    assert asked(server, b"", **{"Content-Length": "-1"})[0] == 411
    same_connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    for body, expected in ((b"{", 400), (b'{"inputs": "[MASK]"}', 200)):
        same_connection.request("POST", "/fill-mask", body)
        response = same_connection.getresponse()
        assert (response.status, len(response.read()) > 0) == (expected, True)
    same_connection.close()


def talked(server: MaskServer, *parts: bytes) -> list[bytes]:
    """What a connection of its own gives after each part; the last until the server closes it, or is silent."""
    given = []
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        for part in parts[:-1]:
            connection.sendall(part)
            given.append(connection.recv(1 << 16))
        connection.sendall(parts[-1])
        connection.shutdown(socket.SHUT_WR)
        given.append(b"".join(iter(lambda: connection.recv(1 << 16), b"")))
    return given


def test_http_is_spoken_as_clients_and_proxies_do(server: MaskServer) -> None:
    body = b'{"inputs": "[MASK]"}'
    head = b"POST /fill-mask HTTP/1.1\r\nContent-Length: %d\r\n" % len(body)
    told, answered = talked(server, head + b"Expect: 100-continue\r\n\r\n", body)
    assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answered.startswith(b"HTTP/1.1 200")
    old = head.replace(b"1.1", b"1.0") + b"Connection: keep-alive\r\n\r\n" + body
    assert talked(server, old)[0].count(b"Connection: keep-alive") == 1
    for path in (b"/health?probe=1", b"http://here:80/health"):
        assert talked(server, b"GET " + path + b" HTTP/1.1\r\n\r\n")[0].startswith(b"HTTP/1.1 200")
    assert talked(server, b"HEAD /health HTTP/1.1\r\n\r\n")[0].endswith(b"\r\n\r\n")
    assert b'{"error": "Unsupported method' in talked(server, b"PUT /health HTTP/1.1\r\n\r\n")[0]


@pytest.mark.parametrize(
    "head",
    [b"POST /fill-mask HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked",
     b"POST /fill-mask HTTP/1.1\r\nContent-Length: 4\r\nContent-Length: 40",
     b"POST /fill-mask HTTP/1.1\r\nContent-Length: " + b"9" * 5000, b"GET /health HTTP/1.1\r\nContent-Length: 34"],
)  # fmt: skip
def test_a_body_is_never_read_as_a_request(server: MaskServer, head: bytes) -> None:
    (answer,) = talked(server, head + b"\r\n\r\n1234GET /health HTTP/1.1\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"Connection: close") == 1


def test_one_request_fails_alone() -> None:
    def predict(texts: list[MaskedText]) -> Iterator[tuple[list[int], list[Candidates]]]:
        for index, text in enumerate(texts):
            if text.ids == [13]:
                raise ValueError
            yield [index], [Candidates([], [text.ids])]

    batcher, gate = Batcher(SimpleNamespace(batch_tokens=100, predict=predict)), threading.Event()  # type: ignore[arg-type]
    answer = batcher._answer
    with patch.object(batcher, "_answer", lambda jobs: (gate.wait(10), answer(jobs))), ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(batcher.predict, [MaskedText([number], [0])]) for number in range(10, 18)]
        while batcher._num_waiting < 8:
            threading.Event().wait(0.01)
        gate.set()
        assert [one.exception() is not None for one in answers] == [number == 13 for number in range(10, 18)]
        assert answers[7].result() == [Candidates([], [[17]])]
    batcher.close()
    with pytest.raises(TooBusy):
        batcher.predict([MaskedText([1], [0])])


def test_who_has_asked_before_the_end_is_answered(server: MaskServer) -> None:
    """Even one whose connection is not accepted yet."""
    ending, body = MaskServer(("127.0.0.1", 0), server.filler, "tiny", top_k=7), b'{"inputs": "[MASK]"}'
    threading.Thread(target=ending.serve_forever, daemon=True).start()
    shutdown, connection = ending.shutdown, socket.socket()

    def shutdown_and_one_more() -> None:
        shutdown()
        connection.connect(("127.0.0.1", ending.server_port))
        connection.sendall(b"POST /fill-mask HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with connection, patch.object(ending, "shutdown", shutdown_and_one_more):
        ending.stop()
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("the model's scores are not numbers"), 500, "not numbers"),
        (torch.OutOfMemoryError("CUDA"), 503, "out of GPU memory"),
        (ValueError("secret"), 500, "the server's mistake"),
    ],
)
def test_a_failed_batch_is_said_and_the_next_is_answered(
    server: MaskServer, error: Exception, status: int, said: str
) -> None:
    with patch.object(server.filler.predictor, "predict", side_effect=error):
        found, headers, answer = asked(server, {"inputs": "[MASK]"})
    assert (found, said in answer["error"], "secret" in answer["error"]) == (status, True, False)
    assert (headers["Retry-After"] == "1") == (status == 503)
    assert asked(server, {"inputs": "[MASK]"})[0] == 200


def test_too_many_that_wait_are_told_to_come_later(server: MaskServer) -> None:
    full = Batcher(server.filler.predictor, most_waiting=2)
    full._num_waiting = 1
    with patch.object(server, "batcher", full):
        assert asked(server, {"inputs": ["[MASK]", "[MASK]"]})[0] == 503
        assert asked(server, {"inputs": ["[MASK]"]})[0] == 200
    full.close()


def test_a_client_that_goes_away_harms_nobody(server: MaskServer) -> None:
    for sent in (b"", b"POST /fill-mask HTTP/1.1\r\nContent-Length: 100\r\n\r\n{", b"\x16\x03\x01 no http\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.sendall(sent)
    assert asked(server, {"inputs": "[MASK]"})[0] == 200


def test_connections_that_cannot_be_had_take_no_time(server: MaskServer) -> None:
    with (
        patch.object(TCPServer, "get_request", side_effect=OSError(24, "Too many open files")) as get_request,
        socket.create_connection(("127.0.0.1", server.server_port)),
    ):
        threading.Event().wait(0.3)
    assert 1 <= get_request.call_count <= 5
    assert asked(server, {"inputs": "[MASK]"})[0] == 200


def test_the_command_ends_when_it_is_told(folder: Path) -> None:
    words = ["serve", "--model", str(folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_bert", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    address = line.split()[2]
    body = json.dumps({"inputs": TEXTS[0]}).encode()
    with urllib.request.urlopen(f"{address}/fill-mask", body, timeout=60) as response:
        assert len(json.loads(response.read())) == 5
    idle = http.client.HTTPConnection("127.0.0.1", int(address.rpartition(":")[2]))
    idle.connect()  # one that asks nothing is not waited for
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, ("", ""))


def test_bad_options_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, said in [
            (["--port", port], f"cannot listen on 127.0.0.1, port {port}"), (["--port", "70000"], "70000 is not"),
            (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"), (["--host", ""], "--host is empty"),
            (["--top-k", "0"], "'0' is not a whole number"),
            (["--batch-tokens", "0"], "'0' is not a whole number"), (["--model", "/nowhere/at/all"], "no such file"),
        ]:  # fmt: skip
            assert main(["serve", "--model", str(folder), "--device", "cpu", *words]) == 2
            error = capsys.readouterr().err
            assert said in error
            assert error.count("\n") == 1
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with patch.dict(os.environ, launched):
        assert main(["serve", "--model", str(folder)]) == 2
    assert "start one for each GPU" in capsys.readouterr().err
