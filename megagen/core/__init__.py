"""Errors, options, logging, registries, seeded streams. Imports nothing else of megagen."""
