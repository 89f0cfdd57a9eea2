"""Certificates for the tests of TLS, made when they are needed: authorities, servers, clients.

Good ones, and ones that are wrong in the one way a test is about.
"""

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KeyKind = Literal["ec", "rsa", "ed25519"]
DigestName = Literal["sha256", "sha384", "sha512"]
Digest = hashes.SHA256 | hashes.SHA384 | hashes.SHA512

_DAY = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate with its key; ``pem`` has the chain, but for the root."""

    certificate: x509.Certificate
    key: CertificateIssuerPrivateKeyTypes
    chain: bytes = b""

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM) + self.chain

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    def key_pem(self, password: str = "") -> bytes:
        encryption: KeySerializationEncryption = NoEncryption()
        if password:
            encryption = BestAvailableEncryption(password.encode())
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    def write(self, folder: Path, name: str, *, password: str = "") -> tuple[Path, Path]:
        """Write ``name.crt`` and ``name.key``, replacing what is there; returns both paths."""
        certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
        certificate.write_bytes(self.pem)
        key.unlink(missing_ok=True)
        key.touch(0o600)
        key.write_bytes(self.key_pem(password))
        return certificate, key


class Authority:
    """Signs certificates. ``Authority("x")`` is a root, ``root.intermediate("y")`` one below it."""

    def __init__(
        self, name: str, issuer: "Authority | None" = None, *, key: KeyKind = "ec"
    ) -> None:
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = _new_key(key)
        self._issuer = issuer
        signer = issuer or self
        builder = _builder(self.name, self.key, signer.name, -_DAY, 30 * _DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        builder = builder.add_extension(_AUTHORITY_USAGE, True)
        self.certificate = builder.sign(signer.key, _digest(signer.key, "sha256"))

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def write(self, folder: Path, name: str) -> Path:
        """Write ``name.crt``; returns its path."""
        path = folder / f"{name}.crt"
        path.write_bytes(self.pem)
        return path

    def intermediate(self, name: str) -> "Authority":
        return Authority(name, self)

    def issue(
        self,
        *names: str,
        common_name: str | None = None,
        begins: dt.timedelta = -_DAY,
        ends: dt.timedelta = 30 * _DAY,
        key: KeyKind = "ec",
        digest: DigestName = "sha256",
        for_client: bool = False,
    ) -> Certificate:
        """A certificate for a server at these host names and addresses, or for a client.

        The common name is what PostgreSQL takes for the user of a client. ``ends`` in the past
        makes one that has expired, ``begins`` in the future one that is not valid yet.
        """
        private = _new_key(key)
        cn = common_name if common_name is not None else names[0]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)])
        builder = _builder(subject, private, self.name, min(begins, ends - _DAY), ends)
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]), False
            )
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH if for_client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        certificate = builder.sign(self.key, _digest(self.key, digest))
        return Certificate(certificate, private, b"" if self._issuer is None else self.pem)

    def revocations(self, *revoked: Certificate) -> bytes:
        """A list of certificates that are no longer good, as PEM (a CRL)."""
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateRevocationListBuilder(self.name, now - _DAY, now + 30 * _DAY)
        for each in revoked:
            entry = x509.RevokedCertificateBuilder(each.certificate.serial_number, now - _DAY)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.key, _digest(self.key, "sha256")).public_bytes(Encoding.PEM)


def self_signed(*names: str) -> Certificate:
    """A server's certificate that nobody vouches for."""
    authority = Authority(names[0])
    return Certificate(authority.certificate, authority.key)


_AUTHORITY_USAGE = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=True,
    crl_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


def _builder(
    subject: x509.Name,
    key: CertificateIssuerPrivateKeyTypes,
    issuer: x509.Name,
    begins: dt.timedelta,
    ends: dt.timedelta,
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(), now + begins, now + ends
    )


def _new_key(kind: KeyKind) -> CertificateIssuerPrivateKeyTypes:
    match kind:
        case "ec":
            return ec.generate_private_key(ec.SECP256R1())
        case "rsa":
            return rsa.generate_private_key(65537, 2048)
        case "ed25519":
            return ed25519.Ed25519PrivateKey.generate()


def _digest(key: CertificateIssuerPrivateKeyTypes, name: DigestName) -> Digest | None:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return None  # it has its own
    match name:
        case "sha256":
            return hashes.SHA256()
        case "sha384":
            return hashes.SHA384()
        case "sha512":
            return hashes.SHA512()


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
