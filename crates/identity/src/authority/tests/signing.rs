//! Making an authority, opening it, and what it signs.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls::pki_types::PrivateKeyDer;

use super::*;
use crate::{
    CsrError,
    authority::csr::requested_key,
    certificate::{names, peer_id},
    node::{Paths, check_key},
};

#[test]
fn an_authority_keeps_its_keys_to_itself() {
    let mesh = Mesh::new();
    for secret in ["root.key", "authority/issuer.key"] {
        assert_eq!(mode(&mesh.path(secret)), 0o600, "{secret}");
    }
    assert_eq!(mode(&mesh.path("authority/tokens")), 0o700);
    let authority = mesh.open(now());
    assert!(!format!("{authority:?}").contains("key"));
    assert_eq!((authority.trust_domain(), authority.life()), (&domain(), DAY));
    assert_eq!(authority.roots().len(), 1);
    let left: Vec<_> = fs::read_dir(mesh.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn a_second_authority_in_one_directory_is_refused() {
    let mesh = Mesh::new();
    let error = message(Authority::init(mesh.dir.path(), &domain(), DAY, now()));
    assert!(error.contains("is there already"), "{error}");
    let inside = mesh.path("authority");
    let error = message(Authority::init(&inside, &domain(), DAY, now()));
    assert!(error.contains("is there already"), "{error}");
}

#[test]
fn a_life_out_of_range_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for life in [Duration::ZERO, DAY * 91] {
        let error = message(Authority::init(dir.path(), &domain(), life, now()));
        assert!(error.contains("between 1s and 90d"), "{error}");
    }
}

#[test]
fn a_certificate_is_believed_under_the_root_and_says_who_it_is_for() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let node = id(Role::Node, "a");
    let ips = [REMOTE];
    let chain = authority.sign(&node, &csr(), &ips, now()).unwrap();
    assert_eq!(chain.len(), 2, "its own and the issuing one, not the root");
    assert!(believed(&chain, authority.roots(), now()));
    assert_eq!(peer_id(&chain).unwrap(), node);
    let names = names(&chain[0]).unwrap();
    assert!(names.has_host("a") && names.has_host("localhost") && names.has_ip(&REMOTE));
    assert_eq!(begins(&chain), now() - Duration::from_secs(300));
    assert_eq!(ends(&chain), now() + DAY);
}

#[test]
fn both_directories_open_the_same_authority() {
    let mesh = Mesh::new();
    let outer = mesh.open(now());
    let inner = Authority::open(&mesh.path("authority"), now()).unwrap();
    assert_eq!(outer.root_fingerprint(), inner.root_fingerprint());
}

#[test]
fn short_lives_begin_a_quarter_before() {
    let dir = tempfile::tempdir().unwrap();
    Authority::init(dir.path(), &domain(), Duration::from_secs(20), now()).unwrap();
    let authority = Authority::open(dir.path(), now()).unwrap();
    let chain = authority.sign(&id(Role::Node, "a"), &csr(), &[], now()).unwrap();
    assert_eq!(begins(&chain), now() - Duration::from_secs(5));
    assert_eq!(ends(&chain), now() + Duration::from_secs(20));
}

#[test]
fn nothing_is_signed_past_the_end_of_the_issuer() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let end = authority.status().unwrap().until;
    let node = id(Role::Node, "a");
    let clipped = authority.sign(&node, &csr(), &[], end - HOUR * 3).unwrap();
    assert_eq!(ends(&clipped), end);
    let error = message(authority.sign(&node, &csr(), &[], end - HOUR * 2));
    assert!(error.contains("isobar ca rotate --issuer"), "{error}");
    let refusal = authority.renew(&clipped[0], &csr(), &[], end - HOUR).unwrap_err();
    assert_eq!(refusal.label(), "issuer_ending");
    let late = end + HOUR;
    let error = message(Authority::open(mesh.dir.path(), late));
    assert!(error.contains("expired on") && error.contains("ca rotate --issuer"), "{error}");
    Authority::rotate_issuer(mesh.dir.path(), late).unwrap();
    assert!(mesh.open(late).sign(&node, &csr(), &[], late).is_ok());
}

