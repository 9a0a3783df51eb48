"""What Ray 2.60 does wrong or keeps to itself: where one of these fails, a workaround can go or needs another name."""

import contextlib
import inspect
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import ray.data
import ray.exceptions
import ray.tune
from ray._private import services

from harma_ray.cli.interruptions import raised_between_imports
from harma_ray.config import DataConfig
from harma_ray.data.order import training_order
from harma_ray.data.splits import open_split
from harma_ray.data.stream import TrainingStream, Worker
from harma_ray.on_ray import quirks, stream
from harma_ray.on_ray.closing import closing_batches
from harma_ray.on_ray.folder import _SESSION
from harma_ray.on_ray.workers import on_workers
from harma_ray.recipes import make_task, recipe_config
from harma_ray.resources import WorkerPlan

RAY = Path(ray.__file__).parent


def fails():
    """Returns a stand-in for an actor whose process is gone."""

    def remote():
        raise ray.exceptions.ActorDiedError

    return SimpleNamespace(abort=SimpleNamespace(remote=remote))


@pytest.fixture(scope="module", autouse=True)
def joining():
    """A process that joins a cluster where none is, which takes Ray long to find out."""
    code = "import ray; print('joins', flush=True); ray.init(address='127.0.0.1:1')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def unset(monkeypatch):
    """Takes the variables away that Ray is given here."""
    for name in quirks.VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Starting Ray


