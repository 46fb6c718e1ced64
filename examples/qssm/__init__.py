"""The quantum sequential scattering model (arXiv 2310.07797): a quantum state learned layer by layer."""
