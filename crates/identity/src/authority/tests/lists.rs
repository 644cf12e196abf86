//! Excluding members: what a list says, who may sign it, and how lists of several authorities come together.

use rcgen::KeyPair;

use super::*;
use crate::{
    REVOCATIONS_MAX_BYTES, RevocationError, Revocations, Revoked, SignedRevocations, dev::random,
};

fn verified(authority: &Authority, now: SystemTime) -> Revocations {
    authority.revocations().verify(&store(authority.roots()), &domain(), now).unwrap()
}

fn list(version: u64, names: &[&str]) -> Revocations {
    let revoked = Revoked { at: now(), forget_at: now() + DAY * 2 };
    let entries = names.iter().map(|name| (id(Role::Node, name), revoked)).collect();
    Revocations { version, entries }
}

/// A list as `signer` would sign it, whatever its role.
fn signed_by(mesh: &Mesh, signer: &SpiffeId, list: &Revocations) -> SignedRevocations {
    let key = make_key().unwrap();
    let csr = make_request(&key).unwrap();
    let chain = mesh.open(now()).sign(signer, &csr, &[], now()).unwrap();
    let key = KeyPair::try_from(&key).unwrap();
    SignedRevocations::sign(list, &domain(), &chain, &key, now()).unwrap()
}

#[test]
fn a_revocation_excludes_what_began_before_it() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    assert_eq!(authority.revocations().version(), 0);
    let a = id(Role::Node, "a");
    let version = authority.revoke(&a, now()).unwrap();
    assert_eq!(version, 1_800_000_000);
    let list = verified(&mesh.open(now()), now());
    assert_eq!(list.version(), version);
    assert!(list.revokes(&a, now()) && list.revokes(&a, now() - HOUR));
    assert!(!list.revokes(&a, now() + Duration::from_secs(1)));
    assert!(!list.revokes(&id(Role::Client, "a"), now()));
    assert_eq!(authority.revoke(&id(Role::Node, "b"), now()).unwrap(), version + 1);
    assert_eq!(verified(&mesh.open(now()), now()).len(), 2);
}

#[test]
fn an_entry_is_forgotten_when_nothing_it_excludes_is_valid() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    authority.revoke(&id(Role::Node, "a"), now()).unwrap();
    authority.revoke(&id(Role::Client, "a"), now()).unwrap();
    let soon = now() + DAY * 2 - HOUR;
    assert_eq!(verified(&mesh.open(soon), soon).len(), 2);
    let later = now() + DAY * 2;
    let reopened = mesh.open(later);
    assert_eq!(verified(&reopened, later).len(), 1, "clients live longer");
    assert!(reopened.revocations().version() > authority.revocations().version());
    let end = now() + DAY * 90;
    assert!(verified(&mesh.open(end), end).is_empty());
}

#[test]
fn only_an_authority_of_the_mesh_can_sign() {
    let mesh = Mesh::new();
    let roots = store(mesh.open(now()).roots());
    let good = signed_by(&mesh, &id(Role::Authority, "x"), &list(7, &["a"]));
    assert_eq!(good.verify(&roots, &domain(), now()).unwrap(), list(7, &["a"]));
    for role in [Role::Node, Role::Client, Role::Operator] {
        let refused = signed_by(&mesh, &id(role, "x"), &list(7, &["a"]));
        assert!(refused.verify(&roots, &domain(), now()).is_err(), "{role}");
    }
    let other = signed_by(&Mesh::new(), &id(Role::Authority, "x"), &list(7, &["a"]));
    let error = other.verify(&roots, &domain(), now()).unwrap_err();
    assert!(matches!(error, RevocationError::Untrusted(_)), "{error}");
    let error = good.verify(&roots, &"other.test".parse().unwrap(), now()).unwrap_err();
    assert!(matches!(error, RevocationError::OtherMesh { .. }), "{error}");
    let error = good.verify(&roots, &domain(), now() - HOUR).unwrap_err();
    assert!(matches!(error, RevocationError::FromTheFuture(_)), "{error}");
}

#[test]
fn a_key_that_is_not_the_signers_is_noticed() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let (chain, _) = authority.own(&region(), &name("x"), now()).unwrap();
    let key = KeyPair::generate().unwrap();
    let forged = SignedRevocations::sign(&list(7, &["a"]), &domain(), &chain, &key, now()).unwrap();
    let error = forged.verify(&store(authority.roots()), &domain(), now()).unwrap_err();
    assert!(matches!(error, RevocationError::Forged), "{error}");
}

