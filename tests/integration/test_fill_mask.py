"""fill-mask against Transformers' fill-mask pipeline on the same folder, and what the command adds to it."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from megatron_bert.cli import fill_mask
from megatron_bert.cli.main import main
from megatron_bert.errors import UserError
from megatron_bert.inference import device as devices
from megatron_bert.inference.device import choose_device, choose_dtype
from megatron_bert.inference.fill_mask import load_encoder, load_mask_filler
from megatron_bert.inference.lines import Text
from tests.integration.tiny_model import VOCABULARY, write_tiny_model

BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}
TEXTS = [
    "Paris is the [MASK] of France.",
    "[MASK]",
    "London is a [MASK] city, and the [MASK] is in it!",
    "植物通过[MASK]合作用产生能量",
    "the [MASK] [MASK] of the old river thames",
    "Seine, Thames: [MASK]?",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    """Transformers' pipeline on its own classes, whatever is registered with its Auto classes."""
    model = transformers.MegatronBertForMaskedLM.from_pretrained(folder)
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    return transformers.FillMaskPipeline(model=model, tokenizer=tokenizer, device="cpu")


def rows(answer):
    """The pipeline's answer as one list of candidates a mask."""
    return answer if isinstance(answer[0], list) else [answer]


def output(capsys, *words, code=0):
    assert main(["fill-mask", *map(str, words)]) == code
    return capsys.readouterr().out


def parsed(printed):
    return [json.loads(line) for line in printed.splitlines()]


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    for our_mask, their_mask in zip(ours, expected, strict=True):
        for our, their in zip(our_mask, their_mask, strict=True):
            assert our.keys() == their.keys()
            assert {**our, "score": 0} == {**their, "score": 0}
            assert our["score"] == pytest.approx(their["score"], abs=1e-5, rel=1e-4)


class TestAgainstTransformers:
    @pytest.mark.parametrize("top_k", [1, 5, 40])
    def test_tokens_scores_and_sequences(self, capsys, folder, pipeline, top_k):
        printed = output(capsys, "--model", folder, "--json", "--top-k", top_k, "--dtype", "float32", *TEXTS)
        for text, ours in zip(TEXTS, parsed(printed), strict=True):
            assert ours["text"] == text
            assert_same(ours["predictions"], rows(pipeline(text, top_k=top_k)))

    def test_the_reference_tells_texts_apart(self, pipeline):
        assert len({tuple(row["token"] for row in rows(pipeline(text))[0]) for text in TEXTS}) == len(TEXTS)

    def test_either_spelling_of_the_mask(self, capsys, folder):
        options = ("--model", folder, "--json", "--dtype", "float32")
        ours = output(capsys, *options, *TEXTS)
        other = output(capsys, *options, *(text.replace("[MASK]", "<mask>") for text in TEXTS))
        assert [line["predictions"] for line in parsed(other)] == [line["predictions"] for line in parsed(ours)]
        assert "<mask>" in other

    def test_truncation(self, capsys, folder, pipeline):
        text = "the [MASK] of " + "the old city and " * 20
        printed = output(capsys, "--model", folder, "--json", "--truncate", "--dtype", "float32", text)
        expected = pipeline(text, tokenizer_kwargs={"truncation": True, "max_length": 32})
        assert_same(parsed(printed)[0]["predictions"], rows(expected))

    @pytest.mark.parametrize(("chunk_texts", "batch_tokens"), [(1, 8192), (2, 8192), (100, 1), (100, 40), (4, 30)])
    def test_chunks_and_batches_change_nothing_and_keep_the_order(self, folder, pipeline, chunk_texts, batch_tokens):
        filler = load_mask_filler(folder, device="cpu", dtype="float32", batch_tokens=batch_tokens)
        texts = [Text(text, "") for text in TEXTS * 2]
        chunks = [texts[start : start + chunk_texts] for start in range(0, len(texts), chunk_texts)]
        filled = list(filler.stream(chunks))
        assert [result.text for result in filled] == TEXTS * 2
        for result in filled:
            assert_same([[vars(row) for row in mask] for mask in result.predictions], rows(pipeline(result.text)))


