"""From a folder of videos to batches of latents: codecs, captions, parquet, order, loader."""
