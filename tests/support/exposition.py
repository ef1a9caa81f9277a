"""Reads a /metrics page: which samples there are, of what kind, with which labels."""

from collections import defaultdict
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Sample:
    kind: str  # counter, gauge, histogram
    labels: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


Exported = dict[str, Sample]  # by sample name, as a query writes it


def read_exposition(page: str) -> Exported:
    found: Exported = {}
    for family in text_string_to_metric_families(page):
        for line in family.samples:
            sample = found.setdefault(line.name, Sample(family.type))
            for label, value in line.labels.items():
                sample.labels[label].add(value)
    return found


Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]  # (name, sorted labels) -> value


def samples(page: str) -> Values:
    """Every sample of the page with its value."""
    return {
        (line.name, tuple(sorted(line.labels.items()))): line.value
        for family in text_string_to_metric_families(page)
        for line in family.samples
    }
