"""Who may call what: keys, certificates, tokens, anonymous callers, and the rules for each."""

import base64
import datetime
import hashlib
import json
import re
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import grpc
import pytest
import tritonclient.grpc.service_pb2 as kserve
from conftest import UNARY
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from grpc_reflection.v1alpha import reflection_pb2
from google.rpc import status_pb2
from nodes import BINARY, LONG, ROOT, Node, Service, SimEngine, wait_for

KEY, OTHER_KEY = "sk-lab-1", "sk-lab-2"
ISSUER = "https://login.example"
CLIENT = "spiffe://mesh.test/client/eu/search"
INFER = "inference.GRPCInferenceService/ModelInfer"
READY = "inference.GRPCInferenceService/ModelReady"
HEALTH = "grpc.health.v1.Health/"
KINDS = "isobar.test.v1.Kinds"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int, length=None) -> str:
    return base64url(value.to_bytes(length or (value.bit_length() + 7) // 8, "big"))


class Signer:
    """A key of an issuer."""

    def __init__(self, kid, elliptic=False):
        self.kid, self.elliptic = kid, elliptic
        self.key = (
            ec.generate_private_key(ec.SECP256R1())
            if elliptic
            else rsa.generate_private_key(65537, 2048)
        )

    def jwk(self) -> dict:
        numbers = self.key.public_key().public_numbers()
        if self.elliptic:
            point = {"x": number(numbers.x, 32), "y": number(numbers.y, 32)}
            return {"kty": "EC", "crv": "P-256", "kid": self.kid, **point}
        return {"kty": "RSA", "kid": self.kid, "n": number(numbers.n), "e": number(numbers.e)}

    def token(self, **claims) -> str:
        exp = int(time.time()) + 600
        claims = {"iss": ISSUER, "aud": "isobar", "sub": "subject-1", "exp": exp, **claims}
        header = {"alg": "ES256" if self.elliptic else "RS256", "kid": self.kid}
        message = ".".join(base64url(json.dumps(part).encode()) for part in (header, claims))
        if self.elliptic:
            r, s = decode_dss_signature(self.key.sign(message.encode(), ec.ECDSA(hashes.SHA256())))
            signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        else:
            signature = self.key.sign(message.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{message}.{base64url(signature)}"


def key_set(*signers) -> str:
    return json.dumps({"keys": [signer.jwk() for signer in signers]})


class KeyServer:
    """Serves a key set over HTTP, and counts how often it was asked."""

    def __init__(self, text, tls=None):
        self.text, self.asked = text, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked += 1
                body = outer.text.encode()
                self.send_response(200 if body else 503)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://localhost:{self.server.server_port}/keys"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class Authority:
    """Signs certificates of clients."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "clients")])
        self.certificate = self.sign(self.name, self.key.public_key(), is_ca=True)

    def sign(self, subject, public_key, names=(), is_ca=False):
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        )
        if not is_ca:
            both = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
            usage = x509.ExtendedKeyUsage(both)
            builder = builder.add_extension(usage, critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def client(self, *names) -> tuple[bytes, bytes]:
        """Key and certificate, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a client")])
        certificate = self.sign(subject, key.public_key(), names)
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return secret, certificate.public_bytes(serialization.Encoding.PEM)

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


class World:
    """A node that knows callers by everything there is, a service and an engine behind it."""

    def __init__(self, directory):
        self.started = []
        self.file_signers = [Signer("r1"), Signer("e1", elliptic=True)]
        self.url_signer = Signer("u1")
        self.keys = directory / "keys.json"
        self.keys.write_text(key_set(*self.file_signers))
        self.server = KeyServer(key_set(self.url_signer))
        self.authority = Authority()
        (directory / "clients.pem").write_bytes(self.authority.pem())
        try:
            service = self.keep(Service(directory))
            engines = [self.keep(SimEngine(directory, m, model=m)) for m in ("llama-1", "secret")]
            jwt = {"audience": "isobar", "refresh": "1h"}
            self.node = self.keep(
                Node(
                    directory, "a", "eu", directory / "ca",
                    engines=[service.engine(), *(engine.engine() for engine in engines)],
                    plaintext=True,
                    log={"access": 1.0},
                    tls={"client_ca": str(directory / "clients.pem")},
                    access={
                        "anonymous": "public",
                        "jwt": [
                            {"issuer": ISSUER, "jwks": str(self.keys), **jwt},
                            {"issuer": "by-url", "jwks": self.server.url, **jwt},
                        ],
                    },
                    tenants=[
                        {"name": "lab", "api_key_sha256": [hashed(KEY), hashed(OTHER_KEY)]},
                        {"name": "idle", "api_key_sha256": hashed("sk-idle")},
                        {"name": "search", "certificates": [CLIENT, "search.example"]},
                        {"name": "shop", "jwt": [f"{ISSUER}#subject-1", "by-url#subject-1"]},
                        {"name": "public"},
                    ],
                    allow=[
                        {"tenant": "lab"},
                        {"tenant": "search", "services": ["isobar.test.v1.*"]},
                        {"tenant": "shop", "services": [UNARY]},
                        {"tenant": "public", "models": ["llama-*"]},
                    ],
                )
            )
        except BaseException:
            self.stop()
            raise

    def keep(self, process):
        self.started.append(process)
        return process

    def stop(self):
        for process in reversed(self.started):
            process.kill()
        self.server.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("access"))
    yield world
    world.stop()


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def call(node, method=UNARY, request=b"", metadata=(), client=(None, None), plaintext=False):
    """Error or None, and the initial metadata of a unary call."""
    if plaintext:
        channel = grpc.insecure_channel(node.plaintext)
    else:
        credentials = grpc.ssl_channel_credentials(node.ca.read_bytes(), *client)
        channel = grpc.secure_channel(node.clients, credentials)
    with channel:
        try:
            _, done = channel.unary_unary(f"/{method}").with_call(
                request, timeout=LONG, metadata=list(metadata)
            )
        except grpc.RpcError as error:
            return error, {}
        return None, dict(done.initial_metadata())


def code_of(*arguments, **options):
    error, _ = call(*arguments, **options)
    return error.code() if error else grpc.StatusCode.OK


def bearer(credential: str):
    return [("authorization", f"Bearer {credential}")]


def for_model(model: str) -> bytes:
    return kserve.ModelReadyRequest(name=model).SerializeToString()


OK = grpc.StatusCode.OK
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
DENIED = grpc.StatusCode.PERMISSION_DENIED


def test_a_key_opens_what_its_tenant_may_call(world):
    for metadata in ([("x-api-key", KEY)], bearer(KEY), bearer(OTHER_KEY)):
        assert code_of(world.node, metadata=metadata) == OK
        assert code_of(world.node, metadata=metadata, plaintext=True) == OK
    assert code_of(world.node, READY, for_model("secret"), [("x-api-key", KEY)]) == OK
    before = world.node.metric('isobar_calls_refused_total{side="ingress",reason="unauthenticated"}')
    for metadata in ([("x-api-key", "sk-lab-3")], bearer("sk-lab-3"), [("authorization", "Basic eDp5")]):
        error, _ = call(world.node, metadata=metadata)
        assert error.code() == UNAUTHENTICATED, error
        assert "isobar node a (eu)" in error.details() and "sk-lab-3" not in error.details()
    after = world.node.metric('isobar_calls_refused_total{side="ingress",reason="unauthenticated"}')
    assert after == before + 3
    both = [("x-api-key", KEY), *bearer(KEY)]
    assert code_of(world.node, metadata=both) == grpc.StatusCode.INVALID_ARGUMENT


def test_a_tenant_without_a_rule_may_call_nothing_and_is_told_so(world):
    error, _ = call(world.node, metadata=[("x-api-key", "sk-idle")])
    assert error.code() == DENIED
    assert "tenant idle may not call method isobar.test.v1.Kinds/Unary" in error.details()
    assert "[[allow]]" in error.details() and "sk-idle" not in error.details()
    trailers = dict(error.trailing_metadata())
    details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
    # isobar.node.v1.Refusal: reason NOT_ALLOWED.
    assert details[0].value.startswith(b"\x08\x0b")
    assert world.node.metric('isobar_calls_refused_total{side="ingress",reason="not_allowed"}') >= 1


def test_credentials_end_at_the_node_and_the_tenant_is_in_the_log(world):
    for metadata in ([("x-api-key", KEY)], bearer(KEY)):
        error, initial = call(world.node, metadata=[*metadata, ("x-echo-this", "1")])
        assert error is None and initial["x-echo-this"] == "1"
        assert not {"x-saw-authorization", "x-saw-x-api-key"} & set(initial)

    def logged():
        lines = [line for line in world.node.err.read_text().splitlines() if '"access":"ingress"' in line]
        return [json.loads(line) for line in lines if '"tenant":"lab"' in line]

    assert wait_for("a line of the access log", logged)[-1]["code"] == "OK"
    assert KEY not in world.node.err.read_text()


def test_callers_who_show_nothing_may_call_what_anonymous_may(world):
    for model, wanted in (("llama-1", OK), ("secret", DENIED), ("", DENIED)):
        for plaintext in (False, True):
            assert code_of(world.node, READY, for_model(model), plaintext=plaintext) == wanted, model
    # A rule that names models covers no call in which there is none.
    assert code_of(world.node) == DENIED
    assert code_of(world.node, "inference.GRPCInferenceService/ServerLive") == DENIED
    assert code_of(world.node, READY, b"\xff\xff") == DENIED
    request = kserve.ModelInferRequest(model_name="secret").SerializeToString()
    assert code_of(world.node, INFER, request) == DENIED


def test_a_certificate_is_its_tenants(world):
    sign = world.authority.client
    uri, dns = x509.UniformResourceIdentifier, x509.DNSName
    for names in ([uri(CLIENT)], [dns("search.example")], [dns("x.example"), uri(CLIENT)]):
        client = sign(*names)
        assert code_of(world.node, client=client) == OK
        assert code_of(world.node, READY, for_model("llama-1"), client=client) == DENIED
        # A key comes first.
        key = [("x-api-key", KEY)]
        assert code_of(world.node, READY, for_model("secret"), key, client=client) == OK
    # Beside a SPIFFE id no DNS name counts: a node that joined as `search.example` is not that tenant.
    node = uri("spiffe://mesh.test/node/eu/search.example")
    for names in ([uri("spiffe://mesh.test/client/eu/other")], [node, dns("search.example")], []):
        error, _ = call(world.node, client=sign(*names))
        assert error.code() == UNAUTHENTICATED and "`certificates` of a [[tenant]]" in error.details()
    # Of another authority: no connection at all.
    stranger = Authority().client(uri(CLIENT))
    assert code_of(world.node, client=stranger) == grpc.StatusCode.UNAVAILABLE


def test_a_token_of_a_key_in_a_file_is_its_tenants(world):
    for signer in world.file_signers:
        for _ in range(2):
            assert code_of(world.node, metadata=bearer(signer.token())) == OK
        error, initial = call(world.node, metadata=bearer(signer.token(aud=["x", "isobar"])))
        assert error is None and "x-saw-authorization" not in initial
    signer, now = world.file_signers[0], int(time.time())
    assert code_of(world.node, READY, for_model("llama-1"), bearer(signer.token())) == DENIED
    for claims, says in (
        ({"exp": now - 60}, "expired"),
        ({"nbf": now + 600}, "not valid yet"),
        ({"aud": "other"}, "aud"),
        ({"iss": "other"}, "iss"),
        ({"sub": "nobody"}, "[[tenant]]"),
        # A tenant that lists no claims is nobody's by a token, whatever it is called.
        ({"sub": "lab"}, "[[tenant]]"),
    ):
        error, _ = call(world.node, metadata=bearer(signer.token(**claims)))
        assert error.code() == UNAUTHENTICATED and says in error.details(), (claims, error.details())
    stranger = Signer("r1").token()
    error, _ = call(world.node, metadata=bearer(stranger))
    assert error.code() == UNAUTHENTICATED and "signature" in error.details()


def test_keys_that_come_over_http_may_change(world):
    assert code_of(world.node, metadata=bearer(world.url_signer.token(iss="by-url"))) == OK
    # No token of one issuer is taken for another's.
    assert code_of(world.node, metadata=bearer(world.url_signer.token())) == UNAUTHENTICATED
    new = Signer("u2")
    world.server.text = ""
    asked = world.server.asked

    def waits(what, check):
        wait_for(what, check, LONG)

    # While they cannot be had, those known stay.
    assert code_of(world.node, metadata=bearer(new.token(iss="by-url"))) == UNAUTHENTICATED
    waits("another reading", lambda: world.server.asked > asked)
    assert code_of(world.node, metadata=bearer(world.url_signer.token(iss="by-url"))) == OK
    world.server.text = key_set(new)
    waits("the new key", lambda: code_of(world.node, metadata=bearer(new.token(iss="by-url"))) == OK)
    # A key that was withdrawn opens nothing, though its tokens were good.
    assert code_of(world.node, metadata=bearer(world.url_signer.token(iss="by-url"))) == UNAUTHENTICATED
    # No key is an answer too, and not a failure.
    world.server.text = key_set()
    unknown = Signer("u3").token(iss="by-url")

    def withdrawn():
        assert code_of(world.node, metadata=bearer(unknown)) == UNAUTHENTICATED
        return code_of(world.node, metadata=bearer(new.token(iss="by-url"))) == UNAUTHENTICATED

    waits("no key", withdrawn)
    assert "lists no key that can be used" in world.node.err.read_text()


def test_keys_come_over_https_from_who_this_machine_believes(tmp_path):
    authority, signer = Authority(), Signer("h1")
    secret, certificate = authority.client(x509.DNSName("localhost"))
    (tmp_path / "server.pem").write_bytes(secret + certificate)
    (tmp_path / "roots.pem").write_bytes(authority.pem())
    (tmp_path / "others.pem").write_bytes(Authority().pem())
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server.pem")
    server = KeyServer(key_set(signer), tls)
    jwt = {"issuer": ISSUER, "audience": "isobar", "jwks": server.url}
    try:
        for roots, wanted in (("roots.pem", OK), ("others.pem", UNAUTHENTICATED)):
            service = Service(tmp_path)
            node = Node(
                tmp_path / wanted.name, "a", "eu", tmp_path / "ca", [service.engine()],
                environment={"SSL_CERT_FILE": str(tmp_path / roots)},
                access={"jwt": [jwt]},
                tenants=[{"name": "shop", "jwt": ["subject-1"]}],
                allow=[{"tenant": "shop"}],
            )
            try:
                assert code_of(node, metadata=bearer(signer.token())) == wanted
                assert ("cannot be read; those known stay" in node.err.read_text()) == (wanted != OK)
            finally:
                node.kill()
                service.kill()
    finally:
        server.stop()


def health_of(service: str) -> bytes:
    """A HealthCheckRequest."""
    return bytes([0x0A, len(service)]) + service.encode() if service else b""


def test_everybody_learns_whether_the_node_serves_and_tenants_what_it_has(tmp_path):
    tenants = [{"name": "lab", "api_key_sha256": hashed(KEY)}]
    service = Service(tmp_path, reflection=True)
    node = Node(tmp_path, "a", "eu", tmp_path / "ca", [service.engine()], plaintext=True, tenants=tenants)
    known, stranger = [("x-api-key", KEY)], [("x-api-key", "sk-lab-3")]
    try:
        assert code_of(node) == UNAUTHENTICATED
        assert code_of(node, metadata=known) == DENIED
        for metadata in ([], known, stranger):
            assert code_of(node, HEALTH + "Check", metadata=metadata) == OK
        check, named = HEALTH + "Check", health_of(KINDS)
        wait_for("the service", lambda: code_of(node, check, named, known) == OK)
        assert code_of(node, HEALTH + "List", metadata=known) == OK
        for name in (KINDS, "no.Such", HEALTH.strip("/")):
            error, _ = call(node, check, health_of(name))
            assert error.code() == UNAUTHENTICATED and "x-api-key" in error.details(), error
            assert code_of(node, check, health_of(name), stranger) == UNAUTHENTICATED
        # Protobuf's last name counts.
        assert code_of(node, check, health_of("x") + b"\x0a\x00") == OK
        assert code_of(node, check, b"\x0a\x00" + named) == UNAUTHENTICATED
        for method, request in (("List", b""), ("Watch", b""), ("Watch", named)):
            assert code_of(node, HEALTH + method, request) == UNAUTHENTICATED

        def services(metadata):
            credentials = grpc.ssl_channel_credentials(node.ca.read_bytes())
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            with grpc.secure_channel(node.clients, credentials) as channel:
                ask = channel.stream_stream(f"/{REFLECTION}")
                replies = list(ask(iter([request.SerializeToString()]), timeout=LONG, metadata=metadata))
            reply = reflection_pb2.ServerReflectionResponse.FromString(replies[0])
            return [service.name for service in reply.list_services_response.service]

        assert "grpc.health.v1.Health" in services(known)
        with pytest.raises(grpc.RpcError) as refused:
            services([])
        assert refused.value.code() == UNAUTHENTICATED
        assert probe(node, "/livez") == (200, "ok\n") and probe(node, "/readyz") == (200, "ok\n")
        for path in ("/room", f"/room?method=/{UNARY}", "/room?model=m"):
            status, why = probe(node, path)
            assert status == 404 and "metrics port" in why
        assert node.get("/livez")[0] == 200 and node.get(f"/room?method=/{UNARY}")[0] == 200
    finally:
        node.kill()
        service.kill()


def probe(node, path) -> tuple[int, str]:
    """Status and body of a page of the port without TLS."""
    try:
        with urllib.request.urlopen(f"http://{node.plaintext}{path}", timeout=LONG) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_room_is_told_where_callers_who_show_nothing_have_a_tenant(world):
    assert probe(world.node, "/room?model=llama-1")[0] == 200


def test_a_client_that_checks_health_by_itself_calls_with_what_its_channel_shows(world):
    """With `healthCheckConfig` gRPC sends nothing where a Watch of the name does not say SERVING."""
    wait_for("the service", lambda: code_of(world.node, HEALTH + "Check", health_of(KINDS)) == OK)
    config = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": KINDS}}
    options = [("grpc.service_config", json.dumps(config))]
    root = world.node.ca.read_bytes()
    token = grpc.access_token_call_credentials(KEY)
    with_key = grpc.composite_channel_credentials(grpc.ssl_channel_credentials(root), token)
    of_client = world.authority.client(x509.UniformResourceIdentifier(CLIENT))
    with_certificate = grpc.ssl_channel_credentials(root, *of_client)
    nobody = world.authority.client(x509.UniformResourceIdentifier("spiffe://mesh.test/client/eu/other"))
    with_none = grpc.ssl_channel_credentials(root, *nobody)
    for credentials, wanted in ((with_key, OK), (with_certificate, OK), (with_none, UNAVAILABLE)):
        with grpc.secure_channel(world.node.clients, credentials, options=options) as channel:
            try:
                channel.unary_unary(f"/{UNARY}")(b"", timeout=LONG)
                code = OK
            except grpc.RpcError as error:
                code = error.code()
        assert code == wanted


def test_what_dev_opens_is_said_and_a_file_that_says_something_stays_closed(tmp_path):
    node = Node(tmp_path / "open", "a", "eu", tmp_path / "ca", plaintext=True)
    try:
        log = node.err.read_text()
        assert log.count("may call every model and service") == 2 and "WARN" in log
        assert code_of(node) == grpc.StatusCode.NOT_FOUND
    finally:
        node.kill()
    node = Node(tmp_path / "closed", "a", "eu", tmp_path / "ca", tenants=[{"name": "lab"}])
    try:
        log = node.err.read_text()
        assert "may call every model" not in log and "nobody may call" in log
        assert code_of(node) == UNAUTHENTICATED
    finally:
        node.kill()


def check(path, *more):
    arguments = [BINARY, "node", "-c", str(path), "--check", *map(str, more)]
    environment = {"PATH": "/usr/bin:/bin"}
    options = {"capture_output": True, "text": True, "timeout": LONG, "env": environment}
    return subprocess.run(arguments, cwd=path.parent, **options)


def test_check_says_who_may_call(tmp_path):
    path = tmp_path / "node.toml"
    ca = ["--dev-ca", tmp_path / "ca"]
    rule = f'[[tenant]]\nname = "lab"\napi_key_sha256 = "{hashed(KEY)}"\n[[allow]]\ntenant = "*"\n'
    jwt = '[[access.jwt]]\nissuer = "i"\naudience = "a"\njwks = "gone.json"\n'
    closed = '[[tenant]]\nname = "lab"\n'
    for text, says in (("", "anonymous may call"), (rule, "; lab may call"), (closed, "nobody may call: add")):
        path.write_text(f'[node]\nname = "a"\n{text}')
        done = check(path, *ca)
        assert done.returncode == 0 and says in done.stdout and done.stderr == "", done
    for text, says in (
        (jwt, "gone.json cannot be read"),
        (jwt + jwt.replace('"i"', '"j"') + closed + 'jwt = ["s"]\n', 'write whose it is, as "i#s"'),
        ('[tls]\nclient_ca = "gone.pem"', "gone.pem does not exist"),
        ('[[tenant]]\nname = "lab"\napi_key_sha256 = "sk-1"', "sha256sum"),
    ):
        path.write_text(f'[node]\nname = "a"\n{text}')
        done = check(path, *ca)
        assert done.returncode == 2 and says in done.stderr and "sk-1" not in done.stderr, done


def test_dev_alone_opens_and_without_it_nobody_may_call(tmp_path):
    made = [BINARY, "ca", "dev", "--dir", tmp_path / "ca", "--trust-domain", "mesh.test", "--node", "eu/a"]
    subprocess.run(list(map(str, made)), check=True, capture_output=True, timeout=LONG)
    identity = tmp_path / ".isobar/identity"
    identity.mkdir(parents=True)
    (tmp_path / "ca/ca.pem").rename(identity / "ca.pem")
    own = tmp_path / "ca/nodes/eu/a"
    for name in ("cert.pem", "key.pem"):
        (own / name).rename(identity / name)
    path = tmp_path / "node.toml"
    path.write_text(
        '[node]\nname = "a"\nregion = "eu"\n[mesh]\ntrust_domain = "mesh.test"\n'
        f'[tls]\ncert = "{identity}/cert.pem"\nkey = "{identity}/key.pem"\n'
    )
    assert "nobody may call" in check(path).stdout
    assert "anonymous may call" in check(path, "--dev").stdout


def test_the_command_line_shows_keys_and_certificates(world, tmp_path):
    secret, certificate = world.authority.client(x509.UniformResourceIdentifier(CLIENT))
    (tmp_path / "key.pem").write_bytes(secret)
    (tmp_path / "cert.pem").write_bytes(certificate)
    shown = ["--cert", tmp_path / "cert.pem", "--key", tmp_path / "key.pem"]
    for command, more in (("call", ["-d", "{}"]), ("bench", ["-d", "{}", "--duration", "1s", "--rate", "5"])):
        for credential, wanted in ((["-H", f"x-api-key: {KEY}"], 0), (shown, 0), (["-H", "x-api-key: no"], 1)):
            proto = ["--proto", ROOT / "proto/isobar/test/v1/kinds.proto", "-I", ROOT / "proto"]
            arguments = [BINARY, command, world.node.clients, "--ca", world.node.ca, *credential, *proto]
            done = subprocess.run(
                list(map(str, [*arguments, UNARY, *more])), capture_output=True, text=True, timeout=LONG
            )
            assert done.returncode == wanted, (command, credential, done.stdout, done.stderr)


def test_no_later_name_in_a_request_opens_a_model(world):
    """Protobuf's last name counts, and each message of a stream has its own; the first one decides where the call goes."""
    secret = world.started[2]
    assert secret.model == "secret"

    def served():
        text = secret.http("/metrics")[1]
        lines = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
        return [float(line.rsplit(" ", 1)[1]) for line in lines]

    before = served()
    allowed, other = for_model("llama-1"), for_model("secret")
    for request in (allowed + other, allowed + b"\x12\x01x" + other):
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            credentials = grpc.ssl_channel_credentials(world.node.ca.read_bytes())
            with grpc.secure_channel(world.node.clients, credentials, compression=compression) as channel:
                with pytest.raises(grpc.RpcError) as refused:
                    channel.unary_unary(f"/{READY}")(request, timeout=LONG)
            assert refused.value.code() == DENIED, refused.value
            assert "may not call model secret" in refused.value.details()
    stream = "inference.GRPCInferenceService/ModelStreamInfer"
    requests = [kserve.ModelInferRequest(model_name=name).SerializeToString() for name in ("llama-1", "secret")]
    credentials = grpc.ssl_channel_credentials(world.node.ca.read_bytes())
    with grpc.secure_channel(world.node.clients, credentials) as channel:
        with pytest.raises(grpc.RpcError):
            list(channel.stream_stream(f"/{stream}")(iter(requests), timeout=LONG))
    assert served() == before


def test_the_example_of_the_readme_is_good(tmp_path):
    section = (ROOT / "README.md").read_text().split("### Say who may call\n")[1].split("\n### ")[0]
    parts = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    assert len(parts) == 2
    text = "\n".join(parts).replace("https://login.example/.well-known", "http://127.0.0.1:1")
    (tmp_path / "clients.pem").write_bytes(Authority().pem())
    path = tmp_path / "node.toml"
    path.write_text(f'[node]\nname = "a"\n[tls]\nclient_ca = "clients.pem"\n{text}')
    done = check(path, "--dev-ca", tmp_path / "ca")
    assert done.returncode == 0, done.stderr
    assert "search, public may call (callers who show nothing are public)" in done.stdout
