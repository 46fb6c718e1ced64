"""The commands of ``pma``, a file per kind; each imports what it needs when it runs, so that ``--help`` answers at once."""
