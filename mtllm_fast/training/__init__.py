"""Self-distillation: the batches that it trains on, and the up-projection that it starts from."""
