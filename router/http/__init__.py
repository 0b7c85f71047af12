"""The router's HTTP face: OpenAI's API over the core's seam (`router.base`).

`server` owns sockets, `connection` speaks HTTP/1.1, `exchange` is one request and its answer, `routes` maps paths,
`parse` turns bodies (`schema`) into what the core takes, `replies` are the sinks, `shapes` and `responses` say how
output looks. Extensions and refused fields are listed in `schema`.
"""

from router.http.limits import HttpLimits
from router.http.server import AccessRecord, HttpServer

__all__ = ["AccessRecord", "HttpLimits", "HttpServer"]