#[test]
fn a_list_holds_on_long_after_its_signer_has_expired() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    authority.revoke(&id(Role::Client, "a"), now()).unwrap();
    let list = mesh.open(now());
    assert_eq!(verified(&list, now() + DAY * 30).len(), 1);
}

#[test]
fn no_changed_byte_is_believed() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    authority.revoke(&id(Role::Node, "a"), now()).unwrap();
    let authority = mesh.open(now());
    let roots = store(authority.roots());
    let good = authority.revocations().encode();
    let truth = verified(&authority, now());
    for at in 0..good.len() {
        let mut bytes = good.to_vec();
        bytes[at] ^= 1 << (at % 8);
        let Ok(changed) = SignedRevocations::decode(&bytes) else { continue };
        if let Ok(list) = changed.verify(&roots, &domain(), now()) {
            assert_eq!(list, truth, "{at}");
        }
    }
    for end in 0..good.len() {
        let cut = SignedRevocations::decode(&good[..end]);
        assert!(cut.is_err() || cut.unwrap().verify(&roots, &domain(), now()).is_err(), "{end}");
    }
}

#[test]
fn no_bytes_make_the_reader_panic() {
    for round in 0..20_000_usize {
        let noise = random::<96>().unwrap();
        drop(SignedRevocations::decode(&noise[..round % noise.len()]));
        // Noise where the list would be.
        let length = u8::try_from(round % 90).unwrap();
        let framed = [&[0x0a, length], &noise[..usize::from(length)]].concat();
        drop(SignedRevocations::decode(&framed));
    }
    assert!(SignedRevocations::decode(&vec![0; REVOCATIONS_MAX_BYTES + 1]).is_err());
}

#[test]
fn a_list_that_is_full_says_so_and_stays_as_it_was() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let names: Vec<_> = (0..1_024).map(|n| format!("gpu-{n}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    assert!(authority.adopt(&list(1, &names), now()).unwrap(), "1,024 usual names fit");
    let before = mesh.open(now()).revocations().clone();
    assert!(before.encode().len() <= REVOCATIONS_MAX_BYTES);
    let error = message(authority.revoke(&id(Role::Node, "one-more"), now()));
    assert!(error.contains("full") && error.contains("1025"), "{error}");
    assert_eq!(*mesh.open(now()).revocations(), before);
    let long: Vec<_> = (0..1_000).map(|n| format!("{n:063}")).collect();
    let long: Vec<_> = long.iter().map(String::as_str).collect();
    let other = Mesh::new().open(now()).adopt(&list(1, &long), now());
    assert!(message(other).contains("full"));
}

#[test]
fn lists_of_two_authorities_come_together_and_come_to_rest() {
    let (one, two) = (Mesh::new(), Mesh::new());
    one.open(now()).revoke(&id(Role::Node, "a"), now()).unwrap();
    two.open(now()).revoke(&id(Role::Node, "b"), now()).unwrap();
    let read = |mesh: &Mesh| verified(&mesh.open(now()), now());
    assert!(one.open(now()).adopt(&read(&two), now()).unwrap());
    assert!(two.open(now()).adopt(&read(&one), now()).unwrap());
    assert!(!one.open(now()).adopt(&read(&two), now()).unwrap(), "nothing new");
    assert_eq!(read(&one).entries, read(&two).entries);
    assert_eq!(read(&one).len(), 2);
    let stale = Revocations { entries: read(&one).entries, version: u64::MAX };
    assert!(!one.open(now()).adopt(&stale, now()).unwrap());
    let gone = now() + DAY * 3;
    assert!(!one.open(gone).adopt(&list(9, &["z"]), gone).unwrap(), "forgotten already");
}

#[test]
fn the_later_moment_of_two_lists_counts() {
    let mut later = list(3, &["a"]);
    let a = id(Role::Node, "a");
    later.entries.get_mut(&a).unwrap().at = now() + HOUR;
    for merged in [list(5, &["a", "b"]).merge(&later), later.merge(&list(5, &["a", "b"]))] {
        assert_eq!(merged.revoked_at(&a), Some(now() + HOUR));
        assert_eq!((merged.version(), merged.len()), (5, 2));
    }
    assert!(later.covers(&list(9, &["a"]), now()));
    assert!(!list(9, &["a"]).covers(&later, now()));
}

#[test]
fn all_nodes_agree_which_list_is_newer() {
    let mesh = Mesh::new();
    let authority = id(Role::Authority, "x");
    let sign = |list: &Revocations| signed_by(&mesh, &authority, list);
    let (old, new) = (sign(&list(7, &["a", "b"])), sign(&list(8, &["a"])));
    assert!(new.supersedes(&old) && !old.supersedes(&new));
    let (more, less) = (sign(&list(8, &["a", "b"])), new);
    assert!(more.supersedes(&less) && !less.supersedes(&more));
    let (one, two) = (sign(&list(8, &["a"])), sign(&list(8, &["b"])));
    assert!(one.supersedes(&two) != two.supersedes(&one));
    assert!(!one.supersedes(&one));
}

#[test]
fn a_version_that_leaves_no_room_for_the_next_is_refused() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let key = KeyPair::generate().unwrap();
    let signed = SignedRevocations::sign(&list(u64::MAX, &[]), &domain(), &[], &key, now());
    assert!(signed.unwrap_err().to_string().contains("version"));
    let most = 1_800_000_000 + 86_400;
    let roots = store(authority.roots());
    let sign = |version| signed_by(&mesh, &id(Role::Authority, "x"), &list(version, &["a"]));
    assert_eq!(sign(most).verify(&roots, &domain(), now()).unwrap().version(), most);
    let error = sign(most + 1).verify(&roots, &domain(), now()).unwrap_err();
    assert!(error.to_string().contains("more than a day ahead"), "{error}");
    let error = sign(most + 1).verify(&roots, &domain(), now() + DAY * 9).unwrap_err();
    assert!(
        error.to_string().contains("more than a day ahead"),
        "the age of a list is no help: {error}"
    );
}

