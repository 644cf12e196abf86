//! The seeds: whether each answers, and whether one of them can renew this node's certificate.

use std::net::SocketAddr;

use identity::{ENROL_ALPN, Role, SpiffeId};
use node::config::{HostPort, SeedAddress};
use rustls::ClientConfig;
use transport::{LINK_ALPN, Prober, Sight, Unreached};

use super::{
    dns,
    facts::{Facts, Source},
    finding::{Check, Finding},
    peers::{self, Seen},
};

/// What a look at one seed came to.
struct Looked {
    findings: Vec<Finding>,
    /// Whether it would renew this node's certificate.
    renews: bool,
}

pub(super) async fn check(facts: &Facts, prober: &Prober) -> Vec<Finding> {
    // Without TLS there is nothing to look with; the checks of certificates say why.
    let Ok(tls) = facts.tls() else { return Vec::new() };
    let named = facts.config.mesh.seeds.iter().map(|seed| places(seed, facts));
    let (seeds, unnamed): (Vec<_>, Vec<_>) =
        futures_util::future::join_all(named).await.into_iter().unzip();
    let seeds: Vec<HostPort> = seeds.into_iter().flatten().collect();
    let looks = seeds.iter().map(|seed| look(facts, prober, seed, &tls));
    let looked = futures_util::future::join_all(looks).await;
    let is_renewed = looked.iter().any(|one| one.renews);
    let mut findings: Vec<_> = unnamed.into_iter().flatten().collect();
    findings.extend(looked.into_iter().flat_map(|one| one.findings));
    // A node that never joined needs a token first.
    if facts.source == Source::Mesh && facts.own.is_some() && !is_renewed {
        findings.push(nobody(seeds.len()));
    }
    findings
}

/// The hosts and ports of a seed, or why there are none.
async fn places(seed: &SeedAddress, facts: &Facts) -> (Vec<HostPort>, Option<Finding>) {
    let name = match seed {
        SeedAddress::At(place) => return (vec![place.clone()], None),
        SeedAddress::Srv(name) => name,
    };
    let looked = tokio::time::timeout(facts.timeout, node::look_up_srv(name)).await;
    let looked = looked.unwrap_or_else(|_| Err("no answer in time".to_owned()));
    let places =
        looked.map(|found| found.iter().filter_map(|one| one.as_str().parse().ok()).collect());
    places.map_or_else(
        |why: String| {
            let what = format!("its SRV record cannot be looked up: {why}");
            let remedy = "correct the name in mesh.seeds, or make the record";
            (
                Vec::new(),
                Some(Finding::error(Check::DnsUnresolved, format!("seed {seed}"), what, remedy)),
            )
        },
        |places| (places, None),
    )
}

fn nobody(seeds: usize) -> Finding {
    let why = match seeds {
        0 => "there are no seeds",
        1 => "the only seed is no authority that can be reached and takes it",
        _ => "none of the seeds is an authority that can be reached and takes it",
    };
    let what = format!("nobody can renew this node's certificate: {why}");
    let remedy = "put the gossip port of a node that holds the authority into mesh.seeds";
    Finding::error(Check::SeedAuthority, "mesh.seeds", what, remedy)
}

async fn look(facts: &Facts, prober: &Prober, seed: &HostPort, tls: &ClientConfig) -> Looked {
    let subject = format!("seed {seed}");
    let (addresses, mut findings) = dns::look(&subject, &seed.authority(), facts.timeout).await;
    if addresses.is_empty() {
        return Looked { findings, renews: false };
    }
    let within = peers::share(facts.timeout, &addresses);
    let gossip = |address: SocketAddr| prober.link(address, tls.clone(), within);
    let enrol = |address: SocketAddr| prober.quic(address, tls.clone(), ENROL_ALPN, within);
    let over_tcp =
        |protocol| move |address| prober.link_over_tcp(address, tls.clone(), protocol, within);
    let (gossip, enrol, gossip_tcp, enrol_tcp) = tokio::join!(
        peers::first(&addresses, gossip),
        peers::first(&addresses, enrol),
        peers::first(&addresses, over_tcp(LINK_ALPN)),
        peers::first(&addresses, over_tcp(ENROL_ALPN)),
    );
    // Over TCP a node that is no authority shows its own certificate.
    let enrol_tcp = enrol_tcp.ok().filter(|sight| judge(facts, sight).is_ok());
    let (gossip, enrol) = (gossip.or(gossip_tcp), enrol.or_else(|e| enrol_tcp.ok_or(e)));
    let told = match &enrol {
        Ok(sight) => authority(facts, &subject, sight),
        Err(_) => Looked { findings: vec![answers(&subject, seed, &gossip)], renews: false },
    };
    findings.extend(told.findings);
    Looked { findings, renews: told.renews }
}

