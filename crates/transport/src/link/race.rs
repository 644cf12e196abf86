//! Dialling a link: QUIC first, and TCP beside it where UDP is blocked or slow; the first that works wins.

use std::{net::SocketAddr, num::NonZeroUsize, sync::Arc, time::Instant};

use base::clock;
use http::uri::Authority;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::{task::JoinSet, time::Duration};

use super::{
    DONE_WITHIN, Link, LinkTransport, Links,
    quic::{self, QuicLink},
    tcp::TcpDial,
};
use crate::{TransportError, dial};

/// How long QUIC may take before TCP is dialled beside it.
const TCP_AFTER: Duration = Duration::from_millis(300);
/// After TCP won, QUIC goes ahead of it by so much, once in so long.
const HEAD_START: Duration = Duration::from_millis(100);
const HEAD_START_EVERY: Duration = Duration::from_secs(60);
/// How long QUIC is waited for where TCP has failed.
const QUIC_ALONE: Duration = Duration::from_secs(1);
/// One address of a name after another is begun with.
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(150);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;
/// Authorities remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(512).unwrap();

/// Where TCP won last, and when QUIC failed there. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Memory(Arc<Mutex<LruCache<Authority, Instant>>>);

impl Default for Memory {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(LruCache::new(REMEMBERED))))
    }
}

impl Memory {
    /// How long TCP waits for QUIC.
    fn tcp_after(&self, authority: &Authority, now: Instant) -> Duration {
        match self.0.lock().get(authority) {
            None => TCP_AFTER,
            Some(failed) if now.saturating_duration_since(*failed) >= HEAD_START_EVERY => {
                HEAD_START
            }
            Some(_) => Duration::ZERO,
        }
    }

    fn won(&self, authority: &Authority, transport: LinkTransport, now: Instant) {
        let mut remembered = self.0.lock();
        match transport {
            LinkTransport::Quic => drop(remembered.pop(authority)),
            // A head start that came to nothing begins the wait anew; what was merely overtaken does not.
            LinkTransport::Tcp => {
                let failed = remembered.get_or_insert_mut(authority.clone(), || now);
                if now.saturating_duration_since(*failed) >= HEAD_START_EVERY {
                    *failed = now;
                }
            }
        }
    }
}

/// Why there is no link.
struct Failure {
    why: String,
    /// Whether the other end was reached, and it would be the same over another transport.
    is_final: bool,
}

impl Failure {
    fn new(why: impl std::fmt::Display) -> Self {
        Self { why: why.to_string(), is_final: false }
    }
}

/// One dial: whom, and how.
pub(super) struct Race<'a> {
    links: &'a Links,
    authority: &'a Authority,
    addresses: Vec<SocketAddr>,
    tls: rustls::ClientConfig,
}

impl<'a> Race<'a> {
    /// To dial `authority`; what `tls` speaks is its first protocol.
    pub(super) async fn new(
        links: &'a Links,
        authority: &'a Authority,
        tls: rustls::ClientConfig,
    ) -> Result<Self, TransportError> {
        let mut addresses = dial::resolve(authority).await?;
        addresses.truncate(ADDRESSES_MAX);
        Ok(Self { links, authority, addresses, tls })
    }

    /// Dials by both transports, or by `only` one.
    pub(super) async fn run(self, only: Option<LinkTransport>) -> Result<Link, TransportError> {
        let dialled = match only {
            Some(LinkTransport::Quic) => self.over_quic().await.map_err(|failure| failure.why),
            Some(LinkTransport::Tcp) => self.over_tcp().await.map_err(|failure| failure.why),
            None => self.over_either().await,
        };
        let target = self.authority.to_string();
        dialled.map_err(|reason| TransportError::Dial { target, reason })
    }

    async fn over_either(&self) -> Result<Link, String> {
        let memory = &self.links.memory;
        let tcp_after = memory.tcp_after(self.authority, clock::now());
        let (quic, tcp) = (self.over_quic(), self.over_tcp());
        let (due, patience) =
            (tokio::time::sleep(tcp_after), tokio::time::sleep(QUIC_ALONE.max(tcp_after)));
        tokio::pin!(quic, tcp, due, patience);
        let (mut tcp_runs, mut quic_failed, mut tcp_failed) = (false, None, None);
        let link = loop {
            tokio::select! {
                dialled = &mut quic, if quic_failed.is_none() => match dialled {
                    Ok(link) => break link,
                    Err(failure) if failure.is_final => return Err(failure.why),
                    Err(failure) => quic_failed = Some(failure.why),
                },
                dialled = &mut tcp, if tcp_runs && tcp_failed.is_none() => match dialled {
                    Ok(link) => break link,
                    Err(failure) => tcp_failed = Some(failure.why),
                },
                () = &mut due, if !tcp_runs => tcp_runs = true,
                // Who refuses TCP seldom answers QUIC, but a slow handshake may still be under way.
                () = &mut patience, if tcp_failed.is_some() && quic_failed.is_none() => {
                    quic_failed = Some(NO_ANSWER.to_owned());
                }
            }
            tcp_runs |= quic_failed.is_some();
            if let (Some(quic), Some(tcp)) = (&quic_failed, &tcp_failed) {
                return Err(format!("QUIC: {quic}; TCP: {tcp}"));
            }
        };
        memory.won(self.authority, link.transport(), clock::now());
        Ok(link)
    }

