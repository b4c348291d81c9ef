"""The objective, the optimizer, the schedule, one step, one loop, and one place that wires (`pretrain`)."""
