"""Asking the hub that an origin mirrors: what a revision has, and the bytes of its files, over plain HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import aiohttp

from origin.hub_listing import MAX_DOCUMENT, HubFile, HubRevision, bytes_path, info_path, parse_revision
from shared.errors import ConfigError, NotFound
from shared.keys import read_private
from shared.token_file import bearer
from shared.web.session import Body, NotLetIn, fetch, open_blob

HOPS = 5
"""Redirects that are followed: to a model's new name, and to the store that has the bytes."""
MAX_TOKEN = 4096


class Hub:
    """One hub. ``token_file``: with this side's token there (mode 0600), read anew for each question; None: none."""

    def __init__(self, session: aiohttp.ClientSession, url: str, token_file: Path | None) -> None:
        self._session, self.url, self._token_file = session, url, token_file

    def __repr__(self) -> str:
        return f"<Hub {self.url}>"

    async def revision(self, model: str, revision: str, etag: str = "") -> tuple[HubRevision | None, str]:
        """What a branch, tag or commit of a model is now, and the answer's ETag; None where it still has ``etag``.

        Raises NotFound (``unknown_model``) for what the hub has not, or does not show to this side; UpstreamError.
        """
        fields = {**self._credentials(), **({"If-None-Match": etag} if etag else {})}
        try:
            answer = await fetch(
                self._session,
                self.url + info_path(model, revision),
                limit=MAX_DOCUMENT,
                headers=fields,
                missing="unknown_model",
                hops=HOPS,
            )
        except NotLetIn as error:  # hubs say 401 of what is not there, too
            raise NotFound(f"{error}: {model} is not there, or a token is needed", code="unknown_model") from error
        if answer.status == 304:
            return None, etag
        return parse_revision(answer.body), answer.headers.get("ETag", "")

    def body(self, found: HubRevision, file: HubFile, start: int) -> AbstractAsyncContextManager[Body]:
        """A file's bytes from ``start`` on, or from its beginning where the hub gives no parts. Raises as
        ``open_blob``."""
        url = self.url + bytes_path(found, file.path)
        return open_blob(
            self._session, url, start=start, size=file.size, max_size=file.size, headers=self._credentials(), hops=HOPS
        )

    def _credentials(self) -> Mapping[str, str]:
        """A token that cannot be read is none: the hub then shows what it shows to everybody."""
        if self._token_file is not None:
            with suppress(ConfigError, FileNotFoundError):
                return bearer(read_private(self._token_file, MAX_TOKEN).decode("ascii", "replace").strip())
        return {}
