"""Models that are signed with OpenSSF model-signing: signed here by the library, checked by the command."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from model_signing import hashing, signing, verifying

from origin.model_dir import read_sources
from origin.model_signature import BUNDLE_FILE, check_signature
from shared.errors import EXIT_CONFIG, EXIT_INTEGRITY, ConfigError, ModelSignatureInvalid
from tests.harness import Lab, command, make_model


class Signer:
    """Somebody's key pair, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.pair = ec.generate_private_key(ec.SECP256R1())
        self.key, self.public = folder / "key", folder / "key.pub"
        self.key.write_bytes(
            self.pair.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self.public.write_bytes(
            self.pair.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )

    def sign(self, model: Path, how: hashing.Config | None = None) -> None:
        """As the tool does it: the bundle, what is not published and git's files are left out."""
        how = how or hashing.Config().set_ignored_paths(paths=[BUNDLE_FILE, "nearshard.toml", ".cache"])
        config = signing.Config().use_elliptic_key_signer(private_key=self.key)
        config.set_hashing_config(how).sign(model, model / BUNDLE_FILE)


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    """Who signs."""
    return Signer(tmp_path / "signer")


@pytest.fixture
def model(tmp_path: Path, signer: Signer) -> Path:
    """A model that is signed, with files in its directory that are not published."""
    directory = tmp_path / "model"
    make_model(directory, width=64)
    (directory / ".cache").mkdir()
    (directory / ".cache" / "lock").touch()
    signer.sign(directory)
    return directory


def publish(lab: Lab, model: Path, *words: object, path: str = "") -> subprocess.CompletedProcess[str]:
    """Publish into the lab's store; however it ends. ``path``: where Python looks for modules first."""
    store = ["--store", str(lab.store)]
    return command("publish", str(model), "acme/tiny", *store, *map(str, words), check=False, PYTHONPATH=path)


def check(model: Path, *, key: Path | None = None, certificates: Path | None = None) -> None:
    """The check alone."""
    check_signature(model, read_sources(model, None)[1], model / BUNDLE_FILE, key=key, certificates=certificates)


def test_a_signed_model_is_published_and_whoever_pulls_it_can_check_it(
    lab: Lab, model: Path, signer: Signer, tmp_path: Path
) -> None:
    done = publish(lab, model, "--verify-signature", signer.public)
    assert done.returncode == 0, done.stderr
    router = lab.router(lab.origin())
    command("pull", "acme/tiny", "-o", str(tmp_path / "out"), "--router", router.url)
    assert (tmp_path / "out" / BUNDLE_FILE).read_bytes() == (model / BUNDLE_FILE).read_bytes()
    pulled = verifying.Config().use_elliptic_key_verifier(public_key=signer.public)
    pulled.verify(tmp_path / "out", tmp_path / "out" / BUNDLE_FILE)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda model: (model / "config.json").write_text('{"layers": 4}'), "config.json"),
    "added": (lambda model: (model / "more.json").write_text("{}"), "more.json"),
    "missing": (lambda model: (model / "config.json").unlink(), "config.json"),
    "bundle missing": (lambda model: (model / BUNDLE_FILE).unlink(), "no such file"),
    "bundle broken": (lambda model: (model / BUNDLE_FILE).write_text("[]"), BUNDLE_FILE),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_not_as_it_was_signed_is_refused_by_name(model: Path, signer: Signer, what: str) -> None:
    spoil, named = SPOILED[what]
    spoil(model)
    with pytest.raises(ModelSignatureInvalid, match=named):
        check(model, key=signer.public)


def test_nothing_is_stored_of_what_is_not_as_it_was_signed(lab: Lab, model: Path, signer: Signer) -> None:
    (model / "config.json").write_text('{"layers": 4}')
    before = {file: file.stat().st_mtime_ns for file in lab.store.rglob("*")}
    done = publish(lab, model, "--verify-signature", signer.public)
    assert done.returncode == EXIT_INTEGRITY, done.stderr
    assert "config.json" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in lab.store.rglob("*")} == before


def test_another_key_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSignatureInvalid, match="Key mismatch"):
        check(model, key=Signer(tmp_path / "other").public)


def test_a_signature_by_another_key_under_the_right_name_is_refused(
    model: Path, signer: Signer, tmp_path: Path
) -> None:
    good = (model / BUNDLE_FILE).read_text()
    Signer(tmp_path / "other").sign(model)
    forged = (model / BUNDLE_FILE).read_text()
    hint = '"hint":'
    (model / BUNDLE_FILE).write_text(forged.replace(_after(forged, hint), _after(good, hint)))
    with pytest.raises(ModelSignatureInvalid, match="not a signature of this key"):
        check(model, key=signer.public)


def _after(bundle: str, name: str) -> str:
    return bundle.split(name, 1)[1].split('"')[1]


