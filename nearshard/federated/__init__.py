"""A site of federated rounds: what it holds, what it sends, and how that is settled."""