#[test]
fn clients_and_operators_are_no_servers() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    for role in [Role::Client, Role::Operator] {
        let chain = authority.sign_for(&id(role, "a"), &csr(), &[], DAY * 90, now()).unwrap();
        assert!(believed(&chain, authority.roots(), now()));
        let (_, x509) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
        let usage = x509.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth);
    }
    for (role, life) in
        [(Role::Client, DAY * 91), (Role::Node, DAY * 3), (Role::Node, Duration::ZERO)]
    {
        let refused = authority.sign_for(&id(role, "a"), &csr(), &[], life, now());
        assert!(message(refused).contains("lives from 1s"));
    }
}

#[test]
fn members_of_another_mesh_are_not_signed_for() {
    let mesh = Mesh::new();
    let mut foreign = id(Role::Node, "a");
    foreign.trust_domain = "other.test".parse().unwrap();
    let error = message(mesh.open(now()).sign(&foreign, &csr(), &[], now()));
    assert!(error.contains("mesh.test"), "{error}");
}

#[test]
fn its_own_certificate_shows_the_whole_chain() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let (chain, key) = authority.own(&region(), &name("a"), now()).unwrap();
    assert_eq!(chain.len(), 3);
    assert_eq!(peer_id(&chain).unwrap(), id(Role::Authority, "a"));
    assert_eq!(super::super::issuing::fingerprint(&chain[2]), authority.root_fingerprint());
    assert!(believed(&chain, &chain[2..], now()));
    let (other, other_key) = authority.own(&region(), &name("a"), now()).unwrap();
    assert!(chain[0] != other[0] && key != other_key);
}

#[test]
fn an_authority_that_cannot_be_trusted_is_not_opened() {
    let refusal = |spoil: &dyn Fn(&Mesh), says: &str| {
        let mesh = Mesh::new();
        spoil(&mesh);
        let error = message(Authority::open(mesh.dir.path(), now()));
        assert!(error.contains(says), "{says}: {error}");
    };
    let other = Mesh::new();
    let copy = |mesh: &Mesh, file: &str| {
        fs::copy(other.path(file), mesh.path(file)).unwrap();
    };
    let remove = |mesh: &Mesh, file: &str| fs::remove_file(mesh.path(file)).unwrap();
    let set = |mesh: &Mesh, text: &str| {
        fs::write(mesh.path("authority/authority.toml"), text).unwrap();
    };
    refusal(&|mesh| remove(mesh, "authority/authority.toml"), "isobar ca init");
    refusal(&|mesh| remove(mesh, "authority/issuer.pem"), "issuer.pem does not exist");
    refusal(&|mesh| remove(mesh, "authority/issuer.key"), "issuer.key does not exist");
    refusal(&|mesh| remove(mesh, "authority/roots.pem"), "roots.pem does not exist");
    refusal(&|mesh| copy(mesh, "authority/issuer.key"), "is not the private key of");
    refusal(&|mesh| copy(mesh, "authority/roots.pem"), "does not vouch for");
    refusal(&|mesh| set(mesh, "trust_domain = \"x.test\"\nlife = \"24h\""), "not for the trust");
    refusal(&|mesh| set(mesh, "trust_domain = \"mesh.test\"\nlife = \"soon\""), "such as 24h");
    refusal(&|mesh| set(mesh, "trust_domain = \"mesh.test\"\nlife = \"1y\""), "between 1s and");
    refusal(&|mesh| set(mesh, "trust_domain = \"mesh.test\"\nlive = \"24h\""), "live");
    let expose = |mesh: &Mesh| {
        let key = mesh.path("authority/issuer.key");
        fs::set_permissions(key, fs::Permissions::from_mode(0o640)).unwrap();
    };
    refusal(&expose, "chmod 600");
    let leaf = |mesh: &Mesh| {
        let key = crate::files::read_key(&mesh.path("authority/issuer.key"), "").unwrap();
        let chain =
            mesh.open(now()).sign(&id(Role::Node, "a"), &make_request(&key).unwrap(), &[], now());
        let pem = super::super::make::pem_of(&chain.unwrap());
        fs::write(mesh.path("authority/issuer.pem"), pem).unwrap();
    };
    refusal(&leaf, "CA is not set");
    refusal(&|mesh| fs::write(mesh.path("authority/revoked.pb"), "x").unwrap(), "damaged");
}

