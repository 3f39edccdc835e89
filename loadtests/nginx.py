"""nginx, one worker. As a caching proxy, in several settings at once: a server block each, over one cache. As a router:
a server block for each set of nodes, that answers 307. And as the caching proxy of a region, far from its origin.

``open_file_cache`` is on throughout: small bodies are up to 40 % faster with it, none are slower. Left out, because
none was better than the best of these: ``aio threads``, ``sendfile_max_chunk``, other sizes of ``output_buffers``,
and ``tcp_nodelay off``, with which answers stall for 40 ms. A router's answers have no such settings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from loadtests.services import Service, running, wait_until
from shared.web.server import free_port

VARIANTS = {
    "sendfile": "sendfile on;",
    "sendfile, nopush": "sendfile on; tcp_nopush on;",
    "read 2x32k": "sendfile off; output_buffers 2 32k;",
    "read 1x128k": "sendfile off; output_buffers 1 128k;",
    "read 2x1m": "sendfile off; output_buffers 2 1m;",
}

_CONFIG = """\
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log warn; {user}
events {{ worker_connections 512; }}
http {{
    access_log off; server_tokens off; default_type application/octet-stream;
    keepalive_requests 1000000000; keepalive_timeout 60s; open_file_cache max=100 inactive=1h;
    client_body_temp_path {directory}/body; fastcgi_temp_path {directory}/fastcgi;
    scgi_temp_path {directory}/scgi; uwsgi_temp_path {directory}/uwsgi; proxy_temp_path {directory}/proxy;
    proxy_cache_path {directory}/cache keys_zone=bench:1m max_size=1g inactive=1h use_temp_path=off;
    proxy_cache bench; proxy_cache_valid 200 1h; proxy_cache_lock on;
    proxy_http_version 1.1; proxy_set_header Connection "";
    add_header X-Cache-Status $upstream_cache_status;
{servers}}}
"""
_SERVER = "    server {{ listen 127.0.0.1:{port}; {settings} location / {{ proxy_pass {origin}; }} }}\n"

_REGION_CONFIG = """\
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log warn; {user}
events {{ worker_connections 512; }}
http {{
    access_log off; server_tokens off; default_type application/octet-stream;
    keepalive_requests 1000000000; keepalive_timeout 60s; open_file_cache max=1000 inactive=1h; {sending}
    client_body_temp_path {directory}/body; fastcgi_temp_path {directory}/fastcgi;
    scgi_temp_path {directory}/scgi; uwsgi_temp_path {directory}/uwsgi; proxy_temp_path {directory}/proxy;
    proxy_cache_path {directory}/cache keys_zone=region:4m max_size=10g inactive=1h use_temp_path=off;
    proxy_cache region; proxy_cache_valid 200 206 1h;
    proxy_cache_lock on; proxy_cache_lock_timeout 1h; proxy_cache_lock_age 1h;
    proxy_http_version 1.1; proxy_set_header Connection ""; proxy_read_timeout 10m;
    add_header X-Cache-Status $upstream_cache_status;
    upstream origin {{ server {origin}; keepalive 16; }}
    server {{ listen {address}:{port}; location / {{ proxy_pass http://origin; {slices} }} }}
}}
"""
_SLICES = "slice {size}; proxy_cache_key $uri$slice_range; proxy_set_header Range $slice_range;"

_ROUTER_CONFIG = """\
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log warn; {user}
events {{ worker_connections 512; }}
http {{
    access_log off; server_tokens off; keepalive_requests 1000000000; keepalive_timeout 60s;
    client_body_temp_path {directory}/body; fastcgi_temp_path {directory}/fastcgi;
    scgi_temp_path {directory}/scgi; uwsgi_temp_path {directory}/uwsgi; proxy_temp_path {directory}/proxy;
{servers}}}
"""
_REDIRECT = """\
    split_clients $uri $node{number} {{ {parts} }}
    server {{ listen 127.0.0.1:{port}; location / {{ return 307 $node{number}$uri; }} }}
"""


@contextmanager
def nginx(directory: Path, origin: str, core: int) -> Iterator[dict[str, Service]]:
    """nginx in front of ``origin``; gives a service for each of ``VARIANTS``."""
    ports = _free_ports(len(VARIANTS))
    blocks = zip(ports, VARIANTS.values(), strict=True)
    servers = "".join(_SERVER.format(port=port, settings=settings, origin=origin) for port, settings in blocks)
    text = _CONFIG.format(directory=directory, user=_user(), servers=servers)
    with _started(directory, text, ports, core) as services:
        yield dict(zip(VARIANTS, services, strict=True))


@contextmanager
def redirecting(directory: Path, nodes: Sequence[Sequence[str]], core: int) -> Iterator[list[Service]]:
    """nginx that sends clients on, by a hash of the path; gives a service for each of these sets of base URLs."""
    ports = _free_ports(len(nodes))
    servers = ""
    for number, (port, urls) in enumerate(zip(ports, nodes, strict=True)):
        parts = "".join(f"{int(10_000 / len(urls)) / 100:.2f}% {url}; " for url in urls[:-1])
        servers += _REDIRECT.format(number=number, port=port, parts=f"{parts}* {urls[-1]};")
    text = _ROUTER_CONFIG.format(directory=directory, user=_user(), servers=servers)
    with _started(directory, text, ports, core) as services:
        yield services


@contextmanager
def caching(
    directory: Path,
    origin: str,
    address: str,
    inside: Callable[[Sequence[str]], Sequence[str]],
    *,
    slices: str,
    send: str,
) -> Iterator[Service]:
    """nginx as a region's proxy at ``address``, one fetch at a time of each thing: those who ask meanwhile wait for it.

    ``slices``: fetch and keep bodies in slices of that size, as ``2m``; empty: whole. ``send``: one of ``VARIANTS``.
    ``inside``: as for ``loadtests.services.service``.
    """
    port = free_port()
    text = _REGION_CONFIG.format(
        directory=directory,
        user=_user(),
        origin=origin.removeprefix("http://"),
        address=address,
        port=port,
        sending=VARIANTS[send],
        slices=_SLICES.format(size=slices) if slices else "",
    )
    file, log = directory / "nginx.conf", directory / "nginx.log"
    file.write_text(text)
    command = inside(["nginx", "-p", str(directory), "-e", str(log), "-c", str(file)])
    with running(command, log) as process:
        # It writes that once it listens; in a namespace we could not connect to it.
        wait_until((directory / "nginx.pid").exists, process, "nginx", log)
        yield Service(f"http://{address}:{port}", process.pid)


@contextmanager
def _started(directory: Path, config: str, ports: Sequence[int], core: int) -> Iterator[list[Service]]:
    """nginx with this configuration, which listens on these ports."""
    file, log = directory / "nginx.conf", directory / "nginx.log"
    file.write_text(config)
    with running(["nginx", "-p", str(directory), "-e", str(log), "-c", str(file)], log, core=core) as process:
        wait_until(lambda: all(map(_listens, ports)), process, "nginx", log)
        yield [Service(f"http://127.0.0.1:{port}", process.pid) for port in ports]


def _user() -> str:
    """Without it, a worker of root's nginx may not enter our directory."""
    return "user root;" if os.geteuid() == 0 else ""


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)


def _listens(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.connect()
    except OSError:
        return False
    finally:
        connection.close()
    return True
