"""What a model is called where nobody gave it a name: after its folder, or its place in the hub.

The hub's cache keeps `org/name` in `models--org--name/snapshots/<commit>`, so the last folder's
name says nothing there.
"""

import re
from functools import cache
from pathlib import Path

# A GGUF file is called by its stem, one of several parts without its place among them.
GGUF = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)
_HUB_PREFIX = "models--"
_HUB_SNAPSHOTS = "snapshots"


def is_gguf_name(name: str) -> bool:
    return GGUF.search(name) is not None


@cache  # asked for with each request, and links may change
def model_name(folder: Path) -> str:
    """`folder` is absolute. One that is a link is called as the link is."""
    named = folder.resolve() if folder.name == ".." else folder
    for place in (named, named.parent.resolve() / named.name):
        store = place.parent.parent.name
        if place.parent.name == _HUB_SNAPSHOTS and store.startswith(_HUB_PREFIX):
            return store.removeprefix(_HUB_PREFIX).replace("--", "/", 1)
    return GGUF.sub("", named.name)
