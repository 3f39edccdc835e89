"""Federated rounds at the origin: sites' updates are taken in, made one, and published as a revision."""
