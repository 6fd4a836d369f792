"""What a machine may use, read from control groups of both versions, laid out in folders as Linux does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grok_local.machine.limits import core_count, cpu_flags, cpu_quota, last_cache, memory_limits

GB = 10**9
TOTAL = psutil.virtual_memory().total


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def stat(**sizes: int) -> str:
    return "".join(f"{name} {size}\n" for name, size in sizes.items())


# -- memory ------------------------------------------------------------------------------------------------------------


def test_without_limits_it_is_the_machines_own(tmp_path: Path) -> None:
    total, available = memory_limits(root=tmp_path)
    assert total == TOTAL
    assert 0 < available <= total


def test_version_2_counts_every_level_and_gives_the_file_cache_back(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a/b"
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": f"{GB // 2}\n",
            f"{group}/memory.stat": stat(anon=GB // 2),
            "sys/fs/cgroup/a/memory.max": f"{GB}\n",
            "sys/fs/cgroup/a/memory.current": "700000000\n",
            "sys/fs/cgroup/a/memory.stat": stat(anon=400_000_000, active_file=100_000_000, inactive_file=200_000_000),
        },
    )
    assert memory_limits(root=tmp_path) == (GB, 600_000_000)


def test_version_2_slows_a_process_down_above_memory_high(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/a"
    files = {"memory.max": f"{GB}", "memory.high": f"{GB // 2}", "memory.current": f"{GB // 4}"}
    tree(tmp_path, {"proc/self/cgroup": "0::/a\n", **{f"{folder}/{name}": text for name, text in files.items()}})
    assert memory_limits(root=tmp_path) == (GB // 2, GB // 4)


def test_version_1_in_a_container_has_only_the_root(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n1:name=systemd:/docker/1\n0::/docker/1\n",
            f"{folder}/memory.limit_in_bytes": f"{GB}\n",
            f"{folder}/memory.usage_in_bytes": f"{GB // 2}\n",
            f"{folder}/memory.stat": stat(total_inactive_file=GB // 8, total_active_file=GB // 8, inactive_file=1),
        },
    )
    assert memory_limits(root=tmp_path) == (GB, 750_000_000)


def test_version_1_says_no_limit_with_a_large_number(tmp_path: Path) -> None:
    limit = {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n"}
    assert memory_limits(root=tree(tmp_path, {"proc/self/cgroup": "4:memory:/a\n", **limit}))[0] == TOTAL


def test_more_in_use_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    files = {"memory.max": f"{GB}", "memory.current": f"{2 * GB}"}
    tree(tmp_path, {"proc/self/cgroup": "0::/\n", **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}})
    assert memory_limits(root=tmp_path) == (GB, 0)


@given(st.lists(st.none() | st.integers(GB // 10, 2 * TOTAL), min_size=1, max_size=5))
def test_the_smallest_of_nested_limits_holds(limits: list[int | None]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = "/".join(f"level{i}" for i in range(len(limits)))
        tree(Path(folder), {"proc/self/cgroup": f"0::/{path}\n"})
        for i, limit in enumerate(limits):
            name = "/".join(path.split("/")[: i + 1])
            tree(Path(folder), {f"sys/fs/cgroup/{name}/memory.max": "max\n" if limit is None else f"{limit}\n"})
        total, available = memory_limits(root=Path(folder))
        assert total == min([TOTAL, *(limit for limit in limits if limit is not None)])
        assert 0 <= available <= total


@given(st.text(), st.text(), st.text())
def test_nonsense_is_no_limit(groups: str, number: str, table: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        lines = f"{groups}\n0::/../{groups.replace('/', '')[:20]}\n".replace("\0", "")
        root = tree(Path(folder), {"proc/self/cgroup": lines, "sys/fs/cgroup/memory.stat": table})
        tree(root, {f"sys/fs/cgroup/{name}": f"x{number}" for name in ("memory.max", "cpu.max", "memory.current")})
        assert memory_limits(root=root)[0] == TOTAL
        assert cpu_quota(root=root) is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit is not kept")
def test_a_limit_of_the_address_space_counts() -> None:
    code = "from grok_local.machine.limits import memory_limits; print(*memory_limits())"
    command = f'ulimit -v 4000000 && exec "{sys.executable}" -c "{code}"'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    total, available = map(int, done.stdout.split())
    assert total == min(4_000_000 * 1024, TOTAL)
    assert 0 < available < total


# -- processor ---------------------------------------------------------------------------------------------------------


def siblings(*pairs: str) -> dict[str, str]:
    """Cores by their hardware threads, for this process's own processors."""
    allowed = sorted(os.sched_getaffinity(0))
    names = [f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in allowed]
    return {name: pairs[i % len(pairs)] for i, name in enumerate(names)}


needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="there is no affinity here")


@needs_affinity
def test_hardware_threads_of_one_core_are_one(tmp_path: Path) -> None:
    assert core_count(root=tree(tmp_path, siblings("0-1\n"))) == 1


@needs_affinity
@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", None), ("150000 100000", 1), ("50000 100000", 1), ("99900000 100000", None)]
)
def test_a_quota_of_version_2_limits_the_cores(tmp_path: Path, quota: str, cores: int | None) -> None:
    each = siblings(*(str(cpu) for cpu in sorted(os.sched_getaffinity(0))))
    tree(tmp_path, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": quota, **each})
    assert core_count(root=tmp_path) == (cores or len(os.sched_getaffinity(0)))


def test_the_smallest_quota_on_the_way_holds(tmp_path: Path) -> None:
    quotas = {"sys/fs/cgroup/a/b/cpu.max": "400000 100000\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}
    assert cpu_quota(root=tree(tmp_path, {"proc/self/cgroup": "0::/a/b\n", **quotas})) == 2.5


def test_a_quota_of_version_1(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/a"
    files = {f"{folder}/cpu.cfs_quota_us": "300000\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(root=tree(tmp_path, {"proc/self/cgroup": "5:cpu,cpuacct:/a\n0::/\n", **files})) == 3
    (tmp_path / folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(root=tmp_path) is None


def test_there_is_always_a_core(tmp_path: Path) -> None:
    assert 1 <= core_count(root=tmp_path) <= (os.cpu_count() or 1)
    assert 1 <= core_count() <= (os.cpu_count() or 1)


def test_the_processors_flags(tmp_path: Path) -> None:
    text = "processor : 0\nmodel name\t: X\nflags\t\t: fpu avx2 amx_int8\nprocessor : 1\nflags : other\n"
    assert cpu_flags(root=tree(tmp_path, {"proc/cpuinfo": text})) == {"fpu", "avx2", "amx_int8"}
    assert cpu_flags(root=tmp_path / "none") == set()


def test_the_last_cache(tmp_path: Path) -> None:
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text("32768K\n")
        (folder / "shared_cpu_list").write_text(shared)
    assert last_cache(root=tmp_path) == 64 << 20
    assert last_cache(root=tmp_path / "none") > 0
