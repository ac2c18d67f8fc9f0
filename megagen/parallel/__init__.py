"""Process groups, launcher, context-parallel attention, CPU platform. Imports only ``core``."""