class TestPaddedVocabulary:
    """Rows beyond the tokenizer, with the highest scores of all, are neither predicted nor given probability."""

    def test_padding_rows_never_win(self, capsys, tmp_path):
        folder = tmp_path
        model = write_tiny_model(folder, vocab_size=128)
        assert len(VOCABULARY) < 128
        with torch.no_grad():
            model.get_parameter("cls.predictions.bias")[len(VOCABULARY) :] = 50.0
        model.save_pretrained(folder)
        printed = output(capsys, "--model", folder, "--json", "--dtype", "float32", "--top-k", 7, *TEXTS)
        tokenizer = transformers.BertTokenizer.from_pretrained(folder)
        for text, ours in zip(TEXTS, parsed(printed), strict=True):
            inputs = tokenizer(text, return_tensors="pt")
            logits = model(**inputs).logits[0][inputs["input_ids"][0] == tokenizer.mask_token_id]
            assert logits.argmax(-1).min() >= len(VOCABULARY)  # without care a padding row would win
            expected = logits[:, : len(VOCABULARY)].softmax(-1).topk(7)
            assert [[row["token"] for row in mask] for mask in ours["predictions"]] == expected.indices.tolist()
            scores = torch.tensor([[row["score"] for row in mask] for mask in ours["predictions"]])
            torch.testing.assert_close(scores, expected.values, rtol=1e-4, atol=1e-6)


class TestCost:
    def test_the_vocabulary_is_projected_at_masks_only(self, folder):
        filler = load_mask_filler(folder, device="cpu", dtype="float32")
        projected = []
        filler.model.cls.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0].shape[0]))
        filler.fill(TEXTS)
        assert sum(projected) == sum(text.count("[MASK]") for text in TEXTS)

    def test_batches_are_of_similar_length_and_hold_the_limit(self, folder):
        filler = load_mask_filler(folder, device="cpu", dtype="float32", batch_tokens=60)
        batches = []
        filler.model.bert.register_forward_pre_hook(lambda _, inputs: batches.append(tuple(inputs[0].shape)))
        filler.fill(["a " * length + "[MASK]" for length in (1, 20, 2, 19, 1, 3, 1, 28)])
        lengths = [length for _, length in batches]
        assert all(texts * length <= 60 for texts, length in batches)
        assert lengths == sorted(lengths, reverse=True)
        assert [texts for texts, _ in batches] == [1, 2, 5]  # 31 tokens; 23 and 22; 6, 5, 4, 4 and 4


