//! `isobar status`: what the mesh looks like from a node, asked at its admin port.

mod json;
mod report;

use std::{net::IpAddr, path::PathBuf, time::Duration};

use anyhow::Context as _;
use base::clock;
use clap::Args;
use http::uri::Authority;
use identity::IdentityFiles;
use node::config::{Config, ListenConfig};
use proto::isobar::admin::v1::{GetMeshReply, GetMeshRequest, admin_client::AdminClient};
use tonic::{Code, Status};

use crate::{
    Failure, log, output, setup,
    target::{self, Caller, OwnOptions, Protocol, Whom, usage},
};

/// Longest answer that is read: some 100,000 members.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Options of `isobar status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Without --admin and --config the node on this machine is asked, at 127.0.0.1:9090. A port on another address than loopback takes
a certificate with the role operator:

  isobar status --admin 10.0.0.1:9090 --ca alice/ca.pem --cert alice/cert.pem --key alice/key.pem --server-name localhost")]
pub(crate) struct Options {
    /// Where the node is asked: its `listen.admin`, HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<String>,
    /// Configuration file of the node, which says where it is asked and whom it believes
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Authority to believe, a PEM file; by default the one the configuration names
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Name the node's certificate must have; by default the host of the address
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    #[command(flatten)]
    own: OwnOptions,
    /// How long the answer is waited for
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = target::duration)]
    timeout: Duration,
    /// Print everything as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    log::to_stderr(tracing::Level::ERROR, options.json)?;
    let config = options.config.as_deref().map(|path| Config::load(path, &setup::environment()));
    let config = config.transpose().map_err(Failure::usage)?;
    let whom = whom(options, config.as_ref())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make a runtime")?;
    let mesh = runtime.block_on(async {
        let caller = Caller::new()?;
        let asked = tokio::time::timeout(options.timeout, ask(&caller, &whom)).await;
        let answer = asked.unwrap_or_else(|_| Err(late(&whom, options.timeout)));
        caller.close().await;
        answer
    })?;
    if options.json {
        output::json(&json::mesh(&mesh, clock::wall()))?;
    } else {
        output::text(&report::text(&mesh, clock::wall()))?;
    }
    Ok(())
}

/// Where the node is asked, and how.
fn whom(options: &Options, config: Option<&Config>) -> Result<Whom, Failure> {
    let address = match (&options.admin, config) {
        (Some(address), _) => Address::given(address)?,
        (None, Some(config)) => Address::listening(&config.listen)?,
        (None, None) => Address::listening(&ListenConfig::default())?,
    };
    let Address { authority, is_tls } = address;
    if !is_tls {
        if options.ca.is_some() || options.own.cert.is_some() || options.server_name.is_some() {
            return Err(usage(format!(
                "the admin port at {authority} speaks without TLS: leave out --ca, --cert, --key and --server-name, or write https://"
            )));
        }
        return Ok(Whom { authority, protocol: Protocol::H2c, tls: None, server_name: None });
    }
    if options.own.cert.is_none() {
        return Err(usage(format!(
            "the admin port at {authority} takes an operator's certificate: give --cert and --key, as \
             `isobar ca issue --role operator` makes them"
        )));
    }
    let files = config.map(|config| config.identity.files(&config.node.state_dir));
    let ca = options.ca.clone().or_else(|| files.map(|IdentityFiles { ca, .. }| ca));
    let ca = ca.ok_or_else(|| {
        usage(
            "whom to believe is not known: give --ca, the ca.pem beside the operator's certificate",
        )
    })?;
    let tls = options.own.tls(Some(&ca))?;
    let server_name = options.server_name.clone();
    Ok(Whom { authority, protocol: Protocol::H2, tls: Some(tls), server_name })
}

/// An admin port. One on loopback speaks without TLS, and any other with it.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    authority: Authority,
    is_tls: bool,
}

