"""Who may see what, as the origin's own metadata says."""

from __future__ import annotations

from origin.signing import CUSTOM, State
from origin.trust_store import TrustStore
from shared.tokens import AccessList
from shared.trust_names import ACCESS, org_of, public_role


class StoreVisibility:
    """``shared.web.access.Visibility`` over the store: always what is in force now."""

    def __init__(self, trust: TrustStore) -> None:
        self._trust = trust
        self._state: State | None = None
        self._access: AccessList | None = None
        self._public: dict[str, frozenset[str]] = {}
        """Public models by organisation, as ``_state`` has them."""

    def __repr__(self) -> str:
        return f"<StoreVisibility of {self._trust!r}>"

    async def is_public(self, model: str) -> bool:
        """Whether the public role of the model's organisation has a ref of it."""
        state, org = await self._now(), org_of(model)
        if org not in self._public:
            role = state.roles.get(public_role(org))
            self._public[org] = frozenset(path.rpartition("/")[0] for path in (role.targets if role else ()))
        return model in self._public[org]

    def known_public(self, model: str) -> bool:
        """The origin reads its store for every answer."""
        return False

    async def access_list(self) -> AccessList:
        """Which tokens are good."""
        state = await self._now()
        if self._access is None:
            self._access = AccessList.parse(state.roles[ACCESS].unrecognized_fields[CUSTOM])
        return self._access

    async def _now(self) -> State:
        state = await self._trust.state()
        if state is not self._state:
            self._state, self._access, self._public = state, None, {}
        return state
