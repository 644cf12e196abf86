//! The outgoing connections of one worker: one per target, another when it fills, the idle ones closed first.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http::{Request, Response};
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::body::Body;

use crate::{
    Channel, Dialer, Target, TransportError,
    channel::{Connection, Place},
    http2::CallError,
};

/// Connections one target may have.
const PER_TARGET: usize = 16;
/// How often a call is handed to a connection that closes just then.
const UNSENT_ATTEMPTS: usize = 3;
/// A connection takes no further call beyond this share of its streams while another may be opened.
const FULL_PERCENT: usize = 80;
/// A target reached over TCP is tried over QUIC again after this, doubling up to the maximum.
const PROBE_FIRST: Duration = Duration::from_secs(1);
const PROBE_MAX: Duration = Duration::from_secs(64);

/// A connection that should be replaced and cannot be is tried again after this, doubling up to the maximum.
const REPLACE_FIRST: Duration = Duration::from_millis(500);
const REPLACE_MAX: Duration = Duration::from_secs(64);

/// Connections to targets, shared by the channels of one worker. Cloneable.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dialer: Dialer,
    entries: Mutex<BTreeMap<Arc<str>, Arc<Entry>>>,
    /// Counts uses, so that the least recently used entry is known without reading a clock.
    uses: AtomicU64,
    /// A dial that ends after this closes what it opened.
    closed: AtomicBool,
}

/// What the pool knows of one target.
#[derive(Debug)]
pub(crate) struct Entry {
    target: Target,
    connections: Mutex<Vec<Connection>>,
    /// Those that take no new call and have some in progress.
    leaving: Mutex<Vec<Connection>>,
    last_use: AtomicU64,
    /// The dial in progress, so that many calls wait for one.
    dialling: Mutex<Option<Dialling>>,
    probe: Mutex<Probe>,
    replacing: Mutex<Probe>,
}

/// What a dial came to, once it is over.
type Dialling = watch::Receiver<Option<Result<(), TransportError>>>;

/// When something is tried again.
#[derive(Debug)]
struct Probe {
    next: Option<Instant>,
    wait: Duration,
}

impl Probe {
    fn first(wait: Duration) -> Self {
        Self { next: None, wait }
    }

    /// Whether it may be tried now; the next time is later by twice as much.
    fn is_due(&mut self, now: Instant, most: Duration) -> bool {
        if self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.next = Some(now + self.wait);
        self.wait = (self.wait * 2).min(most);
        true
    }
}

impl Entry {
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }
}