class TestInputAndOutput:
    def test_a_file_is_read_in_order_and_blank_lines_are_skipped(self, capsys, folder, tmp_path):
        file = tmp_path / "texts.txt"
        file.write_bytes("\ufeffParis [MASK]\r\n\n  \nthe <mask>\n植物[MASK]".encode())
        printed = output(capsys, "--model", folder, "--file", file, "--json")
        assert [line["text"] for line in parsed(printed)] == ["Paris [MASK]", "the <mask>", "植物[MASK]"]

    @pytest.mark.parametrize("words", [["--file", "-"], []])
    def test_standard_input(self, capsys, folder, monkeypatch, words):
        stdin = io.TextIOWrapper(io.BytesIO(b"Paris [MASK]\nthe <mask>\n"))
        monkeypatch.setattr(sys, "stdin", stdin)
        printed = output(capsys, "--model", folder, "--json", *words)
        assert [line["text"] for line in parsed(printed)] == ["Paris [MASK]", "the <mask>"]

    def test_standard_input_is_answered_while_it_comes(self, folder, command):
        words = [command / "megatron-bert", "fill-mask", "--model", folder, "--json"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(words, **pipes, text=True, env=BUFFERED) as process:
            for text in ("the [MASK]", "Paris is [MASK]", "a [MASK] a"):
                process.stdin.write(f"{text}\n")
                process.stdin.flush()
                assert json.loads(process.stdout.readline())["text"] == text  # before the next line is sent
            process.stdin.close()
        assert process.returncode == 0

    def test_the_table(self, capsys, folder):
        printed = output(capsys, "--model", folder, "--top-k", 2, "the [MASK]", "a [MASK] [MASK]").splitlines()
        assert len(printed) == 3 + 7
        assert (printed[0], printed[3], printed[4].strip()) == ("the [MASK]", "a [MASK] [MASK]", "mask 1")
        score, token = printed[1].split()
        assert 0 < float(score) <= 1
        assert token in VOCABULARY

    def test_json_has_these_keys_and_is_not_escaped(self, capsys, folder):
        printed = output(capsys, "--model", folder, "--json", "植物[MASK]")
        assert printed.startswith('{"text": "植物[MASK]", "predictions": [[{"token_str": ')
        assert list(parsed(printed)[0]["predictions"][0][0]) == ["token_str", "token", "score", "sequence"]

    def test_a_progress_bar_on_a_terminal(self, capsys, folder, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setattr(fill_mask, "_bar_options", lambda: {"mininterval": 0})
        assert main(["fill-mask", "--model", str(folder), "--json", *TEXTS]) == 0
        captured = capsys.readouterr()
        assert f"{len(TEXTS)}/{len(TEXTS)} [" in captured.err
        assert "predicting: 100%" in captured.err
        assert len(parsed(captured.out)) == len(TEXTS)

    def test_no_progress_bar_without_a_terminal(self, capsys, folder):
        assert main(["fill-mask", "--model", str(folder), "the [MASK]"]) == 0
        assert capsys.readouterr().err == ""

    def test_a_reader_that_stops_reading_ends_it_quietly(self, folder, tmp_path):
        file = tmp_path / "many.txt"
        file.write_text("the [MASK] of paris\n" * 3000)
        command = f"'{sys.executable}' -m megatron_bert fill-mask --model '{folder}' --file '{file}' | head -n 1"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=BUFFERED, check=True)
        assert (result.stdout, result.stderr) == ("the [MASK] of paris\n", "")


class TestLibrary:
    def test_fill_returns_the_predictions(self, folder, pipeline):
        (filled,) = load_mask_filler(folder, device="cpu", dtype="float32", top_k=3).fill(["the <mask>"])
        assert filled.text == "the <mask>"
        assert [row.token_str for row in filled.predictions[0]] == [
            row["token_str"] for row in pipeline("the [MASK]", top_k=3)
        ]

    def test_what_are_no_texts(self, folder):
        filler = load_mask_filler(folder, device="cpu", dtype="float32")
        assert filler.fill([]) == []
        assert filler.fill("the [MASK]") == filler.fill(["the [MASK]"])
        with pytest.raises(TypeError, match="a text is a str, not NoneType"):
            filler.fill([None])

    def test_an_encoder_checks_texts_without_the_weights(self, folder, tmp_path):
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        encoder = load_encoder(tmp_path)
        assert encoder.check([[Text("a [MASK]", "")], [Text("[MASK]", ""), Text("<mask>", "")]]) == 3

    def test_scores_that_are_not_numbers_are_refused(self, folder):
        filler = load_mask_filler(folder, device="cpu", dtype="float32")
        with torch.no_grad():
            filler.model.bert.encoder.ln.weight[0] = float("nan")
        with pytest.raises(UserError, match="scores are not numbers in float32"):
            filler.fill(["the [MASK]"])


class TestDeviceAndType:
    @pytest.mark.parametrize(
        ("amx", "avx512", "dtype"),
        [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")],
    )
    def test_auto_on_a_cpu(self, monkeypatch, amx, avx512, dtype):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        assert choose_dtype("auto", torch.device("cpu")) is getattr(torch, dtype)

    def test_auto_takes_a_gpu_where_there_is_one(self, monkeypatch):
        monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
        assert choose_device("auto") == torch.device("cuda")
        monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
        assert choose_device("auto") == torch.device("cpu")

    @pytest.mark.parametrize("name", ["float32", "bfloat16"])
    def test_what_is_asked_for_is_what_the_model_is_in(self, folder, name):
        filler = load_mask_filler(folder, device="cpu", dtype=name)
        assert {p.dtype for p in filler.model.parameters()} == {getattr(torch, name)}
        assert filler.fill(["the [MASK]"])[0].predictions[0][0].score > 0

    def test_a_gpu_number_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
        assert choose_device("cuda:1") == torch.device("cuda:1")
        with pytest.raises(UserError, match="device cuda:2 is not there"):
            choose_device("cuda:2")

    @pytest.mark.gpu
    def test_on_a_gpu(self, folder, pipeline):
        filler = load_mask_filler(folder, device="cuda", dtype="float32")
        for result in filler.fill(TEXTS):
            assert_same([[vars(row) for row in mask] for mask in result.predictions], rows(pipeline(result.text)))
