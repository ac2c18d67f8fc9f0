"""Hooks that observe a run: validation videos, EMA, gradient clipping settings."""