/// A root and an intermediate of somebody else, in files.
struct External {
    dir: TempDir,
}

impl External {
    fn new(spoil: impl Fn(&mut CertificateParams)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = |name: &str| {
            let mut params = CertificateParams::new([]).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params.not_before = (now() - DAY).into();
            params.not_after = (now() + DAY * 100).into();
            params
        };
        let key = || KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let (root, middle, issuer) = (key(), key(), key());
        let root_pem = ca("root").self_signed(&root).unwrap().pem();
        let root = Issuer::new(ca("root"), root);
        let middle_pem = ca("middle").signed_by(&middle, &root).unwrap().pem();
        let middle = Issuer::new(ca("middle"), middle);
        let mut params = ca("issuer");
        spoil(&mut params);
        let issuer_pem = params.signed_by(&issuer, &middle).unwrap().pem();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        };
        write("roots.pem", &root_pem);
        write("cert.pem", &format!("{issuer_pem}{middle_pem}"));
        write("key.pem", &issuer.serialize_pem());
        Self { dir }
    }

    fn import(&self, into: &Path) -> Result<(), IdentityError> {
        let path = |name: &str| self.dir.path().join(name);
        let (cert, key, roots) = (path("cert.pem"), path("key.pem"), path("roots.pem"));
        Authority::import(into, &domain(), DAY, (&cert, &key, &roots), now())
    }
}

#[test]
fn an_intermediate_of_somebody_else_signs_too() {
    let external = External::new(|_| ());
    let dir = tempfile::tempdir().unwrap();
    external.import(dir.path()).unwrap();
    assert!(!dir.path().join("root.key").exists());
    assert_eq!(mode(&dir.path().join("authority/issuer.key")), 0o600);
    let authority = Authority::open(dir.path(), now()).unwrap();
    let chain = authority.sign(&id(Role::Node, "a"), &csr(), &[], now()).unwrap();
    assert_eq!(chain.len(), 3);
    let roots = read_roots(&external.dir.path().join("roots.pem"));
    assert!(believed(&chain, &roots, now()));
    let list = authority.revocations().verify(&store(&roots), &domain(), now()).unwrap();
    assert!(list.is_empty());
    let error = message(Authority::rotate(dir.path(), false, now()));
    assert!(error.contains("somebody else's"), "{error}");
}

#[test]
fn an_intermediate_that_cannot_sign_is_not_taken() {
    let refused = |spoil: &dyn Fn(&mut CertificateParams), says: &str| {
        let dir = tempfile::tempdir().unwrap();
        let error = message(External::new(spoil).import(dir.path()));
        assert!(error.contains(says), "{says}: {error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    };
    refused(&|params| params.is_ca = IsCa::ExplicitNoCa, "CA is not set");
    refused(&|params| params.key_usages = vec![KeyUsagePurpose::CrlSign], "key usage");
    refused(&|params| params.not_after = (now() - HOUR).into(), "expired on");
    let uri = |params: &mut CertificateParams| {
        let uri = SanType::URI("spiffe://other.test".try_into().unwrap());
        params.subject_alt_names.push(uri);
    };
    refused(&uri, "other.test");
    let external = External::new(|_| ());
    let stranger = External::new(|_| ());
    fs::copy(stranger.dir.path().join("roots.pem"), external.dir.path().join("roots.pem")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    assert!(message(external.import(dir.path())).contains("does not vouch"));
}

#[test]
fn requests_that_prove_nothing_are_refused() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let sign = |csr: &[u8]| match authority.sign(&id(Role::Node, "a"), csr, &[], now()) {
        Err(IdentityError::Csr(error)) => Some(error),
        other => other.map(|_| None).unwrap(),
    };
    assert_eq!(sign(&[0; 8_193]), Some(CsrError::TooLong(8_193)));
    assert_eq!(sign(b"hello"), Some(CsrError::Unreadable));
    let good = csr();
    assert_eq!(sign(&[good.as_slice(), &[0]].concat()), Some(CsrError::Unreadable));
    for at in 0..good.len() {
        let mut changed = good.clone();
        changed[at] ^= 1;
        // Around what is signed an encoding may have a bit to spare; the key in it has none.
        if let Ok(key) = requested_key(&changed) {
            assert_eq!(key, requested_key(&good).unwrap(), "{at}");
        }
    }
    let (other, key) = (csr(), 70..80);
    let mut swapped = good;
    swapped[key.clone()].copy_from_slice(&other[key]);
    assert_eq!(sign(&swapped), Some(CsrError::Signature));
}

#[test]
fn keys_of_the_usual_kinds_are_certified_and_others_are_not() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let sign = |algorithm: &'static rcgen::SignatureAlgorithm| {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        authority.sign(&id(Role::Node, "a"), &make_request(&key).unwrap(), &[], now())
    };
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ] {
        let chain = sign(algorithm).unwrap();
        assert!(believed(&chain, authority.roots(), now()), "{algorithm:?}");
    }
    assert!(message(sign(&rcgen::PKCS_ECDSA_P521_SHA512)).contains("ECDSA P-256"));
}

