//! Keeps the node's certificate good: renews it while it runs, takes in files somebody else keeps, and says early when it
//! cannot.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use base::clock;
use http::uri::Authority;
use identity::{ClientRoots, IdentityFiles, NodeIdentity, Renewal, ServedCertificate, Urgency};
use parking_lot::Mutex;
use rand::{RngExt as _, rngs::StdRng};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use transport::Links;

use crate::{
    joining::{self, EnrolError},
    seeds::Found,
    signer::Signer,
    spire::{self, SpireError},
    trust::Trust,
};

/// Longest sleep: a clock that is set while the node runs must not make it late.
const LOOK: Duration = Duration::from_secs(5);
/// How long one authority may take to answer, at least and at most.
const PATIENCE_MIN: Duration = Duration::from_secs(2);
const PATIENCE_MAX: Duration = Duration::from_secs(10);
/// How long at least when little is left of the certificate.
const PATIENCE_LAST: Duration = Duration::from_millis(500);
/// How often files kept by somebody else are looked at.
const FILES: Duration = Duration::from_secs(2);

/// Where the next certificate comes from.
#[derive(Debug)]
pub(crate) enum Source {
    /// This node's own authority.
    Own(Arc<Signer>, Vec<std::net::IpAddr>),
    /// The authorities at these addresses, and at what the seeds come to.
    Authorities(Vec<Authority>, watch::Receiver<Found>),
    /// Somebody else puts it into files.
    Files,
    /// A SPIRE agent hands it out.
    Spire(Option<String>),
}

/// What metrics and the operator are told.
#[derive(Debug, Default)]
pub(crate) struct Renewals {
    pub(crate) done: AtomicU64,
    pub(crate) failed: AtomicU64,
    /// Why the last try failed, while there is no newer certificate.
    pub(crate) failing: Mutex<Option<Failing>>,
    pub(crate) due: Mutex<Option<SystemTime>>,
}

/// A renewal that does not work.
#[derive(Clone, Debug)]
pub(crate) struct Failing {
    pub(crate) since: SystemTime,
    pub(crate) why: String,
}

/// Renews the certificate of a node.
#[derive(Debug)]
pub(crate) struct Renewer {
    pub(crate) trust: Arc<Trust>,
    pub(crate) source: Source,
    pub(crate) links: Links,
    /// Where the identity is stored, and found when somebody else keeps it.
    pub(crate) files: IdentityFiles,
    pub(crate) dir: PathBuf,
    /// What lies there, as far as this node knows.
    pub(crate) generation: Option<PathBuf>,
    pub(crate) books: Arc<Renewals>,
    /// Woken when a new certificate is wanted at once: the authority changed.
    pub(crate) hurry: Arc<Notify>,
    pub(crate) rng: StdRng,
}

