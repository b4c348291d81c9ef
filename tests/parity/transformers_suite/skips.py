"""Every reason for which one of Transformers' common tests may be skipped here. Any other skip is a failure.

Three reasons are never accepted, whatever the table says: they are what these classes exist to put right.
"""

import re

NEVER = re.compile(r"sdpa|tensor.?parallel|\bTP.?plan|capture_outputs", re.IGNORECASE)

_OTHER_TASKS = "|".join(
    [
        "any-to-any",
        "audio-classification",
        "automatic-speech-recognition",
        "depth-estimation",
        "document-question-answering",
        "image-[a-z-]+",
        "mask-generation",
        "object-detection",
        "table-question-answering",
        "text-to-audio",
        "video-classification",
        "zero-shot-(audio|image)-classification",
        "zero-shot-object-detection",
    ]
)

# What the whole reason must match -> why that test has nothing to say here.
ACCEPTED: dict[str, str] = {
    # The machine. On one with a GPU these run.
    r"test requires (an? )?(multiple )?accelerators?": "no accelerator",
    r"test requires MPS": "no Apple GPU",
    r"This test requires an? (Nvidia|NVIDIA|AMD) .*GPU.*": "no GPU, or one without the kernel",
    r"test requires CUDA|test requires torch_gpu|test requires (a )?GPU.*": "no GPU",
    r"test requires Ampere or newer.*|.*compute capability.*": "no GPU, or an older one",
    # Optional libraries that this project does not use.
    r"test requires Flash Attention( [34])?": "kernel library not installed",
    r"test requires the kernels library": "kernel library not installed",
    r"test requires deepspeed": "not installed; sharding here is torch's own",
    r"[Tt]est requires (bitsandbytes|torchao).*": "not installed",
    # Other kinds of input: the pipeline mixin has a test for every task there is.
    r"test requires (vision|Timm|PyTesseract|PyAv|av)": "a pipeline over images or video",
    rf".*`({_OTHER_TASKS})` is not in `self.pipeline_model_mapping`.*": "a pipeline over something else than text",
    r"`run_pipeline_test` is currently not implemented\.": "Transformers' own: mask generation on images",
    # Parts that this architecture does not have.
    r"(This model|Model) does not (have|support) RoPE( scaling)?": "positions are learned embeddings",
    r".* has no axial RoPE layer defined\.": "positions are learned embeddings",
    r"This model does not have partial rope supported": "positions are learned embeddings",
    r"Model does not have position embeddings": "resize_position_embeddings: Transformers' class has none either",
    r"Model does not support sliding window mask": "attention is full",
    r"This model has no sparse experts\.|Not an MoE model": "no experts",
    r"Model does not have an expert parallel plan \(base_model_ep_plan\)": "no experts",
    r"This model has no `output_router_logits` in its config\.": "no experts",
    r"MegatronBert\w+ does not support grouped_mm": "no experts",
    r".*(not a composite model|This model is not composite).*": "one model, one configuration",
    r"No subconfigs so the test does not make sense": "one model, one configuration",
    r"No sequence-to-sequence language modeling head to check": "a decoder here has no encoder of its own",
    r"Model is not an encoder-decoder": "a decoder here has no encoder of its own",
    r"MegatronBert\w+ (class )?has no _keep_in_fp32_modules n?or _keep_in_fp32_modules_strict attribute defined": (
        "no weight is kept in fp32, as in Transformers' class"
    ),
    r"No conversion found for <class '.*MegatronBert\w+'>": "checkpoint keys are module names: nothing to convert",
    # Older versions of Transformers.
    r"Not a prioritized model for now\.": "5.17 asks it of new models only; later versions let a test file ask for it",
    r"starts its processes itself": "5.17; later versions let us start them, where the fetched files can be imported",
}

_ACCEPTED = [re.compile(pattern) for pattern in ACCEPTED]


def objection(reason: str) -> str | None:
    """Why a skip for `reason` is not accepted; None if it is."""
    if NEVER.search(reason):
        return f"skipped for a reason that is never accepted: {reason}"
    if not any(pattern.fullmatch(reason) for pattern in _ACCEPTED):
        return f"skipped for a reason that skips.py does not list: {reason}"
    return None
