"""Stands in for `tests/exporters/test_export.py`: every class through `torch.export`, and Transformers' exporter on it.

B batch, S sequence.
"""

import copy
from typing import Any

import torch
from parameterized import parameterized
from transformers import set_seed
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.testing_utils import torch_device
from transformers.utils import ModelOutput

Inputs = dict[str, torch.Tensor]


def tensors_of(outputs: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in the model output `outputs`, nested ones too, under a dotted name."""
    if isinstance(outputs, torch.Tensor):
        return {prefix: outputs}
    if isinstance(outputs, ModelOutput):
        children = list(outputs.items())
    elif isinstance(outputs, tuple | list):
        children = [(str(index), value) for index, value in enumerate(outputs)]
    else:
        return {}
    return {name: tensor for key, value in children for name, tensor in tensors_of(value, f"{prefix}.{key}").items()}


def batch_and_sequence_dims(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Where an input of that name has its batch and its sequence; between them multiple choice has its choices."""
    return (0, 1) if name == "encoder_hidden_states" else (0, tensor.ndim - 1)


class ExportTesterMixin:
    """Exports every class of `all_model_classes`, and runs the program on other values than it was traced with."""

    export_classes: tuple[type, ...] | None = None  # None: all_model_classes

    @parameterized.expand([("static_shapes", False), ("dynamic_shapes", True)])
    def test_torch_export(self, _name: str, dynamic: bool) -> None:
        """`torch.export` itself, nothing patched. (A cache among the outputs is for the exporter below.)"""
        classes = self.export_classes or self.all_model_classes
        for model_class in classes if dynamic else classes[:1]:
            with self.subTest(model_class.__name__), torch.no_grad():
                model, traced, other = self._model_and_two_inputs(model_class)
                model.config.use_cache = False
                shapes = None
                if dynamic:
                    auto = torch.export.Dim.AUTO
                    shapes = {n: dict.fromkeys(batch_and_sequence_dims(n, v), auto) for n, v in traced.items()}
                    other = {n: self._smaller(n, value) for n, value in other.items()}
                program = torch.export.export(model, (), copy.deepcopy(traced), dynamic_shapes=shapes)
                self._check_same(program.module()(**copy.deepcopy(other)), model(**copy.deepcopy(other)), other)

    def test_transformers_exporter(self) -> None:
        model, traced, other = self._model_and_two_inputs(self.all_model_classes[0])
        exported = DynamoExporter().export(model, copy.deepcopy(traced), config=DynamoConfig())
        run = exported.module() if isinstance(exported, torch.export.ExportedProgram) else exported
        with torch.no_grad():
            self._check_same(run(**copy.deepcopy(other)), model(**copy.deepcopy(other)), other)

    def _model_and_two_inputs(self, model_class: type) -> tuple[torch.nn.Module, Inputs, Inputs]:
        set_seed(42)
        config, first = self.model_tester.prepare_config_and_inputs_for_common()
        _, second = self.model_tester.prepare_config_and_inputs_for_common()
        model = model_class(config).eval().to(torch_device)
        return model, self._prepare_for_class(first, model_class), self._prepare_for_class(second, model_class)

    @staticmethod
    def _smaller(name: str, tensor: torch.Tensor) -> torch.Tensor:
        batch, sequence = batch_and_sequence_dims(name, tensor)
        fewer = tensor.narrow(batch, 0, tensor.shape[batch] - 1)
        return fewer.narrow(sequence, 0, tensor.shape[sequence] - 2).contiguous()

    def _check_same(self, found: Any, expected: Any, inputs: Inputs) -> None:
        """Same names and values; at padding, nobody reads the output and the two paths may differ."""
        found, expected = tensors_of(found), tensors_of(expected)
        self.assertTrue(expected)
        self.assertEqual(found.keys(), expected.keys())
        real_BS = inputs["attention_mask"].bool()
        for name, tensor in expected.items():
            pair = (found[name], tensor)
            if tensor.shape[:2] == real_BS.shape:
                pair = (found[name][real_BS], tensor[real_BS])
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
