"""A real inference server behind node b, real clients at node a, which has no engine: every call crosses the mesh."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from nodes import LONG, MLServer, Node
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

SERVED_BY = ("x-isobar-served-by", "b.us/mlserver")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """MLServer, and the nodes a and b."""
    directory = tmp_path_factory.mktemp("mlserver")
    started = []
    try:
        server = MLServer(directory)
        started.append(server)
        engine = {"name": "mlserver", "url": f"http://{server.address}", "protocol": "kserve-v2"}
        b = Node(directory, "b", "us", directory / "ca", engines=[engine])
        started.append(b)
        a = Node(directory, "a", "eu", directory / "ca", peers=[b])
        started.append(a)
        yield server, a, b
    finally:
        for process in reversed(started):
            process.stop()


@pytest.fixture
def mesh(world):
    """tritonclient at node a, over h2 with TLS."""
    _, a, _ = world
    with triton.InferenceServerClient(a.clients, ssl=True, root_certificates=str(a.ca)) as client:
        yield client


@pytest.fixture
def direct(world):
    """tritonclient at MLServer itself."""
    with triton.InferenceServerClient(world[0].address) as client:
        yield client


@pytest.fixture
def channel(world):
    """Plain grpcio at node a."""
    _, a, _ = world
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    credentials = grpc.ssl_channel_credentials(a.ca.read_bytes())
    with grpc.secure_channel(a.clients, credentials, options) as channel:
        yield channel


def tensor(x):
    x = np.asarray(x, dtype=np.float32)
    wanted = triton.InferInput("x", list(x.shape), "FP32")
    wanted.set_data_from_numpy(x)
    return [wanted]


def random(rows, columns, seed=1):
    return np.random.default_rng(seed).random((rows, columns), dtype=np.float32)


def test_the_server_is_live_and_ready_through_the_mesh(mesh):
    assert mesh.is_server_live()
    assert mesh.is_server_ready()
    assert mesh.is_model_ready("summer")


def test_metadata_is_the_same_as_direct(mesh, direct):
    got = mesh.get_model_metadata("summer")
    assert got.name == "summer" and [i.name for i in got.inputs] == ["x"]
    assert got == direct.get_model_metadata("summer")
    assert mesh.get_server_metadata() == direct.get_server_metadata()


def test_inference_gives_the_tensors_a_direct_call_gives(mesh, direct):
    x = random(4, 7)
    got, want = mesh.infer("summer", tensor(x)), direct.infer("summer", tensor(x))
    for name in ("sum", "echo"):
        np.testing.assert_array_equal(got.as_numpy(name), want.as_numpy(name))
    np.testing.assert_array_equal(got.as_numpy("echo"), x)
    np.testing.assert_allclose(got.as_numpy("sum").ravel(), x.sum(axis=1), rtol=1e-5)


def test_request_ids_and_parameters_survive(mesh):
    got = mesh.infer("summer", tensor([[1, 2]]), request_id="call-7")
    assert got.get_response().id == "call-7"


def test_an_unknown_model_is_the_servers_own_error(mesh, direct):
    errors = []
    for client in (mesh, direct):
        with pytest.raises(InferenceServerException) as caught:
            client.infer("nope", tensor([[1]]))
        errors.append((caught.value.status(), caught.value.message()))
    assert errors[0] == errors[1]
    assert errors[0][0] == "StatusCode.NOT_FOUND"
    assert "nope" in errors[0][1]


def test_messages_of_three_megabytes_cross_both_ways(mesh):
    x = random(3, 262_144)
    assert x.nbytes == 3 << 20
    np.testing.assert_array_equal(mesh.infer("summer", tensor(x)).as_numpy("echo"), x)


def test_a_compressed_request_is_understood(mesh):
    x = random(8, 1_000)
    for algorithm in ("gzip", "deflate"):
        got = mesh.infer("summer", tensor(x), compression_algorithm=algorithm)
        np.testing.assert_array_equal(got.as_numpy("echo"), x)


def test_fifty_calls_at_once_get_their_own_answers(mesh):
    def call(seed):
        x = random(2, 500, seed)
        np.testing.assert_array_equal(mesh.infer("summer", tensor(x)).as_numpy("echo"), x)

    with ThreadPoolExecutor(50) as pool:
        for done in [pool.submit(call, seed) for seed in range(50)]:
            done.result(LONG)


def test_plain_grpcio_with_generated_stubs(channel):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=LONG).ready
    assert stub.ModelMetadata(pb.ModelMetadataRequest(name="summer"), timeout=LONG).name == "summer"
    x = random(2, 3)
    request = pb.ModelInferRequest(model_name="summer", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    reply, call = stub.ModelInfer.with_call(request, timeout=LONG)
    assert reply.model_name == "summer"
    assert SERVED_BY in call.initial_metadata()
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(pb.ModelInferRequest(model_name="nope"), timeout=LONG)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_what_the_server_lacks_is_its_own_error(channel):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelStatistics(pb.ModelStatisticsRequest(name="summer"), timeout=LONG)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_every_call_crossed_both_nodes(world, mesh):
    _, a, b = world
    ingress = 'isobar_calls_total{side="ingress",code="OK"}'
    egress = 'isobar_calls_total{side="egress",code="OK"}'
    before = a.metric(ingress), b.metric(egress), b.metric('isobar_attempts_total{to="engine"}')
    mesh.infer("summer", tensor([[1]]))
    after = a.metric(ingress), b.metric(egress), b.metric('isobar_attempts_total{to="engine"}')
    assert [x - y for x, y in zip(after, before)] == [1, 1, 1]
    assert a.metric('isobar_attempts_total{to="engine"}') == 0


def test_models_decide_which_engine_serves(world, tmp_path):
    """With models listed, the name is read from the body and another model is refused by the node itself."""
    server, _, _ = world
    engine = {"name": "mlserver", "url": f"http://{server.address}", "models": ["summer"]}
    node = Node(tmp_path, "c", "us", tmp_path / "ca", engines=[engine])
    try:
        ca = str(node.ca)
        with triton.InferenceServerClient(node.clients, ssl=True, root_certificates=ca) as client:
            x = random(3, 262_144)
            for algorithm in (None, "gzip"):
                got = client.infer("summer", tensor(x), compression_algorithm=algorithm)
                np.testing.assert_array_equal(got.as_numpy("echo"), x)
            with pytest.raises(InferenceServerException) as caught:
                client.infer("nope", tensor([[1]]))
            assert caught.value.status() == "StatusCode.NOT_FOUND"
            assert "isobar node c (us): no engine" in caught.value.message()
            assert "model nope" in caught.value.message()
    finally:
        node.stop()
