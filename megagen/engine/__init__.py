"""Roles: one network each under one parallel layout, with its schedule, optimizer and EMA."""
