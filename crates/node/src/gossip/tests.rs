//! Whole gossip ports on loopback: how they find each other, and what they make of it when one goes, comes back, or lies.

use std::{net::SocketAddr, time::Duration};

use base::NodeName;
use identity::{Authority, CertificateRequest, ExpectedPeer, Identity, NodeIdentity};
use membership::{
    Descriptor, Frame, Hello, Liveness, LoadFrame, MemberStatus, NodeId, Peer, Presence, Transport,
    decode, encode,
};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{net::UdpSocket, task::JoinSet};
use transport::{Link, LinkTransport, QuicKeys};

use super::*;
use crate::{config::Config, peers::MakeTarget};

/// Long enough for a loaded machine; a test that waits so long has failed.
const LONG: Duration = Duration::from_secs(40);
const HOUR: Duration = Duration::from_secs(3600);

/// A mesh in a directory of its own.
struct World(tempfile::TempDir);

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Authority::init(dir.path(), &"mesh.test".parse().unwrap(), HOUR, clock::wall()).unwrap();
        Self(dir)
    }

    fn certificate(&self, name: &str, life: Duration) -> NodeIdentity {
        let (dir, now) = (self.0.path(), clock::wall());
        let authority = Authority::open(dir, now).unwrap();
        let request = CertificateRequest::new().unwrap();
        let id = format!("spiffe://mesh.test/node/eu/{name}").parse().unwrap();
        let chain = authority.sign_for(&id, request.csr(), &[], life, now).unwrap();
        NodeIdentity::issued(dir, chain, request.into_key(), authority.roots(), now).unwrap()
    }

    fn identity(&self, name: &str) -> Identity {
        Identity::new(self.certificate(name, HOUR))
    }

    /// Who is called so.
    fn peer(name: &str) -> Peer {
        peer(&format!("spiffe://mesh.test/node/eu/{name}").parse().unwrap())
    }

    /// A seed that is listed.
    fn listed(name: &str, address: SocketAddr) -> Seed {
        Seed { address: address.to_string(), peer: Some(Self::peer(name)), is_listed: true }
    }

    fn start(&self, name: &str, epoch: u64, seeds: &[SocketAddr]) -> Running {
        self.start_with(self.identity(name), epoch, seeds, vec![])
    }

    fn start_with(
        &self,
        identity: Identity,
        epoch: u64,
        seeds: &[SocketAddr],
        listed: Vec<Seed>,
    ) -> Running {
        let links = links(&identity);
        let address = links.address().unwrap();
        let id = identity.id().clone();
        let make = MakeTarget(Box::new(|_, _| Err("nobody is called".to_owned())));
        let board = Arc::new(Board::new(id.clone(), vec![], make));
        let engines = engines(id.name.as_str());
        let draining = CancellationToken::new();
        let trust = Arc::new(Trust::new(identity, None));
        let found =
            Found { addresses: seeds.iter().map(ToString::to_string).collect(), hosts: Vec::new() };
        let gossip = Gossip {
            links,
            own: Own {
                id: peer(&id).id,
                node: id.name.clone(),
                region: id.region.clone(),
                zone: None,
                trust_domain: id.trust_domain.clone(),
                epoch,
                peers: "127.0.0.1:1".to_owned(),
                gossip: address.to_string(),
                release: "test".to_owned(),
            },
            voice: Voice {
                arrivals: Arc::default(),
                catalog: Arc::new(Catalog::new(engines.clone(), board.clone())),
                engines,
                draining: draining.clone(),
            },
            board: board.clone(),
            trust: trust.clone(),
            seeds: watch::Sender::new(found).subscribe(),
            listed,
            kept: Some(self.0.path().join(format!("{}.pb", id.name))),
            enrolment: None,
            seed: epoch,
        };
        let (prepared, mesh) = gossip.prepare().unwrap();
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        tasks.spawn(prepared.run(stop.clone()));
        let judging = trust.clone();
        tasks.spawn(async move { judging.judge_offers().await });
        Running { mesh, board, trust, address, draining, stop, tasks }
    }
}

