"""The main job on real data: moving handwritten digits, from mp4 files to a trained model."""
