"""The run config: strict, typed, with dotted overrides and cross-field checks."""
