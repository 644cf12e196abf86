//! Joining: what a token is good for, and what it is not.

use std::sync::Barrier;

use super::*;
use crate::{Token, certificate::peer_id};

/// A chain or a label: what the tests below compare.
fn outcome(result: Result<Vec<CertificateDer<'static>>, Refusal>) -> &'static str {
    match result {
        Ok(_) => "joined",
        Err(refusal) => {
            let text = refusal.to_string();
            assert!(!text.contains("isobar-join-"), "{text}");
            refusal.label()
        }
    }
}

#[test]
fn a_token_lets_one_node_in_once() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let token = authority.issue_token(&scope("a", 1), now()).unwrap();
    assert_eq!(token.root_fingerprint(), authority.root_fingerprint());
    assert_eq!(token.seeds(), ["a.example:7440"]);
    let chain = join(&authority, &token.reveal(), "a", now()).unwrap();
    assert_eq!(peer_id(&chain).unwrap(), id(Role::Node, "a"));
    assert!(believed(&chain, authority.roots(), now()));
    let again = join(&authority, &token.reveal(), "a", now() + HOUR / 60).unwrap_err();
    assert_eq!(again.label(), "replayed");
    assert!(again.to_string().contains("2027-01-15T08:00:00Z"), "{again}");
}

#[test]
fn only_a_hash_of_a_token_is_kept_and_nobody_else_can_read_it() {
    let mesh = Mesh::new();
    let token = mesh.open(now()).issue_token(&scope("a", 1), now()).unwrap();
    let path = mesh.path(&format!("authority/tokens/{}.json", token.id()));
    assert_eq!(mode(&path), 0o600);
    let kept = fs::read_to_string(path).unwrap();
    let text = token.reveal();
    for at in (20..text.len() - 16).step_by(8) {
        assert!(!kept.contains(&text[at..at + 16]), "{at}");
    }
}

#[test]
fn each_thing_that_is_wrong_with_a_token_has_its_refusal() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let token = authority.issue_token(&scope("a", 1), now()).unwrap();
    let text = token.reveal();
    let other = Mesh::new().open(now()).issue_token(&scope("a", 1), now()).unwrap().reveal();
    let joins = |text: &str, node: &str, at: SystemTime| outcome(join(&authority, text, node, at));
    assert_eq!(joins(&text, "b", now()), "wrong_name");
    assert_eq!(joins(&text, "a", now() + Duration::from_secs(600)), "expired");
    assert_eq!(joins(&other, "a", now()), "unknown");
    assert_eq!(joins("", "a", now()), "tampered");
    let forged = Token { secret: [7; 32], ..token.clone() };
    assert_eq!(joins(&forged.reveal(), "a", now()), "tampered");
    let wider = Token { names: "*".parse().unwrap(), ..token.clone() };
    assert_eq!(joins(&wider.reveal(), "b", now()), "tampered");
    let longer = Token { expires_at: now() + DAY * 365, ..token.clone() };
    assert_eq!(joins(&longer.reveal(), "a", now() + HOUR), "tampered");
    let foreign = Token { trust_domain: "other.test".parse().unwrap(), ..token };
    assert_eq!(joins(&foreign.reveal(), "a", now()), "wrong_mesh");
    let name = name("a");
    let (csr, elsewhere) = (csr(), "us".parse().unwrap());
    let ask =
        Ask { token: &text, csr: &csr, name: &name, region: &elsewhere, remote: REMOTE, ips: &[] };
    assert_eq!(outcome(authority.redeem(&ask, now())), "wrong_region");
    for (csr, label) in [(vec![0; 9_000], "csr_too_long"), (vec![1, 2], "csr_invalid")] {
        let region = region();
        let ask = Ask { csr: &csr, region: &region, ..ask };
        assert_eq!(outcome(authority.redeem(&ask, now())), label);
    }
    assert_eq!(joins(&text, "a", now()), "joined", "a refusal takes no use");
}

#[test]
fn no_changed_character_is_ever_accepted() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let text = authority.issue_token(&scope("*", 100), now()).unwrap().reveal();
    for at in 0..text.len() {
        for other in ["A", "z", "-"] {
            let mut changed = text.clone();
            changed.replace_range(at..=at, other);
            if changed != text {
                assert_eq!(outcome(join(&authority, &changed, "a", now())), "tampered", "{at}");
            }
        }
    }
    assert_eq!(authority.tokens().unwrap()[0].uses_left, 100);
}

