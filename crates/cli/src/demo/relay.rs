//! Distance between regions: a relay of UDP datagrams that delays each by half a round trip, in order.
//!
//! The kernel of a plain machine has no means to delay packets, so this is done here, for QUIC only: TCP between regions
//! has no way. All relays run on a thread of their own.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use base::clock;
use tokio::{net::UdpSocket, sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// Datagrams on their way in one direction; beyond it they are lost, as on any line.
const ON_THE_WAY_MAX: usize = 8192;
/// Other ends one relay knows; a further one takes the place of the first.
const FLOWS_MAX: usize = 64;
/// Longest datagram.
const DATAGRAM_BYTES_MAX: usize = 65_536;

/// A way to one address of one node, for all nodes of one region.
#[derive(Debug)]
pub(crate) struct Relay {
    socket: std::net::UdpSocket,
    one_way: Duration,
    /// Where it leads, once that is known; until then datagrams are lost.
    to: Arc<OnceLock<SocketAddr>>,
}

impl Relay {
    /// A relay on a port of its own.
    pub(crate) fn bind(one_way: Duration) -> io::Result<Self> {
        Ok(Self { socket: socket()?, one_way, to: Arc::default() })
    }

    /// The address that stands for the node.
    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Says later where it leads.
    pub(crate) fn to(&self) -> Arc<OnceLock<SocketAddr>> {
        self.to.clone()
    }

    async fn run(self) -> io::Result<()> {
        let Self { socket, one_way, to } = self;
        let socket = Arc::new(UdpSocket::from_std(socket)?);
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        let mut flows: BTreeMap<SocketAddr, (u64, Flow)> = BTreeMap::new();
        for number in 0.. {
            let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
            let Some(to) = to.get() else { continue };
            if !flows.contains_key(&from) {
                if flows.len() >= FLOWS_MAX
                    && let Some(first) = flows.iter().min_by_key(|(_, (n, _))| *n).map(|(a, _)| *a)
                {
                    flows.remove(&first);
                }
                let flow = Flow::open(*to, socket.clone(), from, one_way).await?;
                flows.insert(from, (number, flow));
            }
            if let Some((_, flow)) = flows.get(&from) {
                flow.forward(buffer[..length].into());
            }
        }
        Ok(())
    }
}

fn socket() -> io::Result<std::net::UdpSocket> {
    transport::bind_udp((Ipv4Addr::LOCALHOST, 0).into(), false).map(|(socket, _)| socket)
}

/// A datagram, and when it arrives.
type Delayed = (tokio::time::Instant, Box<[u8]>);

/// The datagrams of one other end, both ways. Its tasks end with it.
#[derive(Debug)]
struct Flow {
    one_way: Duration,
    forward: mpsc::Sender<Delayed>,
    _tasks: JoinSet<()>,
}

impl Flow {
    async fn open(
        to: SocketAddr,
        back: Arc<UdpSocket>,
        from: SocketAddr,
        one_way: Duration,
    ) -> io::Result<Self> {
        let ahead = Arc::new(UdpSocket::from_std(socket()?)?);
        ahead.connect(to).await?;
        let (forward, mut forwarded) = mpsc::channel::<Delayed>(ON_THE_WAY_MAX);
        let (backward, mut returned) = mpsc::channel::<Delayed>(ON_THE_WAY_MAX);
        let mut tasks = JoinSet::new();
        let sending = ahead.clone();
        tasks.spawn(async move {
            while let Some((due, datagram)) = forwarded.recv().await {
                tokio::time::sleep_until(due).await;
                // A node that is gone takes nothing.
                drop(sending.send(&datagram).await);
            }
        });
        tasks.spawn(async move {
            while let Some((due, datagram)) = returned.recv().await {
                tokio::time::sleep_until(due).await;
                drop(back.send_to(&datagram, from).await);
            }
        });
        tasks.spawn(async move {
            let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
            loop {
                match ahead.recv(&mut buffer).await {
                    // A full line loses what comes next.
                    Ok(length) => {
                        drop(backward.try_send(delayed(one_way, buffer[..length].into())));
                    }
                    // The node is gone; it may come back, and this must not spin until then.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        Ok(Self { one_way, forward, _tasks: tasks })
    }

    fn forward(&self, datagram: Box<[u8]>) {
        drop(self.forward.try_send(delayed(self.one_way, datagram)));
    }
}

fn delayed(one_way: Duration, datagram: Box<[u8]>) -> Delayed {
    ((clock::now() + one_way).into(), datagram)
}

/// The thread all relays run on; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Relays {
    stop: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

impl Relays {
    pub(crate) fn run(relays: Vec<Relay>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let body = move || {
            runtime.block_on(async {
                let mut running = JoinSet::new();
                for relay in relays {
                    running.spawn(relay.run());
                }
                stopped.cancelled().await;
            });
        };
        let thread = thread::Builder::new().name("relays".to_owned()).spawn(body)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // It only moves datagrams; if it panicked, the demo has shown so.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_come_late_and_in_order_and_answers_find_back() {
        const ONE_WAY: Duration = Duration::from_millis(30);
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let relay = Relay::bind(ONE_WAY).unwrap();
        let address = relay.address().unwrap();
        relay.to().set(server.local_addr().unwrap()).unwrap();
        let _relays = Relays::run(vec![relay]).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let began = clock::now();
        for number in 0..100u8 {
            client.send_to(&[number], address).await.unwrap();
        }
        let mut buffer = [0; 16];
        for number in 0..100u8 {
            let (_, from) = server.recv_from(&mut buffer).await.unwrap();
            assert_eq!(buffer[0], number);
            server.send_to(&[number], from).await.unwrap();
        }
        for number in 0..100u8 {
            assert_eq!(client.recv_from(&mut buffer).await.unwrap(), (1, address));
            assert_eq!(buffer[0], number);
        }
        assert!(clock::now() - began >= 2 * ONE_WAY);
    }
}
