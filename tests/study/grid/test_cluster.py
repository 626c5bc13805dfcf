"""The study on Ray: a cluster of three nodes on this machine, one of which is lost in mid-grid."""

import os

import pytest
from kill_study import check_results, wait_until

from apbm_core.errors import ConfigError
from apbm_core.study.grid import cluster
from apbm_core.study.grid.grid import Study

TINY = {
    "dataset": "digits", "models": ["resnet20"], "targets": {"resnet20": [0.5]}, "epochs": 40, "train_subset": 20,
    "test_subset": 20, "recipe_overrides": {"batch_size": 5, "precision": "float32", "lowering": "off"},
    "device": "cpu", "methods": ["scratch", "dense", "l1"], "seeds": [0], "workers": 1,
}  # fmt: skip


def test_without_ray_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match="make setup-cluster"):
        Study.of(tmp_path, **TINY, engine="ray").run()


def test_the_board_keeps_the_last_word_of_each_run():
    board = cluster.Board()
    assert board.put(3, "train 0.5/2") is False and board.put(3, "train 1.0/2") is False
    assert board.take() == [(3, "train 1.0/2")] and board.take() == []
    board.ask()
    assert board.put(3, "train 1.5/2") is True


@pytest.mark.slow
def test_a_lost_node_costs_no_run(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra [cluster] is not installed: make setup-cluster")
    from ray.cluster_utils import Cluster

    monkeypatch.setattr("apbm_core.study.grid.work.plan_workers", lambda *arguments: (1, 1))
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    reference = Study.of(tmp_path / "alone" / "grid", **TINY).run()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
    try:
        others = [nodes.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
        ray.init(address=nodes.address, log_to_driver=False)
        study = Study.of(tmp_path / "cluster" / "grid", **TINY, engine="ray", address=nodes.address)
        lost, work = [], study.results.work
        execute_remotely = cluster._run

        def lose_a_node(*arguments):
            """Between two results, once all three runs have begun, take a node away with all that runs on it."""
            begun = execute_remotely(*arguments)
            wait = ray.wait

            def waiting(references, **options):
                if not lost and len([f for f in work.glob("*") if f.is_dir() and any(f.glob("*.ckpt"))]) >= 3:
                    lost.append(others[0])
                    nodes.remove_node(others[0], allow_graceful=False)
                return wait(references, **options)

            monkeypatch.setattr(ray, "wait", waiting)
            yield from begun

        monkeypatch.setattr(cluster, "_run", lose_a_node)
        records = study.run()
        assert lost, "no node was lost while runs were under way"
        wait_until(lambda: len([n for n in ray.nodes() if n["Alive"]]) == 2, "the loss to be noticed", 60)
        assert [record.id for record in records] == [record.id for record in reference]
        check_results(study.results.path, reference)
    finally:
        ray.shutdown()
        nodes.shutdown()
