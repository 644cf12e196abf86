//! The engines: whether a connection to each can be made.

use std::{net::SocketAddr, time::Duration};

use futures_util::{StreamExt as _, stream};
use node::config::EngineConfig;
use tokio::net::TcpStream;

use super::{
    dns,
    facts::Facts,
    finding::{Check, Finding},
};

/// Engines tried side by side.
const AT_ONCE: usize = 128;

pub(super) async fn check(facts: &Facts) -> Vec<Finding> {
    let looks = facts.config.engines.iter().map(|engine| look(engine, facts.timeout));
    let found: Vec<Vec<Finding>> = stream::iter(looks).buffered(AT_ONCE).collect().await;
    found.into_iter().flatten().collect()
}

async fn look(engine: &EngineConfig, within: Duration) -> Vec<Finding> {
    let subject = format!("engine {}", engine.name);
    let (addresses, mut findings) = dns::look(&subject, &engine.url.authority(), within).await;
    if addresses.is_empty() {
        return findings;
    }
    let url = &engine.url;
    findings.push(match connect(&addresses, within).await {
        Ok(()) => {
            Finding::ok(Check::EngineUnreachable, subject, format!("{url} takes connections"))
        }
        Err(why) => {
            let what = format!("{url} takes no connection: {why}");
            let remedy =
                "start the engine, or correct `url`; until then the node sends its calls elsewhere";
            Finding::warning(Check::EngineUnreachable, subject, what, remedy)
        }
    });
    findings
}

async fn connect(addresses: &[SocketAddr], within: Duration) -> Result<(), String> {
    match tokio::time::timeout(within, TcpStream::connect(addresses)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {within:?}")),
    }
}