/// A seed that takes requests for certificates.
fn authority(facts: &Facts, subject: &str, sight: &Sight) -> Looked {
    let (finding, renews) = match (judge(facts, sight), &sight.refusal) {
        (Err(what), _) => {
            let remedy = "correct the address, or join the mesh of that authority";
            (Finding::error(Check::SeedIdentity, subject, what, remedy), false)
        }
        (Ok(_), Some(said)) => {
            let what = format!("the authority turns this node's certificate down: {said}");
            let remedy = "get a new one with a token: `isobar ca token` at the authority, then `isobar join --token TOKEN` here";
            (Finding::error(Check::SeedRefuses, subject, what, remedy), false)
        }
        (Ok(id), None) => {
            let ms = sight.rtt.as_secs_f64() * 1e3;
            let what = format!("it is an authority, {id}, and answers in {ms:.1} ms");
            (Finding::ok(Check::SeedAuthority, subject, what), true)
        }
    };
    Looked { findings: vec![finding], renews }
}

/// Who it is, if this node would take certificates from it.
fn judge(facts: &Facts, sight: &Sight) -> Result<SpiffeId, String> {
    let leaf = sight.certificates.first().and_then(|leaf| identity::describe(leaf).ok()?.id);
    let id = leaf.ok_or("who answers there is no member of a mesh")?;
    if id.role != Role::Authority || id.trust_domain != facts.config.mesh.trust_domain {
        return Err(format!("{id} answers there, which is no authority of this mesh"));
    }
    if let Some(own) = &facts.own {
        identity::judge_peer(&sight.certificates, &own.roots, &id, facts.now)
            .map_err(|fault| format!("it says it is {id}, and {fault}"))?;
    }
    Ok(id)
}

/// A seed that takes no requests for certificates.
fn answers(subject: &str, seed: &HostPort, gossip: &Seen) -> Finding {
    match gossip {
        Ok(sight) => {
            let ms = sight.rtt.as_secs_f64() * 1e3;
            let what = format!("it answers in {ms:.1} ms, and is no authority");
            Finding::ok(Check::SeedGossip, subject, what)
        }
        Err(error) => {
            let what = format!("nobody is reached over UDP or TCP: {error}");
            Finding::warning(Check::SeedGossip, subject, what, to_reach(seed, error))
        }
    }
}

fn to_reach(seed: &HostPort, error: &Unreached) -> String {
    match error {
        Unreached::Refused => {
            "start that node, or put the address of its `listen.gossip` here".to_owned()
        }
        _ => {
            let text = seed.to_string();
            let number = text.rsplit(':').next().unwrap_or(&text);
            format!(
                "let port {number} through for UDP and TCP, and compare it with the `listen.gossip` of that node"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{super::Level, *};

    #[test]
    fn who_renews_is_missed_and_a_silent_seed_is_a_warning() {
        assert_eq!((nobody(0).level, nobody(2).level), (Level::Error, Level::Error));
        assert!(nobody(0).what.contains("no seeds") && nobody(1).what.contains("only seed"));
        let seed: HostPort = "seed.example:8445".parse().unwrap();
        let silent = Err(Unreached::Silent(Duration::from_secs(5)));
        let found = answers("seed", &seed, &silent);
        assert_eq!(found.level, Level::Warning);
        assert!(found.remedy.contains("port 8445"), "{}", found.remedy);
        let down = answers("seed", &seed, &Err(Unreached::Refused));
        assert!(down.remedy.contains("start that node"), "{}", down.remedy);
        let rtt = Duration::from_millis(3);
        let sight = Sight { certificates: Vec::new(), rtt, payload_bytes: None, refusal: None };
        assert_eq!(answers("seed", &seed, &Ok(sight)).level, Level::Ok);
    }
}
