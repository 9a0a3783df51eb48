"""Addresses of clusters that cannot be joined are told in seconds, before Ray tries; none of this starts Ray."""

import functools
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest

from harma_ray.errors import UserError
from harma_ray.on_ray import address as ray_address
from harma_ray.on_ray.address import find_address


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No cluster is named, the last one that was started here is unknown, and nobody is waited for."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray_address, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(ray_address, "_ANSWER_SECONDS", 0.5)


@pytest.fixture
def closed():
    """An address at which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


class Head(grpc.GenericRpcHandler):
    """Answers as a head does: to what it is asked, or with a wish for a token."""

    def __init__(self, method="CheckAlive", token=None):
        self._method, self._token = f"/ray.rpc.NodeInfoGcsService/{method}", token

    def service(self, call):
        def answer(request, context):
            if self._token and ("authorization", f"Bearer {self._token}") not in context.invocation_metadata():
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer) if call.method == self._method else None


@pytest.fixture
def serve():
    servers = []

    def start(handler):
        servers.append(grpc.server(ThreadPoolExecutor(1), handlers=[handler]))
        port = servers[-1].add_insecure_port("127.0.0.1:0")
        servers[-1].start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def told(address):
    with pytest.raises(UserError) as caught:
        find_address(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("address", [None, "", " ", "local", " local "])
@pytest.mark.parametrize("named", [None, "", "  ", "local"])
def test_without_an_address_a_cluster_of_ones_own_is_meant(monkeypatch, address, named):
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named)
    assert find_address(address) is None


def test_local_means_ones_own_cluster_whatever_the_environment_names(monkeypatch, closed):
    monkeypatch.setenv("RAY_ADDRESS", closed)
    assert find_address("local") is None


@pytest.mark.parametrize("asked", [None, "auto"])
def test_a_dead_cluster_of_the_environment_is_told_with_its_name(monkeypatch, closed, asked):
    monkeypatch.setenv("RAY_ADDRESS", closed)
    message = told(asked)
    assert f"no Ray cluster answers at {closed} (connection refused)" in message
    assert "unset RAY_ADDRESS" in message


def test_a_dead_cluster_of_the_option_is_told(closed):
    message = told(closed)
    assert f"no Ray cluster answers at {closed} (connection refused)" in message
    assert "leave --address out" in message


def test_an_option_goes_before_the_environment(monkeypatch, closed, serve):
    monkeypatch.setenv("RAY_ADDRESS", closed)
    address = serve(Head())
    assert find_address(address) == address


def test_a_head_that_answers_is_joined(monkeypatch, serve):
    address = serve(Head())
    assert find_address(f" {address} ") == address
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert find_address(None) == address


@pytest.mark.parametrize("from_file", [False, True])
def test_a_head_with_a_token_lets_in_who_has_it_and_says_so_at_once_to_others(monkeypatch, serve, tmp_path, from_file):
    address = serve(Head(token="right"))
    assert f"the Ray cluster at {address} wants a token" in told(address)
    (tmp_path / "token").write_text("right\n")
    if from_file:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    else:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    assert "RAY_AUTH_MODE=token" in told(address)  # Ray shows none unless it is told to
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert find_address(address) == address
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert "wants a token" in told(address)


def test_a_head_that_is_just_starting_is_waited_for(monkeypatch, closed, serve):
    monkeypatch.setattr(ray_address, "PATIENCE_SECONDS", 30)
    asked = threading.Event()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))  # refuses calls until it listens
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    connect = socket.create_connection

    def noted(*args, **kwargs):
        asked.set()
        return connect(*args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", noted)
    started = threading.Thread(target=lambda: (asked.wait(), listening.listen()))
    started.start()
    with listening:
        assert "said nothing" in told(address)  # somebody took the call, if no head
    started.join()


def test_another_service_of_grpc_is_no_head(serve):
    address = serve(Head(method="SomethingElse"))
    assert f"what answers at {address} is no head of a Ray cluster (another service of gRPC" in told(address)


def test_a_web_server_is_no_head():
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        message = told(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "is no head of a Ray cluster" in message


def test_whoever_takes_calls_and_says_nothing_is_no_head():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert "is no head of a Ray cluster" in told(f"127.0.0.1:{mute.getsockname()[1]}")


def test_a_name_that_nobody_knows_is_told():
    assert "the name `no-such-host.invalid` is unknown here" in told("no-such-host.invalid:6379")


@pytest.mark.parametrize(
    "address",
    ["head", "head:", ":6379", "head:port", "head:0", "head:65536", "head:-1", "head:6379:1", "head:6379/x", "::1:6379",
     "me@head:6379", "tcp://head:6379", "hea d:6379/?x", "[::1:6379", "6379", "://", "head:6379#"],
)  # fmt: skip
def test_what_has_not_the_form_of_an_address_is_told_with_the_form(address):
    assert "must be HOST:PORT" in told(address)


def test_a_dashboards_address_is_told_with_the_way_to_submit_a_job(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.7:8265")
    assert "ray job submit --address http://10.0.0.7:8265 --working-dir . -- python launch.py" in told(None)
    assert "ray job submit --address https://ray.example" in told("https://ray.example")


def test_ray_clients_address_is_told_with_what_to_do_instead():
    message = told("ray://10.0.0.7:10001")
    assert "cannot drive Ray Data and Ray Train" in message
    assert "ray job submit" in message


def test_auto_takes_the_last_cluster_started_here_and_tells_of_its_death(monkeypatch, tmp_path, closed):
    from ray._private import services

    monkeypatch.setattr(services, "find_gcs_addresses", functools.lru_cache(set))
    assert "`auto` joins a Ray cluster that runs on this machine, and there is none" in told("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(closed)
    port = closed.partition(":")[2]
    assert re.match(rf"no Ray cluster answers at \S+:{port} ", told("auto"))
