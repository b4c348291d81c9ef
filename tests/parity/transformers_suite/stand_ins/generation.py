"""Stands in for `tests/generation/test_utils.py`: what `generate` promises, for every class that can generate.

References: the model itself run without a cache on the whole text at each step, and exhaustive search for beams.
B batch, S sequence, V vocabulary.
"""

from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache, PreTrainedModel, set_seed
from transformers.testing_utils import torch_device

NEW_TOKENS = 5
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

Inputs = dict[str, torch.Tensor]


class GenerationTesterMixin:
    """Generation over `all_generative_model_classes`, with inputs from `model_tester`."""

    def models_and_inputs(self, **config_changes: Any) -> list[tuple[PreTrainedModel, Inputs]]:
        """Each generative class, random but fixed, in evaluation mode, with a full (unpadded) prompt."""
        pairs = []
        for model_class in self.all_generative_model_classes:
            set_seed(42)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            for name, value in config_changes.items():
                setattr(config, name, value)
            config.initializer_range = 0.5  # so that the next token depends on the prompt, and no two are close
            inputs.pop("token_type_ids")
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
            inputs["input_ids"] = inputs["input_ids"].clamp(min=1)  # 0 is the padding token
            model = model_class(config).eval().to(torch_device)
            model.generation_config.pad_token_id = 0
            pairs.append((model, inputs))
        self.assertTrue(pairs)
        return pairs

    def generate(self, model: PreTrainedModel, inputs: Inputs, **options: Any) -> Any:
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **options}
        return model.generate(**inputs, **options)

    @torch.no_grad()
    def next_logits(self, model: PreTrainedModel, inputs: Inputs, ids_BS: torch.Tensor) -> torch.Tensor:
        """Logits (B, S, V) of the whole text `ids_BS`, no cache, no padding."""
        context = {name: inputs[name] for name in inputs if name.startswith("encoder_")}
        return model(input_ids=ids_BS, use_cache=False, **context).logits

    def greedy_by_hand(self, model: PreTrainedModel, inputs: Inputs, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
        ids_BS = inputs["input_ids"]
        for _ in range(new_tokens):
            best = self.next_logits(model, inputs, ids_BS)[:, -1:].argmax(-1)
            ids_BS = torch.cat([ids_BS, best], dim=1)
        return ids_BS

    def test_greedy_equals_the_whole_text_run_again_at_each_step(self) -> None:
        for model, inputs in self.models_and_inputs():
            for use_cache in (True, False):
                found = self.generate(model, inputs, use_cache=use_cache)
                torch.testing.assert_close(found, self.greedy_by_hand(model, inputs))

    def test_greedy_for_every_attention_implementation(self) -> None:
        for model, inputs in self.models_and_inputs():
            for implementation in ("eager", "sdpa"):
                model.set_attn_implementation(implementation)
                torch.testing.assert_close(self.generate(model, inputs), self.greedy_by_hand(model, inputs))

    def test_greedy_returns_scores_and_states(self) -> None:
        for model, inputs in self.models_and_inputs():
            model.set_attn_implementation("eager")
            config = model.config
            outputs = self.generate(
                model,
                inputs,
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
                output_attentions=True,
                output_hidden_states=True,
            )
            batch, prompt = inputs["input_ids"].shape
            expected = self.next_logits(model, inputs, outputs.sequences)[:, prompt - 1 : -1]
            torch.testing.assert_close(torch.stack(outputs.logits, dim=1), expected, **TOLERANCE)
            self.assertEqual(len(outputs.hidden_states), NEW_TOKENS)
            self.assertEqual(len(outputs.attentions), NEW_TOKENS)
            for step in range(NEW_TOKENS):
                queries = prompt if step == 0 else 1
                shapes = {tuple(hidden.shape) for hidden in outputs.hidden_states[step]}
                self.assertEqual(shapes, {(batch, queries, config.hidden_size)})
                self.assertEqual(len(outputs.hidden_states[step]), config.num_hidden_layers + 1)
                shapes = {tuple(weights.shape) for weights in outputs.attentions[step]}
                self.assertEqual(shapes, {(batch, config.num_attention_heads, queries, prompt + step)})
                self.assertEqual(len(outputs.attentions[step]), config.num_hidden_layers)

    def test_the_cache_has_the_layout_of_transformers(self) -> None:
        for model, inputs in self.models_and_inputs():
            outputs = self.generate(model, inputs, return_dict_in_generate=True)
            cache = outputs.past_key_values
            self.assertIsInstance(cache, Cache)
            length = outputs.sequences.shape[1] - 1  # the last token was never fed
            config = model.config
            shape = (
                len(outputs.sequences),
                config.num_attention_heads,
                length,
                config.hidden_size // config.num_attention_heads,
            )
            self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            self.assertEqual(cache.get_seq_length(), length)
            self.assertEqual(len(self_cache.layers), config.num_hidden_layers)
            for layer in self_cache.layers:
                self.assertEqual((tuple(layer.keys.shape), tuple(layer.values.shape)), (shape, shape))
            if config.add_cross_attention:
                self.assertIsInstance(cache, EncoderDecoderCache)
                for layer in cache.cross_attention_cache.layers:
                    self.assertEqual(layer.keys.shape[2], inputs["encoder_hidden_states"].shape[1])

    def test_sampling_draws_from_the_model(self) -> None:
        for model, inputs in self.models_and_inputs():
            prompt = inputs["input_ids"].shape[1]
            torch.testing.assert_close(
                self.generate(model, inputs, do_sample=True, top_k=1), self.greedy_by_hand(model, inputs)
            )
            set_seed(0)
            first = self.generate(model, inputs, do_sample=True, top_k=3, num_return_sequences=2)
            set_seed(0)
            torch.testing.assert_close(
                self.generate(model, inputs, do_sample=True, top_k=3, num_return_sequences=2), first
            )
            repeated = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
            allowed = self.next_logits(model, repeated, first)[:, prompt - 1 : -1].topk(3).indices
            self.assertTrue((allowed == first[:, prompt:, None]).any(-1).all())
            self.assertFalse(torch.equal(first[::2], first[1::2]))

    def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_continuation(self) -> None:
        for model, inputs in self.models_and_inputs(initializer_range=0.2):
            inputs = {name: value[:1] for name, value in inputs.items()}
            vocabulary, prompt = model.config.vocab_size, inputs["input_ids"]
            found = self.generate(
                model,
                inputs,
                num_beams=vocabulary,
                max_new_tokens=2,
                min_new_tokens=2,
                length_penalty=0.0,
                return_dict_in_generate=True,
                output_scores=True,
            )
            first = self.next_logits(model, inputs, prompt)[0, -1].log_softmax(-1)
            texts = torch.cat(
                [prompt.repeat(vocabulary, 1), torch.arange(vocabulary, device=torch_device)[:, None]], dim=1
            )
            repeated = {name: value.repeat_interleave(vocabulary, dim=0) for name, value in inputs.items()}
            both = first[:, None] + self.next_logits(model, repeated, texts)[:, -1].log_softmax(-1)
            best = both.flatten().argmax().item()
            self.assertEqual(found.sequences[0, -2:].tolist(), [best // vocabulary, best % vocabulary])
            self.assertAlmostEqual(found.sequences_scores.item(), both.max().item(), places=3)

    def test_beams_without_and_with_a_cache_agree(self) -> None:
        for model, inputs in self.models_and_inputs():
            options = {"num_beams": 3, "num_return_sequences": 2}
            cached = self.generate(model, inputs, **options)
            torch.testing.assert_close(self.generate(model, inputs, use_cache=False, **options), cached)

    def test_left_padding_changes_nothing(self) -> None:
        for model, inputs in self.models_and_inputs():
            padded = dict(inputs)
            padding = torch.zeros(len(inputs["input_ids"]), 4, dtype=torch.long, device=torch_device)
            padded["input_ids"] = torch.cat([padding, inputs["input_ids"]], dim=1)
            padded["attention_mask"] = torch.cat([padding, inputs["attention_mask"]], dim=1)
            for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
                expected = self.generate(model, inputs, output_logits=True, return_dict_in_generate=True, **options)
                found = self.generate(model, padded, output_logits=True, return_dict_in_generate=True, **options)
                torch.testing.assert_close(found.sequences[:, 4:], expected.sequences)
                torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **TOLERANCE)

    def test_prompts_of_mixed_length_equal_each_alone(self) -> None:
        for model, inputs in self.models_and_inputs():
            mixed = {name: value.clone() for name, value in inputs.items()}
            prompt = mixed["input_ids"].shape[1]
            for row, padding in enumerate(range(len(mixed["input_ids"]))):
                mixed["input_ids"][row, :padding] = 0
                mixed["attention_mask"][row, :padding] = 0
            together = self.generate(model, mixed)
            for row, padding in enumerate(range(len(together))):
                alone = {name: value[row : row + 1] for name, value in inputs.items()}
                alone["input_ids"] = alone["input_ids"][:, padding:]
                expected = self.greedy_by_hand(model, alone)
                torch.testing.assert_close(together[row, prompt:], expected[0, prompt - padding :])

    def test_a_static_cache_equals_a_dynamic_one(self) -> None:
        for model, inputs in self.models_and_inputs():
            found = self.generate(
                model, inputs, cache_implementation="static", output_logits=True, return_dict_in_generate=True
            )
            expected = self.generate(model, inputs, output_logits=True, return_dict_in_generate=True)
            torch.testing.assert_close(found.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **TOLERANCE)

    def test_generation_goes_on_from_a_returned_cache(self) -> None:
        for model, inputs in self.models_and_inputs():
            begun = self.generate(model, inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
            ended = dict(inputs)
            ended["input_ids"] = begun.sequences
            ended["attention_mask"] = torch.ones_like(begun.sequences)
            rest = {"max_new_tokens": NEW_TOKENS - 2, "min_new_tokens": NEW_TOKENS - 2}
            found = self.generate(model, ended, past_key_values=begun.past_key_values, **rest)
            torch.testing.assert_close(found, self.greedy_by_hand(model, inputs))

    def test_prompt_as_embeddings_equals_prompt_as_tokens(self) -> None:
        for model, inputs in self.models_and_inputs():
            embedded = dict(inputs)
            embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids"))
            expected = self.greedy_by_hand(model, inputs)[:, inputs["input_ids"].shape[1] :]
            torch.testing.assert_close(self.generate(model, embedded), expected)
            torch.testing.assert_close(
                self.generate(model, {**embedded, "input_ids": inputs["input_ids"]})[:, -NEW_TOKENS:], expected
            )

    @torch.no_grad()
    def test_logits_to_keep_is_a_slice(self) -> None:
        for model, inputs in self.models_and_inputs():
            whole = model(**inputs).logits
            for count in (1, 3):
                torch.testing.assert_close(model(**inputs, logits_to_keep=count).logits, whole[:, -count:], **TOLERANCE)
            positions = torch.tensor([0, 4], device=torch_device)
            torch.testing.assert_close(
                model(**inputs, logits_to_keep=positions).logits, whole[:, positions], **TOLERANCE
            )

    def test_a_long_prompt_in_chunks(self) -> None:
        for model, inputs in self.models_and_inputs():
            found = self.generate(model, inputs, prefill_chunk_size=3)
            torch.testing.assert_close(found, self.greedy_by_hand(model, inputs))

    def test_assisted_and_prompt_lookup_decoding_equal_greedy(self) -> None:
        for model, inputs in self.models_and_inputs():
            alone = {name: value[:1] for name, value in inputs.items()}
            expected = self.greedy_by_hand(model, alone)
            torch.testing.assert_close(self.generate(model, alone, prompt_lookup_num_tokens=2), expected)
            if not model.config.add_cross_attention:  # Transformers gives an assistant no encoder output
                torch.testing.assert_close(self.generate(model, alone, assistant_model=model), expected)

    def test_the_forward_compiles_whole_and_generates_the_same(self) -> None:
        for model, inputs in self.models_and_inputs():
            expected = self.generate(model, inputs, cache_implementation="static")
            torch._dynamo.reset()
            whole = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
            model.forward = whole
            found = self.generate(model, inputs, cache_implementation="static", disable_compile=True)
            torch.testing.assert_close(found, expected)
            torch._dynamo.reset()
