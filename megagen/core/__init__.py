"""Errors, logging, registries, seeded streams and process facts. Imports nothing else of megagen."""
