"""Flow samplers and the text-to-video pipeline over a role."""
