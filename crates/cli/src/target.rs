//! Whom `call`, `bench` and `status` call, and how: the options they share, and connections made of them.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use http::{Uri, uri::Authority};
use tokio_util::sync::CancellationToken;
use transport::{Channel, Dialer, Limits, PeerTls, Pool, QuicKeys, Target, Via, Worker};

use crate::Failure;

/// Options that say whom to call.
#[derive(Clone, Debug, Args)]
pub(crate) struct TargetOptions {
    /// Where: HOST:PORT with TLS, or http://HOST:PORT without
    pub(crate) address: String,
    /// Call without TLS (h2c); the same as writing http://
    #[arg(long)]
    plaintext: bool,
    /// Call over HTTP/3 on QUIC instead of HTTP/2 on TCP
    #[arg(long, conflicts_with = "plaintext")]
    h3: bool,
    /// Authority to believe, a PEM file; by default those this machine believes
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Name the server's certificate must have; by default the host of the address
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    #[command(flatten)]
    own: OwnOptions,
}

/// Options that say what to show.
#[derive(Clone, Debug, Args)]
pub(crate) struct OwnOptions {
    /// Certificate to show, a PEM file
    #[arg(long, value_name = "FILE", requires = "key")]
    pub(crate) cert: Option<PathBuf>,
    /// Key of --cert, a PEM file
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub(crate) key: Option<PathBuf>,
}

/// Which HTTP a target is called with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    H2c,
    H2,
    H3,
}

impl Protocol {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::H2c => "h2c",
            Self::H2 => "h2",
            Self::H3 => "h3",
        }
    }

    /// The scheme requests name.
    pub(crate) fn scheme(self) -> &'static str {
        if self == Self::H2c { "http" } else { "https" }
    }
}

/// Options, understood.
#[derive(Clone, Debug)]
pub(crate) struct Whom {
    pub(crate) authority: Authority,
    pub(crate) protocol: Protocol,
    pub(crate) tls: Option<PeerTls>,
    pub(crate) server_name: Option<String>,
}

impl TargetOptions {
    /// What they mean.
    pub(crate) fn whom(&self) -> Result<Whom, Failure> {
        let (scheme, rest) = match self.address.split_once("://") {
            Some((scheme, rest)) => (Some(scheme), rest.trim_end_matches('/')),
            None => (None, self.address.as_str()),
        };
        let protocol = match scheme {
            Some("http") if self.h3 => {
                return Err(usage("HTTP/3 needs TLS: leave out --h3, or write https://"));
            }
            Some("https") if self.plaintext => {
                return Err(usage("https:// is with TLS: leave out --plaintext, or write http://"));
            }
            Some("http") => Protocol::H2c,
            None if self.plaintext => Protocol::H2c,
            Some("https") | None if self.h3 => Protocol::H3,
            Some("https") | None => Protocol::H2,
            Some(other) => {
                return Err(usage(format!("{other}:// is not known: write http:// or https://")));
            }
        };
        let authority = authority(rest).map_err(Failure::Usage)?;
        if protocol == Protocol::H2c
            && (self.ca.is_some() || self.own.cert.is_some() || self.server_name.is_some())
        {
            return Err(usage(
                "--ca, --cert and --server-name are for TLS, which http:// and --plaintext do without",
            ));
        }
        let tls = match protocol {
            Protocol::H2c => None,
            Protocol::H2 | Protocol::H3 => Some(self.tls()?),
        };
        Ok(Whom { authority, protocol, tls, server_name: self.server_name.clone() })
    }

    /// The address of an HTTP API; without a scheme it is https.
    pub(crate) fn uri(&self, path: &str) -> Result<Uri, Failure> {
        let whom = self.whom()?;
        let scheme = match whom.protocol {
            Protocol::H2c => "http",
            Protocol::H2 => "https",
            Protocol::H3 => {
                return Err(usage("an HTTP API is called over HTTP/1.1: leave out --h3"));
            }
        };
        let uri = format!("{scheme}://{}{path}", whom.authority).parse();
        uri.with_context(|| format!("`{path}` is no path")).map_err(Failure::Usage)
    }

    /// TLS as the options say.
    pub(crate) fn tls(&self) -> Result<PeerTls, Failure> {
        self.own.tls(self.ca.as_deref())
    }
}

impl OwnOptions {
    /// TLS that shows it and believes `ca`, or else what this machine believes.
    pub(crate) fn tls(&self, ca: Option<&Path>) -> Result<PeerTls, Failure> {
        let own = self.cert.as_deref().zip(self.key.as_deref());
        Ok(PeerTls::new(identity::client_config(ca, own).map_err(Failure::usage)?))
    }
}

pub(crate) fn usage(text: impl Into<String>) -> Failure {
    Failure::Usage(anyhow::anyhow!(text.into()))
}

/// A duration as people write it, such as 1500ms or 2m; a year at most.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= LONGEST => Ok(duration),
        Ok(_) => Err("write a year at most".to_owned()),
        Err(error) => Err(format!("{error}: write for instance 1500ms, 10s or 2m")),
    }
}

pub(crate) fn authority(text: &str) -> anyhow::Result<Authority> {
    let wanted = "write HOST:PORT, for instance 127.0.0.1:8443";
    let authority: Authority =
        text.parse().with_context(|| format!("`{text}` is not an address: {wanted}"))?;
    anyhow::ensure!(
        authority.port_u16().is_some(),
        "`{text}` has no port from 1 to 65535: {wanted}"
    );
    Ok(authority)
}

impl Whom {
    /// A server without TLS.
    pub(crate) fn plaintext(address: &str) -> anyhow::Result<Self> {
        let authority = authority(address)?;
        Ok(Self { authority, protocol: Protocol::H2c, tls: None, server_name: None })
    }

    /// A server over HTTP/2 whose certificate `ca` vouches for.
    pub(crate) fn h2(address: &str, ca: &Path) -> anyhow::Result<Self> {
        let tls = PeerTls::new(identity::client_config(Some(ca), None)?);
        let authority = authority(address)?;
        Ok(Self { authority, protocol: Protocol::H2, tls: Some(tls), server_name: None })
    }

    fn target(&self, name: &str) -> Target {
        let via = if self.protocol == Protocol::H3 { Via::H3 } else { Via::H2 };
        match &self.tls {
            None => Target::plaintext(name, self.authority.clone()),
            Some(tls) => {
                let server_name = self.server_name.as_deref();
                Target::server(name, self.authority.clone(), tls.clone(), via, server_name)
            }
        }
    }
}

/// Connections of one thread.
#[derive(Debug)]
pub(crate) struct Caller {
    worker: Worker,
    pool: Pool,
}

impl Caller {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let worker = Worker::new(0, 1, CancellationToken::new(), CancellationToken::new());
        // A quiet call to somebody's server is not cut, and nobody is pinged who may mind.
        let dialer = Dialer::new(&worker, &QuicKeys::random(), Limits::engines())
            .context("cannot open a UDP socket")?;
        Ok(Self { pool: Pool::new(dialer), worker })
    }

    /// A channel; channels of different `connection`s share none.
    pub(crate) fn channel(&self, whom: &Whom, connection: usize) -> Channel {
        let name = match connection {
            0 => "the server".to_owned(),
            more => format!("the server, connection {more}"),
        };
        self.pool.channel(whom.target(&name))
    }

    /// Closes every connection.
    pub(crate) async fn close(self) {
        self.pool.close();
        self.worker.outgoing.close();
        self.worker.outgoing.wait().await;
        self.pool.closed().await;
    }
}