    async fn over_quic(&self) -> Result<Link, Failure> {
        let config = quic::client_config(self.tls.clone(), self.links.config.clone());
        let config = config.map_err(Failure::new)?;
        let host: Arc<str> = dial::host(self.authority).into();
        let endpoint = &self.links.endpoint;
        first(&self.addresses, |address| {
            let (endpoint, config, host) = (endpoint.clone(), config.clone(), host.clone());
            async move {
                // Fails for an address of a family this endpoint does not have.
                let connecting = endpoint.connect_with(config, address, &host);
                match connecting.map_err(Failure::new)?.await {
                    Ok(connection) => Ok(Link::quic(QuicLink::new(connection))),
                    Err(quinn::ConnectionError::TimedOut) => Err(Failure::new(NO_ANSWER)),
                    Err(error) => {
                        Err(Failure { why: error.to_string(), is_final: quic::is_final(&error) })
                    }
                }
            }
        })
        .await
    }

    async fn over_tcp(&self) -> Result<Link, Failure> {
        let protocol = self.tls.alpn_protocols.first().map(Vec::as_slice).unwrap_or_default();
        let drivers = self.links.drivers.clone();
        let dial = TcpDial::new(self.tls.clone(), self.authority, protocol, drivers);
        let dial = dial.map_err(Failure::new)?;
        first(&self.addresses, |address| {
            let dialling = dial.clone().dial(address);
            async move { dialling.await.map(Link::tcp).map_err(Failure::new) }
        })
        .await
    }
}

const NO_ANSWER: &str = "no answer";

/// The first of `addresses` that can be dialled. One is not waited for long before the next is begun with.
async fn first<F>(addresses: &[SocketAddr], dial: impl Fn(SocketAddr) -> F) -> Result<Link, Failure>
where
    F: Future<Output = Result<Link, Failure>> + Send + 'static,
{
    let mut rest = addresses.iter();
    let mut under_way = JoinSet::new();
    let mut last = Failure::new("its name has no address");
    loop {
        let begun = rest.next().map(|address| under_way.spawn(dial(*address))).is_some();
        let waiting = async {
            if begun && rest.len() > 0 {
                tokio::time::sleep(NEXT_ADDRESS_AFTER).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        let ended = tokio::select! {
            ended = under_way.join_next() => ended,
            () = waiting => continue,
        };
        match ended {
            Some(Ok(Ok(link))) => return Ok(link),
            Some(Ok(Err(failure))) => {
                let is_final = failure.is_final || last.is_final;
                last = Failure { is_final, ..failure };
            }
            Some(Err(error)) => last = Failure::new(error),
            None => return Err(last),
        }
    }
}

/// Within the time a whole dial may take.
pub(super) async fn within<T>(
    authority: &Authority,
    dialling: impl Future<Output = Result<T, TransportError>>,
) -> Result<T, TransportError> {
    let late = || TransportError::Dial {
        target: authority.to_string(),
        reason: format!("{NO_ANSWER} within {DONE_WITHIN:?}"),
    };
    tokio::time::timeout(DONE_WITHIN, dialling).await.unwrap_or_else(|_| Err(late()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_goes_first_where_it_won_and_quic_now_and_then() {
        let (memory, now) = (Memory::default(), clock::now());
        let (there, elsewhere) =
            ("there:1".parse::<Authority>().unwrap(), "elsewhere:1".parse::<Authority>().unwrap());
        assert_eq!(memory.tcp_after(&there, now), TCP_AFTER);
        memory.won(&there, LinkTransport::Tcp, now);
        assert_eq!(memory.tcp_after(&there, now), Duration::ZERO);
        assert_eq!(memory.tcp_after(&elsewhere, now), TCP_AFTER);
        // Dials meanwhile do not put the next try off.
        memory.won(&there, LinkTransport::Tcp, now + HEAD_START_EVERY / 2);
        let later = now + HEAD_START_EVERY;
        assert_eq!(memory.tcp_after(&there, later), HEAD_START);
        memory.won(&there, LinkTransport::Tcp, later);
        assert_eq!(memory.tcp_after(&there, later), Duration::ZERO);
        memory.won(&there, LinkTransport::Quic, later);
        assert_eq!(memory.tcp_after(&there, later), TCP_AFTER);
    }
}
