//! One issuer of tokens, and its keys as they change.
//!
//! Keys are read again every so often, and sooner when a token names one that is not known. A reading that fails leaves the
//! keys as they were; a set without keys is no failure, and from then on every token of the issuer is refused.

use std::{fs, sync::Arc, time::Duration};

use base::clock;
use parking_lot::RwLock;
use tokio::sync::{Notify, watch};

use super::{AccessError, fetch::Fetch, keys::KeySet};
use crate::config::{JwksSource, JwtConfig};

/// Between two readings of keys that a token asks for, or of which the first failed.
const AGAIN_AFTER: Duration = Duration::from_secs(10);
/// How long a call waits for keys.
const WAIT_MAX: Duration = Duration::from_secs(6);

/// An issuer.
#[derive(Debug)]
pub(super) struct Issuer {
    pub(super) config: JwtConfig,
    keys: RwLock<Arc<Keys>>,
    wanted: Notify,
    /// How often keys were read, well or not, and when last.
    readings: watch::Sender<Option<std::time::Instant>>,
}

/// Keys, and which reading they are of.
#[derive(Debug, Default)]
pub(super) struct Keys {
    pub(super) set: KeySet,
    pub(super) generation: u64,
}

impl Issuer {
    /// Reads its keys, if they are in a file.
    pub(super) fn load(config: &JwtConfig) -> Result<Arc<Self>, AccessError> {
        let mut keys = Keys::default();
        let mut read_at = None;
        if let JwksSource::File(path) = &config.jwks {
            let text = fs::read(path)
                .map_err(|source| AccessError::Keys { path: path.clone(), source })?;
            keys.set = KeySet::parse(&text)
                .and_then(KeySet::meant_for_us)
                .map_err(|source| AccessError::KeySet { path: path.clone(), source })?;
            read_at = Some(clock::now());
        }
        Ok(Arc::new(Self {
            config: config.clone(),
            keys: RwLock::new(Arc::new(keys)),
            wanted: Notify::new(),
            readings: watch::Sender::new(read_at),
        }))
    }

    pub(super) fn is_over_https(self: &Arc<Self>) -> bool {
        matches!(&self.config.jwks, JwksSource::Url(url) if url.scheme_str() == Some("https"))
    }

    /// The keys as they are now.
    pub(super) fn keys(&self) -> Arc<Keys> {
        self.keys.read().clone()
    }

    /// Asks for another reading, and waits for it if it is due at once.
    pub(super) async fn refreshed(&self) {
        let mut readings = self.readings.subscribe();
        let is_due = readings
            .borrow_and_update()
            .is_none_or(|last| clock::now().saturating_duration_since(last) >= AGAIN_AFTER);
        self.wanted.notify_one();
        if is_due {
            // Whatever comes of it, the caller looks for its key once more.
            drop(tokio::time::timeout(WAIT_MAX, readings.changed()).await);
        }
    }

    /// Reads the keys again and again.
    pub(super) async fn keep(self: Arc<Self>, fetch: Fetch) {
        let refresh = Duration::from(self.config.refresh);
        let mut wait = if self.readings.borrow().is_some() { refresh } else { Duration::ZERO };
        loop {
            let is_wanted = tokio::select! {
                () = tokio::time::sleep(wait) => false,
                () = self.wanted.notified() => true,
            };
            let last = *self.readings.borrow();
            if is_wanted && let Some(last) = last {
                let since = clock::now().saturating_duration_since(last);
                tokio::time::sleep(AGAIN_AFTER.saturating_sub(since)).await;
            }
            wait = if self.read(&fetch).await { refresh } else { AGAIN_AFTER.min(refresh) };
            self.readings.send_replace(Some(clock::now()));
        }
    }

    /// Reads the keys once; whether that went well.
    pub(super) async fn read(&self, fetch: &Fetch) -> bool {
        let (issuer, jwks) = (&self.config.issuer, &self.config.jwks);
        let text = fetch.read(jwks).await;
        match text.and_then(|text| KeySet::parse(&text).map_err(|error| error.to_string())) {
            Ok(set) => {
                if set.is_empty() {
                    tracing::warn!(%issuer, %jwks, "an issuer lists no key that can be used; its tokens are refused");
                }
                let mut keys = self.keys.write();
                *keys = Arc::new(Keys { set, generation: keys.generation + 1 });
                true
            }
            Err(why) => {
                tracing::warn!(%issuer, %jwks, why, "the keys of an issuer cannot be read; those known stay");
                false
            }
        }
    }
}
