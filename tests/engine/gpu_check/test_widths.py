"""Whether the memory plan kept its promise on a GPU."""

from moestro.engine.gpu_check.widths import broken_promises

MIB = 1 << 20


def row(taken_bytes: int) -> dict:
    planned = {"device_dense": 3 * MIB, "device_kv": MIB, "host_experts": 90 * MIB}
    memory = {"planned_bytes": planned, "peak_reserved_bytes": taken_bytes}
    return {"expert_format": "int8", "slots": 7, "memory": memory}


def test_more_than_was_planned_is_a_problem_of_the_device_alone() -> None:
    assert broken_promises(row(4 * MIB)) == []
    (said,) = broken_promises(row(5 * MIB))
    assert said == "int8, 7 slots: 5 MiB of the GPU's memory were taken, 4 MiB planned"