/// A gossip port that runs; dropped, it is gone without a word.
struct Running {
    mesh: MeshHandle,
    board: Arc<Board>,
    trust: Arc<Trust>,
    address: SocketAddr,
    draining: CancellationToken,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Running {
    async fn sees(&self, name: &str) -> Option<MemberStatus> {
        let status = self.mesh.status().await.expect("it does not answer");
        let id = World::peer(name).id;
        status.members.into_iter().find(|member| member.peer.id == id)
    }

    /// Waits until it sees a node so.
    async fn until(&self, name: &str, is: impl Fn(&MemberStatus) -> bool) -> MemberStatus {
        let mut last = None;
        let seeing = async {
            loop {
                last = self.sees(name).await;
                if let Some(member) = last.as_ref().filter(|member| is(member)) {
                    return member.clone();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let seen = tokio::time::timeout(LONG, seeing).await;
        seen.unwrap_or_else(|_| panic!("{name} is never seen so: {last:?}"))
    }

    async fn until_presence(&self, name: &str, wanted: Presence) {
        let id = World::peer(name).id;
        let waiting = async {
            while self.board.presence_of(id) != wanted {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LONG, waiting).await.expect("the board never says so");
    }

    async fn leave(mut self) {
        self.stop.cancel();
        tokio::time::timeout(LONG, self.tasks.join_next()).await.unwrap().unwrap().unwrap();
    }
}

fn links(identity: &Identity) -> Links {
    let tls = identity.peer_server_config(&[transport::LINK_ALPN, b"h2"]).unwrap();
    Links::bind("127.0.0.1:0".parse().unwrap(), tls, &QuicKeys::random()).unwrap()
}

/// One engine of a model that everybody has.
fn engines(node: &str) -> Arc<[Arc<Engine>]> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.toml");
    let engine =
        "[[engine]]\nname = \"e\"\nurl = \"http://127.0.0.1:1\"\nmodels = [\"m\"]\nslots = 8";
    std::fs::write(&path, format!("[node]\nname = \"{node}\"\n{engine}\n")).unwrap();
    let config = Config::load(&path, &[]).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    config.engines.iter().map(|engine| Arc::new(Engine::new(engine, &mut rng))).collect()
}

fn is_alive(member: &MemberStatus) -> bool {
    member.state == Liveness::Alive && member.link.is_some() && member.heard.is_some()
}

#[tokio::test]
async fn nodes_find_each_other_through_one_seed() {
    let world = World::new();
    let a = world.start("a", 10, &[]);
    let b = world.start("b", 10, &[a.address]);
    let c = world.start("c", 10, &[b.address]);
    for (node, others) in [(&a, ["b", "c"]), (&b, ["a", "c"]), (&c, ["a", "b"])] {
        for other in others {
            let member = node.until(other, is_alive).await;
            let card = member.card.unwrap();
            assert_eq!((card.facts.epoch, member.protocol), (10, Some(2)));
            assert_eq!(member.link.unwrap().0, Transport::Quic);
            node.until_presence(other, Presence::Present).await;
        }
    }
}

#[tokio::test]
async fn an_address_that_led_back_to_the_node_itself_may_lead_to_another_later() {
    let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let back = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = front.local_addr().unwrap();
    let world = World::new();
    let (a, b) = (world.start("a", 1, &[address]), world.start("b", 1, &[]));
    let (leads_to, led_to) = watch::channel(a.address);
    let mut relaying = JoinSet::new();
    relaying.spawn(async move {
        let (mut there, mut here, mut client) = ([0; 2048], [0; 2048], None);
        loop {
            tokio::select! {
                Ok((length, from)) = front.recv_from(&mut there) => {
                    client = Some(from);
                    let to = *led_to.borrow();
                    back.send_to(&there[..length], to).await.unwrap();
                }
                Ok((length, _)) = back.recv_from(&mut here) => if let Some(client) = client {
                    front.send_to(&here[..length], client).await.unwrap();
                },
            }
        }
    });
    tokio::time::sleep(Duration::from_secs(3)).await;
    leads_to.send(b.address).unwrap();
    a.until("b", is_alive).await;
    relaying.shutdown().await;
}

#[tokio::test]
async fn two_nodes_that_dial_each_other_keep_one_link() {
    let world = World::new();
    let (a_identity, b_identity) = (world.identity("a"), world.identity("b"));
    let a = world.start_with(a_identity, 1, &[], vec![]);
    let both = [a.address];
    let b = world.start_with(b_identity, 1, &both, vec![World::listed("a", a.address)]);
    let again = world.start("c", 1, &[a.address, b.address]);
    for (node, others) in [(&a, ["b", "c"]), (&b, ["a", "c"]), (&again, ["a", "b"])] {
        for other in others {
            node.until(other, is_alive).await;
        }
    }
    let one_each = async {
        while [&a, &b, &again].iter().any(|node| node.trust.connections() != 2) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LONG, one_each).await.expect("there are more links than nodes");
}

#[tokio::test]
async fn a_node_that_dies_is_out_at_once_and_down_soon_and_may_come_back() {
    let world = World::new();
    let a = world.start("a", 1, &[]);
    let b = world.start("b", 1, &[a.address]);
    let c = world.start("c", 1, &[a.address]);
    for (node, other) in [(&a, "b"), (&c, "b"), (&b, "c")] {
        node.until(other, is_alive).await;
    }
    let died = clock::now();
    drop(b);
    a.until("b", |member| member.link.is_none()).await;
    a.until_presence("b", Presence::Silent).await;
    assert!(clock::now() - died < Duration::from_secs(3), "it was noticed late");
    for node in [&a, &c] {
        node.until("b", |member| member.state == Liveness::Down).await;
    }
    // Another process of it, with nothing but what was kept.
    let b = world.start("b", 2, &[a.address]);
    for node in [&a, &c] {
        node.until("b", |member| is_alive(member) && member.epoch == 2).await;
        node.until_presence("b", Presence::Present).await;
    }
    b.until("c", is_alive).await;
}

#[tokio::test]
async fn a_node_that_leaves_says_so_and_is_found_again_without_seeds() {
    let world = World::new();
    let a = world.start("a", 1, &[]);
    let b = world.start("b", 1, &[a.address]);
    a.until("b", is_alive).await;
    b.until("a", is_alive).await;
    b.leave().await;
    a.until("b", |member| member.state == Liveness::Left).await;
    assert!(world.0.path().join("b.pb").exists(), "the cards of others are kept");
    let b = world.start("b", 2, &[]);
    b.until("a", is_alive).await;
    a.until("b", |member| is_alive(member) && member.epoch == 2).await;
}

#[tokio::test]
async fn of_two_processes_with_one_name_the_older_is_told() {
    let world = World::new();
    let mut older = world.start("b", 5, &[]);
    let a = world.start("a", 1, &[older.address]);
    a.until("b", is_alive).await;
    // They never meet each other; a tells.
    let mut newer = world.start("b", 9, &[a.address]);
    let epoch = tokio::time::timeout(LONG, older.mesh.superseded()).await.unwrap();
    assert_eq!(epoch, Some(9));
    a.until("b", |member| is_alive(member) && member.epoch == 9).await;
    drop(older);
    // One that is older is told at once where it dials the newer one itself.
    let mut late = world.start("b", 7, &[newer.address]);
    let epoch = tokio::time::timeout(LONG, late.mesh.superseded()).await.unwrap();
    assert_eq!(epoch, Some(9));
    let told = tokio::time::timeout(Duration::from_millis(100), newer.mesh.superseded()).await;
    assert!(told.is_err(), "the newer one goes on");
}

#[tokio::test]
async fn a_node_that_drains_says_so() {
    let world = World::new();
    let a = world.start("a", 1, &[]);
    let b = world.start("b", 1, &[a.address]);
    a.until_presence("b", Presence::Present).await;
    b.draining.cancel();
    a.until_presence("b", Presence::Draining).await;
}

#[tokio::test]
async fn certificates_are_renewed_and_the_link_goes_on() {
    let world = World::new();
    let life = Duration::from_secs(6);
    let short = |name| Identity::new(world.certificate(name, life));
    let (of_a, of_b) = (short("a"), short("b"));
    let a = world.start_with(of_a.clone(), 1, &[], vec![]);
    let b = world.start_with(of_b.clone(), 1, &[a.address], vec![]);
    let before = a.until("b", is_alive).await.card.unwrap();
    b.until("a", is_alive).await;
    for (identity, name) in [(&of_a, "a"), (&of_b, "b")] {
        identity.replace(world.certificate(name, HOUR)).unwrap();
    }
    let bump = before.facts.bump;
    a.until("b", |member| member.card.as_ref().is_some_and(|c| c.facts.bump > bump)).await;
    // Beyond the end of the first certificates.
    let until = clock::now() + life + Duration::from_secs(1);
    while clock::now() < until {
        for (node, other) in [(&a, "b"), (&b, "a")] {
            let member = node.sees(other).await.unwrap();
            assert!(is_alive(&member), "{member:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A node of version 1, by its hello.
fn hello(node: &str, epoch: u64) -> Hello {
    Hello {
        trust_domain: "mesh.test".parse().unwrap(),
        protocol: (1, 1),
        node: node.parse().unwrap(),
        region: "eu".parse().unwrap(),
        epoch,
        revocations: 0,
        revocations_digest: 0,
        card: None,
    }
}

fn load(epoch: u64, sequence: u64) -> Frame {
    Frame::Load(LoadFrame {
        epoch,
        sequence,
        descriptor_version: 1,
        sample_age: Duration::ZERO,
        next: Duration::from_secs(1),
        draining: false,
        engines: vec![],
        arrivals: vec![],
    })
}

async fn say(link: &Link, frame: Frame) {
    // The other end may have had enough already.
    drop(link.send_whole(encode(&frame).into()).await);
}

async fn hear(link: &Link) -> Result<Frame, String> {
    let heard = tokio::time::timeout(LONG, link.receive()).await.expect("nothing is said");
    decode(&heard.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
}

/// Dials `to` as `identity`, and says what is given.
async fn dial(
    identity: &Identity,
    to: SocketAddr,
    name: &str,
    frames: Vec<Frame>,
) -> (Links, Link) {
    let expect = ExpectedPeer { region: "eu".parse().unwrap(), name: name.parse().unwrap() };
    let tls = identity.peer_client_config(&[], expect).unwrap();
    let links = links(identity);
    let link = links.dial(&to.to_string().parse().unwrap(), tls).await.unwrap();
    for frame in frames {
        say(&link, frame).await;
    }
    (links, link)
}

/// Dials `to` as `identity` over one transport.
async fn dial_over(
    identity: &Identity,
    to: SocketAddr,
    name: &str,
    over: LinkTransport,
) -> (Links, Link) {
    let expect = ExpectedPeer { region: "eu".parse().unwrap(), name: name.parse().unwrap() };
    let tls = identity.peer_client_config(&[], expect).unwrap();
    let links = links(identity);
    let link = links.dial_over(&to.to_string().parse().unwrap(), tls, over).await.unwrap();
    (links, link)
}

#[tokio::test]
async fn a_node_of_version_1_that_dials_is_told_what_it_asked_for() {
    let world = World::new();
    let a = world.start("a", 1, &[]);
    let old = world.identity("old");
    let (_links, link) = dial(&old, a.address, "a", vec![Frame::Hello(hello("old", 7))]).await;
    // As such a node does: what may be lost waits until it knows who speaks.
    let first = tokio::time::timeout(LONG, link.receive_whole()).await.unwrap().unwrap();
    let Ok(Frame::Hello(first)) = decode(&first) else { panic!("the first frame is no hello") };
    assert_eq!((first.protocol, first.epoch), ((1, 2), 1));
    let mut kinds = Vec::new();
    while !["descriptor", "load"].iter().all(|kind| kinds.contains(kind)) {
        match hear(&link).await.unwrap() {
            Frame::Descriptor(descriptor) => {
                assert_eq!(descriptor.engines.len(), 1);
                kinds.push("descriptor");
            }
            Frame::Load(load) => {
                assert_eq!((load.epoch, load.engines.len()), (1, 1));
                kinds.push("load");
            }
            other => panic!("it would not understand {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_listed_node_of_version_1_is_listened_to_although_it_dials_too() {
    let world = World::new();
    let old = world.identity("old");
    let old_links = links(&old);
    let listed = World::listed("old", old_links.address().unwrap());
    let a = world.start_with(world.identity("a"), 1, &[], vec![listed]);
    let (_links, theirs) = dial(&old, a.address, "a", vec![Frame::Hello(hello("old", 7))]).await;
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let link = old_links.accept().await.unwrap().accept().await.unwrap();
        assert!(matches!(hear(&link).await, Ok(Frame::Hello(_))));
        say(&link, Frame::Hello(hello("old", 7))).await;
        say(&link, Frame::Descriptor(Descriptor { version: 1, engines: vec![] })).await;
        for sequence in 1.. {
            say(&link, load(7, sequence)).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    a.until_presence("old", Presence::Present).await;
    let member = a.sees("old").await.unwrap();
    assert!(member.card.is_none() && member.protocol == Some(1), "{member:?}");
    // And it is told, over the link that it dialled.
    while !matches!(hear(&theirs).await.unwrap(), Frame::Load(_)) {}
    serving.shutdown().await;
}

#[tokio::test]
async fn whoever_does_not_say_who_it_is_is_turned_away() {
    let world = World::new();
    let a = world.start("a", 1, &[]);
    let b = world.identity("b");
    let of_c = Hello { node: "c".parse::<NodeName>().unwrap(), ..hello("b", 7) };
    let of_later = Hello { protocol: (3, 4), ..hello("b", 7) };
    for (frame, why) in [
        (Frame::Hello(of_c), "says that it is c"),
        (Frame::Hello(of_later), "no common protocol version"),
        (load(7, 1), "no hello"),
    ] {
        let (_links, link) = dial(&b, a.address, "a", vec![frame]).await;
        let said = tokio::time::timeout(LONG, link.closed()).await.unwrap();
        assert!(said.contains(why), "{said}");
    }
    assert!(a.sees("b").await.is_none());
    assert_eq!(a.trust.refused().map(|(_, count)| count).sum::<u64>(), 3);
}

#[tokio::test]
async fn whoever_is_no_node_of_the_mesh_is_not_let_in() {
    let (ours, theirs) = (World::new(), World::new());
    let a = ours.start("a", 1, &[]);
    let stranger = theirs.start("b", 1, &[a.address]);
    let turned_away = async {
        while a.trust.refused().all(|(_, count)| count == 0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let either = async {
        tokio::select! {
            () = turned_away => {}
            () = tokio::time::sleep(Duration::from_secs(3)) => {}
        }
    };
    either.await;
    assert!(a.sees("b").await.is_none() && stranger.sees("a").await.is_none());
}

#[tokio::test]
async fn a_revoked_node_is_out_at_once() {
    let world = World::new();
    let a = world.start("a", 1, &[]);
    let b = world.start("b", 1, &[a.address]);
    a.until("b", is_alive).await;
    let authority = || Authority::open(world.0.path(), clock::wall()).unwrap();
    authority().revoke(b.trust.identity().id(), clock::wall()).unwrap();
    let authority = authority();
    assert!(a.trust.adopt(authority.revocations().clone()).unwrap());
    a.until("b", |member| member.link.is_none()).await;
    a.until_presence("b", Presence::Silent).await;
    // The list was handed on: it knows why.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(a.sees("b").await.unwrap().link.is_none());
}

#[tokio::test]
async fn where_udp_does_not_come_through_nodes_are_linked_over_tcp() {
    let world = World::new();
    let a = world.start("a", 1, &[]);
    let (_links, link) = dial_over(&world.identity("b"), a.address, "a", LinkTransport::Tcp).await;
    say(&link, Frame::Hello(hello("b", 7))).await;
    assert!(matches!(hear(&link).await, Ok(Frame::Hello(_))));
    let member = a.until("b", |member| member.link.is_some()).await;
    assert_eq!(member.link.unwrap().0, Transport::Tcp);
    let _: NodeId = member.peer.id;
}

#[tokio::test]
async fn who_sends_a_frame_that_is_too_long_is_named_whichever_way_it_goes_and_whenever() {
    for over in [LinkTransport::Quic, LinkTransport::Tcp] {
        for greets in [true, false] {
            let world = World::new();
            let a = world.start("a", 1, &[]);
            let (_links, link) = dial_over(&world.identity("b"), a.address, "a", over).await;
            if greets {
                say(&link, Frame::Hello(hello("b", 7))).await;
                a.until("b", |member| member.link.is_some()).await;
            }
            let whole = link.send_whole(vec![0; 1 << 20].into());
            let (_, why) = tokio::join!(whole, tokio::time::timeout(LONG, link.closed()));
            assert!(why.unwrap().contains("longer than"));
            let named = async {
                loop {
                    let status = a.mesh.status().await.expect("it does not answer");
                    if let Some((peer, _, why)) = status.quarantined.first() {
                        return (peer.clone(), why.clone());
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            let (peer, why) = tokio::time::timeout(LONG, named).await.expect("nobody is named");
            assert_eq!(peer, World::peer("b"), "{over}");
            assert!(why.contains("longer than"), "{why}");
        }
    }
}
