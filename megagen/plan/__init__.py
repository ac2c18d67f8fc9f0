"""What a run will cost before it is started: layout, memory, tokens, FLOPs."""