impl Renewer {
    /// Renews until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let remedy = match &self.source {
            Source::Own(..) => "see what this node's authority says in the log",
            Source::Authorities(..) => "see that an authority in mesh.seeds can be reached",
            Source::Files => "see what should put a newer one into the files of [identity]",
            Source::Spire(_) => "see that the SPIRE agent runs and knows this node",
        };
        let alarm = Alarm { trust: self.trust.clone(), books: self.books.clone(), remedy };
        let working = async {
            match &self.source {
                Source::Files => self.watch_files().await,
                Source::Spire(socket) => {
                    let socket = socket.clone();
                    self.watch_agent(socket.as_deref()).await;
                }
                Source::Own(..) | Source::Authorities(..) => self.renew_for_ever().await,
            }
        };
        tokio::select! {
            () = working => {}
            () = alarm.watch() => {}
            () = stop.cancelled() => {}
        }
    }

    async fn renew_for_ever(&mut self) {
        let current = self.trust.identity().current();
        let summary = current.certificate();
        let mut renewal = Renewal::new(summary.from, summary.until);
        loop {
            *self.books.due.lock() = Some(renewal.due());
            let is_hurried = self.wait_for(&renewal).await;
            let now = clock::wall();
            if let Some(until) = self.found_on_disk().await {
                renewal = Renewal::new(clock::wall(), until);
                continue;
            }
            if !is_hurried && !renewal.is_due(now) {
                continue;
            }
            match self.renew_once().await {
                Ok(until) => {
                    // From now on, not from its first moment: that is set back for clocks that are behind.
                    renewal = Renewal::new(clock::wall(), until);
                }
                Err(why) => {
                    self.books.failed.fetch_add(1, Ordering::Relaxed);
                    renewal.failed(now, self.rng.random_range(0.0..1.0));
                    let since = renewal.failing_since().unwrap_or(now);
                    tracing::debug!(why, "the certificate was not renewed; trying again");
                    *self.books.failing.lock() = Some(Failing { since, why });
                }
            }
        }
    }

    /// Waits until the next try is due or wanted. Returns whether it is wanted.
    async fn wait_for(&self, renewal: &Renewal) -> bool {
        let wait = renewal.due().duration_since(clock::wall()).unwrap_or_default().min(LOOK);
        tokio::time::timeout(wait, self.hurry.notified()).await.is_ok()
    }

    /// Gets the next certificate, shows it and keeps it; returns when it ends.
    async fn renew_once(&mut self) -> Result<SystemTime, String> {
        let identity = self.renew().await.map_err(|error| error.to_string())?;
        let until = identity.certificate().until;
        self.show(identity.clone())?;
        let dir = self.dir.clone();
        let stored = tokio::task::spawn_blocking(move || identity.store(&dir)).await;
        if let Err(why) =
            stored.map_err(|e| e.to_string()).and_then(|s| s.map_err(|e| e.to_string()))
        {
            tracing::error!(
                why,
                "the renewed certificate cannot be kept: it is lost when the node stops"
            );
        }
        self.generation = identity::generation(&self.dir);
        Ok(until)
    }

    /// An operator may have joined the node again while it runs, for it was revoked or its certificate has ended: then what lies
    /// on disk is better than what we have.
    async fn found_on_disk(&mut self) -> Option<SystemTime> {
        let generation = identity::generation(&self.dir);
        if generation == self.generation {
            return None;
        }
        self.generation = generation;
        let files = self.files.clone();
        let found = tokio::task::spawn_blocking(move || files.load()).await.ok()?.ok()?;
        let until = found.certificate().until;
        let is_better = until > self.trust.identity().current().certificate().until;
        (is_better && self.show(found).is_ok()).then_some(until)
    }

    async fn renew(&mut self) -> Result<NodeIdentity, EnrolError> {
        match &self.source {
            Source::Own(signer, ips) => Ok(signer.own_identity(&self.dir, ips)?),
            Source::Authorities(listed, found) => {
                let found = found.borrow().hosts.clone();
                let seeds: Vec<Authority> = listed.iter().cloned().chain(found).collect();
                let mut worst = EnrolError::NobodyToAsk;
                // Begun anywhere, so that one that is down is not everybody's first.
                let first = self.rng.random_range(0..seeds.len().max(1));
                for seed in seeds.iter().cycle().skip(first).take(seeds.len()) {
                    let asking =
                        joining::renew(&self.links, self.trust.identity(), seed, &self.dir);
                    let asked = tokio::time::timeout(self.patience(), asking).await;
                    match asked.unwrap_or(Err(EnrolError::Silent)) {
                        Ok(enrolled) => {
                            self.adopt(enrolled.revocations);
                            return Ok(enrolled.identity);
                        }
                        // What an authority says is better than that another does not answer.
                        Err(_) if matches!(worst, EnrolError::Refused { .. }) => {}
                        Err(error) => worst = error,
                    }
                }
                Err(worst)
            }
            Source::Files | Source::Spire(_) => Err(EnrolError::NobodyToAsk),
        }
    }

    /// How long one authority may take: one that is down must not use up a short life.
    fn patience(&self) -> Duration {
        let current = self.trust.identity().current();
        let certificate = current.certificate();
        let life = certificate.until.duration_since(certificate.from).unwrap_or_default();
        let left = certificate.until.duration_since(clock::wall()).unwrap_or_default();
        (life / 48).clamp(PATIENCE_MIN, PATIENCE_MAX).min((left / 4).max(PATIENCE_LAST))
    }

    fn adopt(&self, revocations: Option<identity::SignedRevocations>) {
        if let Some(Err(error)) = revocations.map(|signed| self.trust.adopt(signed)) {
            tracing::warn!(%error, "an authority's list of revocations is not believed");
        }
    }

    /// Shows a newer identity from now on.
    fn show(&self, identity: NodeIdentity) -> Result<(), String> {
        let certificate = identity.certificate().clone();
        self.trust.identity().replace(identity).map_err(|error| error.to_string())?;
        self.books.done.fetch_add(1, Ordering::Relaxed);
        *self.books.failing.lock() = None;
        let until = humantime::format_rfc3339_seconds(certificate.until);
        tracing::info!(serial = certificate.serial, %until, "the certificate was renewed");
        Ok(())
    }

    /// Takes in what a SPIRE agent hands out.
    async fn watch_agent(&self, socket: Option<&str>) {
        let wanted = self.trust.identity().id().clone();
        let (newest, newer) = watch::channel(None);
        let take = |found: NodeIdentity| self.take_from_agent(found, &newest);
        let failed = |error: &SpireError| self.failing(&error.to_string());
        tokio::select! {
            () = spire::watch(socket, &wanted, take, failed) => {}
            () = self.keep_roots(newer) => {}
        }
    }

    fn take_from_agent(&self, found: NodeIdentity, newest: &watch::Sender<Option<NodeIdentity>>) {
        if found.is_same(&self.trust.identity().current()) {
            *self.books.failing.lock() = None;
            return;
        }
        newest.send_replace(Some(found.clone()));
        if let Err(why) = self.show(found) {
            self.failing(&why);
        }
    }

    /// The agent keeps certificate and key; the roots are kept for clients, beside everything else.
    async fn keep_roots(&self, mut newer: watch::Receiver<Option<NodeIdentity>>) {
        while newer.changed().await.is_ok() {
            let Some(newest) = newer.borrow_and_update().clone() else { continue };
            let dir = self.dir.clone();
            let stored = tokio::task::spawn_blocking(move || newest.store_roots(&dir)).await;
            if let Err(why) =
                stored.map_err(|e| e.to_string()).and_then(|s| s.map_err(|e| e.to_string()))
            {
                tracing::warn!(why, "the roots cannot be written down for clients");
            }
        }
    }

    /// Looks at the files again and again, and takes in what is new and good.
    async fn watch_files(&self) {
        let mut doubt = Doubt::default();
        loop {
            let current = self.trust.identity().current();
            tokio::time::sleep(FILES).await;
            let files = self.files.clone();
            let loaded = tokio::task::spawn_blocking(move || files.load()).await;
            let taken = match loaded {
                Ok(Ok(found)) if !found.is_same(&current) => self.show(found),
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Some(why) = doubt.about(taken) {
                self.failing(why);
                tracing::warn!(
                    why,
                    "the identity's files changed and are not used; the earlier identity stays in use"
                );
            } else if doubt.is_none() && self.books.failing.lock().take().is_some() {
                tracing::info!("the identity's files are good again");
            }
        }
    }

    fn failing(&self, why: &str) {
        self.books.failed.fetch_add(1, Ordering::Relaxed);
        *self.books.failing.lock() = Some(Failing { since: clock::wall(), why: why.to_owned() });
    }
}

