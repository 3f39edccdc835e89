"""The origin: publishes models, keeps their shards, and answers the read paths from object storage."""
