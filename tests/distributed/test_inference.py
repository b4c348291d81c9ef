"""Masks filled by tensor-parallel ranks: as by one process, and none of them ever holds the whole model."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from megatron_bert.cli.main import main
from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel.tensor import check_degree
from tests.distributed import inference_cases as cases
from tests.integration.tiny_model import VOCABULARY, write_tiny_model

TEXTS = [
    "Paris is the [MASK] of France.",
    "London is a [MASK] city, and the [MASK] is in it!",
    "the [MASK] of the old river thames",
    "[MASK]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The vocabulary's last rows are padding, with the highest scores of all; two of four ranks have nothing else."""
    folder = tmp_path_factory.mktemp("model")
    model = write_tiny_model(folder, vocab_size=256)
    assert len(VOCABULARY) < 128
    with torch.no_grad():
        model.get_parameter("cls.predictions.bias")[len(VOCABULARY) :] = 50.0
    model.save_pretrained(folder)
    return folder


def expected(folder, texts, top_k):
    """Tokens and probabilities from Transformers' classes, without the padding rows."""
    model = transformers.MegatronBertForMaskedLM.from_pretrained(folder)
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        at = inputs["input_ids"][0] == tokenizer.mask_token_id
        yield model(**inputs).logits[0, at, : len(VOCABULARY)].softmax(-1).topk(top_k)


@pytest.mark.parametrize(("ranks", "top_k"), [(2, 5), (4, 3), (4, 90)])
def test_predictions_are_those_of_transformers(world, folder, ranks, top_k):
    answers = world(ranks).run(cases.fills, folder, TEXTS, dtype="float32", top_k=top_k)
    assert all(answer == answers[0] for answer in answers)
    for masks, best in zip(answers[0], expected(folder, TEXTS, top_k), strict=True):
        assert [[candidate["token"] for candidate in mask] for mask in masks] == best.indices.tolist()
        for mask, scores in zip(masks, best.values.tolist(), strict=True):
            assert [candidate["score"] for candidate in mask] == pytest.approx(scores, rel=1e-4)


def test_a_16_bit_type(world, folder):
    (answer, _) = world(2).run(cases.fills, folder, TEXTS, dtype="bfloat16", top_k=1)
    for masks, best in zip(answer, expected(folder, TEXTS, 1), strict=True):
        for mask, scores in zip(masks, best.values.tolist(), strict=True):
            assert mask[0]["score"] == pytest.approx(scores[0], rel=0.2)


@pytest.mark.parametrize(("num_tokens", "num_candidates"), [(256, 5), (130, 5), (100, 80), (60, 60)])
def test_logits_are_never_sent(world, num_tokens, num_candidates):
    """Of each mask's 256 logits, each of four ranks sends its best."""
    most = world(4).run(cases.merges_the_best, num_tokens, num_candidates)
    assert 0 < max(most) <= 4 * 6 * num_candidates


def test_no_rank_holds_more_than_its_part(world, folder, tmp_path):
    """In memory and from the file, at their peak: issue 4's bound, 0.6 of the checkpoint and what a process needs."""
    shape = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048, "vocab_size": 2048}
    config = transformers.MegatronBertConfig(**shape, num_attention_heads=8)
    transformers.MegatronBertForMaskedLM(config).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 100e6
    for held, read, grown in world(2).run(cases.takes_its_part, tmp_path, folder):
        assert held == read
        assert held < 0.52 * size
        assert grown < 0.6 * size


class TestRefused:
    """On every rank, in the same words."""

    def message(self, world, *args, ranks=2):
        (message, *others) = world(ranks).run(cases.refusal, *args)
        assert others == (ranks - 1) * [message]
        return message

    def test_heads_that_cannot_be_split(self, world, tmp_path):
        write_tiny_model(tmp_path, vocab_size=128, num_attention_heads=2)
        message = self.message(world, 2 * [tmp_path], ranks=4)
        assert message.startswith(
            "num_attention_heads 2 is not divisible by the tensor-parallel degree 4; it fits 1 or 2"
        )

    def test_a_vocabulary_that_cannot_be_split(self, world, tmp_path):
        write_tiny_model(tmp_path, vocab_size=129)
        assert "; pad the vocabulary to a multiple of 256; it fits 1 (" in self.message(world, 2 * [tmp_path])

    def test_damaged_weights(self, world, folder, tmp_path):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 10_000 if file.suffix == ".safetensors" else None])
        assert "model.safetensors is truncated or damaged" in self.message(world, 2 * [tmp_path])
        assert self.message(world, [folder, tmp_path]).startswith(f"rank 1: {tmp_path}")

    def test_a_folder_that_one_rank_lacks(self, world, folder):
        missing = folder / "nowhere"
        assert self.message(world, [folder, missing]) == f"rank 1: {missing}: no such file or folder"

    def test_ranks_with_different_models(self, world, folder, tmp_path):
        write_tiny_model(tmp_path, vocab_size=128)
        assert "digest is" in self.message(world, [folder, tmp_path])

    def test_ranks_with_different_number_types(self, world, folder):
        message = self.message(world, 2 * [folder], ("float32", "bfloat16"))
        assert message == "the number type is float32 on rank 0 and bfloat16 on rank 1: start all of them alike"


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_every_published_vocabulary_can_be_split(degree):
    """NVIDIA's, Erlangshen's, GatorTron's: all were padded to a multiple of 128."""
    for vocab_size in (29056, 21248, 50176):
        check_degree(MegatronBertConfig(vocab_size=vocab_size), degree)


def test_texts_and_errors_of_the_first_rank_arrive_everywhere(world):
    heard = [[1, 2], [1], [], "line 3 is not a text", "/nowhere/texts: No such file or directory"]
    assert world(2).run(cases.hears_the_first_rank) == 2 * [heard]


def test_under_torchrun_one_process_reads_prints_and_complains(folder, capsys):
    """A line is answered before the next is there; one that cannot be ends all of them, with one line."""
    options = ["fill-mask", "--model", str(folder), "--device", "cpu", "--dtype", "float32", "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "-m", "megatron_bert", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{TEXTS[1]}\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    printed, said = process.communicate("no mask in here\n", timeout=120)
    assert main([*options, TEXTS[1]]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert answer["text"] == alone["text"]
    for ours, theirs in zip(answer["predictions"], alone["predictions"], strict=True):
        assert [one["token"] for one in ours] == [one["token"] for one in theirs]
    assert not printed
    complaints = [line for line in said.splitlines() if line.startswith("megatron-bert")]
    assert len(complaints) == 1, said
    assert "standard input, line 2: no mask" in complaints[0]
    assert "exitcode  : 2" in said  # torchrun's own is 1, whatever a process's
    assert process.returncode == 1
