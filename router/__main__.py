"""``python -m router``: a router."""

from router.app import build_app
from router.config import RouterSettings
from shared.web.command import serve

if __name__ == "__main__":
    serve(RouterSettings, build_app)
