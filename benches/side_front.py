"""Our front-end under uvicorn with uvloop and httptools; its controller's configuration is the argument, in JSON."""

from __future__ import annotations

import json
import sys

import uvloop
from over_http import serve

from mlx_serving_router.fastapi import create_app

if __name__ == "__main__":
    uvloop.run(serve(create_app(json.loads(sys.argv[1]))))
