"""A model's name on a hub, `org/name[@revision]`, told from a folder's by its form alone."""

import re
from dataclasses import dataclass

HUB_FORM = "org/name[@revision]"
# One slash, and no dot in front: `./org/name` and `../name` are folders, whatever is there.
_FORM = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>.*))?")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./+-]*")


@dataclass(frozen=True, slots=True)
class HubName:
    """`revision` is a branch, a tag or a commit; None: the repository's main branch."""

    repo_id: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def hub_name(text: str) -> HubName | None:
    """None where `text` has another form; ValueError where the hub would not take the name."""
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    # Only here: the library takes longer to import than a wrong flag to be answered.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented

    try:
        validate_repo_id(match["repo"])
    except HFValidationError as error:
        raise ValueError(f"{text!r} is no name of a hub ({HUB_FORM}): {error}") from None
    if match["revision"] is not None and not _REVISION.fullmatch(match["revision"]):
        raise ValueError(f"{match['revision']!r} is no branch, tag or commit ({HUB_FORM})")
    return HubName(match["repo"], match["revision"])
