//! The machine: what its kernel gives to sockets, and how many of them.

use std::{collections::BTreeSet, net::SocketAddr};

use rustix::{
    net::sockopt,
    process::{Resource, getrlimit},
};
use transport::{Offload, SocketBuffers};

use super::finding::{Check, Finding};

/// Files a busy node has open: two for each connection that it relays, and engines.
const FILES_MIN: u64 = 4096;
/// QUIC cannot live below (RFC 9000 §14, with the headers of IPv6).
const MTU_MIN: u32 = 1280;
const MTU_USUAL: u32 = 1500;

pub(super) fn check() -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Ok((_, given)) = transport::bind_udp(([127, 0, 0, 1], 0).into(), false) {
        findings.push(buffers(given));
    }
    if let Ok(found) = transport::offload() {
        findings.push(offload(found));
    }
    findings.push(files(getrlimit(Resource::Nofile).current));
    findings
}

fn buffers(given: SocketBuffers) -> Finding {
    let (receive, send) = (given.receive_bytes >> 10, given.send_bytes >> 10);
    let what =
        format!("the kernel gives a UDP socket {receive} KiB to receive and {send} KiB to send");
    if !given.are_short() {
        return Finding::ok(Check::SystemBuffers, "system", what);
    }
    let remedy = "run `sysctl -w net.core.rmem_max=4194304 net.core.wmem_max=4194304`, and put both into /etc/sysctl.d";
    Finding::warning(Check::SystemBuffers, "system", what, remedy)
}

fn offload(found: Offload) -> Finding {
    let Offload { gso_segments, gro_segments } = found;
    let what = format!(
        "the kernel sends {gso_segments} datagrams at once (GSO) and receives {gro_segments} (GRO)"
    );
    if gso_segments > 1 && gro_segments > 1 {
        return Finding::ok(Check::SystemOffload, "system", what);
    }
    let remedy = "use Linux 5.0 or later, outside sandboxes that hide UDP_SEGMENT and UDP_GRO";
    Finding::note(Check::SystemOffload, "system", what, remedy)
}

/// `None`: without a limit.
fn files(limit: Option<u64>) -> Finding {
    match limit {
        Some(limit) if limit < FILES_MIN => {
            let what = format!(
                "a process started from here may have {limit} files open, connections among them"
            );
            let remedy = "raise it where the node is started: LimitNOFILE=65536 in its systemd unit, or `ulimit -n 65536`";
            Finding::warning(Check::SystemDescriptors, "system", what, remedy)
        }
        Some(limit) => {
            Finding::ok(Check::SystemDescriptors, "system", format!("{limit} files may be open"))
        }
        None => Finding::ok(Check::SystemDescriptors, "system", "any number of files may be open"),
    }
}

/// The MTU of the way out to a peer, as far as this machine knows it.
pub(super) fn mtu(subject: &str, addresses: &[SocketAddr]) -> Option<Finding> {
    let known: BTreeSet<u32> = addresses.iter().filter_map(mtu_towards).collect();
    judge_mtu(subject, *known.first()?)
}

fn mtu_towards(address: &SocketAddr) -> Option<u32> {
    let socket = transport::towards(*address).ok()?;
    let mtu = if address.is_ipv6() { sockopt::ipv6_mtu(&socket) } else { sockopt::ip_mtu(&socket) };
    mtu.ok()
}

fn judge_mtu(subject: &str, mtu: u32) -> Option<Finding> {
    let what = format!("packets on the way there may have {mtu} bytes");
    match mtu {
        ..MTU_MIN => {
            let remedy = format!(
                "raise the MTU of the interface to {MTU_MIN} or more: QUIC needs datagrams of 1200 bytes"
            );
            Some(Finding::error(Check::SystemMtu, subject, what, remedy))
        }
        MTU_MIN..MTU_USUAL => {
            let remedy = "nothing, where a tunnel needs the rest; otherwise raise the MTU of the interface to 1500";
            Some(Finding::note(Check::SystemMtu, subject, what, remedy))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn short_buffers_few_files_and_small_packets_are_found() {
        let given = |bytes| SocketBuffers { receive_bytes: bytes, send_bytes: 8 << 20 };
        assert_eq!(buffers(given(212_992)).level, Level::Warning);
        assert_eq!(buffers(given(8 << 20)).level, Level::Ok);
        assert!(buffers(given(212_992)).remedy.contains("net.core.rmem_max"));
        let segments = |n| Offload { gso_segments: n, gro_segments: 64 };
        assert_eq!(offload(segments(1)).level, Level::Note);
        assert_eq!(offload(segments(64)).level, Level::Ok);
        assert_eq!(files(Some(1024)).level, Level::Warning);
        assert_eq!((files(Some(4096)).level, files(None).level), (Level::Ok, Level::Ok));
        let mtu = |mtu| judge_mtu("peer b", mtu).map(|finding| finding.level);
        assert_eq!(mtu(1279), Some(Level::Error));
        assert_eq!(mtu(1420), Some(Level::Note));
        assert_eq!((mtu(1500), mtu(65_536)), (None, None));
    }

    #[test]
    fn the_way_to_this_machine_is_wide() {
        let here = SocketAddr::from(([127, 0, 0, 1], 9));
        assert!(mtu_towards(&here).is_some_and(|mtu| mtu >= MTU_USUAL));
    }
}
