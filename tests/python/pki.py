"""A company's own authority: roots, intermediates and certificates made with the `cryptography` package."""

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOUR = timedelta(hours=1)
DER, PEM = serialization.Encoding.DER, serialization.Encoding.PEM
PKCS8, PLAIN = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


@dataclass
class Certified:
    """A certificate with its intermediates, its own first, and its key."""

    chain: list
    key: object

    @property
    def leaf(self) -> x509.Certificate:
        return self.chain[0]

    @property
    def serial(self) -> int:
        return self.leaf.serial_number

    def pem(self) -> bytes:
        return b"".join(one.public_bytes(PEM) for one in self.chain)

    def der(self) -> bytes:
        return b"".join(one.public_bytes(DER) for one in self.chain)

    def key_pem(self) -> bytes:
        return self.key.private_bytes(PEM, PKCS8, PLAIN)

    def key_der(self) -> bytes:
        return self.key.private_bytes(DER, PKCS8, PLAIN)


class Authority:
    """A root, or an intermediate under `above`."""

    def __init__(self, name: str, above=None, depth=1):
        self.above, self.key = above, ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=depth)
        builder = begun(subject, self.key, 1000 * HOUR).add_extension(constraints, critical=True)
        builder = builder.add_extension(usage(signs=True), critical=True)
        signer = above or self
        issuer = above.certificate.subject if above else subject
        self.certificate = builder.issuer_name(issuer).sign(signer.key, hashes.SHA256())

    def issue(self, uri=None, hosts=("localhost",), life=HOUR) -> Certified:
        """A certificate for a member of a mesh, or for names."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(uri)] if uri else []
        names += [x509.DNSName(host) for host in hosts]
        names += [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            begun(x509.Name([]), key, life)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
        )
        return Certified([builder.sign(self.key, hashes.SHA256()), *self.below_root()], key)

    def below_root(self) -> list:
        """Its own certificate and those above it, without the root."""
        return [self.certificate, *self.above.below_root()] if self.above else []

    def pem(self) -> bytes:
        return self.certificate.public_bytes(PEM)

    def der(self) -> bytes:
        return self.certificate.public_bytes(DER)

    def key_pem(self) -> bytes:
        return self.key.private_bytes(PEM, PKCS8, PLAIN)


def begun(subject, key, life) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + life)
    )


def usage(signs: bool) -> x509.KeyUsage:
    names = (
        "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "encipher_only", "decipher_only",
    )
    rest = {name: False for name in names}
    return x509.KeyUsage(digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, **rest)


def member(name: str, region: str, mesh="mesh.test", role="node") -> str:
    return f"spiffe://{mesh}/{role}/{region}/{name}"


def put(path: Path, content: bytes, secret=False):
    """Replaces a file at one moment, as those do who know that it is read meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    descriptor = os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600 if secret else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.rename(new, path)