impl Address {
    /// As somebody wrote it.
    fn given(text: &str) -> Result<Self, Failure> {
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) => (Some(scheme), rest.trim_end_matches('/')),
            None => (None, text),
        };
        let authority = target::authority(rest).map_err(Failure::Usage)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let is_loopback =
            host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let is_tls = match scheme {
            None => !is_loopback,
            Some("http") => false,
            Some("https") => true,
            Some(other) => {
                return Err(usage(format!("{other}:// is not known: write HOST:PORT")));
            }
        };
        Ok(Self { authority, is_tls })
    }

    /// Where a node of this machine listens.
    fn listening(listen: &ListenConfig) -> Result<Self, Failure> {
        let mut at = listen.admin;
        if at.ip().is_unspecified() {
            at.set_ip(if at.is_ipv4() {
                IpAddr::from(std::net::Ipv4Addr::LOCALHOST)
            } else {
                IpAddr::from(std::net::Ipv6Addr::LOCALHOST)
            });
        }
        if at.port() == 0 {
            return Err(usage(
                "`listen.admin` has port 0, which is another one after each start: give --admin, which the node printed",
            ));
        }
        let authority = target::authority(&at.to_string()).map_err(Failure::Usage)?;
        Ok(Self { authority, is_tls: !listen.admin.ip().is_loopback() })
    }
}

async fn ask(caller: &Caller, whom: &Whom) -> Result<GetMeshReply, Failure> {
    let channel = caller.channel(whom, 0);
    if let Err(error) = channel.connect().await {
        let why = format!(
            "no node answers at {}: is it running, and is this its `listen.admin`? --admin and --config say where else to ask",
            whom.authority
        );
        return Err(Failure::Failed(anyhow::Error::new(error).context(why)));
    }
    let mut admin = AdminClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
    let answer = admin.get_mesh(GetMeshRequest {}).await;
    Ok(answer.map_err(|status| failed(whom, &status))?.into_inner())
}

fn failed(whom: &Whom, status: &Status) -> Failure {
    let at = &whom.authority;
    let what = match status.code() {
        Code::Unimplemented => format!(
            "whoever answers at {at} cannot say what the mesh looks like: it is not an admin port, or the node is older \
             than this command"
        ),
        _ => {
            format!("the node at {at} does not say what the mesh looks like: {}", status.message())
        }
    };
    Failure::Failed(anyhow::anyhow!(what))
}

fn late(whom: &Whom, within: Duration) -> Failure {
    Failure::Failed(anyhow::anyhow!(
        "nothing came from {} within {}: it is overloaded, or no admin port of a node; --timeout waits longer",
        whom.authority,
        humantime::format_duration(within)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(text: &str) -> (String, bool) {
        let address = Address::given(text).unwrap();
        (address.authority.to_string(), address.is_tls)
    }

    #[test]
    fn loopback_is_asked_without_tls_and_everything_else_with_it() {
        assert_eq!(given("127.0.0.1:9090"), ("127.0.0.1:9090".to_owned(), false));
        assert_eq!(given("[::1]:9090"), ("[::1]:9090".to_owned(), false));
        assert_eq!(given("localhost:1"), ("localhost:1".to_owned(), false));
        assert_eq!(given("10.0.0.1:9090"), ("10.0.0.1:9090".to_owned(), true));
        assert_eq!(given("https://localhost:1/"), ("localhost:1".to_owned(), true));
        assert_eq!(given("http://10.0.0.1:9090"), ("10.0.0.1:9090".to_owned(), false));
        for wrong in ["", "host", "host:99999", "ftp://h:1"] {
            assert!(matches!(Address::given(wrong), Err(Failure::Usage(_))), "{wrong}");
        }
    }

    #[test]
    fn a_node_that_listens_everywhere_is_asked_on_loopback_with_tls() {
        let listening = |admin: &str| {
            Address::listening(&ListenConfig {
                admin: admin.parse().unwrap(),
                ..ListenConfig::default()
            })
        };
        let everywhere = listening("0.0.0.0:9090").unwrap();
        assert_eq!((everywhere.authority.as_str(), everywhere.is_tls), ("127.0.0.1:9090", true));
        let here = listening("127.0.0.1:9091").unwrap();
        assert_eq!((here.authority.as_str(), here.is_tls), ("127.0.0.1:9091", false));
        assert!(matches!(listening("127.0.0.1:0"), Err(Failure::Usage(_))));
    }
}
