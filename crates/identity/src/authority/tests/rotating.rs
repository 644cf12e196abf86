//! Changing the root and what signs, with certificates from before and after held against all bundles.

use super::*;
use crate::Rotated;

fn sign(mesh: &Mesh, now: SystemTime) -> Vec<CertificateDer<'static>> {
    mesh.open(now).sign(&id(Role::Node, "a"), &csr(), &[], now).unwrap()
}

fn rotate(mesh: &Mesh, now: SystemTime) -> Result<Rotated, IdentityError> {
    Authority::rotate(mesh.dir.path(), false, now)
}

fn bundle(mesh: &Mesh) -> Vec<CertificateDer<'static>> {
    read_roots(&mesh.path("authority/roots.pem"))
}

#[test]
fn a_root_changes_in_three_steps_without_cutting_anybody_off() {
    let mesh = Mesh::new();
    let mut at = now();
    let (old, first) = (bundle(&mesh), sign(&mesh, at));
    let fingerprint = mesh.open(at).root_fingerprint();

    assert_eq!(rotate(&mesh, at).unwrap(), Rotated::RootAdded { next_at: at + DAY });
    let both = bundle(&mesh);
    assert_eq!((both.len(), &both[0]), (2, &old[0]));
    assert_eq!(mesh.open(at).root_fingerprint(), fingerprint);
    let second = sign(&mesh, at);
    for roots in [&old, &both] {
        assert!(believed(&first, roots, at) && believed(&second, roots, at));
    }
    let early = message(rotate(&mesh, at + DAY - HOUR));
    assert!(early.contains("2027-01-16T08:00:00Z") && early.contains("--now"), "{early}");

    at += DAY;
    assert_eq!(rotate(&mesh, at).unwrap(), Rotated::IssuerReplaced { next_at: at + DAY });
    assert_ne!(mesh.open(at).root_fingerprint(), fingerprint);
    let third = sign(&mesh, at);
    assert!(believed(&second, &both, at - HOUR) && believed(&third, &both, at));
    assert!(!believed(&third, &old, at), "whoever has not renewed for a whole life");
    message(rotate(&mesh, at + HOUR));

    at += DAY;
    assert_eq!(rotate(&mesh, at).unwrap(), Rotated::RootRemoved);
    let new = bundle(&mesh);
    assert_eq!(new, both[1..]);
    let fourth = sign(&mesh, at);
    for roots in [&both, &new] {
        assert!(believed(&third, roots, at - HOUR) && believed(&fourth, roots, at));
    }
    assert!(!believed(&second, &new, at - DAY));
    assert_eq!(read_roots(&mesh.path("root.pem")), new);
    assert_eq!(mode(&mesh.path("root.key")), 0o600);
    let retired = fs::read_dir(mesh.dir.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "retired"));
    assert_eq!(retired.count(), 2);

    // And the next one begins at once.
    assert!(matches!(rotate(&mesh, at).unwrap(), Rotated::RootAdded { .. }));
}

#[test]
fn who_is_in_a_hurry_need_not_wait() {
    let mesh = Mesh::new();
    let hurry = || Authority::rotate(mesh.dir.path(), true, now()).unwrap();
    assert!(matches!(hurry(), Rotated::RootAdded { .. }));
    assert!(matches!(hurry(), Rotated::IssuerReplaced { .. }));
    assert_eq!(hurry(), Rotated::RootRemoved);
    assert!(believed(&sign(&mesh, now()), &bundle(&mesh), now()));
}

#[test]
fn a_rotation_goes_on_from_the_inner_directory() {
    let mesh = Mesh::new();
    let inner = mesh.path("authority");
    assert!(matches!(Authority::rotate(&inner, true, now()).unwrap(), Rotated::RootAdded { .. }));
    assert!(matches!(
        Authority::rotate(mesh.dir.path(), true, now()).unwrap(),
        Rotated::IssuerReplaced { .. }
    ));
}

/// Runs the command until it is done, as an operator does after a crash; the authority opens at every point.
fn complete(mesh: &Mesh) {
    for _ in 0..8 {
        let done = Authority::rotate(mesh.dir.path(), true, now()).unwrap();
        assert!(believed(&sign(mesh, now()), &bundle(mesh), now()), "{done:?}");
        if done == Rotated::RootRemoved {
            assert_eq!(bundle(mesh), read_roots(&mesh.path("root.pem")));
            assert!(mesh.path("root.key").exists());
            for gone in ["root.next.pem", "root.next.key", "rotation.toml"] {
                assert!(!mesh.path(gone).exists(), "{gone}");
            }
            for gone in ["authority/issuer.next.pem", "authority/issuer.next.key"] {
                assert!(!mesh.path(gone).exists(), "{gone}");
            }
            return;
        }
    }
    panic!("it never ends");
}

