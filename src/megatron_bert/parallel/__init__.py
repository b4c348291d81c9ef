"""The network on many devices: the paper's tensor parallelism, sequence parallelism and fully sharded data parallelism.

All of it is put onto a model of `model/` from outside. The engine is PyTorch's: DeviceMesh, DTensor, FSDP2.
"""
