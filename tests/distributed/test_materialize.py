"""No rank holds the whole model: drawn or read, each has its part, with the values that one process has."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import cases


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_first_values_do_not_depend_on_the_degree(world, tensor):
    world(4).run(cases.starts_as_single_process, tensor=tensor)


@pytest.mark.parametrize("form", ["one file", "two files", "bare encoder", "half", "pickle", "old pickle"])
def test_a_folder_is_read_in_parts(world, tmp_path, form):
    model = cases.build(cases.MegatronBertForMaskedLM)
    model = model.half() if form == "half" else model
    (model.bert if form == "bare encoder" else model).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if form == "two files":
        (tmp_path / "model.safetensors").unlink()
        weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(weights)}
        for file in set(weight_map.values()):
            save_file({name: weights[name] for name in weights if weight_map[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if "pickle" in form:
        (tmp_path / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "pickle")
    said = world(2).run(cases.loads_as_single_process, tmp_path, has_head=form != "bare encoder")
    assert len(said[0]) == (1 if form == "bare encoder" else 0), said
