"""``python -m edge_node``: an edge node."""

from edge_node.app import build_app
from edge_node.config import EdgeSettings
from shared.web.command import serve

if __name__ == "__main__":
    serve(EdgeSettings, build_app)
