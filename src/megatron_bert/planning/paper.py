"""The paper's weak scaling (arXiv 1909.08053, section 5.1, table 1 and figure 5) beside what is predicted for it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.model import MegatronBertConfig
from megatron_bert.planning.devices import Gpu, of_data_sheet
from megatron_bert.planning.layout import Job, Layout
from megatron_bert.planning.parameters import rank_parameters
from megatron_bert.planning.speed import step_flops, step_time

__all__ = ["DGX2", "PaperRow", "paper_table"]

DGX2 = of_data_sheet("v100-dgx2", 125, 31.7, 0.9, 16, 150, 6.25, 80)
"""The paper's servers: 16 V100 of 32 GB, NVSwitch of 300 GB/s a GPU, 100 GB/s between servers (section 5)."""

_VOCABULARY, _ROW_TOKENS, _ROWS, _DATA = 51200, 1024, 8, 64
# Hidden size, heads, layers, tensor-parallel degree (table 1), and the two efficiencies in percent (figure 5).
_SHAPES = [
    (1536, 16, 40, 1, 100, 96),
    (1920, 20, 54, 2, 95, 83),
    (2304, 24, 64, 4, 82, 79),
    (3072, 32, 72, 8, 77, 74),
]


@dataclass(frozen=True)
class PaperRow:
    """One configuration. Efficiencies are FLOPs a second and GPU over those of the first row on one GPU."""

    parameters: int
    gpus: int
    tensor: int
    data: int
    step_seconds: float
    predicted: float
    paper: float


def paper_table(gpu: Gpu = DGX2) -> list[PaperRow]:
    """Model parallelism alone, then with 64 data-parallel groups of 8 rows each; activations recomputed, as theirs.

    The prediction is of this package's step: weights are sharded within a server, and gradients are summed in float32,
    beside the backward pass.
    """
    rows: list[PaperRow] = []
    baseline = None
    for data in (1, _DATA):
        for hidden, heads, layers, tensor, *percents in _SHAPES:
            config = MegatronBertConfig(
                vocab_size=_VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=4 * hidden, max_position_embeddings=_ROW_TOKENS,
            )  # fmt: skip
            job = Job(config, tensor * data, _ROWS * data, _ROW_TOKENS, predicted_share=1.0)
            shard = min(data, gpu.node_gpus // tensor)  # what is put together most often stays within a server
            layout = Layout(tensor, shard, data // shard, recompute="full", micro_rows=_ROWS)
            seconds = step_time(job, layout, gpu).total
            rate = step_flops(job) / seconds / job.gpus
            baseline = baseline or rate
            percent = percents[0] if data == 1 else percents[1]
            rows.append(
                PaperRow(rank_parameters(config), job.gpus, tensor, data, seconds, rate / baseline, percent / 100)
            )
    return rows
