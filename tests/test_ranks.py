"""Ranks from every launcher, and where they rendezvous."""

import pytest

from pixio.engine.ranks import Ranks, expand_node_list, find_ranks

SRUN_TASK = {  # as a task of `srun` on 2 nodes finds them (SLURM 22.05)
    "SLURM_JOB_ID": "4546",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_NODELIST": "n[0-2]",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],login1", ["n1", "n2", "n3", "n7", "login1"]),
        ("a-[001-004]-ib", ["a-001-ib", "a-002-ib", "a-003-ib", "a-004-ib"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ],
)
def test_node_lists_expand_to_host_names(text, hosts):
    assert expand_node_list(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[]"])
def test_an_invalid_node_list_is_an_error(text):
    with pytest.raises(ValueError, match="not a SLURM node list"):
        expand_node_list(text)


def test_ranks_of_torchrun():
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert find_ranks(environ) == Ranks(5, 1, 8, 4, "env://")


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({}, "tcp://head:1234"),
        ({"MASTER_ADDR": "fe80::1"}, "tcp://[fe80::1]:1234"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "env://"),  # torchrun's agent listens there
    ],
)
def test_any_launcher_gets_a_rendezvous_that_can_name_missing_ranks(environ, address):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert find_ranks(given | environ).address == address


def test_torchrun_inside_srun_wins():
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert find_ranks(SRUN_TASK | environ).world_size == 2


def test_the_rendezvous_of_srun_is_on_the_first_node_of_the_step():
    ranks = find_ranks(SRUN_TASK)
    assert ranks[:4] == (5, 1, 8, 4)
    assert ranks.address.startswith("tcp://n1:")


def test_concurrent_jobs_and_steps_use_different_ports():
    others = [{"SLURM_JOB_ID": "4547"}, {"SLURM_STEP_ID": "3"}]
    assert len({find_ranks(SRUN_TASK | other).address for other in [{}, *others]}) == 3


def test_address_and_port_of_the_environment_win_under_srun():
    environ = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert find_ranks(SRUN_TASK | environ).address == "tcp://head:1234"


def test_a_batch_script_without_srun_runs_alone_and_says_so():
    environ = {"SLURM_JOB_ID": "4546", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    with pytest.warns(UserWarning, match="8 tasks, but this process was not started by srun"):
        assert find_ranks(environ) == Ranks()


def test_ranks_given_as_arguments():
    assert find_ranks({}, 2, 1, "tcp://127.0.0.1:29500") == Ranks(1, 1, 2, 2, "tcp://127.0.0.1:29500")


@pytest.mark.parametrize("arguments", [(), (1, -1, "env://"), (None, None, None)])
def test_without_a_launcher_there_is_one_process(arguments):
    assert find_ranks({}, *arguments) == Ranks()


@pytest.mark.parametrize(
    ("environ", "arguments", "message"),
    [
        ({}, (2, None, None), "needs --local_rank, 0 to 1"),
        ({}, (2, 0, None), "--dist_url"),
        ({}, (2, 2, "tcp://127.0.0.1:29500"), "rank 2 does not exist"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, (4, None, None), "--world_size is 4, but the launcher started 2"),
    ],
)
def test_ranks_that_contradict_each_other_are_an_error(environ, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_ranks(environ, *arguments)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be an integer from 0 .* found 'one'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be an integer from 0 .* found '-1'"),
        ({"RANK": "1", "WORLD_SIZE": ""}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"RANK": " ", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "99999"},
            "MASTER_PORT .* 65535",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "x"}, "MASTER_PORT .* 65535"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1"}, "SLURM_PROCID is not set"),
    ],
)
def test_odd_variables_are_named(environ, message):
    with pytest.raises(ValueError, match=message):
        find_ranks(environ)


def test_empty_variables_count_as_unset():
    assert find_ranks({"RANK": "", "WORLD_SIZE": "", "MASTER_PORT": "", "SLURM_NTASKS": ""}) == Ranks()
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "", "MASTER_ADDR": "head", "MASTER_PORT": ""}
    assert find_ranks(environ).address == "tcp://head:29500"


OMPI = {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_processes_under_mpirun_are_ranks():
    environ = {f"OMPI_COMM_WORLD_{name}": value for name, value in OMPI.items()} | {"MASTER_ADDR": "head"}
    assert find_ranks(environ)[:4] == (5, 1, 8, 4)
    assert find_ranks(environ).address.startswith("tcp://head:")
    assert find_ranks(SRUN_TASK | environ)[:4] == (5, 1, 8, 4)  # mpirun in a job starts its daemons with srun
    assert find_ranks(HYDRA)[:4] == (1, 1, 2, 2)
    assert find_ranks(HYDRA).address.startswith("tcp://127.0.0.1:")


def test_the_port_argument_gives_way_to_the_environment():
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "head"}
    assert find_ranks(environ, port=1234).address == "tcp://head:1234"
    assert find_ranks(environ | {"MASTER_PORT": "5"}, port=1234).address == "tcp://head:5"
