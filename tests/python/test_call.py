"""`isobar call` on other people's servers and through the mesh: reflection and proto files, every kind of method."""

import json
import subprocess
import time

import pytest
from nodes import BINARY, LONG, ROOT, SimEngine, free_port, text_input, wait_for, wait_for_peers

KINDS = "isobar.test.v1.Kinds"
KSERVE = "inference.GRPCInferenceService"


def call(*arguments, stdin=""):
    return subprocess.run(
        [BINARY, "call", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, timeout=LONG,
    )


def result(*arguments, stdin=""):
    done = call(*arguments, "--json", stdin=stdin)
    assert done.stdout.count("\n") == 1, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    from conftest import Mesh

    mesh = Mesh(tmp_path_factory.mktemp("call"))
    try:
        mesh.sim = mesh.keep(SimEngine(mesh.directory, "gpu", model="llama"))
        mesh.kinds = mesh.service("kinds", reflection=True)
        mesh.plain = mesh.service("plain")
        engines = [mesh.sim.engine(), mesh.kinds.engine()]
        mesh.b = mesh.node("b", "us", engines=engines)
        mesh.c = mesh.node("c", "us", engines=engines[:1])
        mesh.a = mesh.node("a", "eu", peers=[mesh.b], plaintext=True)
        wait_for_peers(mesh.a, mesh.b)
        mesh.at = (mesh.a.clients, "--ca", mesh.a.ca)
        wait_for("the services of the peer", lambda: KINDS in call(*mesh.at).stdout)
        yield mesh
    finally:
        for process in reversed(mesh.started):
            process.kill()


@pytest.fixture(params=["h2", "h3", "h2c"])
def at(request, far):
    """Where and how the node that owns nothing is called."""
    if request.param == "h2c":
        return (f"http://{far.a.plaintext}",)
    return (*far.at, "--h3") if request.param == "h3" else far.at


def test_services_and_methods_are_listed(far, at):
    services = call(*at).stdout.split()
    assert KSERVE in services and KINDS in services
    described = call(*at, KINDS).stdout
    assert "rpc Bidi(stream isobar.test.v1.Request) returns (stream isobar.test.v1.Reply);" in described
    assert "string text = " in described


def test_a_unary_call_goes_through_the_mesh_and_says_who_served_it(far, at):
    done = call(*at, f"{KINDS}/Unary", "-d", '{"text": "hello"}', "-H", "x-trail-note: thanks")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "hello"
    assert "status     OK" in done.stderr and "served by  b.us/kinds" in done.stderr
    assert "trailer    x-trail-note: thanks" in done.stderr and "first message" in done.stderr


def test_json_holds_everything_about_every_call(far, at):
    found = result(*at, f"{KINDS}/ServerStream", "-d", '{"count": 3}', "-H", "x-echo-note: yes", "--repeat", "2")
    assert found["protocol"] in ("h2", "h3", "h2c") and len(found["calls"]) == 2
    for one in found["calls"]:
        assert one["status"] == {"code": 0, "name": "OK", "message": "", "details": []}
        assert [message["sequence"] for message in one["messages"]] == ["0", "1", "2"]
        assert one["served_by"] == "b.us/kinds" and one["headers"]["x-echo-note"] == ["yes"]
        assert "endpoint-load-metrics-bin" in one["trailers"]
        timings = one["timings"]
        assert 0 < timings["head_s"] <= timings["first_message_s"] <= timings["total_s"]


def test_bidi_answers_each_message_as_it_is_typed(far, at):
    talk = subprocess.Popen(
        [BINARY, "call", *map(str, at), f"{KINDS}/Bidi"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    try:
        for number in range(3):
            talk.stdin.write(json.dumps({"text": f"message {number}"}) + "\n")
            talk.stdin.flush()
            answer = ""
            while not answer.endswith("}\n"):
                answer += talk.stdout.readline()
            answer = json.loads(answer)
            assert (answer["text"], answer["sequence"]) == (f"message {number}", str(number))
        _, said = talk.communicate(timeout=LONG)
        assert talk.returncode == 0 and "status     OK" in said
    finally:
        talk.kill()
        talk.wait()


def test_client_streams_take_their_messages_from_the_option_or_standard_input(far, at):
    for options, stdin in [(("-d", '{"text": "a"} {"text": "b"}'), ""), ((), '{"text":"a"}{"text":"b"}')]:
        found = result(*at, f"{KINDS}/ClientStream", *options, stdin=stdin)
        assert found["calls"][0]["messages"][0]["text"] == "ab"


def test_a_status_that_is_not_ok_ends_with_1_and_a_refusal_shows_its_details(far, at):
    done = call(*at, f"{KINDS}/Unary", "-d", '{"fail_code": 9, "fail_message": "not now"}')
    assert done.returncode == 1 and done.stdout == ""
    assert "FAILED_PRECONDITION" in done.stderr and "not now" in done.stderr
    # An opaque engine would be asked; c has none.
    at_c = (far.c.clients, *far.at[1:])
    found = result(*at_c, f"{KSERVE}/ModelInfer", "-d", json.dumps(text_input("x", 1, "nobody")))
    status = found["calls"][0]["status"]
    assert status["name"] == "NOT_FOUND" and status["details"][0]["reason"] == "REFUSAL_REASON_NO_ENGINE"
    late = call(*at, f"{KINDS}/Unary", "-d", '{"delay_ms": 20000}', "--deadline", "300ms")
    assert late.returncode == 1 and "DEADLINE_EXCEEDED" in late.stderr


def test_a_server_without_reflection_is_called_with_its_proto_file(far):
    address = f"http://{far.plain.address}"
    done = call(address, "my.own.Service/Method")
    assert done.returncode == 2 and "offers no reflection" in done.stderr and "--proto" in done.stderr
    # The same messages under other names: it is this file that is read.
    proto = far.directory / "kinds.proto"
    proto.write_text((ROOT / "proto/isobar/test/v1/kinds.proto").read_text().replace(" text = ", " words = "))
    done = call(address, f"{KINDS}/Unary", "--proto", proto, "-d", '{"words": "hi"}')
    assert json.loads(done.stdout)["words"] == "hi", done.stderr
    done = call(address)
    assert done.returncode == 1 and "reflection" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("METHOD", "-d", '{"text": 7}'), "isobar.test.v1.Request"),
        (("METHOD", "-d", '{"txt": "x"}'), "txt"),
        (("METHOD", "-d", "{"), "not JSON"),
        (("METHOD", "-d", "{} {}"), "exactly one message"),
        (("METHOD", "-d", "@/no/such/file"), "/no/such/file"),
        (("METHOD", "-H", "nonsense"), "name: value"),
        (("METHOD", "-H", "x-bin: %%%"), "base64"),
        (("METHOD", "--deadline", "soon"), "--deadline"),
        (("METHOD", "--deadline", "20000years"), "a year at most"),
        (("METHOD", "--ca", "/no/such/ca"), "/no/such/ca"),
        ((f"{KINDS}/Unari",), "did you mean Unary?"),
        ((f"{KINDS}x/Unary",), f"did you mean {KINDS}?"),
        (("Unary",), "package.Service/Method"),
        (("METHOD", "--proto", "/no/such.proto"), "such.proto"),
    ],
)
def test_bad_input_ends_with_2_and_says_what_is_wrong(far, arguments, wanted):
    arguments = [f"{KINDS}/Unary" if argument == "METHOD" else argument for argument in arguments]
    at = far.at if "--ca" not in arguments else far.at[:1]
    done = call(*at, *arguments)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert wanted in done.stderr


