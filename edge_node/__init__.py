"""The edge node: caches shards near their readers, and serves every read path from them."""
