"""The network cut over the ranks of a gang: mesh, experts, what each rank holds and restores."""
