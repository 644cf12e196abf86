//! What a hop adds to a call and takes away.
//!
//! Standard names first: `via` (RFC 9110 §7.6.3) guards against loops, `grpc-timeout` says what time is left. Only what has
//! no standard is ours and begins with `x-isobar-`.

use std::fmt;

use base::{Deadline, EngineName, NodeName, RegionName, TrustDomain, clock, parse_grpc_timeout};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Version, header, request};
use tonic::body::Body;
use transport::grpc;

/// The reply header that says which engine of which node answered: `<node>.<region>/<engine>`.
pub(crate) const SERVED_BY: HeaderName = HeaderName::from_static("x-isobar-served-by");
/// Why a reply is as it is: words of ours, separated by commas.
pub(crate) const FLAGS: HeaderName = HeaderName::from_static("x-isobar-flags");
/// The word in [`FLAGS`] for a call that no engine has seen.
pub(crate) const REFUSED: &str = "refused";
/// The word in [`FLAGS`] for a call refused because every engine that suits it is full.
pub(crate) const FULL: &str = "full";
/// The word in [`FLAGS`] for a call whose engine failed, whatever the status says.
pub(crate) const BROKEN: &str = "broken";
/// How many attempts were made before this one (gRFC A6); in a reply, how many retries it took.
pub(crate) const PREVIOUS_ATTEMPTS: HeaderName =
    HeaderName::from_static("grpc-previous-rpc-attempts");
/// What a call says whose body is held back until it is acknowledged (RFC 9110 §10.1.1).
pub(crate) const CONTINUE: HeaderValue = HeaderValue::from_static("100-continue");
/// What our own headers begin with.
const OURS: &str = "x-isobar-";
/// Nodes a call may have crossed when it arrives: it crosses at most two.
const CROSSED_MAX: usize = 1;
/// How much of a wrong `via` an error repeats.
const SHOWN_MAX: usize = 4;
const SHOWN_CHARS_MAX: usize = 200;

/// How this node is called in `via` and `x-isobar-served-by`.
#[derive(Clone, Debug)]
pub(crate) struct Pseudonym {
    node: String,
    /// What the pseudonym of every node of this mesh ends with.
    mesh: String,
}

impl Pseudonym {
    pub(crate) fn new(name: &NodeName, region: &RegionName, mesh: &TrustDomain) -> Self {
        Self { node: format!("{name}.{region}"), mesh: format!(".{mesh}") }
    }

    /// The value of [`SERVED_BY`] for one of this node's engines.
    pub(crate) fn served_by(&self, engine: &EngineName) -> HeaderValue {
        HeaderValue::try_from(format!("{}/{engine}", self.node))
            .unwrap_or_else(|_| HeaderValue::from_static("unknown"))
    }
}

impl fmt::Display for Pseudonym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.node, self.mesh)
    }
}

/// A call that came back, or crossed more nodes than a call may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Loop {
    /// The `via` it came with.
    pub(crate) via: String,
}

/// Refuses a call that this node has seen, or that has crossed as many nodes as it may.
pub(crate) fn guard(headers: &HeaderMap, own: &Pseudonym) -> Result<(), Loop> {
    let crossed = || {
        let values = headers.get_all(header::VIA).iter().filter_map(|value| value.to_str().ok());
        // Each element: protocol version, received-by, perhaps a comment.
        values
            .flat_map(|value| value.split(','))
            .filter_map(|via| via.split_ascii_whitespace().nth(1))
    };
    let own_name = own.to_string();
    let of_this_mesh = crossed().filter(|by| by.ends_with(&own.mesh)).count();
    if of_this_mesh > CROSSED_MAX || crossed().any(|by| by == own_name) {
        let mut via = crossed().take(SHOWN_MAX).collect::<Vec<_>>().join(", ");
        if let Some((end, _)) = via.char_indices().nth(SHOWN_CHARS_MAX) {
            via.truncate(end);
        }
        return Err(Loop { via });
    }
    Ok(())
}

/// Takes away what only a node may say of a call, at the door for everybody else. `priority` is among it: between nodes it
/// ranks the calls of everybody.
pub(crate) fn strip_request(headers: &mut HeaderMap) {
    strip(headers);
    for name in [PREVIOUS_ATTEMPTS, HeaderName::from_static("priority"), header::EXPECT] {
        headers.remove(name);
    }
}

/// Whether a peer's reply carries the word `flag`.
pub(crate) fn has_flag(headers: &HeaderMap, flag: &str) -> bool {
    let flags = headers.get(FLAGS).and_then(|flags| flags.to_str().ok()).unwrap_or_default();
    flags.split(',').any(|word| word.trim() == flag)
}

/// The attempts a call or a reply says were made before. More than a digit says nothing.
pub(crate) fn previous_attempts(headers: &HeaderMap) -> u32 {
    let text = headers.get(PREVIOUS_ATTEMPTS).and_then(|value| value.to_str().ok());
    text.filter(|text| text.len() == 1).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Says how many attempts were made before; nothing when there were none.
pub(crate) fn set_previous_attempts(headers: &mut HeaderMap, attempts: u32) {
    if attempts == 0 {
        headers.remove(PREVIOUS_ATTEMPTS);
    } else {
        headers.insert(PREVIOUS_ATTEMPTS, attempts.into());
    }
}

/// Takes away what only a node may say.
pub(crate) fn strip(headers: &mut HeaderMap) {
    let ours: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(OURS)).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
}

