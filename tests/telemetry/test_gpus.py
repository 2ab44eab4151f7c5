"""Which GPUs an engine holds, who else is there, and waiting for memory; in processes that see the fake driver."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from bench.telemetry.gpus import Released, select_visible

from .conftest import FakeNvml, uuid_of

PRESENT = ["GPU-aa11", "GPU-ab22", "GPU-cc33"]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, PRESENT),
        ("", []),
        ("1", ["GPU-ab22"]),
        ("2,0", ["GPU-cc33", "GPU-aa11"]),
        (" 0 , 1 ", ["GPU-aa11", "GPU-ab22"]),
        ("GPU-cc33,0", ["GPU-cc33", "GPU-aa11"]),
        ("GPU-c", ["GPU-cc33"]),
        ("GPU-a", []),  # two begin so
        ("0,-1,1", ["GPU-aa11"]),  # the list ends at the first entry that names nothing
        ("0,7,1", ["GPU-aa11"]),
        ("0,nonsense", ["GPU-aa11"]),
        ("0,0", []),
        ("MIG-known", ["MIG-known"]),
        ("MIG-other", []),
    ],
)
def test_cuda_visible_devices(wanted: str | None, chosen: list[str]) -> None:
    assert list(select_visible(PRESENT, wanted, lambda uuid: uuid == "MIG-known")) == chosen


def test_list_and_visible(fake_nvml: FakeNvml) -> None:
    fake_nvml.configure("gpu 1 name NVIDIA_A100-SXM4-80GB", "gpu 1 gpm 0", num_gpus=4)
    answer = fake_nvml.python(
        "import json; from bench.telemetry.gpus import *;"
        "print(json.dumps([[g.name, g.gpm, g.memory_used_bytes, g.energy_counter] for g in list_gpus()]"
        " + [list(visible_devices({'CUDA_VISIBLE_DEVICES': '3,1'}))]))"
    )
    assert isinstance(answer, list)
    assert answer[0] == ["NVIDIA H100 80GB HBM3", True, 1_000_000_000, True]
    assert answer[1][:2] == ["NVIDIA A100-SXM4-80GB", False]
    assert answer[4] == [uuid_of(3), uuid_of(1)]


def test_no_driver_means_no_gpus(fake_nvml: FakeNvml) -> None:
    fake_nvml.configure("init_error 9")
    code = "import json; from bench.telemetry.gpus import *; print(json.dumps([list_gpus(), visible_devices({})]))"
    assert fake_nvml.python(code) == [[], []]


def test_a_lost_gpu_is_left_out_of_the_list(fake_nvml: FakeNvml) -> None:
    fake_nvml.configure("gpu 0 lost_after_s 0", num_gpus=2)
    code = "import json; from bench.telemetry.gpus import *; print(json.dumps([g.uuid for g in list_gpus()]))"
    assert fake_nvml.python(code) == [uuid_of(1)]


HELD = """
import json, sys
from bench.telemetry.gpus import devices_of_pids, foreign_processes, held_devices
pid, watched = int(sys.argv[1]), sys.argv[2:]
foreign = {d: [p.pid for p in ps] for d, ps in foreign_processes(watched, [pid]).items()}
elsewhere = held_devices([1234567], {"CUDA_VISIBLE_DEVICES": "3,2,1"}, 2)
print(json.dumps([devices_of_pids([pid]), held_devices([pid], {}, 2), elsewhere, foreign]))
"""


def test_devices_held_by_an_engine_and_its_workers(fake_nvml: FakeNvml) -> None:
    # an engine that leads its own session, with a worker below it
    engine = subprocess.Popen(["sh", "-c", "sleep 30 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True)
    assert engine.stdout is not None
    worker = int(engine.stdout.readline())
    try:
        fake_nvml.configure(
            f"gpu 1 process {worker}", f"gpu 2 process {engine.pid}", f"gpu 3 process {os.getpid()}", num_gpus=4
        )
        answer = fake_nvml.python(HELD, str(engine.pid), uuid_of(2), uuid_of(3))
        held = [uuid_of(1), uuid_of(2)]
        assert answer == [held, held, [uuid_of(3), uuid_of(2)], {uuid_of(3): [os.getpid()]}]
    finally:
        os.killpg(engine.pid, 9)
        engine.wait()
        engine.stdout.close()


WAIT = """
import json, sys
from bench.telemetry.gpus import wait_for_release
limit, uuid = float(sys.argv[1]), sys.argv[2]
r = wait_for_release(["cpu", uuid], used_before_bytes={uuid: 400_000_000}, limit_s=limit)
print(json.dumps([r.released, r.waited_s, r.remaining_bytes, str(r)]))
"""


def test_waiting_until_memory_is_free(fake_nvml: FakeNvml) -> None:
    start = time.monotonic()
    fake_nvml.configure(
        f"t0_monotonic_s {start:.6f}", "gpu 0 used_bytes 7e10", "gpu 0 released_at_s 2.0", "gpu 0 used_after_bytes 5e8"
    )
    answer = fake_nvml.python(WAIT, "30", uuid_of(0))
    assert isinstance(answer, list)
    assert answer[0] is True and answer[2] == {}
    assert 2.0 <= time.monotonic() - start < 20


def test_waiting_gives_up_and_names_who_holds_it(fake_nvml: FakeNvml) -> None:
    fake_nvml.configure("gpu 0 used_bytes 7e10", f"gpu 0 process {os.getpid()}")
    answer = fake_nvml.python(WAIT, "0.3", uuid_of(0))
    assert isinstance(answer, list)
    assert answer[0] is False and answer[2] == {uuid_of(0): 70_000_000_000}
    assert answer[1] >= 0.3
    assert str(os.getpid()) in answer[3] and "65.2 GiB" in answer[3]


def test_nothing_to_wait_for_without_gpus() -> None:
    from bench.telemetry.gpus import wait_for_release

    answer = wait_for_release(["cpu"], limit_s=5)
    assert isinstance(answer, Released) and answer.released and answer.waited_s < 1
