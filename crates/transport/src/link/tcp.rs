//! Links where UDP is blocked: the same frames over one HTTP/2 stream on TCP, with the same TLS at both ends.
//!
//! A connection serves exactly one request, `POST` to the path of a protocol ([`path`]), and that stream is the link. It is
//! HTTP/2 to whatever lies between (ALPN `h2`); which certificate it would be shown the dialler says by offering the link's
//! own protocol beside it, as it does over QUIC.

mod dialling;
mod serving;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    DONE_WITHIN,
    connection::Connection,
    driver::Driver,
    pipe::{End, Parting, Pipe},
    pulse::Pulse,
};

pub(super) use dialling::TcpDial;
pub(super) use serving::{TcpIncoming, TcpPort, bind};

/// Bytes the other end may have under way that nobody has read. More than a frame, or none would ever be whole.
const WINDOW_BYTES: u32 = 256 << 10;
/// Bytes that are handed to the connection before they are written.
const SEND_BYTES_MAX: usize = 32 << 10;
/// Bytes of the one request's headers.
const HEADER_BYTES_MAX: u32 = 4 << 10;
/// What small pieces of data cost may be owed so far (`h2`: 256 bytes a piece, less what is in it).
const PIECES_BUDGET: usize = 1 << 20;
const H2: &[u8] = b"h2";

/// The path at which a protocol is spoken; `None`: it is not spoken over TCP.
///
/// `isobar/1`, which is frames both ways, is `/isobar.mesh.v1.Link/Frames`. `isobar-enrol/1`, as every protocol
/// `isobar-WORD/VERSION`, is one question and its answer: `/isobar.mesh.v1.Enrol/Ask`.
pub(super) fn path(protocol: &[u8]) -> Option<String> {
    let (name, version) = std::str::from_utf8(protocol).ok()?.split_once('/')?;
    version.parse::<u16>().ok()?;
    match name.strip_prefix("isobar")? {
        "" => Some(format!("/isobar.mesh.v{version}.Link/Frames")),
        word => {
            let word = word.strip_prefix('-')?;
            let (first, rest) = (word.get(..1)?.to_ascii_uppercase(), word.get(1..)?);
            Some(format!("/isobar.mesh.v{version}.{first}{rest}/Ask"))
        }
    }
}

/// The tasks that drive links. Cloneable.
#[derive(Clone, Debug, Default)]
pub(super) struct Drivers {
    tasks: TaskTracker,
    pub(super) stop: CancellationToken,
}

impl Drivers {
    /// Ends all links and waits until the other ends know.
    pub(super) async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Begins to drive a link.
    fn start(
        &self,
        mut connection: Connection,
        (send, mut body): (SendStream<Bytes>, RecvStream),
        link: Unstarted,
    ) -> Result<TcpLink, String> {
        let ping = connection.ping_pong().ok_or("the connection is in use already")?;
        let pulse = Pulse::new(ping, link.heard);
        let pipe = Arc::new(Pipe::new(body.flow_control().clone(), link.rtt));
        let driver = Driver::new(connection, (send, body), pipe.clone(), pulse);
        self.tasks.spawn(driver.run(self.stop.clone()));
        let Unstarted { protocol, remote, certificates, .. } = link;
        Ok(TcpLink { pipe, protocol, remote, certificates })
    }
}

/// What is known of a link before it is driven.
struct Unstarted {
    heard: Arc<parking_lot::Mutex<std::time::Instant>>,
    rtt: Duration,
    protocol: Vec<u8>,
    remote: SocketAddr,
    certificates: Vec<CertificateDer<'static>>,
}

/// A link over TCP. Whoever drops it closes it.
#[derive(Debug)]
pub(super) struct TcpLink {
    pub(super) pipe: Arc<Pipe>,
    pub(super) protocol: Vec<u8>,
    pub(super) remote: SocketAddr,
    pub(super) certificates: Vec<CertificateDer<'static>>,
}

impl TcpLink {
    /// Closes the link and says why.
    pub(super) fn close(&self, reason: &str) {
        self.pipe.end(End::new("closed", Parting::Say(reason.to_owned())));
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.close("");
    }
}

fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    {
        let socket = socket2::SockRef::from(stream);
        // What the other end does not acknowledge is given up, also when the link is over here.
        socket.set_tcp_user_timeout(Some(DONE_WITHIN))?;
        // What waits is to wait where it can be counted, and dropped.
        socket.set_tcp_notsent_lowat(WINDOW_BYTES / 4)?;
    }
    Ok(())
}

fn certificates(stream: &TlsStream<TcpStream>) -> Vec<CertificateDer<'static>> {
    let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
    shown.iter().cloned().map(CertificateDer::into_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_has_a_path() {
        for (protocol, expected) in [
            ("isobar/1", Some("/isobar.mesh.v1.Link/Frames")),
            ("isobar-enrol/1", Some("/isobar.mesh.v1.Enrol/Ask")),
            ("isobar-enrol/x", None),
            ("isobar-/1", None),
            ("isobars/1", None),
            ("h2", None),
        ] {
            assert_eq!(path(protocol.as_bytes()).as_deref(), expected, "{protocol}");
        }
    }
}
