"""The demonstration, and benchmarks against other programs: each runs both sides in one run."""
