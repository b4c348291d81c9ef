"""Masks over HTTP: requests a second, ours beside Transformers' pipeline behind the same kind of server.

    PYTHONPATH=src python benchmarks/serve.py                                        # mini
    PYTHONPATH=src python benchmarks/serve.py --size 345m --texts texts.txt          # random weights, real lengths

Both answer one text a request, five candidates, to so many clients at once, each of which asks again as soon as it is
answered. Theirs is `pipeline("fill-mask")` with Transformers' own class in a `ThreadingHTTPServer`, one request at a
time (a lock: a model is not made for several threads). Clients are processes of their own. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"345m": (24, 1024, 16), "1.3b": (24, 2048, 32)}
SENTENCES = [
    "The capital of France is [MASK].",
    "She opened the [MASK] and looked into the garden, where it had begun to rain.",
    "In 1912 the company [MASK] its first factory in the north of the country, and many people came to work there.",
    "Water boils at one hundred degrees, and [MASK] at zero.",
]
PROCESSES = 8  # of clients


def main() -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="random weights of this size; left out: mini")
    parser.add_argument("--texts", type=Path, help="one a line, each with a mask; left out: four sentences")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--theirs", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        return _serve_theirs(args.theirs, args.dtype)
    texts = args.texts.read_text(encoding="utf-8").splitlines() if args.texts else SENTENCES
    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(Path(folder), args.size) if args.size else str(ROOT / "src" / "megatron_bert" / "mini")
        rates = {
            name: _rates(words, texts, args)
            for name, words in {
                "ours": ["-m", "megatron_bert", "serve", "--model", model, "--port", "0", "--dtype", args.dtype],
                "theirs": [__file__, "--theirs", model, "--dtype", args.dtype],
            }.items()
        }
    print("\n| clients at once | ours, requests/s | theirs | ours is faster |\n|---|---|---|---|")
    for clients in args.clients:
        ours, theirs = rates["ours"][clients], rates["theirs"][clients]
        print(f"| {clients} | {ours:,.0f} | {theirs:,.0f} | **{ours / theirs:.1f}** |")
    return 0


def _random_model(folder: Path, size: str) -> str:
    import shutil

    import torch

    from megatron_bert import MegatronBertConfig, MegatronBertForMaskedLM
    from megatron_bert.bundled import MINI

    layers, hidden, heads = SIZES[size]
    config = MegatronBertConfig(vocab_size=20096, hidden_size=hidden, num_hidden_layers=layers,
                                num_attention_heads=heads, intermediate_size=4 * hidden)  # fmt: skip
    MegatronBertForMaskedLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MINI) / name, folder)
    return str(folder)


def _rates(words: list[str], texts: list[str], args: argparse.Namespace) -> dict[int, float]:
    """Requests a second by the number of clients."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    port = int(process.stdout.readline().split("//")[1].split()[0].rpartition(":")[2])
    try:
        rates = {}
        for clients in args.clients:
            _round(port, texts, clients, 2.0)  # compilation, graphs, caches
            rates[clients] = statistics.median(_round(port, texts, clients, args.seconds) for _ in range(args.rounds))
            print(f"{' '.join(words[:3])}: {clients} clients, {rates[clients]:,.1f} requests/s", flush=True)
        return rates
    finally:
        process.terminate()
        process.wait()


def _round(port: int, texts: list[str], clients: int, seconds: float) -> float:
    spread = [clients // PROCESSES + (number < clients % PROCESSES) for number in range(min(PROCESSES, clients))]
    with multiprocessing.get_context("fork").Pool(len(spread)) as pool:
        counts = pool.starmap(_clients, [(port, texts, number, seconds) for number in spread])
    return sum(counts) / seconds


def _clients(port: int, texts: list[str], clients: int, seconds: float) -> int:
    counts = [0] * clients
    end = time.perf_counter() + seconds

    def ask(client: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        number = client
        while time.perf_counter() < end:
            connection.request("POST", "/fill-mask", json.dumps({"inputs": texts[number % len(texts)]}).encode())
            response = connection.getresponse()
            answer = response.read()
            assert response.status == 200, answer
            counts[client] += 1
            number += 7
        connection.close()

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


def _serve_theirs(model: str, dtype: str) -> int:
    import torch
    import transformers

    from megatron_bert.inference.device import choose_device, choose_dtype

    device = choose_device("auto")
    network = transformers.MegatronBertForMaskedLM.from_pretrained(model, dtype=choose_dtype(dtype, device))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    fill = transformers.FillMaskPipeline(model=network, tokenizer=tokenizer, device=device)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock, torch.inference_mode():
                answer = fill(asked["inputs"])
            body = json.dumps(answer, ensure_ascii=False).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 1024

    server = Server(("127.0.0.1", 0), Handler)
    print(f"theirs on http://127.0.0.1:{server.server_port} ({device})", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