/// Says early that a certificate is not renewed, whoever should renew it and whatever keeps the try in progress.
struct Alarm {
    trust: Arc<Trust>,
    books: Arc<Renewals>,
    /// What to do about it.
    remedy: &'static str,
}

impl Alarm {
    async fn watch(&self) {
        let mut said = Urgency::None;
        loop {
            let current = self.trust.identity().current();
            let certificate = current.certificate();
            let renewal = Renewal::new(certificate.from, certificate.until);
            let (now, urgency) = (clock::wall(), renewal.urgency(clock::wall()));
            if urgency != said {
                said = urgency;
                self.raise(urgency, renewal.left(now));
            }
            // A hundred looks in what is left, so that the end of a short life is not missed.
            tokio::time::sleep((renewal.left(now) / 100).clamp(LOOK / 50, LOOK)).await;
        }
    }

    fn raise(&self, urgency: Urgency, left: Duration) {
        let failing = self.books.failing.lock().clone();
        let (why, since) = match failing {
            Some(Failing { why, since }) => {
                (why, humantime::format_rfc3339_seconds(since).to_string())
            }
            None => (String::new(), "never".to_owned()),
        };
        let (left_s, remedy) = (left.as_secs(), self.remedy);
        match urgency {
            Urgency::None => {}
            Urgency::Alarm => tracing::error!(
                left_s,
                failing_since = since,
                why,
                remedy,
                "this node's certificate ends soon and cannot be renewed"
            ),
            Urgency::Expired => tracing::error!(
                why,
                remedy,
                "this node's certificate has ended: peers refuse this node until it has another; one from an authority is had with a \
                 new token: `isobar ca token` there, then `isobar join --token TOKEN` here"
            ),
        }
    }
}