def test_what_the_signer_left_out_is_not_published_as_signed(model: Path, signer: Signer) -> None:
    (model / ".gitattributes").write_text("* text")
    with pytest.raises(ModelSignatureInvalid, match=r"not signed: \.gitattributes"):
        check(model, key=signer.public)
    (model / "nearshard.toml").write_text('exclude = [".gitattributes"]')
    check(model, key=signer.public)
    signer.sign(model, hashing.Config().set_ignored_paths(paths=["nearshard.toml", "tokenizer.json"]))
    with pytest.raises(ModelSignatureInvalid, match=r"not signed: tokenizer\.json"):
        check(model, key=signer.public)


def test_what_is_signed_and_not_published_is_named(model: Path, signer: Signer) -> None:
    (model / BUNDLE_FILE).unlink()
    signer.sign(model, hashing.Config())
    with pytest.raises(ModelSignatureInvalid, match=r"Missing files .*\.cache/lock, nearshard\.toml"):
        check(model, key=signer.public)


def test_a_model_that_was_signed_in_parts_or_holds_links_is_checked(model: Path, signer: Signer) -> None:
    shutil.move(model / "tokenizer.json", model / "t.json")
    (model / "tokenizer.json").symlink_to("t.json")
    how = hashing.Config().use_shard_serialization(shard_size=100_000).set_allow_symlinks(True)
    signer.sign(model, how.set_ignored_paths(paths=[BUNDLE_FILE, "nearshard.toml", ".cache"]))
    check(model, key=signer.public)
    with (model / "tokenizer.json").open("r+b") as file:
        file.seek(150_000)
        file.write(b"\0\1\2\3")
    with pytest.raises(ModelSignatureInvalid, match=r"Hash mismatch"):
        check(model, key=signer.public)


def test_the_bundle_may_have_another_name_and_is_in_the_model(
    lab: Lab, model: Path, signer: Signer, tmp_path: Path
) -> None:
    (model / BUNDLE_FILE).rename(model / "acme.sig")
    done = publish(lab, model, "--verify-signature", signer.public, "--signature", model / "acme.sig")
    assert done.returncode == 0, done.stderr
    shutil.copy(model / "acme.sig", tmp_path)
    done = publish(lab, model, "--verify-signature", signer.public, "--signature", tmp_path / "acme.sig")
    assert done.returncode == EXIT_INTEGRITY and "is not published with the model" in done.stderr
    done = publish(lab, model, "--signature", model / "acme.sig")
    assert done.returncode == EXIT_CONFIG, "a signature is never left unchecked by a forgotten word"


def certify(name: str, signer: Signer, issuer: Signer, *, ca: bool) -> x509.Certificate:
    """A certificate of ``signer``, by ``issuer``, which is called CA."""
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA")]),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        signer.pair.public_key(),
        x509.random_serial_number(),
        now,
        now + timedelta(days=1),
    )
    usage = x509.KeyUsage(not ca, False, False, False, False, ca, False, False, False)
    builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True).add_extension(usage, critical=True)
    return builder.sign(issuer.pair, hashes.SHA256())


def test_a_model_signed_with_a_certificate_is_checked_by_its_ca(
    lab: Lab, model: Path, signer: Signer, tmp_path: Path
) -> None:
    authority = Signer(tmp_path / "ca")
    chain, leaf = tmp_path / "ca.pem", tmp_path / "leaf.pem"
    chain.write_bytes(certify("CA", authority, authority, ca=True).public_bytes(serialization.Encoding.PEM))
    leaf.write_bytes(certify("signer", signer, authority, ca=False).public_bytes(serialization.Encoding.PEM))
    config = signing.Config().use_certificate_signer(
        private_key=signer.key, signing_certificate=leaf, certificate_chain=[chain]
    )
    how = hashing.Config().set_ignored_paths(paths=[BUNDLE_FILE, "nearshard.toml", ".cache"])
    config.set_hashing_config(how).sign(model, model / BUNDLE_FILE)
    assert publish(lab, model, "--verify-certificates", chain).returncode == 0

    stranger = Signer(tmp_path / "stranger")
    chain.write_bytes(certify("CA", stranger, stranger, ca=True).public_bytes(serialization.Encoding.PEM))
    with pytest.raises(ModelSignatureInvalid):
        check(model, certificates=chain)


def test_what_is_no_key_is_a_setting_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "none.pub").write_text("no key")
    for file in (tmp_path / "none.pub", tmp_path / "missing.pub"):
        with pytest.raises(ConfigError, match=file.name):
            check(model, key=file)


def test_without_the_library_it_says_how_to_get_it(lab: Lab, model: Path, signer: Signer, tmp_path: Path) -> None:
    (tmp_path / "path" / "model_signing").mkdir(parents=True)
    (tmp_path / "path" / "model_signing" / "__init__.py").write_text("raise ImportError('not here')")
    done = publish(lab, model, "--verify-signature", signer.public, path=str(tmp_path / "path"))
    assert done.returncode == EXIT_CONFIG
    assert "pip install 'nearshard[model-signing]'" in done.stderr