impl Drop for Entry {
    /// Nobody calls the target any more.
    fn drop(&mut self) {
        let leaving = std::mem::take(self.leaving.get_mut());
        for connection in self.connections.get_mut().drain(..).chain(leaving) {
            connection.close();
        }
    }
}

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(dialer: Dialer) -> Self {
        let (entries, uses, closed) = (Mutex::default(), AtomicU64::new(0), AtomicBool::new(false));
        let inner = Inner { dialer, entries, uses, closed };
        Self(Arc::new(inner))
    }

    /// A channel to `target`; channels to a target of the same name share connections.
    #[must_use]
    pub fn channel(&self, target: Target) -> Channel {
        let mut entries = self.0.entries.lock();
        let entry = entries.entry(target.name().into()).or_insert_with(|| {
            Arc::new(Entry {
                target,
                connections: Mutex::default(),
                leaving: Mutex::default(),
                last_use: AtomicU64::new(0),
                dialling: Mutex::new(None),
                probe: Mutex::new(Probe::first(PROBE_FIRST)),
                replacing: Mutex::new(Probe::first(REPLACE_FIRST)),
            })
        });
        Channel::new(self.clone(), entry.clone())
    }

    /// The target of `channel` is called no more through this pool, or under its name another one is. Its connections are closed
    /// once every channel to it is gone.
    pub fn forget(&self, channel: &Channel) {
        let mut entries = self.0.entries.lock();
        let entry = channel.entry();
        if entries.get(entry.target.name()).is_some_and(|known| Arc::ptr_eq(known, entry)) {
            entries.remove(entry.target.name());
        }
    }

    /// Opens a connection to the target, unless there is one.
    pub(crate) async fn connect(&self, entry: &Arc<Entry>) -> Result<(), TransportError> {
        match self.choose(entry, base::clock::now()) {
            Some(_) => Ok(()),
            None => self.dial(entry).await,
        }
    }

    /// Closes every connection; calls in progress fail.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
        for entry in self.0.entries.lock().values() {
            let leaving = std::mem::take(&mut *entry.leaving.lock());
            for connection in entry.connections.lock().drain(..).chain(leaving) {
                connection.close();
            }
        }
    }

    /// Waits until the other ends know that the connections are closed, at most a second.
    pub async fn closed(&self) {
        self.0.dialer.closed().await;
    }

    pub(crate) async fn call(
        &self,
        entry: &Arc<Entry>,
        mut request: Request<Body>,
    ) -> Result<Response<Body>, TransportError> {
        entry.last_use.store(self.0.uses.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        for _ in 0..UNSENT_ATTEMPTS {
            match self.place(entry).await?.call(request).await {
                Ok(response) => return Ok(response),
                Err(CallError::Failed(error)) => return Err(error),
                Err(CallError::Unsent(unsent)) => request = *unsent,
            }
        }
        Err(TransportError::Full { target: entry.target.name().into() })
    }

    /// A place for a call on an open connection, or on a new one.
    async fn place(&self, entry: &Arc<Entry>) -> Result<Place, TransportError> {
        // Each round ends with a place, an error, or one connection more.
        for _ in 0..=PER_TARGET {
            let now = base::clock::now();
            let Some(connection) = self.choose(entry, now) else {
                self.dial(entry).await?;
                continue;
            };
            if connection.is_old(now) && entry.replacing.lock().is_due(now, REPLACE_MAX) {
                // The next calls find the new one; this one need not wait for it.
                drop(self.dialling(entry));
            }
            if !connection.is_quic() && entry.target.prefers_quic() {
                self.probe_quic(entry, now);
            }
            match connection.place().await {
                Ok(Some(place)) => return Ok(place),
                Ok(None) if entry.connections.lock().len() < PER_TARGET => {
                    self.dial(entry).await?;
                }
                Ok(None) => break,
                // It broke between the choice and the call: nothing was sent.
                Err(_) => connection.close(),
            }
        }
        Err(TransportError::Full { target: entry.target.name().into() })
    }

    /// The least loaded usable connection with room, young before old, QUIC before TCP; forgets those that are gone, and
    /// the old ones once there is a young one.
    fn choose(&self, entry: &Entry, now: Instant) -> Option<Connection> {
        let limits = self.0.dialer.limits();
        let mut connections = entry.connections.lock();
        let has_young = connections.iter().any(|c| c.is_usable(now) && !c.is_old(now));
        connections.retain(|connection| {
            let stays = connection.is_usable(now) && !(has_young && connection.is_old(now));
            if !stays {
                entry.leaving.lock().push(connection.clone());
            }
            stays
        });
        if has_young {
            *entry.replacing.lock() = Probe::first(REPLACE_FIRST);
        }
        entry.leaving.lock().retain(|connection| {
            let is_done = connection.in_flight() == 0;
            if is_done {
                connection.close();
            }
            !is_done
        });
        let least =
            connections.iter().min_by_key(|c| (c.is_old(now), !c.is_quic(), c.in_flight()))?;
        let full = least.in_flight() >= least.streams(limits).saturating_mul(FULL_PERCENT) / 100;
        (!full || connections.len() >= PER_TARGET).then(|| least.clone())
    }

    /// Opens one connection more, or waits for the one that is being opened. The dial is a task of its own: a caller that
    /// gives up does not end it for the others.
    async fn dial(&self, entry: &Arc<Entry>) -> Result<(), TransportError> {
        let mut outcome = self.dialling(entry)?;
        let over = outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
        match over {
            Ok(Some(outcome)) => outcome,
            Ok(None) | Err(_) => {
                Err(TransportError::Closed("this node stopped while it dialled".into()))
            }
        }
    }

    fn dialling(&self, entry: &Arc<Entry>) -> Result<Dialling, TransportError> {
        let mut dialling = entry.dialling.lock();
        if let Some(outcome) = &*dialling {
            return Ok(outcome.clone());
        }
        self.make_room(entry)?;
        let (tell, outcome) = watch::channel(None);
        *dialling = Some(outcome.clone());
        let (pool, entry) = (self.clone(), entry.clone());
        self.0.dialer.tasks().spawn(async move {
            let dialled = pool.0.dialer.dial(&entry.target).await.and_then(|connection| {
                if !connection.is_quic() && entry.target.prefers_quic() {
                    tracing::info!(target = entry.target.name(), "QUIC did not answer; using TCP");
                }
                pool.take_in(&entry, connection)
            });
            *entry.dialling.lock() = None;
            tell.send_replace(Some(dialled));
        });
        Ok(outcome)
    }

    /// Takes a new connection in, if there is still a use for it.
    fn take_in(&self, entry: &Entry, connection: Connection) -> Result<(), TransportError> {
        let mut connections = entry.connections.lock();
        let why = if self.0.closed.load(Ordering::SeqCst) {
            "this node stopped while it dialled"
        } else if !connection.is_usable(base::clock::now()) {
            // A client is done with the handshake before the server has judged its certificate.
            "its certificate or ours has ended"
        } else {
            connections.push(connection);
            return Ok(());
        };
        connection.close();
        Err(TransportError::Dial { target: entry.target.name().into(), reason: why.into() })
    }

    /// Keeps the pool within its bound by closing the least recently used target without calls.
    fn make_room(&self, for_entry: &Arc<Entry>) -> Result<(), TransportError> {
        let entries = self.0.entries.lock();
        let open: usize = entries.values().map(|entry| entry.connections.lock().len()).sum();
        if open < self.0.dialer.limits().pool_connections {
            return Ok(());
        }
        let idle = entries
            .values()
            .filter(|entry| {
                let connections = entry.connections.lock();
                !connections.is_empty() && connections.iter().all(|c| c.in_flight() == 0)
            })
            .min_by_key(|entry| entry.last_use.load(Ordering::Relaxed));
        let Some(idle) = idle else {
            return Err(TransportError::Full { target: for_entry.target.name().into() });
        };
        for connection in idle.connections.lock().drain(..) {
            connection.close();
        }
        Ok(())
    }

    /// Tries QUIC again beside a TCP connection, with growing waits; once it works, new calls take it.
    fn probe_quic(&self, entry: &Arc<Entry>, now: Instant) {
        {
            let mut probe = entry.probe.lock();
            if probe.next.is_none() {
                // QUIC has just failed.
                probe.next = Some(now + PROBE_FIRST);
            }
            if !probe.is_due(now, PROBE_MAX) {
                return;
            }
        }
        let (pool, entry) = (self.clone(), entry.clone());
        let tasks = self.0.dialer.tasks().clone();
        tasks.spawn(async move {
            if let Ok(connection) = pool.0.dialer.dial_quic(&entry.target).await {
                tracing::info!(target = entry.target.name(), "QUIC works again");
                *entry.probe.lock() = Probe::first(PROBE_FIRST);
                drop(pool.take_in(&entry, connection));
            }
        });
    }
}