#[test]
fn an_authority_keeps_its_versions_where_they_are_believed() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let most = 1_800_000_000 + 86_400;
    assert!(authority.adopt(&list(most - 1, &["a"]), now()).unwrap());
    assert_eq!(verified(&mesh.open(now()), now()).version(), most);
    assert_eq!(authority.revoke(&id(Role::Node, "b"), now()).unwrap(), most);
    let later = now() + Duration::from_secs(1);
    assert_eq!(authority.revoke(&id(Role::Node, "c"), later).unwrap(), most + 1);
    assert_eq!(verified(&mesh.open(later), later).len(), 3);
}

#[test]
fn a_list_on_disk_that_nobody_would_believe_is_signed_anew() {
    let mesh = Mesh::new();
    mesh.open(now()).revoke(&id(Role::Node, "a"), now() + DAY * 9).unwrap();
    let kept = signed_by(&mesh, &id(Role::Authority, "x"), &list(9_000_000_000, &["a"]));
    fs::write(mesh.path("authority/revoked.pb"), kept.encode()).unwrap();
    let list = verified(&mesh.open(now()), now());
    assert_eq!((list.len(), list.version()), (1, 1_800_000_000 + 86_400));
}

#[test]
fn whoever_was_given_something_here_is_known() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let known = |role, name: &str| authority.has_issued_to(&id(role, name)).unwrap();
    assert!(!known(Role::Node, "a"));
    let token = authority.issue_token(&scope("a", 1), now()).unwrap().reveal();
    assert!(known(Role::Node, "a") && !known(Role::Client, "a") && !known(Role::Node, "b"));
    join(&authority, &token, "b", now()).unwrap_err();
    assert!(!known(Role::Node, "b"), "a refusal gives nothing");
    authority.revoke(&id(Role::Node, "b"), now()).unwrap();
    assert!(!known(Role::Node, "b"), "nor does a revocation");
    let group = authority.issue_token(&scope("*", 9), now()).unwrap().reveal();
    join(&authority, &group, "c", now()).unwrap();
    fs::remove_dir_all(mesh.path("authority/tokens")).unwrap();
    assert!(known(Role::Node, "c") && !known(Role::Node, "a") && !known(Role::Node, "d"));
    authority.sign(&id(Role::Client, "me"), &csr(), &[], now()).unwrap();
    assert!(known(Role::Client, "me") && !known(Role::Client, "m"));
}

#[test]
fn members_of_another_mesh_cannot_be_revoked() {
    let mesh = Mesh::new();
    let foreign = "spiffe://other.test/node/eu/a".parse().unwrap();
    assert!(message(mesh.open(now()).revoke(&foreign, now())).contains("other.test"));
}