#[test]
fn a_pattern_lets_in_as_many_as_it_has_uses() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let token = authority.issue_token(&scope("gpu-*", 2), now()).unwrap().reveal();
    let joins = |node: &str| outcome(join(&authority, &token, node, now()));
    assert_eq!(joins("cpu-1"), "wrong_name");
    assert_eq!(joins("gpu-1"), "joined");
    assert_eq!(joins("gpu-1"), "replayed");
    assert_eq!(joins("gpu-2"), "joined");
    assert_eq!(joins("gpu-3"), "used_up");
    let error = join(&authority, &token, "gpu-3", now()).unwrap_err().to_string();
    assert!(error.contains("all 2 uses") && error.contains("gpu-2"), "{error}");
    let tokens = authority.tokens().unwrap();
    assert_eq!((tokens[0].uses_left, tokens[0].redemptions.len()), (0, 2));
    assert_eq!(tokens[0].redemptions[0].remote, REMOTE.to_string());
}

#[test]
fn of_many_that_redeem_a_token_at_once_one_gets_in() {
    let mesh = Mesh::new();
    for _ in 0..8 {
        let token = mesh.open(now()).issue_token(&scope("*", 1), now()).unwrap().reveal();
        // As other processes would: each with an authority of its own.
        let authorities: Vec<_> = (0..4).map(|_| mesh.open(now())).collect();
        let start = Barrier::new(authorities.len());
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let joining: Vec<_> = ["a", "b", "c", "d"]
                .into_iter()
                .zip(&authorities)
                .map(|(node, authority)| {
                    let (token, start) = (&token, &start);
                    scope.spawn(move || {
                        start.wait();
                        outcome(join(authority, token, node, now()))
                    })
                })
                .collect();
            joining.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let joined = outcomes.iter().filter(|outcome| **outcome == "joined").count();
        let late = outcomes.iter().filter(|outcome| **outcome == "used_up").count();
        assert_eq!((joined, late), (1, 3), "{outcomes:?}");
    }
}

/// Like `cp -a` of the online part: the files are the same in every way.
fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let there = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &there),
            false => drop(fs::copy(entry.path(), there).unwrap()),
        }
    }
}

#[test]
fn a_copy_of_an_authority_lets_nobody_in_with_the_tokens_of_the_first() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let tokens =
        ["a", "b"].map(|name| authority.issue_token(&scope(name, 1), now()).unwrap().reveal());
    copy(&mesh.path("authority"), &mesh.path("second"));
    let second = Authority::open(&mesh.path("second"), now()).unwrap();
    assert_eq!(outcome(join(&authority, &tokens[0], "a", now())), "joined");
    for (token, node) in tokens.iter().zip(["a", "b"]) {
        let refused = join(&second, token, node, now()).unwrap_err();
        assert_eq!(refused.label(), "unknown");
        assert!(refused.to_string().contains("another copy"), "{refused}");
    }
    assert!(second.tokens().unwrap().is_empty(), "none of them is good there");
    let own = second.issue_token(&scope("c", 1), now()).unwrap().reveal();
    assert_eq!(outcome(join(&second, &own, "c", now())), "joined");
    assert_eq!(outcome(join(&authority, &own, "c", now())), "unknown");
}

#[test]
fn an_authority_that_is_moved_keeps_its_tokens() {
    let mesh = Mesh::new();
    let token = mesh.open(now()).issue_token(&scope("a", 1), now()).unwrap().reveal();
    fs::rename(mesh.path("authority"), mesh.path("moved")).unwrap();
    let moved = Authority::open(&mesh.path("moved"), now()).unwrap();
    assert_eq!(outcome(join(&moved, &token, "a", now())), "joined");
}

#[test]
fn a_token_without_uses_lets_nobody_in_though_nobody_has_used_it() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let token = authority.issue_token(&scope("a", 1), now()).unwrap();
    let path = mesh.path(&format!("authority/tokens/{}.json", token.id()));
    let kept = fs::read_to_string(&path).unwrap();
    fs::write(&path, kept.replace("\"uses_left\": 1", "\"uses_left\": 0")).unwrap();
    let refused = join(&authority, &token.reveal(), "a", now()).unwrap_err();
    assert_eq!(refused.label(), "used_up");
    assert!(refused.to_string().contains("taken: ask"), "{refused}");
}

#[test]
fn tokens_that_would_let_in_too_much_are_not_made() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let refused = |change: &dyn Fn(&mut TokenScope), says: &str| {
        let mut scope = scope("gpu-*", 5);
        change(&mut scope);
        let error = message(authority.issue_token(&scope, now()));
        assert!(error.contains(says), "{says}: {error}");
    };
    refused(&|scope| scope.role = Role::Authority, "no token makes an authority");
    refused(&|scope| scope.role = Role::Client, "isobar ca issue");
    refused(&|scope| scope.names = "a".parse().unwrap(), "one use");
    refused(&|scope| scope.uses = 0, "1 to 1,024");
    refused(&|scope| scope.uses = 1_025, "1 to 1,024");
    refused(&|scope| scope.ttl = Duration::from_millis(999), "1s to 7d");
    refused(&|scope| scope.ttl = DAY * 8, "1s to 7d");
    refused(&|scope| scope.seeds = vec!["a".into()], "HOST:PORT");
    refused(&|scope| scope.seeds = vec!["a:1".into(); 17], "16 seeds");
    assert!(authority.tokens().unwrap().is_empty());
}