/// A copy of everything in `mesh` as it was.
fn copy(mesh: &Mesh) -> Mesh {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let target = to.join(path.file_name().unwrap());
            if path.is_dir() {
                copy(&path, &target);
            } else {
                fs::copy(&path, &target).unwrap();
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    copy(mesh.dir.path(), dir.path());
    Mesh { dir }
}

#[test]
fn a_step_that_was_cut_short_is_finished_by_the_next_attempt() {
    let hurry = |mesh: &Mesh| Authority::rotate(mesh.dir.path(), true, now()).unwrap();
    let take = |to: &Mesh, from: &Mesh, file: &str| {
        fs::copy(from.path(file), to.path(file)).unwrap();
    };
    let rest = Mesh::new();
    let added = copy(&rest);
    hurry(&added);
    let replaced = copy(&added);
    hurry(&replaced);
    let removed = copy(&replaced);
    hurry(&removed);

    // Step 1: each prefix of what it writes.
    let writes = [
        "root.next.key",
        "authority/issuer.next.key",
        "root.next.pem",
        "authority/issuer.next.pem",
        "authority/roots.pem",
    ];
    for end in 1..=writes.len() {
        let mesh = copy(&rest);
        writes[..end].iter().for_each(|file| take(&mesh, &added, file));
        complete(&mesh);
    }
    // Step 2: the certificate is there, the key is not; then the key, and no word of when.
    let mesh = copy(&added);
    take(&mesh, &replaced, "authority/issuer.pem");
    sign(&mesh, now());
    let half = copy(&mesh);
    complete(&mesh);
    fs::rename(half.path("authority/issuer.next.key"), half.path("authority/issuer.key")).unwrap();
    assert!(matches!(rotate(&half, now()).unwrap(), Rotated::IssuerReplaced { .. }));
    complete(&half);
    // Step 3: each name in turn.
    let renames: [&dyn Fn(&Mesh); 5] = [
        &|mesh| take(mesh, &removed, "authority/roots.pem"),
        &|mesh| fs::rename(mesh.path("root.key"), mesh.path("old.key")).unwrap(),
        &|mesh| fs::rename(mesh.path("root.pem"), mesh.path("old.pem")).unwrap(),
        &|mesh| fs::rename(mesh.path("root.next.key"), mesh.path("root.key")).unwrap(),
        &|mesh| fs::rename(mesh.path("root.next.pem"), mesh.path("root.pem")).unwrap(),
    ];
    for end in 1..=renames.len() {
        let mesh = copy(&replaced);
        renames[..end].iter().for_each(|rename| rename(&mesh));
        assert_eq!(hurry(&mesh), Rotated::RootRemoved, "{end}");
        complete(&mesh);
    }
}

#[test]
fn revocations_outlive_a_rotation() {
    let mesh = Mesh::new();
    let a = id(Role::Client, "a");
    mesh.open(now()).revoke(&a, now()).unwrap();
    let mut version = mesh.open(now()).revocations().version();
    for step in 0..3 {
        Authority::rotate(mesh.dir.path(), true, now()).unwrap();
        let authority = mesh.open(now());
        let list = authority.revocations();
        let found = list.verify(&store(authority.roots()), &domain(), now()).unwrap();
        assert!(found.revokes(&a, now()), "{step}");
        assert_eq!(list.version() > version, step == 1, "signed anew when the issuer changes");
        version = list.version();
    }
}

#[test]
fn what_signs_changes_under_the_same_root() {
    let mesh = Mesh::new();
    let before = sign(&mesh, now());
    let later = now() + DAY * 300;
    Authority::rotate_issuer(mesh.dir.path(), later).unwrap();
    let after = sign(&mesh, later);
    assert_ne!(before[1], after[1]);
    assert!(believed(&after, &bundle(&mesh), later) && believed(&before, &bundle(&mesh), now()));
    assert_eq!(ends(&after[1..]), later + DAY * 365);
    assert_eq!(mode(&mesh.path("authority/issuer.key")), 0o600);
    assert!(!mesh.path("authority/issuer.next.key").exists());

    let error = mesh.path("root.key");
    fs::rename(&error, mesh.path("elsewhere")).unwrap();
    let error = message(Authority::rotate_issuer(mesh.dir.path(), later));
    assert!(error.contains("root.key") && error.contains("bring the root's key back"), "{error}");
    // The root's key is not needed to change the root.
    rotate(&mesh, later).unwrap();
    let error = message(Authority::rotate_issuer(mesh.dir.path(), later));
    assert!(error.contains("finish that first"), "{error}");
}
