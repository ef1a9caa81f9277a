"""Models by their hub name: what of a repository is needed, fetched into the hub's own cache."""

from .fetch import PlanFolder, fetch_for_plan, fetch_model
from .kept import FetchedRepository, fetched_repositories, remove_repository
from .repository import Hub, HubRefused

__all__ = [
    "FetchedRepository",
    "Hub",
    "HubRefused",
    "PlanFolder",
    "fetch_for_plan",
    "fetch_model",
    "fetched_repositories",
    "remove_repository",
]
