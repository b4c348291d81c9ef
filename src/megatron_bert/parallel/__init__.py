"""The network on many devices: the paper's tensor parallelism, sequence parallelism and fully sharded data parallelism.

All of it is put onto a model of `model/` from outside. The engine is PyTorch's: DeviceMesh, DTensor, FSDP2. Which
weight is split along which axis is data: `megatron_bert.sharding`.

    launch        joins the processes that torchrun started
    mesh          the ranks as a grid
    parallelize   the entry point: what is put onto a model, and in which order
    tensor        tensor and sequence parallelism of a whole model, by the table
    layers        the parallel twins of `model/`'s modules
    region        f and g: the communication between replicated and sharded computation
    streams       which random numbers are common to ranks and which are a rank's own
    loss          cross-entropy on parts of the vocabulary
    data          fully sharded data parallelism
    gradients     their sums over ranks, beside the last backward pass, and their norm
    materialize   memory and first values, each rank its own part; and whole parameters again, for export
"""
