"""The ``megagen`` command. Each command is one module, imported when it is asked for."""
