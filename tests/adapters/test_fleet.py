"""`batch --ray` on a cluster of two nodes, both on this machine: real ones, which are lost in the ways real ones are.

The tests that need a cluster run where Ray is installed: pip install ray.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import grok_local
from grok_local.adapters.fleet import Backlog, Fleet
from grok_local.adapters.replica import Order
from grok_local.errors import OptionError, WorkerError
from grok_local.formats.gguf_file import read_model
from grok_local.formats.identity import identity
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.text.answering import Answering
from grok_local.runtime.text.batch import Prepared
from tests.conftest import Run

ROOT = Path(__file__).parents[2]
MEMORY = 80_000_000  # bytes of Ray's object store, which has nothing to hold here

Grow = Callable[..., Any]


def home_with(model: Path, folder: Path) -> Path:
    """A folder of grok-local's that has the model as `small`."""
    (folder / "models").mkdir(parents=True)
    shutil.copyfile(model, folder / "models" / "small.gguf")
    return folder


def order(model: Path, *, parallel: int) -> Order:
    return Order("small", {"context": 200}, identity(read_model(model)), parallel, most=100)


def line(index: int, *, length: int = 1) -> Prepared:
    how = Answering(Sampling(seed=index), length, (), None, None)
    return Prepared(index, index, how, how.request([1]))