#[test]
fn the_largest_token_can_be_read_back() {
    let mesh = Mesh::new();
    let mut scope = scope(&"*".repeat(63), 1_024);
    scope.seeds = vec![format!("{}:65535", "h".repeat(256)); 16];
    let token = mesh.open(now()).issue_token(&scope, now()).unwrap();
    assert_eq!(token.reveal().parse::<Token>().unwrap(), token);
}

#[test]
fn an_expired_token_is_recognised_for_a_day_and_then_swept() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let old = authority.issue_token(&scope("a", 1), now()).unwrap().reveal();
    let later = now() + DAY;
    authority.issue_token(&scope("b", 1), later).unwrap();
    assert_eq!(outcome(join(&authority, &old, "a", later)), "expired");
    let later = now() + DAY + HOUR;
    authority.issue_token(&scope("c", 1), later).unwrap();
    assert_eq!(outcome(join(&authority, &old, "a", later)), "unknown");
    assert_eq!(authority.tokens().unwrap().len(), 2);
}

#[test]
fn whoever_was_revoked_needs_a_token_from_afterwards() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let before = [
        authority.issue_token(&scope("a", 1), now()).unwrap().reveal(),
        authority.issue_token(&scope("*", 9), now()).unwrap().reveal(),
    ];
    let revoked = now() + Duration::from_millis(10_300);
    authority.revoke(&id(Role::Node, "a"), revoked).unwrap();
    for token in before {
        assert_eq!(outcome(join(&authority, &token, "a", revoked + HOUR / 60)), "revoked");
    }
    let later = revoked + Duration::from_millis(100);
    let after = authority.issue_token(&scope("a", 1), later).unwrap().reveal();
    let chain = join(&authority, &after, "a", later).unwrap();
    assert!(begins(&chain) > revoked, "not backdated into what is revoked");
    let list = mesh.open(later).revocations().verify(&store(authority.roots()), &domain(), later);
    assert!(!list.unwrap().revokes(&id(Role::Node, "a"), begins(&chain)));
    let renewed = authority.renew(&chain[0], &csr(), &[], later + HOUR).unwrap();
    assert_eq!(begins(&renewed), now() + Duration::from_secs(3_600 + 10 - 300));
}

#[test]
fn nodes_renew_and_nobody_else_does() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let node = authority.sign(&id(Role::Node, "a"), &csr(), &[], now()).unwrap();
    let later = now() + HOUR * 12;
    let renewed = authority.renew(&node[0], &csr(), &[REMOTE], later).unwrap();
    assert_eq!(ends(&renewed), later + DAY);
    authority.revoke(&id(Role::Node, "a"), later).unwrap();
    assert_eq!(outcome(authority.renew(&renewed[0], &csr(), &[], later)), "revoked");
    let client = authority.sign(&id(Role::Client, "a"), &csr(), &[], now()).unwrap();
    assert_eq!(outcome(authority.renew(&client[0], &csr(), &[], now())), "wrong_role");
}

#[test]
fn what_was_done_for_whom_is_on_record_without_secrets() {
    let mesh = Mesh::new();
    let authority = mesh.open(now());
    let token = authority.issue_token(&scope("a", 1), now()).unwrap();
    join(&authority, &token.reveal(), "a", now()).unwrap();
    join(&authority, &token.reveal(), "a", now()).unwrap_err();
    authority.revoke(&id(Role::Node, "a"), now()).unwrap();
    let done = [("token", "done"), ("join", "done"), ("revoke", "done")];
    for (file, want) in [("audit.log", &done[..]), ("refused.log", &[("join", "replayed")])] {
        let path = mesh.path("authority").join(file);
        assert_eq!(mode(&path), 0o600);
        let log = fs::read_to_string(path).unwrap();
        let lines: Vec<serde_json::Value> =
            log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let said = |line: &serde_json::Value| (line["event"].clone(), line["outcome"].clone());
        let want: Vec<_> =
            want.iter().map(|(event, how)| ((*event).into(), (*how).into())).collect();
        assert_eq!(lines.iter().map(said).collect::<Vec<_>>(), want);
        let join = lines.iter().find(|line| line["event"] == "join").unwrap();
        assert_eq!(join["remote"], "192.0.2.7");
        assert_eq!(join["token"], token.id());
        assert!(!log.contains(&token.reveal()[20..60]), "{log}");
    }
}

#[test]
fn what_is_shown_for_debugging_holds_no_token() {
    let mesh = Mesh::new();
    let token = mesh.open(now()).issue_token(&scope("a", 1), now()).unwrap().reveal();
    let (name, region, csr) = (name("a"), region(), csr());
    let ask =
        Ask { token: &token, csr: &csr, name: &name, region: &region, remote: REMOTE, ips: &[] };
    assert!(!format!("{ask:?}").contains("isobar-join"));
}
