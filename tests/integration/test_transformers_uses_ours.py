"""Transformers' own entry points with this package's classes, and the published samples with the import changed."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import tokenizers
import torch
import transformers

from megatron_bert import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
    MegatronBertForSequenceClassification,
    MegatronBertTokenizer,
    pipeline,
    register,
)

PUBLISHED_NAME = "IDEA-CCNL/Erlangshen-MegatronBert-1.3B"
CHINESE = "植物通过光合作用产生能量的"
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(CHINESE)), "a", "##b", "c"]
FIRST_SAMPLE = """
import tokenizers
import torch
from megatron_bert import pipeline
pipeline = pipeline(task="fill-mask", model="IDEA-CCNL/Erlangshen-MegatronBert-1.3B", dtype="auto")
predictions = pipeline("植物通过<mask>合作用产生能量")
"""
SECOND_SAMPLE = """
import tokenizers
import torch
from megatron_bert import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained("IDEA-CCNL/Erlangshen-MegatronBert-1.3B", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("IDEA-CCNL/Erlangshen-MegatronBert-1.3B")
inputs = tokenizer("植物通过<mask>合作用产生能量", return_tensors="pt")
outputs = model(**inputs)
mask_token_id = tokenizer.mask_token_id
mask_position = (inputs.input_ids == tokenizer.mask_token_id).nonzero(as_tuple=True)[1]
predicted_word = tokenizer.decode(outputs.logits[0, mask_position].argmax(dim=-1))
print(f"Predicted word: {predicted_word}")
"""

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny_config(**overrides):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 128}
    return MegatronBertConfig(**{"vocab_size": 64, "max_position_embeddings": 32, **shape, **overrides})


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder of the published name in the working directory: fp16, padded vocabulary, BERT's tokenizer files."""
    folder = tmp_path / PUBLISHED_NAME
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    torch.manual_seed(0)
    model = MegatronBertForPreTraining(tiny_config())
    with torch.no_grad():  # the padding rows would win every prediction
        model.cls.predictions.bias[len(TOKENS) :] = 100.0
        model.cls.predictions.bias[TOKENS.index("光")] = 3.0
    model.half().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_first_published_sample(published):
    names = {}
    exec(FIRST_SAMPLE, names)
    assert type(names["pipeline"].model) is MegatronBertForMaskedLM
    assert names["pipeline"].model.dtype == torch.float16
    assert names["predictions"][0]["token_str"] == "光"
    assert all(prediction["token"] < len(TOKENS) for prediction in names["pipeline"]("通过[MASK]合", top_k=len(TOKENS)))


def test_second_published_sample(published, capsys):
    names = {}
    exec(SECOND_SAMPLE, names)
    assert type(names["model"]) is MegatronBertForMaskedLM
    assert type(names["tokenizer"]) is MegatronBertTokenizer
    assert names["mask_position"].tolist() == [5]
    assert capsys.readouterr().out == "Predicted word: 光\n"


def test_transformers_pipeline_uses_ours(published):
    register()
    filler = transformers.pipeline("fill-mask", model=str(published))
    assert type(filler.model) is MegatronBertForMaskedLM
    assert filler("通过[MASK]合")[0]["token_str"] == "光"


def test_transformers_configuration_leads_to_ours():
    register()
    model = transformers.AutoModelForMaskedLM.from_config(transformers.MegatronBertConfig(**SMALL_SHAPE))
    assert type(model) is MegatronBertForMaskedLM


SMALL_SHAPE = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}


def test_padding_rows_may_win_again_once_they_are_tokens(published):
    model = AutoModelForMaskedLM.from_pretrained(published)
    ids = torch.tensor([[2, 4, 3]])
    assert model(ids).logits[..., len(TOKENS) :].max() < -60000
    model.resize_token_embeddings(64)
    assert model(ids).logits[0, 1].argmax() >= len(TOKENS)


def test_tokens_that_only_the_tokenizers_configuration_knows(published):
    """Transformers 5 writes added tokens there, beside a vocab.txt."""
    added = {str(len(TOKENS) + at): {"content": f"[DRUG{at}]", "special": False} for at in range(3)}
    (published / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "added_tokens_decoder": added})
    )
    assert len(AutoTokenizer.from_pretrained(published)) == len(TOKENS) + 3
    assert AutoModelForMaskedLM.from_pretrained(published).num_tokens == len(TOKENS) + 3


