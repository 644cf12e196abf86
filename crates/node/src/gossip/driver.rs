//! The one task that owns the machine of membership: what comes from links, timers and this node goes in, and what comes out is
//! done. It never waits for a link.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use base::clock;
use bytes::Bytes;
use identity::NodeIdentity;
use membership::{
    Event, Frame, Hello, Input, LINKS_MAX, Mesh, NodeId, Output, Pair, Peer, Pool, Seed, Transport,
    Way, encode,
};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use transport::Links;

use crate::{peers::Board, seeds::Found};

use super::{
    NodeJudge, StatusAsk, Voice,
    dial::Dial,
    kept,
    link::{Answer, Common, News, Reins, SUPERSEDED, Up},
    news::Teller,
    table::{Entry, Left, Table},
};

/// News taken in before timers are looked at again.
const BATCH: usize = 64;
/// How often what is not waited for is looked at: certificates, seeds, links whose task is gone.
const LOOK: Duration = Duration::from_millis(200);
/// A seed at whose address this node itself answered is no seed for so long, for one address may stand for several nodes: while there
/// is no link, and while there is one.
const SELF_FOR: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(300)];
/// How often cards are written down.
const KEEP: Duration = Duration::from_secs(30);
/// Later than this by its own clock, the loop must not think badly of others.
const LATE: Duration = Duration::from_millis(100);
/// How long it sleeps at most.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// A frame that must arrive finds no room.
const UNREAD: &str = "the other end does not read";
/// Dials in progress.
const DIALS_MAX: usize = 128;
/// A link that another took the place of is heard for so long yet.
const LINGER: Duration = Duration::from_secs(1);
/// A node that leaves goes on for so long, so that others hear of it and pass it on; then its links end within this.
const LEAVING: Duration = Duration::from_millis(300);
const LEFT_LINGER: Duration = Duration::from_millis(100);
const CLOSED_WITHIN: Duration = Duration::from_millis(1_200);

/// Everything the loop needs besides the machine.
pub(super) struct Parts {
    pub(super) links: Links,
    pub(super) common: Common,
    pub(super) news: mpsc::Receiver<News>,
    pub(super) asks: mpsc::Receiver<StatusAsk>,
    pub(super) voice: Voice,
    pub(super) board: Arc<Board>,
    pub(super) seeds: watch::Receiver<Found>,
    pub(super) listed: Vec<Seed>,
    /// Where cards are kept; `None`: nowhere.
    pub(super) kept: Option<std::path::PathBuf>,
    pub(super) own_gossip: String,
    /// Told once when another process has this node's name.
    pub(super) superseded: watch::Sender<Option<u64>>,
}

/// The loop.
pub(super) struct Driver {
    mesh: Mesh<NodeJudge>,
    parts: Parts,
    table: Table<Near>,
    next_number: u64,
    /// Links that have begun and not ended, those that are replaced too.
    open: usize,
    dials: JoinSet<()>,
    dialling: Arc<Semaphore>,
    /// Nodes to which a link is being made that takes the place of an old one.
    renewing: BTreeSet<NodeId>,
    /// What was dialled for each link, to dial it again.
    dialled: BTreeMap<NodeId, Dial>,
    /// Nodes of version 1, with which there may be a link each way.
    legacy: BTreeMap<NodeId, Legacy>,
    /// Addresses at which this node itself answered, and when.
    selves: BTreeMap<String, Instant>,
    /// What is to be told to the machine once it has no more outputs.
    inputs: VecDeque<Input>,
    teller: Teller,
    keeping: JoinSet<()>,
    seen: Seen,
}

/// This end of a link, and the card of the other, signed.
struct Near {
    reins: Reins,
    card: Option<Vec<u8>>,
}

impl Near {
    /// Ends the link, for there is a later process of that node: its card says so.
    fn supersede(self, card: Option<&Vec<u8>>) {
        if let Some(frame) = card.map(|card| later(card)) {
            self.reins.send(frame, Way::Stream);
        }
        self.reins.end(SUPERSEDED, LINGER);
    }
}

