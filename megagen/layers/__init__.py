"""Parts of a diffusion transformer on megatron-core: linears, attention, norms, embeddings."""