/// Files that are being replaced can be wrong for a moment: what is wrong twice in a row is said, once.
#[derive(Debug, Default)]
struct Doubt {
    why: Option<String>,
    said: bool,
}

impl Doubt {
    /// What is to be said after another look.
    fn about(&mut self, taken: Result<(), String>) -> Option<&str> {
        let Err(why) = taken else {
            *self = Self::default();
            return None;
        };
        if self.why.as_ref() != Some(&why) {
            *self = Self { why: Some(why), said: false };
            return None;
        }
        if std::mem::replace(&mut self.said, true) { None } else { self.why.as_deref() }
    }

    fn is_none(&self) -> bool {
        self.why.is_none()
    }
}

/// Takes in the certificate for clients again whenever its files change.
pub(crate) async fn watch_client_certificate(
    served: ServedCertificate,
    (cert, key): (PathBuf, PathBuf),
) {
    let mut doubt = Doubt::default();
    loop {
        tokio::time::sleep(FILES).await;
        let (cert_path, key_path) = (cert.clone(), key.clone());
        let reading = move || identity::load_server_cert(&cert_path, &key_path);
        let Ok(read) = tokio::task::spawn_blocking(reading).await else { continue };
        let taken = read.and_then(|(chain, secret)| served.replace_if_other(chain, secret));
        if let Ok(true) = taken {
            tracing::info!(cert = %cert.display(), "a newer certificate for clients is shown");
        }
        if let Some(why) = doubt.about(taken.map(drop).map_err(|error| error.to_string())) {
            tracing::warn!(
                why,
                "the certificate for clients changed and is not used; the earlier one stays in use"
            );
        }
    }
}

/// Takes in the roots of clients again whenever their file changes.
pub(crate) async fn watch_client_roots(roots: ClientRoots, path: PathBuf) {
    let mut doubt = Doubt::default();
    loop {
        tokio::time::sleep(FILES).await;
        let (reading, at) = (roots.clone(), path.clone());
        let reloading = tokio::task::spawn_blocking(move || reading.reload(&at));
        let Ok(taken) = reloading.await else { continue };
        if let Ok(true) = taken {
            tracing::info!(path = %path.display(), "other roots are believed for clients");
        }
        if let Some(why) = doubt.about(taken.map(drop).map_err(|error| error.to_string())) {
            tracing::warn!(
                why,
                "tls.client_ca changed and is not used; the earlier roots stay in use"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_twice_is_said_once() {
        let mut doubt = Doubt::default();
        let wrong = |why: &str| Err(why.to_owned());
        assert_eq!(doubt.about(wrong("half written")), None);
        assert_eq!(doubt.about(wrong("another key")), None, "it changes still");
        assert_eq!(doubt.about(wrong("another key")), Some("another key"));
        assert_eq!(doubt.about(wrong("another key")), None);
        assert!(!doubt.is_none());
        assert_eq!(doubt.about(Ok(())), None);
        assert!(doubt.is_none());
        assert_eq!(doubt.about(wrong("another key")), None);
        assert_eq!(doubt.about(wrong("another key")), Some("another key"));
    }
}