def test_a_vocabulary_that_is_a_list(published):
    """SentencePiece's Unigram, a list of pieces and their scores."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([(f"w{at}", -1.0) for at in range(50)], unk_id=0))
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.save(str(published / "tokenizer.json"))
    assert AutoModelForMaskedLM.from_pretrained(published).num_tokens == 51


def test_labels_of_padding_rows_have_a_finite_loss(published):
    """A row beyond the tokenizer may have become a token of the user's since."""
    model = AutoModelForMaskedLM.from_pretrained(published)
    assert torch.isfinite(model(torch.tensor([[2, 4, 3]]), labels=torch.tensor([[-100, 63, -100]])).loss)


def test_smoothed_labels_count_padding_rows_as_they_do_there(published, tmp_path):
    """Transformers' Trainer takes the labels away and smooths them over the whole vocabulary."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, len(TOKENS), (8, 6))]
    losses = []
    for model_class in (transformers.MegatronBertForMaskedLM, MegatronBertForMaskedLM):
        model = model_class.from_pretrained(
            published, dtype="float32", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            label_smoothing_factor=0.1,
            max_steps=2,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        losses.append([trainer.train().training_loss, trainer.evaluate(rows)["eval_loss"]])
        logits = model.train()(rows[0]["input_ids"][None]).logits
        losses[-1].append(torch.nn.functional.cross_entropy(logits[0], rows[0]["labels"], label_smoothing=0.1).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_trainer_trains_ours(tmp_path):
    torch.manual_seed(0)
    texts = torch.randint(5, 64, (64, 8))
    rows = [{"input_ids": ids, "attention_mask": torch.ones(8), "labels": int(ids[1] > 34)} for ids in texts]
    model = MegatronBertForSequenceClassification(tiny_config(num_labels=2))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        num_train_epochs=15,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before / 2


@pytest.mark.parametrize("model_class", [MegatronBertForMaskedLM, MegatronBertForSequenceClassification])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, model_class):
    """One SGD step of Transformers' Trainer on 8 texts, at once and in four parts."""
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids if model_class is MegatronBertForMaskedLM else int(ids[1] > 34)}
            for ids in torch.randint(5, 64, (8, 8))]  # fmt: skip
    start = model_class(tiny_config(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    trained = []
    for parts in (1, 4):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=copy.deepcopy(start), args=arguments, train_dataset=rows)
        trainer.train()
        trained.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    change = trained[0] - torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    assert (trained[1] - trained[0]).norm() < 1e-3 * change.norm()


def test_lora_adapters_of_one_fit_the_other(tmp_path):
    """An adapter trained on Transformers' class gives the same outputs on ours."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = transformers.MegatronBertForMaskedLM(transformers.MegatronBertConfig(**SMALL_SHAPE)).eval()
    ours = MegatronBertForMaskedLM(MegatronBertConfig(**SMALL_SHAPE)).eval()
    ours.load_state_dict(theirs.state_dict())
    lora = peft.LoraConfig(target_modules=["query", "value", "dense"], init_lora_weights=False)
    adapted = peft.get_peft_model(theirs, lora)
    adapted.save_pretrained(tmp_path)
    ours_adapted = peft.PeftModel.from_pretrained(ours, tmp_path).eval()
    ids = torch.randint(5, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        expected, found = adapted.eval()(ids, attention_mask=mask).logits, ours_adapted(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_bare_import_is_light_and_has_no_effect():
    program = """
        import sys, time
        start = time.process_time()
        import megatron_bert
        assert time.process_time() - start < 0.1, time.process_time() - start
        assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
        import transformers
        assert transformers.AutoConfig.for_model("megatron-bert").__module__.startswith("transformers.")
        megatron_bert.MegatronBertConfig
        assert transformers.AutoConfig.for_model("megatron-bert").__module__.startswith("megatron_bert.")
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=environment)


def test_other_models_are_left_alone(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    config = transformers.BertConfig(**SMALL_SHAPE)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(tmp_path)
    filler = pipeline("fill-mask", model=str(tmp_path))
    assert type(filler.model) is transformers.BertForMaskedLM
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is transformers.BertTokenizer
