"""Where metrics go: always ``metrics.jsonl``; TensorBoard and wandb when asked for."""