/// What tells a process that there is a later one of its node.
fn later(card: &[u8]) -> Bytes {
    encode(&Frame::Cards(Pool::Region, vec![card.to_vec()])).into()
}

/// A node of version 1, as it last said hello.
#[derive(Clone)]
struct Legacy {
    peer: Peer,
    hello: Hello,
    transport: Transport,
}

/// What was last looked at, and when the next look is due.
struct Seen {
    identity: Arc<NodeIdentity>,
    descriptor: u32,
    draining: bool,
    cards: Vec<Pair>,
    look: Instant,
    keep: Instant,
    sample: Instant,
    /// When the loop should have woken at the latest.
    due: Instant,
}

impl Driver {
    /// `described` is the version of the descriptor that the machine knows.
    pub(super) fn new(mesh: Mesh<NodeJudge>, parts: Parts, described: u32) -> Self {
        let now = clock::now();
        let seen = Seen {
            identity: parts.common.trust.identity().current(),
            descriptor: described,
            draining: false,
            cards: Vec::new(),
            look: now,
            keep: now + KEEP,
            sample: now,
            due: now + SLEEP_MAX,
        };
        Self {
            table: Table::new(super::judge::node_id(parts.common.own())),
            mesh,
            parts,
            next_number: 1,
            open: 0,
            dials: JoinSet::new(),
            dialling: Arc::new(Semaphore::new(DIALS_MAX)),
            renewing: BTreeSet::new(),
            dialled: BTreeMap::new(),
            legacy: BTreeMap::new(),
            selves: BTreeMap::new(),
            inputs: VecDeque::new(),
            teller: Teller::default(),
            keeping: JoinSet::new(),
            seen,
        }
    }