def test_no_call_starts_a_cluster_by_itself():
    script = """
from harma_ray.on_ray.quirks import set_variables
set_variables()
import ray
try:
    ray.put(1)
except Exception as error:
    print(type(error).__name__, ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "RaySystemError False\n"


def two_clusters(address):
    raise ConnectionError("Found multiple active Ray instances")


def test_ray_trains_helpers_ask_for_a_dashboard_by_its_variable_alone(monkeypatch):
    from ray.dashboard.utils import get_address_for_submission_client
    from ray.train.v2._internal.state import util

    assert "get_actor(actor_id, timeout=timeout)" in inspect.getsource(util.is_actor_alive)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.dashboard.utils.ray_address_to_api_server_url", two_clusters)
    with pytest.raises(ConnectionError):
        get_address_for_submission_client(None)
    with quirks.announced_dashboard("127.0.0.1") as port:
        assert get_address_for_submission_client(None) == f"http://127.0.0.1:{port}"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def test_ray_replaces_the_handler_of_sigterm_for_good():
    before = signal.getsignal(signal.SIGTERM)
    with quirks.keeping_handler(signal.SIGTERM):
        with pytest.raises(ValueError, match="address"):
            ray.init(address="a:b:c")
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_that_comes_while_ray_has_replaced_it_interrupts_like_ctrl_c():
    def terminated():
        with quirks.keeping_handler(signal.SIGTERM):
            with pytest.raises(ValueError, match="address"):
                ray.init(address="a:b:c")
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        terminated()
    with pytest.raises(SystemExit, match="3"), quirks.keeping_handler(signal.SIGTERM):
        sys.exit(3)


def lost(self):
    """Interrupts in a place from which Python lets no exception out."""
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100):
        pass


@pytest.mark.parametrize("command", [contextlib.nullcontext, raised_between_imports])
def test_ray_forks_and_a_ctrl_c_that_python_loses_then_is_raised_in_the_end_and_prints_nothing(capfd, command):
    assert "preexec_fn=" in inspect.getsource(services.start_ray_process)
    went_on = []

    def start():
        with quirks.heeding_interruptions():
            instance = type("Lost", (), {"__del__": lost})()
            del instance
            went_on.append(True)

    with command(), pytest.raises(KeyboardInterrupt):
        start()
    assert went_on
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_sigterm_that_is_lost_so_by_rays_handler_is_raised_in_the_end_too(capfd):
    def start():
        with quirks.heeding_interruptions():
            instance = type("Lost", (), {"__del__": lambda self: sys.exit(15)})()
            del instance

    with pytest.raises(KeyboardInterrupt):
        start()
    assert capfd.readouterr().err == ""


def test_without_a_ctrl_c_nothing_happens_and_all_is_as_before():
    before = sys.unraisablehook
    with quirks.heeding_interruptions():
        subprocess.run(["true"], check=True)
    assert sys.unraisablehook is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_cluster_that_comes_up_late_is_told_by_a_bare_exception_and_left_running():
    from ray._private.node import Node

    made = inspect.getsource(Node.__init__)
    assert "raise Exception(" in made
    assert "kill_all_processes" not in made
    assert "self.all_processes: dict = {}" in made
    assert "self._session_dir = os.path.join(" in inspect.getsource(Node)
    assert set(inspect.signature(Node.kill_all_processes).parameters) >= {"check_alive", "allow_graceful", "wait"}
    assert quirks.is_late_start(Exception("late"))
    assert not quirks.is_late_start(RuntimeError("another"))


def test_a_process_that_had_just_been_started_is_ended_with_the_folder_that_it_names(tmp_path):
    session = tmp_path / "session_1"
    session.mkdir()
    late = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"--session-dir={session}"])
    threading.Thread(target=late.wait).start()
    quirks._remove(session)
    assert not session.exists()
    late.wait(timeout=10)
    assert late.returncode == -signal.SIGKILL


def test_a_cluster_of_other_machines_is_told_in_words_alone():
    source = inspect.getsource(services.get_node_to_connect_for_driver)
    assert 'raise RuntimeError(\n            f"No node info found matching attributes' in source


def test_ray_has_no_public_name_for_the_cluster_it_finds_and_remembers_it(monkeypatch):
    assert not hasattr(ray, "find_cluster")
    assert hasattr(services._cached_find_gcs_addresses, "cache_clear")
    forgotten = []
    monkeypatch.setattr(services.find_gcs_addresses, "cache_clear", lambda: forgotten.append(True))
    monkeypatch.setattr(services, "canonicalize_bootstrap_address_or_die", lambda address: f"found {address}")
    assert quirks.find_running_cluster() == "found auto"
    assert forgotten


def test_rays_own_measure_of_memory_heeds_a_containers_limit(tmp_path):
    from ray._common.utils import get_system_memory
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert get_system_memory(str(tmp_path / "no"), str(tmp_path / "memory.max")) == 2**30
    assert 0 < quirks.machine_memory() <= installed
    assert DEFAULT_OBJECT_STORE_MEMORY_PROPORTION > 0.2


@pytest.mark.filterwarnings("ignore")
def test_the_longest_name_of_a_socket_is_the_one_that_a_folder_leaves_room_for():
    from ray.dashboard.subprocesses.module import SubprocessModule
    from ray.dashboard.subprocesses.utils import get_socket_path
    from ray.dashboard.utils import get_all_modules

    names = [module.__name__ for module in get_all_modules(SubprocessModule) if module.is_enabled()]
    assert get_socket_path("sockets", max(names, key=len)) == "/".join(_SESSION.split("/")[1:])


# What Ray prints


def test_errors_are_printed_whatever_log_to_driver_says(monkeypatch):
    from ray._private import worker

    connected = inspect.getsource(worker.connect)
    assert connected.index("target=listen_error_messages") < connected.index("if log_to_driver:")
    stopped = threading.Event()

    def poll():
        stopped.set()
        return None, {"job_id": None, "error_message": "a worker died"}

    told = SimpleNamespace(subscribe=lambda: None, poll=poll)
    listener = SimpleNamespace(gcs_error_subscriber=told, current_job_id=ray.JobID.nil())
    monkeypatch.setattr(worker, "_internal_kv_initialized", lambda: False)
    printed = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: printed.append(data["lines"]))
    worker.listen_error_messages(listener, stopped)
    assert printed == [["a worker died"]]
    quirks.quiet_errors()
    stopped.clear()
    worker.listen_error_messages(listener, stopped)
    assert len(printed) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# where Ray ran in this process before, its handler leaves the file of that session open
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_data_shows_bars_and_what_it_does():
    from ray.data._internal.logging import configure_logging

    configure_logging()
    logger = logging.getLogger("ray.data")
    names = [handler.name for handler in logger.handlers]
    assert logger.level == logging.DEBUG
    assert "console" in names
    assert ray.data.DataContext().enable_progress_bars
    quirks.quiet_data()
    assert [handler.name for handler in logger.handlers] == [name for name in names if name != "console"] != []
    assert logger.level == logging.ERROR


# Ray Data


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_ray_datas_loop_spins_where_it_is_ahead_unless_it_pauses(scenes, ray_cluster, monkeypatch):
    steps = []

    class Counted(quirks.Pause):
        def on_execution_step(self, executor):
            steps.append(time.monotonic())

    monkeypatch.setattr(stream, "Pause", Counted)
    order = training_order(open_split(scenes, "train"), seed=3, global_batch_size=8, shuffle_window_mb=256)
    transform = make_task(recipe_config("harma-scenes")).transform(training=True)
    batches = TrainingStream(order, transform, DataConfig(chunk_mb=0.05), Worker(), stream.ray_batches).steps(0, 200)
    for _ in range(40):  # the first chunk does without Ray Data
        next(batches)
    time.sleep(3)
    batches.close()
    assert np.median(np.diff(steps)[-100:]) < 0.02


def test_the_threads_that_served_a_data_set_are_not_waited_for():
    from ray.data._internal.block_batching.util import iter_threaded

    gate = threading.Event()

    def slow(items):
        for item in items:
            yield item
            gate.wait()

    def served():
        return [thread for thread in threading.enumerate() if thread.name == "iter_threaded"]

    batches = iter_threaded(iter(range(3)), slow)
    next(batches)
    batches.close()
    (left,) = served()
    gate.set()
    left.join(timeout=10)
    with closing_batches(iter_threaded(iter(range(3)), slow)) as batches:
        next(batches)
    assert not [thread for thread in served() if thread.is_alive()]


def test_the_threads_of_a_data_set_that_fails_at_once_are_waited_for():
    from ray.data._internal.block_batching.util import iter_threaded

    gate = threading.Event()

    def failing(items):
        if next(items) == 0:
            raise ValueError("the first")
        gate.wait()
        yield 1

    with closing_batches(iter_threaded(iter(range(9)), failing, num_workers=2)) as batches:
        threading.Timer(0.5, gate.set).start()
        with pytest.raises(ValueError, match="the first"):
            next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name == "iter_threaded"]


def test_a_data_set_that_ends_does_not_wait_for_the_threads_of_another():
    from ray.data._internal.block_batching.util import iter_threaded

    gate = threading.Event()

    def blocked(items):
        yield next(items)
        gate.wait()

    with closing_batches(iter_threaded(iter(range(3)), blocked)) as others:
        with closing_batches(iter_threaded(iter(range(3)), iter)) as batches:
            next(others)  # begins after the one that ends before it
            begun = time.monotonic()
            assert next(batches) == 0
        assert time.monotonic() - begun < 5
        gate.set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_a_deprecated_argument_says_that_actors_are_not_started_again():
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    assert "max_restarts" not in inspect.signature(ray.data.ActorPoolStrategy).parameters
    assert "max_restarts" not in inspect.signature(ray.data.Dataset.map).parameters
    context = ray.data.DataContext.get_current()
    assert ActorPoolMapOperator._apply_default_remote_args({}, context)["max_restarts"] == -1
    with pytest.warns(ray.util.annotations.RayDeprecationWarning):
        ray.data.dataset._warn_on_ray_remote_args({"max_restarts": 0})
    taken = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quirks.map_without_restarts(SimpleNamespace(map=lambda function, **more: taken.update(more)), dict)
    assert taken == {"max_restarts": 0}


# Ray Train


def test_ray_train_ends_on_ctrl_c_as_if_all_were_well_and_keeps_its_handler_if_it_works_on_the_main_thread():
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    before = signal.getsignal(signal.SIGINT)
    with quirks.keeping_handler(signal.SIGINT):
        DataParallelTrainer._register_sigint_handler(None, fails())
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGINT)
        assert left.value.code == 0
        assert signal.getsignal(signal.SIGINT) is not before
    source = inspect.getsource(DataParallelTrainer._initialize_and_run_controller)
    assert "if threading.current_thread() is threading.main_thread():" in source


def test_the_controller_is_given_nothing_of_a_runs_settings(tmp_path, monkeypatch):
    """It unpickles what it is given, and would import all of torch with them before it starts a worker."""
    from ray import cloudpickle

    given = []
    monkeypatch.setattr("harma_ray.on_ray.workers.fit", lambda trainer, on_interrupt: given.append(trainer))
    on_workers(print, {}, recipe_config("harma-scenes"), WorkerPlan(2, 1.0, 0.0), tmp_path)
    named = re.findall(rb"harma_ray[\w.]*", cloudpickle.dumps(given[0].train_run_context))
    assert set(named) == {b"harma_ray.on_ray.process_group"}


def test_the_exceptions_that_tell_of_a_workers_end_are_private():
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    assert not hasattr(ray.train, "WorkerHealthCheckFailedError")
    assert not hasattr(ray.train, "WorkerHealthCheckTimeoutError")
    cause = ray.exceptions.ActorDiedError()
    assert quirks.cause_of_death(WorkerHealthCheckFailedError("", cause)) is cause
    assert quirks.cause_of_death(RuntimeError()) is None
    assert quirks.is_hanging(WorkerHealthCheckTimeoutError("no answer"))
    assert not quirks.is_hanging(TimeoutError())


@pytest.mark.parametrize(
    ("program", "words"),
    [("raylet/raylet", b"connection error code"), ("gcs/gcs_server", b"its node has died")],
)
def test_why_a_process_has_ended_is_told_in_words(program, words):
    assert words in (RAY / "core" / "src" / "ray" / program).read_bytes()


# Ray Tune


def test_rays_searcher_leaves_a_trial_open_for_ever_that_is_told_no_number():
    from optuna.trial import TrialState
    from ray.tune.search.optuna import OptunaSearch

    search = OptunaSearch(lambda trial: trial.suggest_float("rate", 0, 1) and None, metric="recall", mode="max")
    search.suggest("one")
    search.on_trial_complete("one", {"recall": math.nan})
    assert search._ot_study.trials[0].state == TrialState.RUNNING


def test_ray_tune_pickles_all_that_it_is_given(tmp_path):
    pickled = []

    class Searcher(ray.tune.search.Searcher):
        def __getstate__(self):
            pickled.append("searcher")
            return {}

    class Limits(quirks.Unpickled, ray.tune.Stopper):
        def __init__(self):
            self.lock = threading.Lock()  # cannot be pickled

    ray.tune.Tuner(
        len,
        tune_config=ray.tune.TuneConfig(search_alg=Searcher(metric="recall", mode="max")),
        run_config=ray.tune.RunConfig(storage_path=str(tmp_path), stop=Limits()),
    )
    assert pickled


def test_ray_tune_starts_one_process_at_a_time(monkeypatch):
    from ray.tune.execution.tune_controller import _get_max_pending_trials

    monkeypatch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "auto")
    assert _get_max_pending_trials(SimpleNamespace()) == 1
    quirks.start_side_by_side(3)
    assert _get_max_pending_trials(SimpleNamespace()) == 3


def test_ray_tune_waits_two_seconds_for_a_stopped_trial(monkeypatch):
    from ray.tune.trainable import function_trainable

    waited = []

    def finish(timeout):
        waited.append(timeout)

    session = SimpleNamespace(finish=finish, training_thread=SimpleNamespace(is_alive=lambda: True))
    monkeypatch.setattr(function_trainable, "get_session", lambda: session)
    monkeypatch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "")
    monkeypatch.delenv("TUNE_FUNCTION_THREAD_TIMEOUT_S")
    function_trainable.FunctionTrainable.reset_config(None, {})
    quirks.wait_for_stopped_trials()
    function_trainable.FunctionTrainable.reset_config(None, {})
    assert waited == [2, 60]


def test_a_process_that_is_killed_for_memory_ends_a_whole_search():
    from ray.air.execution._internal.actor_manager import RayActorManager

    task = SimpleNamespace(_tracked_actor=None)
    with pytest.raises(RuntimeError) as ended:
        RayActorManager._actor_task_failed(None, task, ray.exceptions.OutOfMemoryError("low"))
    assert quirks.is_out_of_memory(ended.value)
    assert not quirks.is_out_of_memory(RuntimeError())


# What Ray reads from the environment


def test_without_its_variables_ray_reports_polls_logs_and_prints(unset):
    from ray._common.usage import usage_lib
    from ray.train.v2._internal.constants import DEFAULT_HEALTH_CHECK_INTERVAL_S
    from ray.tune.experimental.output import get_air_verbosity
    from ray.tune.logger import CSVLoggerCallback
    from ray.tune.utils.callback import _create_default_callbacks

    assert usage_lib._usage_stats_enabledness().name == "ENABLED_BY_DEFAULT"
    assert DEFAULT_HEALTH_CHECK_INTERVAL_S == 2
    assert get_air_verbosity(0) is not None
    assert any(isinstance(callback, CSVLoggerCallback) for callback in _create_default_callbacks([]))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("train/v2/_internal/execution/controller/controller.py", "os.getenv(HEALTH_CHECK_INTERVAL_S_ENV_VAR"),
        ("train/v2/api/data_parallel_trainer.py", "if env_bool(RAY_CHDIR_TO_TRIAL_DIR, True)"),
        ("tune/trainable/trainable.py", 'int(os.environ.get(RAY_CHDIR_TO_TRIAL_DIR, "1"))'),
        ("tune/tune.py", 'if not int(os.getenv("TUNE_DISABLE_SIGINT_HANDLER", "0")):\n            signal.signal('),
        ("tune/execution/tune_controller.py", 'os.environ.get("TUNE_DISABLE_STRICT_METRIC_CHECKING", 0)) != 1'),
        ("tune/execution/tune_controller.py", 'os.getenv("TUNE_GLOBAL_CHECKPOINT_S", "auto")'),
    ],
)
def test_ray_reads_its_variables_still_and_takes_the_other_way_by_default(file, words):
    assert words in (RAY / file).read_text()


# Last, for it began first


def test_ray_tries_on_to_join_a_cluster_where_nobody_listens(joining):
    assert joining.stdout.readline() == b"joins\n"
    time.sleep(5)
    assert joining.poll() is None
