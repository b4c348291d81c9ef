"""Fine-tuning and the paper's scorers, one file a task."""
