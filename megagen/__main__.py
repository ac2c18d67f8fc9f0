"""``python -m megagen`` is the ``megagen`` command (what ``torchrun -m megagen`` runs)."""

from megagen.cli.main import main

main()