/// The caller's deadline. A `grpc-timeout` nobody can read is the caller's fault.
pub(crate) fn deadline(headers: &HeaderMap) -> Result<Option<Deadline>, base::TimeoutError> {
    headers.get(grpc::GRPC_TIMEOUT).map_or(Ok(None), |value| {
        parse_grpc_timeout(value.as_bytes()).map(|timeout| Deadline::after(clock::now(), timeout))
    })
}

/// The call of `head` with `body`, ready for the next hop, after `attempts` attempts.
pub(crate) fn next(
    head: &request::Parts,
    body: Body,
    own: &Pseudonym,
    deadline: Option<Deadline>,
    attempts: u32,
) -> Request<Body> {
    let mut next = Request::new(body);
    *next.method_mut() = head.method.clone();
    *next.uri_mut() = head.uri.clone();
    *next.headers_mut() = head.headers.clone();
    forward(next.headers_mut(), head.version, own, deadline);
    set_previous_attempts(next.headers_mut(), attempts);
    next
}

/// Makes the headers of a call ready for the next hop.
fn forward(headers: &mut HeaderMap, version: Version, own: &Pseudonym, deadline: Option<Deadline>) {
    // RFC 9110 §7.6.1: what speaks of one connection stays there.
    for name in [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE, header::HOST] {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    headers.remove("proxy-connection");
    // Some clients cannot send it, and some servers ask for it.
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    if let Some(deadline) = deadline {
        headers.insert(grpc::GRPC_TIMEOUT, grpc::remaining(deadline, clock::now()));
    }
    let received_over = if version == Version::HTTP_3 { "3.0" } else { "2.0" };
    if let Ok(via) = HeaderValue::try_from(format!("{received_over} {own}")) {
        headers.append(header::VIA, via);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Pseudonym {
        Pseudonym::new(
            &"a".parse().unwrap(),
            &"eu".parse().unwrap(),
            &"mesh.example".parse().unwrap(),
        )
    }

    fn via(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::VIA, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn a_call_may_have_crossed_one_other_node() {
        assert_eq!(guard(&via(&[]), &own()), Ok(()));
        assert_eq!(guard(&via(&["2.0 b.us.mesh.example"]), &own()), Ok(()));
        assert_eq!(guard(&via(&["1.1 some-proxy", "2.0 a.eu.other.example (x)"]), &own()), Ok(()));
    }

    #[test]
    fn a_call_that_comes_back_is_a_loop() {
        assert!(guard(&via(&["2.0 a.eu.mesh.example"]), &own()).is_err());
        assert!(guard(&via(&["2.0 x, 3.0 a.eu.mesh.example"]), &own()).is_err());
    }

    #[test]
    fn a_call_that_crossed_two_nodes_may_not_cross_a_third() {
        let both = via(&["2.0 b.us.mesh.example", "3.0 c.us.mesh.example"]);
        let found = guard(&both, &own()).unwrap_err();
        assert_eq!(found.via, "b.us.mesh.example, c.us.mesh.example");
    }

    #[test]
    fn the_next_hop_gets_the_remaining_time_and_no_connection_headers() {
        let mut headers = via(&["2.0 proxy"]);
        for (name, value) in
            [("connection", "close"), ("keep-alive", "1"), ("te", "gzip"), ("x", "y")]
        {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers.insert(grpc::GRPC_TIMEOUT, HeaderValue::from_static("10S"));
        let until = deadline(&headers).unwrap();
        forward(&mut headers, Version::HTTP_3, &own(), until);
        assert!(!headers.contains_key("connection") && !headers.contains_key("keep-alive"));
        assert_eq!(headers["te"], "trailers");
        assert_eq!(headers["x"], "y");
        let left = parse_grpc_timeout(headers[grpc::GRPC_TIMEOUT].as_bytes()).unwrap();
        assert!(left.as_secs_f64() > 9.0 && left.as_secs_f64() <= 10.0);
        let vias: Vec<_> = headers.get_all(header::VIA).iter().collect();
        assert_eq!(vias, ["2.0 proxy", "3.0 a.eu.mesh.example"]);
    }

    #[test]
    fn attempts_are_counted_in_one_digit() {
        let mut headers = HeaderMap::new();
        assert_eq!(previous_attempts(&headers), 0);
        set_previous_attempts(&mut headers, 2);
        assert_eq!(previous_attempts(&headers), 2);
        for odd in ["10", "x", "", "-1"] {
            headers.insert(PREVIOUS_ATTEMPTS, HeaderValue::from_static(odd));
            assert_eq!(previous_attempts(&headers), 0, "{odd}");
        }
        set_previous_attempts(&mut headers, 0);
        assert!(headers.is_empty());
    }

    #[test]
    fn a_loop_is_shown_in_a_bounded_way() {
        let long = format!("2.0 {}, 2.0 a.eu.mesh.example", "x".repeat(10_000));
        assert!(guard(&via(&[&long]), &own()).unwrap_err().via.len() <= SHOWN_CHARS_MAX);
    }

    #[test]
    fn what_only_nodes_may_say_is_stripped() {
        let mut headers = HeaderMap::new();
        headers.insert(SERVED_BY, HeaderValue::from_static("me"));
        headers.insert("x-isobar-flags", HeaderValue::from_static("1"));
        headers.insert("x-other", HeaderValue::from_static("1"));
        headers.insert("priority", HeaderValue::from_static("u=0"));
        headers.insert(PREVIOUS_ATTEMPTS, HeaderValue::from_static("3"));
        strip_request(&mut headers);
        assert_eq!(headers.len(), 1);
    }
}