    /// Goes on until `stop`, and then says good-bye.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        self.begin().await;
        let draining = self.parts.voice.draining.clone();
        let mut described = self.parts.voice.catalog.changes();
        // What changed meanwhile.
        described.mark_changed();
        while !stop.is_cancelled() {
            let due = self.turn();
            tokio::select! {
                () = stop.cancelled() => {}
                () = draining.cancelled(), if !self.seen.draining => {}
                Ok(()) = described.changed() => self.describe(),
                () = tokio::time::sleep_until(due.into()) => {}
                Some(news) = self.parts.news.recv() => self.take(news),
                Some(ask) = self.parts.asks.recv() => self.answer(ask),
                Some(_) = self.dials.join_next() => {}
            }
        }
        self.leave().await;
    }

    /// Where others may be found, from the configuration and from the last time.
    async fn begin(&mut self) {
        self.tell_seeds();
        self.settle();
        let Some(path) = self.parts.kept.clone() else { return };
        let reading = tokio::task::spawn_blocking(move || kept::read(&path));
        let cards = reading.await.unwrap_or_default();
        self.mesh.remember(clock::now(), &cards);
    }

    /// Everything that is due is done, and what follows from it; returns when there is more, if nothing comes before.
    fn turn(&mut self) -> Instant {
        let now = clock::now();
        let late = now.saturating_duration_since(self.seen.due);
        if late > LATE {
            tracing::debug!(late_ms = late.as_millis(), "the gossip port came too late");
            self.handle(Input::Lagged(late));
        }
        for _ in 1..BATCH {
            let Ok(news) = self.parts.news.try_recv() else { break };
            self.take(news);
        }
        if now >= self.seen.look {
            self.seen.look = now + LOOK;
            self.look(now);
        }
        if self.parts.voice.draining.is_cancelled() && !self.seen.draining {
            self.seen.draining = true;
            self.handle(Input::Drain);
        }
        self.sample(now);
        if self.mesh.next_deadline().is_some_and(|deadline| now >= deadline) {
            self.handle(Input::Tick);
        }
        let machine = self.mesh.next_deadline().unwrap_or(now + SLEEP_MAX);
        let sample = self.mesh.sample_interval().map_or(self.seen.look, |_| self.seen.sample);
        self.seen.due = machine.min(sample).min(self.seen.look).min(now + SLEEP_MAX).max(now);
        self.seen.due
    }

    /// Looks at the engines when the machine wants to know.
    fn sample(&mut self, now: Instant) {
        let Some(interval) = self.mesh.sample_interval() else { return };
        // An interval that became shorter counts at once.
        self.seen.sample = self.seen.sample.min(now + interval);
        if now >= self.seen.sample {
            self.seen.sample = now + interval;
            let loads = self.parts.voice.engines.iter().map(|engine| engine.load()).collect();
            let arrivals = self.parts.voice.arrivals.arrivals();
            self.handle(Input::Loads { loads, arrivals });
        }
    }

    /// Looks at what is not waited for.
    fn look(&mut self, now: Instant) {
        let identity = self.parts.common.trust.identity().current();
        if !Arc::ptr_eq(&identity, &self.seen.identity) {
            self.seen.identity = identity;
            self.handle(Input::Renewed);
        }
        let known = self.selves.len();
        let [alone, linked] = SELF_FOR;
        let self_for = if self.table.len() == 0 { alone } else { linked };
        self.selves.retain(|_, since| now < *since + self_for);
        // Nobody looks any more where there is nothing to look up.
        let is_news = self.parts.seeds.has_changed().unwrap_or(false);
        if is_news || self.selves.len() < known {
            self.tell_seeds();
            self.settle();
        }
        if now >= self.seen.keep {
            self.seen.keep = now + KEEP;
            self.keep();
        }
        while self.keeping.try_join_next().is_some() {}
        // A task that was ended tells nothing.
        let gone = self.table.all().filter(|(_, _, near)| near.reins.is_closed());
        let gone: Vec<_> = gone.map(|(id, number, _)| (id, number)).collect();
        for (id, number) in gone {
            self.lost(number, id, "its task is gone".to_owned());
        }
    }

    /// Tells the machine what this node serves, if that is news.
    fn describe(&mut self) {
        let descriptor = self.parts.voice.catalog.descriptor();
        if std::mem::replace(&mut self.seen.descriptor, descriptor.version) != descriptor.version {
            self.handle(Input::Describe(descriptor));
        }
    }

    /// Tells the machine where others may be found.
    fn tell_seeds(&mut self) {
        let found = self.parts.seeds.borrow_and_update().addresses.clone();
        let others = found.into_iter().filter(|address| {
            *address != self.parts.own_gossip && !self.selves.contains_key(address)
        });
        let seeds = others.map(|address| Seed { address, peer: None, is_listed: false });
        let seeds = self.parts.listed.iter().cloned().chain(seeds).collect();
        self.tell(Input::Seeds(seeds));
    }

    /// Writes down the cards of others when they are others than last time.
    fn keep(&mut self) {
        let Some(path) = self.parts.kept.clone().filter(|_| self.keeping.is_empty()) else {
            return;
        };
        let cards = self.mesh.cards(kept::CARDS_MAX);
        let pairs: Vec<Pair> = cards.iter().map(|card| card.pair()).collect();
        if pairs.is_empty() || pairs == self.seen.cards {
            return;
        }
        self.seen.cards = pairs;
        let signed = cards.iter().map(|card| card.signed.to_vec()).collect();
        self.keeping.spawn_blocking(move || kept::write(path, signed));
    }

    /// A link has something to say.
    fn take(&mut self, news: News) {
        match news {
            News::Up(up) => self.up(*up),
            News::DialFailed { dial, why, is_self } => {
                if is_self {
                    self.selves.insert(dial.address().to_owned(), clock::now());
                    self.tell_seeds();
                }
                self.dial_failed(dial, why);
                self.settle();
            }
            // A frame of a link that was replaced counts as long as the same process is linked.
            News::Frame { epoch, from, bytes, rtt } => {
                if self.table.epoch(from) == Some(epoch) {
                    self.handle(Input::Frame { from, bytes, rtt });
                }
            }
            News::Broke { peer, why } => self.handle(Input::Broke { peer, why }),
            News::Ended { number, id, why } => self.ended(number, id, why),
            News::Old { number, id, to_quic } => self.renew(number, id, to_quic),
            News::Twin { epoch, answer } => {
                if let Some(answer) = answer {
                    drop(answer.send(self.mesh.hello()));
                }
                if epoch > self.parts.common.epoch {
                    self.superseded(epoch);
                }
            }
        }
    }

    /// Both ends of a link have said hello, or the one that dialled.
    fn up(&mut self, up: Up) {
        let Up { peer, hello, transport, dialled, answer } = up;
        if let Some(Dial { renews: Some(id), .. }) = &dialled {
            self.renewing.remove(id);
        }
        let (id, number, is_dialled) = (peer.id, self.next_number, dialled.is_some());
        self.next_number += 1;
        let (reins, taken) = Reins::new(number, self.mesh.hello());
        let before = self.table.epoch(id);
        let near = Near { reins, card: hello.card.clone() };
        let is_legacy = hello.card.is_none() || hello.version() == Some(1);
        let (epoch, since) = (hello.epoch, clock::now());
        let entry = Entry { number, epoch, dialled: is_dialled, is_legacy, since };
        let admitted = if !self.table.contains(id) && self.table.len() >= LINKS_MAX {
            tracing::warn!(node = %peer.node, "a link was turned down: there are {LINKS_MAX} already");
            Err("too many links")
        } else {
            self.table.admit(id, entry, near)
        };
        match admitted {
            Err(why) => {
                let card = self.table.to(id).and_then(|near| near.card.as_ref());
                drop(answer.send(match card.filter(|_| why == SUPERSEDED) {
                    Some(card) => {
                        let hello = Box::new(self.mesh.hello());
                        Answer::Superseded { hello, frame: later(card) }
                    }
                    None => Answer::Not(why.to_owned()),
                }));
                if let Some(dial) = dialled {
                    self.dial_failed(dial, why.to_owned());
                }
                return self.settle();
            }
            Ok(older) if before.is_some_and(|before| before < epoch) => {
                older.into_iter().for_each(|one| one.supersede(hello.card.as_ref()));
            }
            Ok(older) => {
                let why = "another link takes its place";
                older.into_iter().for_each(|one| one.reins.end(why, LINGER));
            }
        }
        self.open += 1;
        match dialled {
            Some(dial) => drop(self.dialled.insert(id, dial)),
            None if is_legacy => {}
            None => drop(self.dialled.remove(&id)),
        }
        self.teller.link_up(&peer, transport);
        if is_legacy {
            let (peer, hello) = (peer.clone(), hello.clone());
            self.legacy.insert(id, Legacy { peer, hello, transport });
        } else {
            self.legacy.remove(&id);
        }
        let hello = Box::new(hello);
        self.tell(Input::LinkUp { peer, hello, transport, dialled: is_dialled });
        if answer.send(Answer::Taken(Box::new(taken))).is_err() {
            // Its task was ended: it is gone already.
            self.ended(number, id, "the node stops".to_owned());
        }
        self.settle();
    }

    /// Link `number` has ended.
    fn ended(&mut self, number: u64, id: NodeId, why: String) {
        self.open = self.open.saturating_sub(1);
        self.lost(number, id, why);
    }

    fn lost(&mut self, number: u64, id: NodeId, why: String) {
        match self.table.remove_number(id, number) {
            Left::AsBefore => return,
            Left::Nothing => self.gone(id, why),
            Left::Other { dialled } => {
                let Some(Legacy { peer, hello, transport }) = self.legacy.get(&id).cloned() else {
                    return;
                };
                if !dialled {
                    self.dialled.remove(&id);
                }
                self.teller.link_down(id, &why);
                self.tell(Input::LinkDown { id, why });
                let hello = Box::new(hello);
                self.tell(Input::LinkUp { peer, hello, transport, dialled });
            }
        }
        self.settle();
    }

    /// The link with a node is gone, and there is no other.
    fn gone(&mut self, id: NodeId, why: String) {
        self.dialled.remove(&id);
        self.legacy.remove(&id);
        self.teller.link_down(id, &why);
        self.tell(Input::LinkDown { id, why });
    }

    fn dial_failed(&mut self, dial: Dial, why: String) {
        tracing::debug!(address = dial.address(), why, "a gossip port was not reached");
        match dial.renews {
            Some(id) => drop(self.renewing.remove(&id)),
            None => self.tell(Input::DialFailed { target: dial.target, why }),
        }
    }

    /// The lease of a link that this end dialled is half over, or it goes over TCP and QUIC may work by now.
    fn renew(&mut self, number: u64, id: NodeId, to_quic: bool) {
        if self.table.is_current(id, number)
            && let Some(dial) = self.dialled.get(&id).cloned()
            && self.renewing.insert(id)
        {
            self.dial(Dial { renews: Some(id), to_quic, ..dial });
            self.settle();
        }
    }

    /// Dials unless what answers there is linked already: the other end would take the new link for the better one, every time.
    fn dial_anew(&mut self, dial: Dial) {
        let is_same = |(id, known): (&NodeId, &Dial)| {
            known.address() == dial.address() && self.table.contains(*id)
        };
        if dial.expected().is_none() && self.dialled.iter().any(is_same) {
            return self.dial_failed(dial, "who answers there is linked already".to_owned());
        }
        self.dial(dial);
    }

    fn dial(&mut self, dial: Dial) {
        let Ok(place) = self.dialling.clone().try_acquire_owned() else {
            return self.dial_failed(dial, "too many dials at once".to_owned());
        };
        let (common, links, hello) =
            (self.parts.common.clone(), self.parts.links.clone(), self.mesh.hello());
        self.dials.spawn(common.dial(links, hello, dial, place));
    }

    fn answer(&self, ask: StatusAsk) {
        // Whoever asked may have given up.
        drop(ask.send(self.mesh.status(clock::now())));
    }

    fn handle(&mut self, input: Input) {
        self.tell(input);
        self.settle();
    }

    fn tell(&mut self, input: Input) {
        self.inputs.push_back(input);
    }

    /// Tells the machine what there is to tell, and does what it wants done.
    fn settle(&mut self) {
        while let Some(input) = self.inputs.pop_front() {
            self.mesh.handle(clock::now(), input);
            while let Some(output) = self.mesh.poll_output() {
                self.perform(output);
            }
        }
    }

    fn perform(&mut self, output: Output) {
        match output {
            Output::Send { to, bytes, way } => {
                if self.table.to(to).is_some_and(|near| !near.reins.send(bytes, way)) {
                    self.close(to, UNREAD);
                    self.gone(to, UNREAD.to_owned());
                }
            }
            Output::Dial(target) => self.dial_anew(Dial { target, renews: None, to_quic: false }),
            Output::Close { id, why } => {
                self.teller.link_down(id, &why);
                self.close(id, &why);
            }
            Output::Event(event) => self.event(&event),
        }
    }

    fn close(&mut self, id: NodeId, why: &str) {
        self.dialled.remove(&id);
        self.legacy.remove(&id);
        self.table.remove(id).into_iter().for_each(|near| near.reins.end(why, Duration::ZERO));
    }

    fn event(&mut self, event: &Event) {
        if let Event::Superseded { epoch } = event {
            self.superseded(*epoch);
        }
        self.teller.tell(event);
        self.parts.board.apply(event);
    }

    /// Another process has this node's name and is the later one.
    fn superseded(&self, epoch: u64) {
        self.parts.superseded.send_if_modified(|known| {
            let is_news = known.is_none();
            *known = known.or(Some(epoch));
            is_news
        });
    }

    /// Says good-bye, and ends all links.
    async fn leave(mut self) {
        self.keep();
        self.handle(Input::Leave);
        let until = clock::now() + LEAVING;
        while clock::now() < until {
            let due = self.turn().min(until);
            tokio::select! {
                () = tokio::time::sleep_until(due.into()) => {}
                Some(news) = self.parts.news.recv() => self.take(news),
                Some(ask) = self.parts.asks.recv() => self.answer(ask),
            }
        }
        for near in self.table.drain() {
            near.reins.end("left", LEFT_LINGER);
        }
        let closing = async {
            while self.open > 0 {
                let Some(news) = self.parts.news.recv().await else { return };
                self.open -= usize::from(matches!(news, News::Ended { .. }));
            }
            while self.keeping.join_next().await.is_some() {}
        };
        drop(tokio::time::timeout(CLOSED_WITHIN, closing).await);
        self.dials.shutdown().await;
    }
}
