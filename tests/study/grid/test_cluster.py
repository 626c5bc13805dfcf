"""The study on Ray: a cluster of three nodes on this machine, one of which is lost in mid-grid, and a killed driver.

No loss is a matter of luck: the runs wait, each in its second epoch, until the node is gone.
"""

import json
import os
import sys
import time

import pytest
from kill_study import PATIENCE, Command, check_results, wait_until

from apbm_core.errors import ApbmError, ConfigError, DataError
from apbm_core.study.grid import cluster, work
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.run import execute

TINY = {
    "dataset": "digits", "models": ["resnet20"], "targets": {"resnet20": [0.5]}, "epochs": 10, "train_subset": 20,
    "test_subset": 20, "recipe_overrides": {"batch_size": 5, "precision": "float32", "lowering": "off"},
    "device": "cpu", "methods": ["scratch", "dense", "apbm"], "seeds": [0], "workers": 1,
}  # fmt: skip
DRIVER = """
import json, sys
from apbm_core.study.grid.grid import Study
folder, address, values = sys.argv[1:]
Study.of(folder, **json.loads(values), engine="ray", address=address).run()
"""


def test_without_ray_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="make setup-cluster"):
        Study.of(tmp_path, **TINY, engine="ray").run()


def test_the_board_keeps_the_last_word_of_each_run():
    board = cluster.Board()
    assert board.put(3, "train 0.5/2") is False and board.put(3, "train 1.0/2") is False
    assert board.take() == [(3, "train 1.0/2")] and board.take() == []
    board.ask()
    assert board.put(3, "train 1.5/2") is True


@pytest.fixture(scope="module")
def nodes():
    """Three nodes of a core each; asked for again where a busy machine lets Ray give up on its own processes."""
    pytest.importorskip("ray", reason="the extra [cluster] is not installed: make setup-cluster")
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80_000_000}
    for patience in (2, 1, 0):
        nodes = Cluster()
        try:
            for _ in range(3):
                nodes.add_node(**options)
            break
        except Exception:
            nodes.shutdown()
            if not patience:
                raise
    yield nodes
    nodes.shutdown()


@pytest.fixture
def driver(nodes):
    """This process as a driver of the cluster."""
    import ray

    ray.init(address=nodes.address, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The records of the grid that nothing disturbs, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "plan_workers", lambda *arguments: (1, 1))
        return Study.of(tmp_path_factory.mktemp("alone") / "grid", **TINY).run()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(work, "plan_workers", lambda *arguments: (1, 1))


@pytest.mark.slow
def test_a_lost_node_costs_no_run(nodes, driver, reference, tmp_path, monkeypatch):
    marks, done, gone = tmp_path / "marks", execute, tmp_path / "gone"
    marks.mkdir()

    def gated(config, folder, device, side_by_side, stop_at, report):
        """A run that notes its node and its first step, and waits in its second epoch until a node is gone."""
        from ray import get_runtime_context

        first = []

        def tell(standing):
            if not first:
                first.append(standing)
                line = json.dumps([get_runtime_context().get_node_id(), standing.before])
                with (marks / config.id).open("a") as file:
                    file.write(line + "\n")
            while standing.epochs >= 1.25 and not gone.exists():
                time.sleep(0.05)
            report(standing)

        return done(config, folder, device, side_by_side, stop_at, tell)

    wait, lost = driver.wait, []

    def lose_a_node(references, **options):
        begun = {path.name: json.loads(path.read_text().splitlines()[0])[0] for path in marks.glob("*")}
        saved = [path.parent.name for path in (tmp_path / "cluster").rglob("*.ckpt")]
        if not lost and len(set(begun.values())) == 3 and set(saved) == set(begun):
            doomed = next(node for node in nodes.worker_nodes if node.node_id in begun.values())
            lost.extend(name for name, node in begun.items() if node == doomed.node_id)
            nodes.remove_node(doomed, allow_graceful=False)
            gone.touch()
        return wait(references, **options)

    monkeypatch.setattr(work, "execute", gated)
    monkeypatch.setattr(driver, "wait", lose_a_node)
    study = Study.of(tmp_path / "cluster" / "grid", **TINY, engine="ray", address=nodes.address)
    records = study.run()
    assert len(lost) == 1, "a node was lost with a run under way"
    tries = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in marks.glob("*")}
    assert [len(tries[name]) for name in lost] == [2], "its run was begun again"
    (first, before), (second, went_on_from) = tries[lost[0]]
    assert first != second and before == 0 and went_on_from >= 1, "on another node, from its checkpoint"
    assert all(len(tries[record.id]) == 1 for record in records if record.id not in lost)
    wait_until(lambda: sum(node["Alive"] for node in driver.nodes()) == 2, "the loss to be noticed", 60)
    assert [record.id for record in records] == [record.id for record in reference]
    check_results(study.results.path, reference)
    nodes.add_node(num_cpus=1, object_store_memory=80_000_000)


@pytest.mark.slow
def test_a_killed_driver_costs_no_run(nodes, reference, tmp_path):
    script, grid = tmp_path / "driver.py", tmp_path / "cluster" / "grid"
    script.write_text(DRIVER)
    arguments = [str(script), str(grid), nodes.address, json.dumps(TINY)]
    command = Command(arguments, tmp_path)
    try:
        wait_until(lambda: any(grid.glob("work/*/*.ckpt")) or command.is_over(), "the first checkpoint")
    finally:
        command.kill()
    assert len(list(grid.glob("runs/*.json"))) < len(reference), command.output
    again = Command(arguments, tmp_path)  # its tasks wait for those of the killed driver, which Ray ends
    assert again.finish(2 * PATIENCE) == 0, again.output
    check_results(grid, reference)


@pytest.mark.slow
def test_the_errors_of_runs_come_back_as_they_are(nodes, driver):
    def fail(number, report):
        report(f"at {number}")
        if number == 1:
            raise DataError("the disk is full")
        if number == 2:
            os._exit(1)  # as if killed for its memory, each time
        return 10 * number

    jobs = iter([(0,), (1,), (2,)])
    found = {
        index: (result, error)
        for index, result, error in cluster.run_on_cluster(
            fail, lambda: next(jobs, None), 1, 0.0, lambda *said: None, nodes.address
        )
    }
    assert found[0] == (0, None)
    assert isinstance(found[1][1], DataError) and "the disk is full" in str(found[1][1])
    assert isinstance(found[2][1], ApbmError) and "lost more than 5 times" in str(found[2][1])