#[test]
fn names_in_a_request_are_ignored() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(["evil.example".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let uri = "spiffe://mesh.test/operator/eu/root".try_into().unwrap();
    params.subject_alt_names.push(SanType::URI(uri));
    let csr = params.serialize_request(&key).unwrap();
    let chain = authority.sign(&id(Role::Node, "a"), csr.der(), &[], now()).unwrap();
    assert_eq!(peer_id(&chain).unwrap(), id(Role::Node, "a"));
    assert!(!names(&chain[0]).unwrap().has_host("evil.example"));
    let (_, x509) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
    assert!(!x509.is_ca());
}

#[test]
fn an_identity_by_hand_is_three_files() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let out = mesh.path("out");
    let issue = |keep_key, now| {
        authority.issue_to(&out, keep_key, &id(Role::Operator, "me"), &[], HOUR, now)
    };
    assert!(message(issue(true, now())).contains("--keep-key"), "there is none to keep");
    assert!(!out.exists());
    let issued = |keep_key| {
        issue(keep_key, now()).unwrap();
        let [cert, key] = ["cert.pem", "key.pem"].map(|name| out.join(name));
        let secret = crate::files::read_secret_key(&key, "").unwrap();
        let paths = Paths { ca: &cert, cert: &cert, key: &key };
        check_key(paths, &read_roots(&cert), &secret).unwrap();
        secret
    };
    let (first, second) = (issued(false), issued(false));
    assert_ne!(first, second, "whoever took the first has nothing of the second");
    assert_eq!(issued(true), second);
    let before = fs::read(out.join("cert.pem")).unwrap();
    assert!(issue(false, now() + DAY * 365).is_err());
    assert_eq!(fs::read(out.join("cert.pem")).unwrap(), before, "a refusal changes nothing");
    assert_eq!(mode(&out.join("key.pem")), 0o600);
    let chain = read_roots(&out.join("cert.pem"));
    assert!(believed(&chain, &read_roots(&out.join("ca.pem")), now()));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 3);
}

#[test]
fn whatever_a_running_node_must_take_in_is_noticed() {
    let mesh = Mesh::new();
    let changed = |change: &dyn Fn(&Authority)| {
        let authority = mesh.open(now());
        assert!(!authority.has_changed());
        change(&authority);
        let noticed = authority.has_changed();
        assert!(!mesh.open(now()).has_changed());
        noticed
    };
    let revoke = |authority: &Authority| {
        authority.revoke(&id(Role::Node, "a"), now()).unwrap();
    };
    assert!(changed(&revoke));
    assert!(changed(&|_| Authority::rotate_issuer(mesh.dir.path(), now()).unwrap()));
    let rotate = |_: &Authority| {
        Authority::rotate(mesh.dir.path(), false, now()).unwrap();
    };
    assert!(changed(&rotate));
    assert!(!changed(&|authority| drop(authority.issue_token(&scope("a", 1), now()).unwrap())));
    let settings = mesh.path("authority/authority.toml");
    assert!(changed(
        &|_| fs::write(&settings, "trust_domain = \"mesh.test\"\nlife = \"2h\"").unwrap()
    ));
}
