"""``python -m origin``: the origin service."""

from origin.app import build_app
from origin.config import OriginSettings
from shared.web.command import serve

if __name__ == "__main__":
    serve(OriginSettings, build_app)