def test_bad_addresses_and_strangers_are_said(far):
    for address, code, wanted in [
        ("nowhere", 2, "HOST:PORT"),
        ("ftp://127.0.0.1:1", 2, "http:// or https://"),
        (f"http://127.0.0.1:{free_port()}", 1, "refused"),
        (far.a.clients, 1, "UnknownIssuer"),
        (far.sim.listen["http"], 1, "TLS"),
    ]:
        done = call(address, f"{KINDS}/Unary")
        assert done.returncode == code and wanted in done.stderr, (address, done.stderr)


def test_what_is_typed_wrong_gives_the_call_up(far):
    done = call(*far.at, f"{KINDS}/ClientStream", stdin='{"text": "a"} {"text": }')
    assert done.returncode == 2 and "standard input" in done.stderr


def test_a_deadline_holds_over_the_questions_before_the_call(far):
    hung = far.keep(SimEngine(far.directory, "hung"))
    hung.inject("hang")
    began = time.monotonic()
    done = call(f"http://{hung.address}", f"{KSERVE}/ServerReady", "--deadline", "1s")
    assert done.returncode == 1 and "deadline" in done.stderr and "--proto" in done.stderr
    assert time.monotonic() - began < 9


def test_what_is_no_grpc_server_is_said(far):
    done = call(f"http://{far.sim.listen['http']}", f"{KSERVE}/ServerReady", "--proto", ROOT / "proto/inference/grpc_service.proto", "-I", ROOT / "proto")
    assert done.returncode == 1 and "no gRPC server" in done.stderr and "404" in done.stderr
    done = call(far.a.clients.rsplit(":", 1)[0] + ":99999", f"{KSERVE}/ServerReady")
    assert done.returncode == 2 and "port" in done.stderr


def test_a_reader_that_has_seen_enough_ends_the_call(far):
    stream = subprocess.Popen(
        [BINARY, "call", *map(str, far.at), f"{KINDS}/ServerStream", "-d", '{"count": 100000, "delay_ms": 20}'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    assert stream.stdout.readline()
    stream.stdout.close()
    assert stream.wait(LONG) == 1 and "error" not in stream.stderr.read()
