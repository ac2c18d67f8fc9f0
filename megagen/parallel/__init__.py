"""Process groups, the launcher, context-parallel attention and the CPU platform. Imports only ``core``."""
