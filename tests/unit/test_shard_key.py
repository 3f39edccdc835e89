"""What an edge's cache calls shards: no two shards share a name."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_node.shard_key import digest_in, model_in, path_of, shard_key
from shared.digest import Digest
from shared.paths import BlobPath, parse_path
from tests.unit.strategies import digests, models, quick

owners = st.just("") | models


@quick
@given(digests, owners)
def test_a_key_says_what_it_is_of(digest: Digest, model: str) -> None:
    key = shard_key(digest, model)
    assert (digest_in(key), model_in(key)) == (digest, model)
    assert parse_path(path_of(key)) == BlobPath(digest, model)


@quick
@given(digests, owners, owners)
def test_a_shard_of_one_model_is_not_that_of_another(digest: Digest, model: str, other: str) -> None:
    assert (shard_key(digest, model) == shard_key(digest, other)) == (model == other)