@pytest.fixture(scope="module")
def cluster(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster whose head is the node `a`."""
    pytest.importorskip("ray", reason="Ray is an extra: pip install ray")
    from ray.cluster_utils import Cluster

    home = home_with(packed, tmp_path_factory.mktemp("a") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        head = {**_node("a", home), "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield found
        finally:
            found.shutdown()


def _node(name: str, home: Path) -> dict[str, Any]:
    where = {"GROK_LOCAL_HOME": str(home)}
    return {"num_cpus": 1, "object_store_memory": MEMORY, "node_name": name, "env_vars": where}


@pytest.fixture
def grow(cluster: Any, tmp_path: Path) -> Iterator[Grow]:
    """Adds a node, which has a model as `small`, for one test."""
    nodes = []

    def grow(name: str, model: Path) -> Any:
        nodes.append(cluster.add_node(**_node(name, home_with(model, tmp_path / name))))
        return nodes[-1]

    yield grow
    for node in nodes:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node)


class Batch:
    """A batch over the cluster, as people start it."""

    def __init__(self, cluster: Any, folder: Path, count: int, *options: object) -> None:
        source, self.output = folder / "in.jsonl", folder / "out.jsonl"
        prompts = [{"id": f"p{i}", "prompt": [3 + i % 90, 5, 7], "seed": i} for i in range(count)]
        source.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        self.ids = {prompt["id"] for prompt in prompts}
        where = ("--ray", cluster.address, "-o", self.output)
        command = (sys.executable, "-m", "grok_local", "batch", "-m", "small", source, *where, *options)
        self._log = folder / "stderr"
        with self._log.open("w") as file:
            self.process = subprocess.Popen(list(map(str, command)), stderr=file, stdout=subprocess.PIPE, text=True)

    @property
    def told(self) -> str:
        return self._log.read_text()

    def until_told(self, words: str) -> None:
        self._until(lambda: words in self.told)

    def until_written(self, count: int) -> None:
        """So many results more than there are."""
        before = self._written()
        self._until(lambda: self._written() >= before + count)

    def _written(self) -> int:
        return len(self.output.read_text().splitlines()) if self.output.exists() else 0

    def _until(self, happened: Callable[[], bool]) -> None:
        for _ in range(1200):
            if happened():
                return
            assert self.process.poll() is None, self.told
            time.sleep(0.05)
        raise AssertionError(f"it has not happened within a minute: {self.told}")

    def ended(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=120)
        assert not out
        return self.process.returncode, self.told

    def results(self) -> dict[str, dict[str, Any]]:
        found = [json.loads(text) for text in self.output.read_text().splitlines()]
        keyed = {one["id"]: one for one in found}
        assert len(keyed) == len(found)
        return keyed


def replicas() -> list[psutil.Process]:
    """The processes that have a model loaded, on all nodes."""
    return [one for one in psutil.Process().children(recursive=True) if _is_replica(one)]


def _is_replica(process: psutil.Process) -> bool:
    try:
        return "Replica" in "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:  # or a zombie
        return False


def until_no_model_is_loaded() -> None:
    for _ in range(100):
        if not replicas():
            return
        time.sleep(0.1)
    raise AssertionError("a model is still loaded")


@pytest.fixture
def driver_home(home: Path, packed: Path) -> Path:
    return home_with(packed, home)


def test_results_are_those_of_one_machine_to_the_bit(
    cluster: Any, grow: Grow, driver_home: Path, packed: Path, tmp_path: Path, run: Run
) -> None:
    grow("b", packed)
    same = ("--reproducible", "--max-tokens", 8, "--logprobs", 1, "--temperature", 0.9)
    batch = Batch(cluster, tmp_path, 20, "--parallel", 2, *same)
    code, told = batch.ended()
    assert (code, "note" in told) == (0, False), told
    assert "node a is ready: 2 go together" in told or "node b is ready: 2 go together" in told
    alone = tmp_path / "alone.jsonl"
    done = run("batch", "-m", "small", tmp_path / "in.jsonl", "-o", alone, "--parallel", 2, *same)
    assert done.returncode == 0, done.stderr
    expected = {one["id"]: one for one in map(json.loads, alone.read_text().splitlines())}
    found = batch.results()
    assert set(found) == batch.ids
    for name in ("text", "logprobs", "fingerprint", "finish_reason"):
        assert {id_: one[name] for id_, one in found.items()} == {id_: one[name] for id_, one in expected.items()}


def test_lines_of_a_lost_machine_are_answered_by_another(
    cluster: Any, grow: Grow, driver_home: Path, packed: Path, tmp_path: Path
) -> None:
    other = grow("b", packed)
    batch = Batch(cluster, tmp_path, 300, "--parallel", 4, "--max-tokens", 100)
    batch.until_told("node b is ready")
    batch.until_written(10)
    cluster.remove_node(other)
    code, told = batch.ended()
    assert code == 0, told
    assert "node b is lost, and " in told
    assert " 0 answers" not in told
    assert "the machine does not answer" in told
    found = batch.results()
    assert set(found) == batch.ids
    assert not any("error" in one for one in found.values())


def test_progress_counts_what_is_under_way(cluster: Any, packed: Path) -> None:
    seen: list[int] = []
    with Fleet(cluster.address, order(packed, parallel=2), fingerprint=None, say=print) as fleet:
        tasks = [line(index, length=120) for index in range(60)]
        results = list(
            fleet.run(tasks, size=200, watch=lambda stats: seen.append(sum(one.generated_tokens for one in stats)))
        )
    assert sorted(result.index for result in results) == list(range(60))
    assert sum(result.stats.generated_tokens for result in results) == 60 * 120
    assert 0 < max(seen) <= 2 * 2 * 120


def test_nodes_that_would_compute_other_bits_are_refused(cluster: Any, packed: Path) -> None:
    with (
        Fleet(cluster.address, order(packed, parallel=1), fingerprint="fp_another", say=print) as fleet,
        pytest.raises(OptionError, match="node a would compute other bits"),
    ):
        list(fleet.run([line(0)], size=200))
    until_no_model_is_loaded()


def test_nodes_with_another_version_are_left_out(cluster: Any, packed: Path) -> None:
    said: list[str] = []
    newer = replace(order(packed, parallel=1), version="99")
    with (
        Fleet(cluster.address, newer, fingerprint=None, say=said.append) as fleet,
        pytest.raises(WorkerError, match="no node is left"),
    ):
        list(fleet.run([line(0)], size=200))
    assert said == [
        f"note: node a is left out: grok-local there is {grok_local.__version__}, and 99 here: both have to be the same"
    ]


def test_when_no_node_is_left_the_same_command_goes_on(cluster: Any, driver_home: Path, tmp_path: Path) -> None:
    batch = Batch(cluster, tmp_path, 60, "--parallel", 2, "--max-tokens", 100)
    batch.until_written(5)
    (process,) = replicas()
    process.kill()
    code, told = batch.ended()
    assert code == 1
    assert "node a is lost" in told
    assert "its process ended" in told
    assert "no node is left" in told
    before = batch.results()
    assert 5 <= len(before) < 60
    again = Batch(cluster, tmp_path, 60, "--parallel", 2, "--max-tokens", 100)
    code, told = again.ended()
    assert code == 0, told
    assert "have their results already" in told
    assert set(again.results()) == again.ids
    assert before.items() <= again.results().items()


def test_a_node_with_another_model_of_that_name_is_left_out(
    cluster: Any, grow: Grow, packed: Path, small: Path, tmp_path: Path
) -> None:
    grow("b", grok_local.quantize_checkpoint(small, tmp_path / "other.gguf", type="q8_0").path)
    said: list[str] = []
    found = set()
    with Fleet(cluster.address, order(packed, parallel=2), fingerprint=None, say=said.append) as fleet:
        for result in fleet.run([line(index, length=60) for index in range(20_000)], size=200):
            assert not result.error
            assert result.index not in found
            found.add(result.index)
            if len(said) == 2 and len(found) >= 10:
                break
    left_out = f"note: node b is left out: {tmp_path / 'b' / 'models' / 'small.gguf'}: is another model there than here"
    assert set(said) == {"node a is ready: 2 go together", left_out}


def test_a_cluster_without_the_model_is_an_error(cluster: Any, home: Path, packed: Path, tmp_path: Path) -> None:
    home_with(packed, home)
    (home / "models" / "small.gguf").rename(home / "models" / "mine.gguf")
    batch = Batch(cluster, tmp_path, 2, "-m", "mine")
    code, told = batch.ended()
    assert code == 1
    assert "note: node a is left out: mine: no such file" in told
    assert "no node is left" in told


def test_ctrl_c_keeps_what_is_written_and_leaves_no_process(cluster: Any, driver_home: Path, tmp_path: Path) -> None:
    batch = Batch(cluster, tmp_path, 200, "--parallel", 2, "--max-tokens", 100)
    batch.until_written(3)
    assert len(replicas()) == 1
    batch.process.send_signal(signal.SIGINT)
    code, told = batch.ended()
    assert code == 130
    assert told.endswith("stopped: the same command goes on from here\n")
    assert "Traceback" not in told
    assert 3 <= len(batch.results()) < 200
    until_no_model_is_loaded()


@pytest.mark.parametrize(
    ("address", "code", "reason"),
    [
        ("127.0.0.1:9", 1, "nobody answers there"),
        ("nonsense", 2, "Invalid address"),
        ("ray://127.0.0.1:9", 1, "nobody"),
    ],
)
def test_an_address_of_no_cluster(run: Run, packed: Path, address: str, code: int, reason: str) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install ray")
    done = run("batch", "-m", packed, "-", "--ray", address, stdin="Hi\n")
    assert (done.returncode, done.stdout) == (code, "")
    assert f"error: --ray {address}: {reason}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_ray_a_line_says_how_to_get_it(packed: Path) -> None:
    program = "import sys; sys.modules['ray'] = None; from grok_local.cli import main; main()"
    command = [sys.executable, "-c", program, "batch", "-m", str(packed), "-", "--ray", "auto"]
    done = subprocess.run(command, input="Hi\n", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--ray needs Ray, on every machine: {sys.executable} -m pip install ray" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", [("--worker", "127.0.0.1"), ("--trace-experts", "record")])
def test_what_makes_no_sense_with_it_is_refused(run: Run, packed: Path, option: tuple[str, str]) -> None:
    done = run("batch", "-m", packed, "-", "--ray", "auto", *option, stdin="Hi\n")
    assert done.returncode == 2
    assert f"{option[0]}: not with --ray" in done.stderr


def test_what_a_lost_node_had_comes_next_in_its_order() -> None:
    backlog = Backlog(map(line, range(6)))
    first = [backlog.take() for _ in range(3)]
    assert not backlog.put_back([one for one in reversed(first) if isinstance(one, Prepared)], blamed=True)
    assert [backlog.take().index for _ in range(len(backlog))] == list(range(6))


def test_a_task_that_two_nodes_died_of_is_given_up_and_machines_that_are_gone_are_not_held_against_it() -> None:
    backlog = Backlog(())
    assert not backlog.put_back([line(0), line(1)], blamed=True)
    assert not backlog.put_back([line(0), line(2)], blamed=False)
    (result,) = backlog.put_back([line(0), line(2)], blamed=True)
    assert result.index == 0
    assert "2 nodes" in str(result.error)
    assert len(backlog) == 5
