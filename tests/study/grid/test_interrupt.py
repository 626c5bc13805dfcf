"""The stop button of JupyterLab, that is Ctrl-C in a notebook, while a study trains."""

import sys
import uuid
from collections.abc import Iterator

import kill_study
import pytest
from jupyter_client import BlockingKernelClient, KernelManager
from jupyter_client.kernelspec import KernelSpec
from kill_study import check_results, environment, marked, undisturbed, wait_until

METHODS = ["apbm", "scratch"]


class ThisInterpreter(KernelManager):
    """A kernel of the interpreter that runs the tests, whichever kernels are registered."""

    kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


@pytest.fixture
def kernel(tmp_path) -> Iterator[tuple[KernelManager, BlockingKernelClient, str]]:
    """A live kernel in a folder of its own, a client of it, and the mark that all its processes carry."""
    mark = uuid.uuid4().hex
    manager = ThisInterpreter(connection_file=str(tmp_path / "kernel.json"))
    manager.start_kernel(cwd=str(tmp_path), env=environment(tmp_path, mark, fsync_seconds=0.5))
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield manager, client, mark
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_ctrl_c_in_a_notebook_ends_the_workers_and_the_same_cell_goes_on_as_if_undisturbed(kernel, tmp_path):
    manager, client, mark = kernel
    results = tmp_path / "results" / "tiny"
    values = kill_study.PARAMETERS_CELL.replace("workers = 1", "workers = 2").replace('["apbm"]', repr(METHODS))
    two_cores = "import os\nos.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])"
    cell = "\n".join([two_cores, values, kill_study.STUDY_CELL])

    # A kernel that stops on errors goes on refusing requests for a moment after its reply; here the next one must run.
    message = client.execute(cell, stop_on_error=False)
    wait_until(lambda: any(results.glob("work/*/*.ckpt")) or client.shell_channel.msg_ready(), "a run to save")
    assert len(marked(mark)) > 2  # the kernel and its workers
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=60)
    while reply["parent_header"].get("msg_id") != message:
        reply = client.get_shell_msg(timeout=60)
    assert reply["content"]["status"] == "error" and reply["content"]["ename"] == "KeyboardInterrupt"
    wait_until(lambda: len(marked(mark)) <= 2, "the workers to end", 60)  # multiprocessing keeps a resource tracker

    reply = client.execute_interactive(cell, timeout=kill_study.PATIENCE, output_hook=lambda output: None)
    assert reply["content"]["status"] == "ok", reply["content"]
    check_results(results, undisturbed(tmp_path / "undisturbed" / "grid", METHODS))
