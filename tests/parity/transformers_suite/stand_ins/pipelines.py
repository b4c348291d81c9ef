"""Stand in for the classes of Transformers' `tests/pipelines/`: what each pipeline returns, against the model itself.

The mixin loads a tiny model, calls `get_test_pipeline`, then `run_pipeline_test`, then runs a batch of the examples.
"""

import unittest
from typing import Any, ClassVar

import torch
from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase, pipeline

TEXT, OTHER_TEXT = "paris is the capital of france .", "it was a good day in new york"


class PipelineCheck(unittest.TestCase):
    """A real pipeline for `task` over the tiny model, and the same computed by hand from the model's output."""

    task: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    examples: ClassVar[list[str]] = [TEXT, OTHER_TEXT]

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32", **processors: Any
    ) -> tuple[Pipeline, list[str]]:
        self.assertEqual(processors, {})
        return pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype, **self.options), list(self.examples)

    def run_pipeline_test(self, pipe: Pipeline, examples: list[str]) -> None:
        for text in examples:
            self.check(pipe, text, pipe(text))
        together = pipe(list(examples))
        self.assertEqual(len(together), len(examples))
        for text, output in zip(examples, together, strict=True):
            self.check(pipe, text, output)

    def check(self, pipe: Pipeline, text: str, output: Any) -> None:
        raise NotImplementedError

    def forward(self, pipe: Pipeline, *texts: str) -> Any:
        """The model's output for one text (or one pair), as the pipeline's own tokenizer reads it."""
        with torch.no_grad():
            return pipe.model(**pipe.tokenizer(*texts, return_tensors="pt").to(pipe.model.device))

    def assert_close(self, found: Any, expected: torch.Tensor) -> None:
        """Half precision is the coarsest type that the mixin asks for: 3 decimals."""
        torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=2e-2, atol=2e-3)


class FeatureExtraction(PipelineCheck):
    task = "feature-extraction"

    def check(self, pipe: Pipeline, text: str, output: Any) -> None:
        self.assert_close(output, self.forward(pipe, text).last_hidden_state)


class FillMask(PipelineCheck):
    task = "fill-mask"
    examples: ClassVar[list[str]] = ["paris is the [MASK] of france .", "[MASK] is a city"]

    def check(self, pipe: Pipeline, text: str, output: Any) -> None:
        ids = pipe.tokenizer(text, return_tensors="pt").input_ids[0]
        position = (ids == pipe.tokenizer.mask_token_id).nonzero().item()
        probabilities = self.forward(pipe, text).logits[0, position].float().softmax(-1)
        top = probabilities.topk(5)
        self.assert_close([prediction["score"] for prediction in output], top.values)
        for prediction in output:
            self.assertAlmostEqual(prediction["score"], probabilities[prediction["token"]].item(), places=3)
            self.assertEqual(prediction["token_str"], pipe.tokenizer.decode([prediction["token"]]))
            filled = ids.clone()
            filled[position] = prediction["token"]
            self.assertEqual(prediction["sequence"], pipe.tokenizer.decode(filled, skip_special_tokens=True))


class TextClassification(PipelineCheck):
    task = "text-classification"

    def check(self, pipe: Pipeline, text: str, output: Any) -> None:
        best = output[0] if isinstance(output, list) else output
        probabilities = self.forward(pipe, text).logits[0].float().softmax(-1)
        self.assertAlmostEqual(best["score"], probabilities.max().item(), places=2)
        self.assertAlmostEqual(probabilities[pipe.model.config.label2id[best["label"]]].item(), best["score"], places=2)


class TokenClassification(PipelineCheck):
    task = "token-classification"

    def check(self, pipe: Pipeline, text: str, output: Any) -> None:
        logits = self.forward(pipe, text).logits[0].float()
        tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(text).input_ids)
        self.assertEqual([entity["word"] for entity in output], tokens[1:-1])
        self.assert_close([entity["score"] for entity in output], logits[1:-1].softmax(-1).amax(-1))
        for entity in output:
            self.assertEqual(text[entity["start"] : entity["end"]], entity["word"])


class ZeroShot(PipelineCheck):
    task = "zero-shot-classification"
    labels: ClassVar[list[str]] = ["politics", "science", "health"]
    options: ClassVar[dict[str, Any]] = {"candidate_labels": labels, "hypothesis_template": "this text is about {}."}

    def check(self, pipe: Pipeline, text: str, output: Any) -> None:
        entailment = pipe.model.config.label2id["entailment"]
        logits = [self.forward(pipe, text, f"this text is about {label}.").logits[0] for label in self.labels]
        scores = torch.stack(logits).float()[:, entailment].softmax(0)
        self.assertEqual(output["sequence"], text)
        self.assertEqual(output["scores"], sorted(output["scores"], reverse=True))
        found = dict(zip(output["labels"], output["scores"], strict=True))
        self.assert_close([found[label] for label in self.labels], scores)


class TextGeneration(PipelineCheck):
    task = "text-generation"
    options: ClassVar[dict[str, Any]] = {"max_new_tokens": 4, "do_sample": False}

    def check(self, pipe: Pipeline, text: str, output: Any) -> None:
        ids = pipe.tokenizer(text, return_tensors="pt").input_ids
        for _ in range(self.options["max_new_tokens"]):  # greedy, without a cache
            with torch.no_grad():
                logits = pipe.model(ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        self.assertEqual(pipe(text, return_tensors=True)[0]["generated_token_ids"], ids[0].tolist())
        self.assertTrue(output[0]["generated_text"].startswith(text))
        new_text = pipe.tokenizer.decode(ids[0, -self.options["max_new_tokens"] :], skip_special_tokens=True)
        self.assertEqual(output[0]["generated_text"][len(text) :].strip(), new_text)


# The mixin's task name -> the check that stands in for Transformers' own.
CHECKS: dict[str, type[PipelineCheck]] = {
    "feature-extraction": FeatureExtraction,
    "fill-mask": FillMask,
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "zero-shot": ZeroShot,
    "text-generation": TextGeneration,
}
